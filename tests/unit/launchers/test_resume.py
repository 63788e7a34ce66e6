"""What a run that goes on may change, and what it may not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers import job_end, resumes, resuming
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train import config as run_config
from shardwright.train.checkpoint import retention
from shardwright.train.config import (
    OPTIMIZERS,
    Progress,
    SlurmLauncher,
    TrainerConfig,
    schedule_of,
    to_yaml,
)
from shardwright.train.errors import UserError
from shardwright.train.run_directory import history
from tests.unit.launchers.ended_runs import contents, finished, make_ended_run, run
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.trees import TREE

shardwright = pytest.fixture(make_shardwright)
run_dir = pytest.fixture(make_ended_run)


def test_values_change_and_the_rest_stays() -> None:
    after = resuming.changed(run(), ["trainer.max_steps=20", "launcher.nproc_per_node=2"], {})
    assert after.trainer.max_steps == 20
    assert after.launcher.world_size == 2
    assert after.model == run().model


def test_lines_that_were_padded_may_be_laid_end_to_end() -> None:
    lines = {"line_by_line": True, "document_attention": True, "unpad": False}
    before = run(data={**TREE["data"], **lines})
    for value, unpadded in (("true", True), ("auto", True), ("false", False)):
        after = resuming.changed(before, [f"data.unpad={value}"], {})
        assert resolve(after, Machine(), "/run").data.is_unpadded is unpadded


@pytest.mark.parametrize(
    ("ranks", "overrides", "size"),
    [
        (1, [], 16),
        (2, [], 16),
        (4, [], 8),
        (3, ["trainer.global_batch_size=48"], 16),
        (4, ["trainer.micro_batch_size=2"], 2),
        (1, ["trainer.micro_batch_size=null"], 8),
    ],
)
def test_the_micro_batch_stays_or_shrinks_with_the_ranks(
    ranks: int, overrides: list[str], size: int
) -> None:
    batch = {**TREE["trainer"], "global_batch_size": 32, "micro_batch_size": 16}
    before = run(trainer=batch, launcher={"kind": "torchrun", "nproc_per_node": 2})
    overrides = [*overrides, f"launcher.nproc_per_node={ranks}"]
    after = resuming.changed(before, overrides, {})
    limit = resuming.largest_micro_batch(before, overrides)
    assert resolve(after, Machine(cores=2), "/run", limit).trainer.micro_batch_size == size


@pytest.mark.parametrize(
    ("override", "extra"),
    [
        ("strategy.extra={dump_state: true}", {"dump_state": True}),
        ("strategy.extra.dump_state=true", {"log_level": "info", "dump_state": True}),
        ("+strategy.extra.dump_state=true", {"log_level": "info", "dump_state": True}),
        (
            "strategy.extra.zero_optimization.legacy_stage1=true",
            {"log_level": "info", "zero_optimization": {"legacy_stage1": True}},
        ),
        ("strategy.extra={}", {}),
    ],
)
def test_keys_of_deepspeed_may_change(override: str, extra: dict[str, Any]) -> None:
    before = run(strategy={"kind": "zero", "stage": 2, "extra": {"log_level": "info"}})
    after = resuming.changed(before, [override], {})
    assert after.strategy.kind == "zero"
    assert after.strategy.extra == extra


def test_the_length_of_samples_is_not_resolved_anew() -> None:
    with pytest.raises(UserError, match="data.sequence_length=auto was 64, and a resumed run"):
        resuming.changed(run(), ["data.sequence_length=auto"], {})


def test_a_group_is_replaced_by_its_option_with_values_on_top() -> None:
    overrides = ["strategy=zero3", "strategy.persistence_elements=0"]
    option = {"kind": "zero", "stage": 3}
    after = resuming.changed(run(), overrides, {"strategy": option})
    assert after.strategy.model_dump().items() >= {**option, "persistence_elements": 0}.items()


def test_a_resume_may_keep_what_nothing_reads_and_not_set_it() -> None:
    trainer = {**TREE["trainer"], "decay_fraction": 0.3}
    before = run(trainer=trainer)
    after = resuming.changed(before, ["trainer.max_steps=20"], {})
    resuming.check_read(before, after, after)
    after = resuming.changed(before, ["trainer.decay_fraction=0.2"], {})
    with pytest.raises(
        UserError, match=r"^trainer\.decay_fraction=0\.2 is read with trainer\.lr_s"
    ):
        resuming.check_read(before, after, after)


def test_wandb_does_what_the_environment_says_today() -> None:
    before = run(tracking={"kind": "wandb", "mode": "online"})

    def mode(overrides: list[str], said: str | None) -> str:
        after = resuming.with_wandb_mode(before, overrides, said)
        return str(after.model_dump()["tracking"]["mode"])

    assert mode([], None) == "online"
    assert mode([], "offline") == "offline"
    assert mode(["tracking.mode=online"], "offline") == "online"
    assert resuming.with_wandb_mode(run(), [], "offline") == run()


def test_only_groups_are_chosen() -> None:
    overrides = ["strategy=fsdp", "trainer.max_steps=2", "precision=bf16"]
    assert resuming.chosen(overrides, {"strategy", "precision"}) == [
        "strategy=fsdp",
        "precision=bf16",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=128", "model.hidden_size=128 was 64, .* weights of the checkpoint"),
        ("model.dropout=0.3", "model.dropout=0.3 was 0.1"),
        ("data.sequence_length=32", "data.sequence_length=32 was 64, .* position in the data"),
        (
            "data.document_attention=true",
            "=True was False, .* learned from what a token sees by it",
        ),
        ("tokenizer.min_frequency=3", "min_frequency=3 was 2, .* the model has learned its tokens"),
        ("seed=1", "seed=1 was 0, .* the order of the data depends on it"),
        ("trainer.optimizer=muon", "trainer.optimizer=muon was adamw"),
        ("run_dir=/elsewhere", "the run is resumed in its own directory"),
        ("experiment=demo", "experiment=demo is a file of settings for a new run; give those of"),
        ("trainer.max_stps=20", "unknown key trainer.max_stps: did you mean trainer.max_steps"),
        ("trainr.max_steps=20", "unknown key trainr.max_steps"),
        ("trainer.max_steps=many", "trainer.max_steps=many: must be a whole number"),
        ("trainer.max_steps=1,2", "takes key=value only"),
        ("+trainer.x=1", "takes key=value only"),
        ("trainer.max_steps", "trainer.max_steps needs a value: trainer.max_steps=VALUE"),
        ("trainer.micro_batch_size=48", "global_batch_size=64 is not a multiple"),
    ],
)
def test_what_may_not_change_is_refused_with_the_reason(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resuming.changed(run(), [override], {})


SGD = {"optimizer": "sgd"}
SCHEDULE_FREE = {"optimizer": "schedule_free", "lr_scheduler": "constant"}


@pytest.mark.parametrize(
    ("trainer", "override", "message"),
    [
        (
            SCHEDULE_FREE,
            "trainer.adam_beta1=0.95",
            "trainer.adam_beta1=0.95 was 0.9, and a resumed run keeps it: by it the average is "
            "told from the two sets of weights that the checkpoint has; leave it out, or start a "
            "new run with `shardwright train`",
        ),
        (SCHEDULE_FREE, "trainer.adam_beta2=0.99", None),
        ({}, "trainer.adam_beta1=0.95", None),
        ({"optimizer": "muon"}, "trainer.adam_beta1=0.95", None),
        (SGD, "trainer.sgd_momentum=0.5", None),
        (
            SGD,
            "trainer.sgd_momentum=0",
            "trainer.sgd_momentum=0.0 was 0.9, and a resumed run keeps it: with 0 there is no sum "
            "of gradients in a checkpoint, or none that goes on; leave it out, or start a new run "
            "with `shardwright train`",
        ),
        ({**SGD, "sgd_momentum": 0.0}, "trainer.sgd_momentum=0.9", "sgd_momentum=0.9 was 0.0"),
    ],
)
def test_a_field_by_which_the_optimizers_state_is_understood_stays(
    trainer: dict[str, Any], override: str, message: str | None
) -> None:
    before = run(trainer={**TREE["trainer"], **trainer})
    if message is None:
        resuming.changed(before, [override], {})
        return
    with pytest.raises(UserError, match=re.escape(message)):
        resuming.changed(before, [override], {})


def test_every_field_that_a_resume_keeps_of_an_optimizer_is_one() -> None:
    named = [field.name for facts in OPTIMIZERS.values() for field in facts.of_the_state]
    assert named == ["adam_beta1", "sgd_momentum"]
    assert {*named} <= TrainerConfig.model_fields.keys()


def test_the_factor_on_a_loss_does_not_begin_anew() -> None:
    before = run(precision={"compute_dtype": "fp16"})
    with pytest.raises(UserError, match="initial_loss_scale=1024.0 was 65536.0, and a resumed run"):
        resuming.changed(before, ["precision.initial_loss_scale=1024"], {})
    fp16 = {"precision": {"compute_dtype": "fp16", "initial_loss_scale": 1024.0}}
    assert resuming.changed(run(), ["precision=fp16"], fp16).precision.initial_loss_scale == 1024


def test_an_open_value_of_an_option_must_be_given() -> None:
    option = {**TREE["strategy"], "kind": "zero", "stage": 3, "nvme_path": "???"}
    with pytest.raises(UserError, match=r"strategy\.nvme_path is not set; give it with"):
        resuming.changed(run(), ["strategy=zero3_nvme"], {"strategy": option})


def test_prompts_and_the_cache_may_move() -> None:
    after = resuming.changed(run(), ["objective.prompts=[a]", "data.cache_dir=/cache"], {})
    assert after.objective.prompts == ("a",)
    assert after.data.cache_dir == "/cache"


# --- what is written down -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_steps=30"], "to have 30 steps and has 60 already .checkpoint-60.; raise"),
        (["trainer.max_steps=null", "trainer.max_epochs=2"], "to have 2,500 samples .* has 3,840"),
        (["trainer.max_steps=null", "trainer.max_tokens=999"], "raise trainer.max_tokens"),
        (["trainer.global_batch_size=2000"], "too small for one batch: 9 training documents with"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a directory"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_the_ranks_would_refuse_is_refused_before_anything_is_written(
    overrides: list[str], message: str, dry_run: bool, run_dir: Path, shardwright: Shardwright
) -> None:
    before = contents(run_dir)
    outcome = shardwright("resume", str(run_dir), *overrides, *["--dry-run"] * dry_run)
    assert outcome.code == 2
    assert re.search(message, outcome.err), outcome.err
    assert contents(run_dir) == before


def test_lines_of_unknown_number_are_not_taken_back_either(run_dir: Path) -> None:
    lines = {"max_tokens": 999}
    config = finished(run_dir, **lines)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"line_by_line": True})}
    )
    with pytest.raises(UserError, match="to have 999 tokens and has 245,760 already"):
        resumes.check(run_dir, config)


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(
    run_dir: Path, shardwright: Shardwright
) -> None:
    (run_dir / "checkpoints/checkpoint-60/rng-0.pt").unlink()
    before = contents(run_dir)
    outcome = shardwright("resume", str(run_dir))
    assert outcome.code == 2
    assert "has checkpoints, but none to resume from (checkpoint-60 is not whole" in outcome.err
    assert contents(run_dir) == before


def test_what_a_kill_has_set_aside_is_resumed_from(run_dir: Path) -> None:
    directory = run_dir / "checkpoints"
    (directory / "checkpoint-60").rename(directory / ".checkpoint-60.old")
    (directory / "checkpoint-60").mkdir()
    assert resumes.check(run_dir, finished(run_dir)) is None, "it is not known before the sweep"
    retention.remove_leftovers(directory)
    assert resumes.check(run_dir, finished(run_dir)) == directory / "checkpoint-60"


def test_each_resume_is_written_down_and_the_first_config_stays(tmp_path: Path) -> None:
    first = run(run_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-1.error.json").write_text("{}")
    for number, steps in ((1, 20), (2, 30)):
        after = resuming.changed(run_config.load(tmp_path), [f"trainer.max_steps={steps}"], {})
        assert resumes.write(tmp_path, after, [f"trainer.max_steps={steps}"], None) == number
        assert run_config.load(tmp_path) == after
    assert run_config.from_tree(yaml.safe_load((tmp_path / "config.yaml").read_text())) == first
    entries = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["config"] for entry in entries] == ["resumes/1.yaml", "resumes/2.yaml"]
    assert entries[1]["overrides"] == ["trainer.max_steps=30"]
    assert [p.name for p in logs.iterdir()] == ["before-resume-1"], "old failures are put aside"


def test_a_resume_that_came_to_no_step_is_taken_back(run_dir: Path) -> None:
    for steps in (70, 80):
        config = finished(run_dir, max_steps=steps)
        resumes.write(run_dir, config, [f"trainer.max_steps={steps}"], None)
    (run_dir / "engine.json").write_text("{}")
    (run_dir / "logs/rank-3.error.json").write_text('{"of": "the start before"}')
    (run_dir / "stopped.json").write_text('{"step": 60}')
    before = contents(run_dir)

    assert not resumes.take_back_unstarted(run_dir), "the engine is younger: it has trained"
    assert contents(run_dir) == before

    for attempt in ("", "-2"):
        resumes.write(run_dir, finished(run_dir, max_steps=90), ["trainer.max_steps=90"], None)
        assert not (run_dir / "stopped.json").exists()
        history.append(run_dir, {"by": history.BY_TORCHRUN, "restart": 1})
        (run_dir / "resumes/3.provenance.json").write_text("{}")
        (run_dir / "logs/rank-0.error.json").write_text('{"of": "the refused one"}')
        assert resumes.take_back_unstarted(run_dir)
        after = contents(run_dir)
        refused = f"logs/refused-resume-3{attempt}/rank-0.error.json"
        assert after.pop(refused) == b'{"of": "the refused one"}'
        assert {k: v for k, v in after.items() if "refused" not in k} == before


def test_the_first_resume_of_a_run_that_never_trained_is_taken_back(run_dir: Path) -> None:
    before = contents(run_dir)
    assert not resumes.take_back_unstarted(run_dir), "it was never resumed"
    resumes.write(run_dir, finished(run_dir, max_steps=90), [], None)
    assert resumes.take_back_unstarted(run_dir)
    assert contents(run_dir) | {"history.jsonl": b""} == before | {"history.jsonl": b""}
    assert not (run_dir / "resumes").exists()


def test_a_job_that_ends_on_bad_input_takes_its_resume_back(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = SlurmLauncher(kind="slurm", device="cpu", nproc_per_node=1)
    config = finished(run_dir).model_copy(update={"launcher": slurm})
    (run_dir / "config.yaml").write_text(to_yaml(config))
    resumes.write(run_dir, config, [], None)
    note = {
        "time": 1,
        "rank": 0,
        "host": "n",
        "kind": "UserError",
        "message": "no",
        "traceback": "",
    }
    (run_dir / "logs/rank-0.error.json").write_text(json.dumps(note))
    assert job_end.main([str(run_dir), "1"]) == 2
    assert "nothing was trained: the run is what it was before" in capsys.readouterr().out
    assert resumes.newest_number(run_dir) is None


# --- the learning rate --------------------------------------------------------------------------


def at(step: int) -> Progress:
    samples = 64 * step
    return Progress(step, samples, 64, step, samples, 64)


@pytest.mark.parametrize("name", ["cosine", "linear", "warmup_stable_decay", "polynomial"])
def test_a_rate_that_rises_again_is_told_with_the_way_to_avoid_it(
    name: str, tmp_path: Path
) -> None:
    before = finished(tmp_path, max_steps=60, lr_scheduler=name, learning_rate=1e-3).trainer
    longer = before.model_copy(update={"max_steps": 120})
    told = resuming.rise(before, longer, None, None, at(60))
    assert told is not None
    had = schedule_of(before, None)(59) * 1e-3
    has = schedule_of(longer, None)(60) * 1e-3
    assert told.startswith(
        f"rises again, from {had:.3g} at step 60 to {has:.3g} at step 61: the {name} schedule "
        "now ends at step 120. To stay at the rate that it has reached, add "
        f"trainer.lr_scheduler=constant trainer.learning_rate={had:.6g}"
    )
    # Done so, it does.
    stays = longer.model_copy(update={"lr_scheduler": "constant", "learning_rate": had})
    assert schedule_of(stays, None, at(60))(60) * had == had
    assert resuming.rise(before, stays, None, None, at(60)) is None
    # Nothing else is told: not a plain resume, a shorter run, nor the first checkpoint.
    assert resuming.rise(before, before, None, None, at(60)) is None
    assert resuming.rise(longer, before, None, None, at(40)) is None
    assert resuming.rise(before, longer, None, None, Progress()) is None


@pytest.mark.parametrize(
    "decays",
    [
        {"lr_scheduler": "warmup_stable_decay", "decay_shape": "sqrt"},
        {"lr_scheduler": "polynomial", "polynomial_power": 3.0, "min_learning_rate_ratio": 0.1},
    ],
)
def test_the_way_to_stay_leaves_out_what_no_constant_rate_reads(
    decays: dict[str, Any], tmp_path: Path
) -> None:
    before = finished(tmp_path, max_steps=60, **decays).trainer
    longer = before.model_copy(update={"max_steps": 120})
    told = resuming.rise(before, longer, None, None, at(60))
    assert told is not None
    pairs = (pair.split("=") for pair in re.findall(r"trainer\.(\S+=\S+)", told))
    settings = {key: yaml.safe_load(value) for key, value in pairs}
    stays = TrainerConfig.model_validate({**longer.model_dump(), **settings})
    assert resuming.rise(before, stays, None, None, at(60)) is None
    assert schedule_of(stays, None, at(60))(60) * stays.learning_rate == pytest.approx(
        schedule_of(before, None)(59) * before.learning_rate
    )


def test_the_way_to_stay_names_the_rate_of_muons_matrices_too(tmp_path: Path) -> None:
    rates = {"optimizer": "muon", "learning_rate": 1e-3, "muon_learning_rate": 0.02}
    before = finished(tmp_path, max_steps=60, lr_scheduler="linear", **rates).trainer
    longer = before.model_copy(update={"max_steps": 120})
    told = resuming.rise(before, longer, None, None, at(60))
    assert told is not None
    share = schedule_of(before, None)(59)
    assert f"trainer.learning_rate={share * 1e-3:.6g} trainer.muon_learning_rate=" in told
    assert f"trainer.muon_learning_rate={share * 0.02:.6g}" in told


def test_what_warms_up_does_not_rise_again(tmp_path: Path) -> None:
    before = finished(tmp_path, max_steps=60, warmup_steps=40).trainer
    longer = before.model_copy(update={"max_steps": 120})
    assert resuming.rise(before, longer, None, None, at(20)) is None
    told = resuming.rise(before, longer, None, None, at(60))
    assert told is not None
    assert told.endswith("trainer.warmup_steps=0")


def test_a_longer_run_by_tokens_is_told_at_the_launcher(
    run_dir: Path, shardwright: Shardwright
) -> None:
    arguments = ["trainer.max_steps=null", f"trainer.max_tokens={120 * 64 * 64}"]
    outcome = shardwright("resume", str(run_dir), *arguments, "--dry-run")
    assert outcome.code == 0, outcome.err
    text = " ".join(outcome.out.split())
    assert "resumes from checkpoint-60 rate rises again, from " in text
    assert "the cosine schedule now ends at step 120" in text
    plain = shardwright("resume", str(run_dir), "--dry-run")
    assert "rises" not in plain.out


# --- options of a folder of one's own -----------------------------------------------------------


def test_a_resume_takes_options_of_a_folder_of_ones_own(
    run_dir: Path, tmp_path: Path, shardwright: Shardwright
) -> None:
    (tmp_path / "mine/precision").mkdir(parents=True)
    (tmp_path / "mine/precision/odd.yaml").write_text("defaults: [bf16]\nreduce_dtype: bf16\n")
    outcome = shardwright(
        *("resume", str(run_dir), "--config-dir", "mine", "precision=odd", "--dry-run")
    )
    assert outcome.code == 0, outcome.err
    assert "reduce_dtype: bf16" in outcome.out
    without = shardwright("resume", str(run_dir), "precision=odd", "--dry-run")
    assert without.code == 2
    assert "precision=odd: there is no such option" in without.err


def test_a_resume_takes_the_engine_of_a_file(
    run_dir: Path, shardwright: Shardwright, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    words = ("strategy=deepspeed_file", f"strategy.path={path}")
    outcome = shardwright("resume", str(run_dir), *words, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "overlap_communication: true" in outcome.out
    assert "zero_optimization.stage" in outcome.err
