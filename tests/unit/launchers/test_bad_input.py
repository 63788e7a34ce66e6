"""Each bad input ends before any rank starts: exit code 2, one clear message, nothing created."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from shardwright.launchers import preflight
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import from_tree, to_yaml
from tests.checkpoints import write_checkpoint
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.trees import TREE

shardwright = pytest.fixture(make_shardwright)

FP8 = ("precision=fp8", "model=llama_tiny", "data.sequence_length=64")
TEXT = ("data=text", "model=gpt2_tiny", "data.sequence_length=32")


def refused(shardwright: Shardwright, *arguments: str) -> str:
    """Return the message of a run that must not start."""
    before = sorted(os.listdir())
    outcome = shardwright("train", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert sorted(os.listdir()) == before
    return outcome.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=3", "unknown key trainer.max_step: did you mean trainer.max_steps?"),
        ("max_steps=3", "unknown key max_steps: did you mean trainer.max_steps?"),
        ("+model.hiden_size=8", "unknown key model.hiden_size: did you mean model.hidden_size?"),
        (
            "+data.stages=[{tokens: 5, weightz: [1]}]",
            "unknown key data.stages[0].weightz: did you mean weights? an entry of data.stages has "
            "tokens, weights and sequence_length",
        ),
        (
            "+data.stages=[{tokens: 5}, {frobnicate: 7}]",
            "unknown key data.stages[1].frobnicate: an entry of data.stages has tokens, weights "
            "and sequence_length",
        ),
        ("strat=zero2", "unknown key strat: did you mean strategy?"),
        ("trainer.max_steps.x=3", "unknown key trainer.max_steps.x: did you mean"),
        ("foo/bar=1", "unknown key foo.bar"),
        ("trainer.lr=1e-3", "unknown key trainer.lr: use trainer.learning_rate"),
        ("+fp16=true", "unknown key fp16: use precision=fp16"),
        ("gradient_accumulation_steps=2", "the accumulation steps follow from it"),
        ("+data.paths=[a]", "data.paths is not a setting of data.kind=stdlib"),
        ("data.paths=[a]", "it belongs to data=text or tokens; choose one of them"),
        ("adapter.frobnicate=1", "unknown key adapter.frobnicate: `shardwright train --cfg job` l"),
        ("adapter.r=8", "unknown key adapter.r: use adapter.rank, under adapter=lora or dora"),
        ("tracking.entity=x", "it belongs to tracking=wandb; add tracking=wandb"),
        ("strategy.stage=2", "it belongs to strategy=zero0, zero1, zero2, zero3,"),
        ("per_device_train_batch_size=4", "use trainer.micro_batch_size"),
        ("num_train_epochs=3", "use trainer.max_epochs"),
        ("learning_rate=1", "did you mean trainer.learning_rate?"),
        ("rampup_batch_size=8", "use trainer.batch_warmup_from and trainer.batch_warmup_samples"),
        ("batch_size=8", "use trainer.global_batch_size (all ranks) or trainer.micro_batch_size"),
        ("resume_from_checkpoint=x", "use `shardwright resume RUN_DIR`, with --step N"),
    ],
)
def test_unknown_key(shardwright: Shardwright, override: str, message: str) -> None:
    assert message in refused(shardwright, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=many", "trainer.max_steps=many: must be a whole number"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: must be a whole number"),
        ("trainer.learning_rate=fast", "trainer.learning_rate=fast: must be a number"),
        ("trainer.compile=1", "trainer.compile=1: must be true or false or auto"),
        ("name=123", "name=123: must be text"),
        ("launcher.nproc_per_node=two", "launcher.nproc_per_node=two: must be a whole number or"),
        ("data.eval_paths=[a]", "data.eval_paths: must be a mapping, such as {key: value}"),
        ("trainer.callbacks={a: 1}", "trainer.callbacks: must be a list, such as [a, b]"),
        ("trainer.profile=5", "trainer.profile is a section, not a value; set one of its keys"),
        ("model=[1]", "model=[1]: the option of a group is a name"),
        ("trainer=3", "trainer=3: the option of a group is a name"),
    ],
)
def test_wrong_type(shardwright: Shardwright, override: str, message: str) -> None:
    assert message in refused(shardwright, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trainer.max_steps=0: must be at least 1"),
        ("model.dropout=1.5", "model.dropout=1.5: must be at most 1"),
        ("trainer.adam_beta1=1.0", "trainer.adam_beta1=1.0: must be less than 1"),
        ("trainer.learning_rate=0.0", "trainer.learning_rate=0.0: must be more than 0"),
        (
            "trainer.lr_scheduler=cosin",
            "must be linear, cosine, cosine_with_restarts, polynomial, constant, warmup_stable",
        ),
        ("trainer.optimizer=AdamW", "(did you mean adamw?)"),
        ("trainer.optimizer=adamw_torch_fused", "(did you mean adamw?)"),
        ("trainer.lr_scheduler=constant_with_warmup", "(did you mean constant?)"),
        ("launcher.nproc_per_node=0", "launcher.nproc_per_node=0: must be at least 1 or auto"),
        ("name=a/b", "name=a/b: must be text of the form"),
        ("data.sequence_length=4096", "is longer than the 1024 positions of the model"),
        ("trainer.max_epochs=1", "give exactly one of max_steps, max_epochs and max_tokens"),
    ],
)
def test_value_out_of_range(shardwright: Shardwright, override: str, message: str) -> None:
    assert message in refused(shardwright, override)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategy=zero9"], "did you mean zero0? there are zero0, zero1, zero2, zero3,"),
        (["strategy=FSDP"], "strategy=FSDP: there is no such option; did you mean fsdp, fsdp_grad"),
        (["strategy=hybrid_shard"], "did you mean fsdp_hybrid or fsdp_hybrid_grad_op?"),
        (["precision=float16"], "did you mean fp16? there are fp16,"),
        (["precision=bfloat16"], "did you mean bf16 or bf16_pure?"),
        (
            ["experiment=demo", "launcher=local"],
            "or add ~launcher.nproc_per_node, which drops what an experiment has set",
        ),
        (
            ["experiment=demo", "launcher=local", "launcher.nproc_per_node=2"],
            "choose one of them, or leave launcher.nproc_per_node out",
        ),
        (["experiment=dmeo"], "did you mean demo? there are demo,"),
        (["data=text"], "data.paths is not set; give it with data.paths=VALUE"),
        (["~model"], "model is not set; choose an option with model=NAME"),
        (["strategy.kind=zeor"], "strategy.kind=zeor is not known (there are single, ddp, zero"),
        (
            ["strategy=zero2", "strategy.kind=fsdp"],
            "strategy.stage is not a setting of strategy.kind",
        ),
        (["trainer.max_steps=[1,2"], "cannot read the override 'trainer.max_steps=[1,2'"),
        (["seed=1,2"], "add -m for a run with each value"),
        (["name=${nmae}"], "name: Interpolation key 'nmae' not found"),
        (["--lr", "3"], "unknown flag --lr; settings are given as key=value, without dashes"),
        (["--data=text"], "unknown flag --data=text: leave the dashes out and write data=text"),
        (["launcher=local", "launcher.nproc_per_node=2"], "it belongs to launcher=torchrun, deeps"),
        (["zero2"], "zero2 is an option of strategy; write strategy=zero2"),
        (["trainer.max_steps"], "trainer.max_steps needs a value: trainer.max_steps=VALUE"),
        (["run_dir=a#b"], "# in a value needs quotes: write \"run_dir='a#b'\""),
        (["run_dir=~/a&b!"], "& ! in a value needs quotes"),
        (["name=zürich"], "ü in a value needs quotes: write \"name='zürich'\""),
        (
            ["model=me/mine"],
            "a model of the hub or in a directory is model=pretrained model.name=me",
        ),
        (["+model=gpt2_tiny"], "this group has an option already; write model=NAME"),
        (["--config-dir", "nowhere"], "nowhere' not found"),
        (["-m", "seed=1,2", "run_dir=one"], "run_dir=one is one directory, and -m starts several"),
        (["sweep_dir=s"], "sweep_dir=s is for several runs; add -m"),
    ],
)
def test_composition(shardwright: Shardwright, arguments: list[str], message: str) -> None:
    assert message in refused(shardwright, *arguments)


def test_config_file_that_is_no_yaml(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "bad.yaml").write_text("seed: [1\nname: x\n")
    message = refused(shardwright, "--config-dir", "mine", "experiment=bad")
    assert re.search(r"cannot read .*bad\.yaml, line \d", message)


def test_the_version_is_the_projects_own(shardwright: Shardwright) -> None:
    outcome = shardwright("train", "--version")
    assert (outcome.code, outcome.out) == (0, shardwright("--version").out)


def test_a_run_in_place_of_a_setting(shardwright: Shardwright) -> None:
    Path("mine").mkdir()
    Path("mine", "config.yaml").touch()
    message = refused(shardwright, "mine")
    assert "mine is a run: `shardwright resume mine` continues it, `shardwright data" in message


def test_mlm_with_a_causal_model(shardwright: Shardwright) -> None:
    message = refused(shardwright, "model=gpt2_tiny", "objective=mlm", "data.sequence_length=64")
    assert message.startswith("objective=mlm does not fit model.kind=gpt2")


def test_batch_that_does_not_divide(shardwright: Shardwright) -> None:
    twelve = ("trainer.global_batch_size=12", "launcher.device=cpu", "--dry-run")
    message = refused(shardwright, *twelve, "trainer.micro_batch_size=8")
    assert "trainer.global_batch_size=12 is not a multiple of trainer.micro_batch_size=8" in message
    message = refused(shardwright, *twelve, "launcher.nproc_per_node=5")
    assert message == (
        "trainer.global_batch_size=12 cannot be divided evenly among 5 rank(s); "
        "set trainer.global_batch_size=10 or 15"
    )


def on(monkeypatch: pytest.MonkeyPatch, here: Machine) -> None:
    monkeypatch.setattr(machine, "detect", lambda environment: here)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_precision_that_the_cpu_lacks(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    on(monkeypatch, Machine())
    assert "needs a GPU, but the ranks run on cpu" in refused(shardwright, f"precision={precision}")


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_precision_that_an_old_gpu_lacks(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    on(monkeypatch, Machine(compute_capabilities=(7.5,)))
    message = refused(shardwright, f"precision={precision}")
    assert "needs compute capability 8.0, but a GPU here has 7.5" in message


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (Machine(), "fp8_recipe=tensorwise needs a GPU, but the ranks run on cpu"),
        (
            Machine(compute_capabilities=(8.9, 8.6)),
            "fp8_recipe=tensorwise needs compute capability 8.9, but a GPU here has 8.6",
        ),
    ],
)
def test_fp8_where_the_machine_lacks_it(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch, here: Machine, message: str
) -> None:
    on(monkeypatch, here)
    assert message in refused(shardwright, *FP8)


def test_fp8_without_torchao(shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Machine(compute_capabilities=(9.0,)))
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda package: None)
    message = refused(shardwright, *FP8)
    assert "precision.fp8_recipe=tensorwise needs the package torchao" in message


def test_more_ranks_than_gpus(shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Machine(compute_capabilities=(9.0, 9.0)))
    message = refused(shardwright, "launcher.nproc_per_node=4")
    assert message.startswith("launcher.nproc_per_node=4 is more than the 2 GPU(s)")


def test_gpu_asked_for_where_there_is_none(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, Machine())
    assert "shows no NVIDIA GPU" in refused(shardwright, "launcher.device=cuda")
    on(monkeypatch, Machine(compute_capabilities=(9.0,), torch_has_cuda=False))
    assert "torch is a CPU build" in refused(shardwright, "launcher.device=cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("me@node1 slots=2\n", "hosts: line 1, 'me@node1 slots=2', names a user"),
        ("node1 slots=0\n", "hosts: line 1, 'node1 slots=0', gives no slot"),
        ("\ufeffnode1 slots=2\n", "hosts: line 1 begins with a byte-order mark"),
        ("node1 slots=2\nnode2 slots=1\n", "hosts gives its hosts different numbers of slots"),
    ],
)
def test_a_hostfile_is_blamed_itself(
    shardwright: Shardwright, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "hosts").write_text(text, encoding="utf-8")
    said = refused(
        *(shardwright, "launcher=deepspeed", "launcher.hostfile=hosts", "strategy=ddp"),
        "launcher.device=cpu",
    )
    assert said.startswith(f"launcher.hostfile={tmp_path}/{message}")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_name_that_no_file_system_takes(shardwright: Shardwright, dry: tuple[str, ...]) -> None:
    outcome = shardwright("train", *dry, f"run_dir={'a' * 300}/run", "launcher.device=cpu")
    assert outcome.code == 2
    assert "a name of 300 bytes is longer than the 255" in outcome.err


@pytest.mark.parametrize("section", ["model", "tokenizer"])
def test_a_path_that_leads_nowhere(shardwright: Shardwright, tmp_path: Path, section: str) -> None:
    (tmp_path / "file").touch()
    others = ["model=gpt2_tiny"] if section == "tokenizer" else ["tokenizer=byte_bpe"]
    given = [*others, "launcher.device=cpu", f"{section}=pretrained"]
    if section == "model":
        given += ["tokenizer.vocab_size=300"]
    for name, why in (("nothere", "does not exist"), ("file", "is a file")):
        outcome = shardwright("train", "--dry-run", *given, f"{section}.name=./{name}")
        assert outcome.code == 2
        assert f"{section}.name={tmp_path}/{name} {why}" in outcome.err


def test_a_run_starts_from_another_with_its_tokenizer_or_is_told_why_not(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    run = tmp_path / "other"
    (run / "tokenizer").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(from_tree(TREE)))
    given = ("model=pretrained", f"model.name={run}", "objective=clm", "launcher.device=cpu")
    message = refused(shardwright, *given)
    assert "other is a run that has no final/ and no whole checkpoint: there are no" in message
    assert f"`shardwright resume {run}` continues it up to one" in message
    saved = write_checkpoint(run / "checkpoints", 3)
    (saved / "config.json").write_text("{}")
    assert "config.json is not in its manifest" in refused(shardwright, *given)
    (saved / "config.json").unlink()
    outcome = shardwright("train", "--dry-run", *given, "data.sequence_length=8")
    assert outcome.code == 0, outcome.err
    shown = yaml.safe_load(outcome.out.split("# engine settings")[0])
    assert shown["model"]["name"] == str(saved)
    assert shown["tokenizer"]["name"] == str(run / "tokenizer")


def test_existing_run_directory(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    message = refused(shardwright, "run_dir=run", "launcher.device=cpu")
    assert message == f"run_dir={tmp_path}/run exists already; choose another, or remove it first"


def test_run_directory_below_a_file(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused(shardwright, "run_dir=file/run", "launcher.device=cpu")
    assert message.endswith(f"cannot be created: {tmp_path}/file is not a directory")


def test_run_directory_on_a_read_only_file_system(shardwright: Shardwright) -> None:
    if os.access("/proc/self", os.W_OK) and os.access("/sys", os.W_OK):
        pytest.skip("no read-only file system at hand")
    where = "/sys" if not os.access("/sys", os.W_OK) else "/proc/self"
    message = refused(shardwright, f"run_dir={where}/run", "launcher.device=cpu")
    assert f"no permission to write to {where}" in message


def test_run_directory_in_proc_cannot_be_made(shardwright: Shardwright) -> None:
    # access(2) says yes to root here, mkdir(2) says no.
    for dry in ([], ["--dry-run"]):
        outcome = shardwright("train", *dry, "run_dir=/proc/run", "launcher.device=cpu")
        assert outcome.code == 2
        assert "run_dir=/proc/run cannot be created" in outcome.err


@pytest.mark.skipif(os.getuid() == 0, reason="permission bits do not bind root")
def test_run_directory_without_permission(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    message = refused(shardwright, "run_dir=locked/run", "launcher.device=cpu")
    assert f"no permission to write to {tmp_path}/locked" in message


def test_tracker_that_is_not_installed(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    message = refused(shardwright, "tracking=tensorboard", "launcher.device=cpu")
    assert message.startswith("tracking=tensorboard needs the package tensorboard, which is not")


def test_what_mlflow_needs_depends_on_where_it_is(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    found = util.find_spec
    absent = ("mlflow", "sqlalchemy", "alembic")
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in absent else found(name))
    message = refused(shardwright, "tracking=mlflow", "launcher.device=cpu")
    assert message.endswith("not installed; `pip install mlflow-skinny sqlalchemy alembic`")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    message = refused(shardwright, "tracking=mlflow", "launcher.device=cpu")
    assert message == (
        "tracking=mlflow needs the package mlflow-skinny, which is not installed; "
        "`pip install mlflow-skinny`"
    )


def test_mlflow_writes_to_no_directory(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    monkeypatch.setattr(util, "find_spec", lambda name: name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    message = refused(shardwright, "tracking=mlflow", "launcher.device=cpu")
    assert message.startswith("MLFLOW_TRACKING_URI=./mlruns is a directory, to which MLflow writes")


def test_a_mode_of_tracking_that_the_environment_contradicts(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    message = refused(
        *(shardwright, "tracking=wandb", "tracking.mode=online", "launcher.device=cpu")
    )
    assert message.startswith("tracking.mode=online, but WANDB_MODE=offline requests offline")


def test_online_tracking_without_a_key(shardwright: Shardwright) -> None:
    message = refused(
        *(shardwright, "tracking=wandb", "tracking.mode=online", "launcher.device=cpu")
    )
    assert message.startswith("tracking.mode=online, but there is no API key")


def test_missing_corpus_file(shardwright: Shardwright, tmp_path: Path) -> None:
    message = refused(shardwright, *TEXT, "data.paths=[nowhere.txt]", "launcher.device=cpu")
    assert "nowhere.txt" in message


def test_empty_corpus_file(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    message = refused(shardwright, *TEXT, "data.paths=[empty.txt]", "launcher.device=cpu")
    assert "empty.txt" in message
    assert "empty" in message.replace("empty.txt", "")


def test_undecodable_corpus_file(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Königsberg ".encode("latin-1") * 100)
    message = refused(shardwright, *TEXT, "data.paths=[latin.txt]", "launcher.device=cpu")
    assert "latin.txt" in message
    assert "UTF-8" in message


def test_corpus_too_small_for_one_batch(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "small.txt").write_text("a few words " * 20)
    outcome = shardwright(
        *("train", *TEXT, "data.paths=[small.txt]", "data.eval_fraction=0.0", "run_dir=run"),
        *("launcher.device=cpu", f"data.cache_dir={tmp_path}/cache"),
    )
    assert outcome.code == 2
    assert "error: " in outcome.err
    assert "Traceback" not in outcome.err
    assert "trainer.global_batch_size" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [("resume", "run"), ("doctor",)])
@pytest.mark.parametrize("flag", ["--trainer.max_steps=30", "--strategy=zero2"])
def test_a_setting_with_dashes_is_told_by_every_command_that_takes_settings(
    shardwright: Shardwright, command: tuple[str, ...], flag: str
) -> None:
    outcome = shardwright(*command, flag)
    bare = flag.removeprefix("--")
    assert outcome.code == 2
    assert outcome.err == f"error: unknown flag {flag}: leave the dashes out and write {bare}\n"
