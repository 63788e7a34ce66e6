"""What a run that goes on may change, and what it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers import resume
from launchers.machine import Machine, resolve
from tests.unit.strategy.test_misconfiguration import TREE
from train import config as run_config
from train.config import RunConfig, from_tree, to_yaml
from train.errors import UserError


def run(**sections: Any) -> RunConfig:
    return from_tree({**TREE, **sections})


def test_values_change_and_the_rest_stays() -> None:
    after = resume.changed(run(), ["trainer.max_steps=20", "launcher.nproc_per_node=2"], {})
    assert after.trainer.max_steps == 20
    assert after.launcher.world_size == 2
    assert after.model == run().model


@pytest.mark.parametrize(
    ("ranks", "overrides", "size"),
    [
        (1, [], 16),
        (2, [], 16),
        (4, [], 8),
        (3, ["trainer.global_batch_size=48"], 16),
        (4, ["trainer.micro_batch_size=2"], 2),
        (1, ["trainer.micro_batch_size=auto"], 8),
    ],
)
def test_the_micro_batch_stays_or_shrinks_with_the_ranks(
    ranks: int, overrides: list[str], size: int
) -> None:
    batch = {**TREE["trainer"], "global_batch_size": 32, "micro_batch_size": 16}
    before = run(trainer=batch, launcher={"kind": "torchrun", "nproc_per_node": 2})
    overrides = [*overrides, f"launcher.nproc_per_node={ranks}"]
    after = resume.changed(before, overrides, {})
    limit = resume.largest_micro_batch(before, overrides)
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
    after = resume.changed(before, [override], {})
    assert after.strategy.kind == "zero"
    assert after.strategy.extra == extra


def test_the_length_of_samples_is_not_resolved_anew() -> None:
    with pytest.raises(UserError, match="data.sequence_length=auto was 64, and a run"):
        resume.changed(run(), ["data.sequence_length=auto"], {})


def test_a_group_is_replaced_by_its_option_with_values_on_top() -> None:
    overrides = ["strategy=zero3", "strategy.persistence_elements=0"]
    option = {"kind": "zero", "stage": 3}
    after = resume.changed(run(), overrides, {"strategy": option})
    assert after.strategy.model_dump().items() >= {**option, "persistence_elements": 0}.items()


def test_wandb_does_what_the_environment_says_today() -> None:
    before = run(tracking={"kind": "wandb", "mode": "online"})

    def mode(overrides: list[str], said: str | None) -> str:
        after = resume.with_wandb_mode(before, overrides, said)
        return str(after.model_dump()["tracking"]["mode"])

    assert mode([], None) == "online"
    assert mode([], "offline") == "offline"
    assert mode(["tracking.mode=online"], "offline") == "online"
    assert resume.with_wandb_mode(run(), [], "offline") == run()


def test_only_groups_are_chosen() -> None:
    overrides = ["strategy=fsdp", "trainer.max_steps=2", "precision=bf16"]
    assert resume.chosen(overrides, {"strategy", "precision"}) == [
        "strategy=fsdp",
        "precision=bf16",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=128", "model.hidden_size=128 was 64, .* weights of the checkpoint"),
        ("model.dropout=0.3", "model.dropout=0.3 was 0.1"),
        ("data.sequence_length=32", "data.sequence_length=32 was 64, .* position in the data"),
        ("tokenizer.min_frequency=3", "min_frequency=3 was 2, .* the model has learned its tokens"),
        ("seed=1", "seed=1 was 0, .* the order of the data hangs on it"),
        ("trainer.optimizer=muon", "trainer.optimizer=muon was adamw"),
        ("run_dir=/elsewhere", "the run goes on in its own directory"),
        ("trainer.max_stps=20", "unknown key trainer.max_stps: did you mean trainer.max_steps"),
        ("trainr.max_steps=20", "unknown key trainr.max_steps"),
        ("trainer.max_steps=many", "trainer.max_steps=many: must be a whole number"),
        ("trainer.max_steps=1,2", "takes key=value only"),
        ("+trainer.x=1", "takes key=value only"),
        ("trainer.max_steps", "does not parse as key=value"),
        ("trainer.micro_batch_size=48", "global_batch_size=64 is not a multiple"),
    ],
)
def test_what_may_not_change_is_refused_with_the_reason(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resume.changed(run(), [override], {})


def test_an_open_value_of_an_option_must_be_given() -> None:
    option = {**TREE["strategy"], "kind": "zero", "stage": 3, "nvme_path": "???"}
    with pytest.raises(UserError, match=r"strategy\.nvme_path is not set; give it with"):
        resume.changed(run(), ["strategy=zero3_nvme"], {"strategy": option})


def test_prompts_and_the_cache_may_move() -> None:
    after = resume.changed(run(), ["objective.prompts=[a]", "data.cache_dir=/cache"], {})
    assert after.objective.prompts == ("a",)
    assert after.data.cache_dir == "/cache"


def test_each_resume_is_written_down_and_the_first_config_stays(tmp_path: Path) -> None:
    first = run(run_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-1.error.json").write_text("{}")
    for steps in (20, 30):
        after = resume.changed(run_config.load(tmp_path), [f"trainer.max_steps={steps}"], {})
        assert resume.write(tmp_path, after, [f"trainer.max_steps={steps}"]) is None
        assert run_config.load(tmp_path) == after
    assert run_config.from_tree(yaml.safe_load((tmp_path / "config.yaml").read_text())) == first
    entries = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["config"] for entry in entries] == ["resumes/1.yaml", "resumes/2.yaml"]
    assert entries[1]["overrides"] == ["trainer.max_steps=30"]
    assert [p.name for p in logs.iterdir()] == ["before-resume-1"], "old failures are put aside"
