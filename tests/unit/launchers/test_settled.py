"""What `auto` comes to on a command line: frozen as plain values, with the reason, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from shardwright.launchers import resuming
from shardwright.launchers.composition import settled
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import child, kept
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import UserError
from shardwright.train.strategy import engine_of
from tests.unit.launchers.configs import config, resolved
from tests.unit.launchers.fakes import Outcome, Shardwright, make_shardwright
from tests.unit.launchers.plan.looking import MadeUp

shardwright = pytest.fixture(make_shardwright)

GIB = 2**30
H200 = Machine(
    compute_capabilities=(9.0,) * 8,
    gpu_names=("NVIDIA H200",) * 8,
    gpu_memory_bytes=143_771 * 2**20,
    ram_bytes=2000 * GIB,
    memory_bytes=2000 * GIB,
    cores=64,
)
CPU = Machine(cores=8, ram_bytes=64 * GIB, memory_bytes=64 * GIB)
RUN = ("model=gpt2_small", "data.sequence_length=1024")
ALL = (
    "strategy=auto",
    "trainer.micro_batch_size=auto",
    "trainer.checkpoint_activations_every_blocks=auto",
)


@pytest.fixture(autouse=True)
def looking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have models looked at in no child, and no cache but this test's."""
    monkeypatch.setattr(settled, "Looking", MadeUp)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def on(monkeypatch: pytest.MonkeyPatch, here: Machine) -> None:
    monkeypatch.setattr(machine, "detect", lambda environment: here)


def frozen(outcome: Outcome) -> RunConfig:
    """Return the config that a dry run shows."""
    text = outcome.out.partition("config.yaml\n")[2].partition("# engine settings")[0]
    return from_tree(yaml.safe_load(text))


def test_values_are_plain_and_said_with_the_reason(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, H200)
    outcome = shardwright("train", "--dry-run", *RUN, *ALL, "precision=bf16", "launcher=torchrun")
    assert (outcome.code, outcome.err) == (0, "")
    chosen = frozen(outcome)
    assert chosen.left_to_the_plan == ()
    # A GiB for each sample: 16 of them are enough tokens, and leave most of the device alone.
    assert chosen.trainer.micro_batch_size == 16
    assert chosen.trainer.checkpoint_activations_every_blocks is None
    said = outcome.out.partition("# /")[0]
    assert f"# auto: strategy={said_of(chosen)} trainer.micro_batch_size=16 " in said
    assert "on 1 x 8 cuda rank(s), NVIDIA H200, as conf/hardware/h200.yaml" in said
    assert "of micro-batches of 1, 2, 4, 8, 16, 32: trainer.global_batch_size=256 has to" in said
    assert "should it be too much: strategy=" in said


def said_of(config: RunConfig) -> str:
    from shardwright.launchers.composition.options import strategy_name

    return strategy_name(config.strategy.model_dump())


def test_what_is_given_stays(shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, H200)
    words = ("strategy=zero3", "trainer.checkpoint_activations_every_blocks=2")
    outcome = shardwright(
        *("train", "--dry-run", *RUN, *words, "trainer.micro_batch_size=auto"),
        *("precision=bf16", "launcher=torchrun"),
    )
    assert outcome.code == 0, outcome.err
    chosen = frozen(outcome)
    assert chosen.strategy.model_dump()["stage"] == 3
    assert chosen.trainer.checkpoint_activations_every_blocks == 2
    assert "# auto: trainer.micro_batch_size=16\n" in outcome.out


def test_a_small_device_has_blocks_recomputed_or_less_at_once(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, H200)
    words = ("train", "--dry-run", *RUN, *ALL, "precision=bf16", "launcher=torchrun")
    small = ("hardware=h200", "hardware.memory_mib=12000")
    outcome = shardwright(*words, *small)
    assert outcome.code == 0, outcome.err
    trainer = frozen(outcome).trainer
    assert trainer.samples_per_pass < 16
    assert "as hardware= says" in outcome.out


def test_on_cores_the_hosts_memory_is_what_there_is(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, CPU)
    words = ("train", "--dry-run", *RUN, *ALL, "launcher=torchrun", "launcher.nproc_per_node=2")
    outcome = shardwright(*words)
    assert outcome.code == 0, outcome.err
    assert "of a host's 64.0 GiB" in outcome.out
    assert "`shardwright plan hardware=here` measures it" in outcome.out
    on(monkeypatch, Machine(cores=8, ram_bytes=16 * GIB, memory_bytes=64 * GIB))
    outcome = shardwright(*words)
    assert outcome.code == 2
    text = " ".join(outcome.err.split())
    assert "strategy=auto: nothing fits: the least, strategy=" in text
    assert "of a host's 16.0 GiB on 1 x 2 cpu rank(s); strategy=" in text
    assert re.search(r"; strategy=\w+ trainer\S+ trainer\S+ fits [248] such node\(s\)", text)
    assert "choose a smaller model or a shorter data.sequence_length" in text


def test_nothing_fits_with_what_is_given(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, CPU)
    outcome = shardwright(
        *("train", "--dry-run", *RUN, "strategy=auto", "trainer.micro_batch_size=128"),
    )
    assert outcome.code == 2
    text = " ".join(outcome.err.split())
    assert (
        "less may do with trainer.micro_batch_size=auto "
        "trainer.checkpoint_activations_every_blocks=auto"
    ) in text


SLURM = ("launcher=slurm", "launcher.gpus_per_node=4", "precision=bf16")


@pytest.mark.parametrize(
    ("here", "words", "message"),
    [
        (Machine((9.0,)), [], "strategy=auto: nothing says what the GPUs here are; say it with"),
        (
            Machine((9.0,), gpu_names=("NVIDIA Foo 9",)),
            [],
            "nothing is known of NVIDIA Foo 9; measure it once with `shardwright plan "
            "hardware=here`, or say it with hardware=NAME, such as hardware=h200",
        ),
        (
            Machine((9.0, 9.0), gpu_names=("NVIDIA H200", "NVIDIA L40S")),
            ["launcher=torchrun"],
            "the GPUs are not alike (NVIDIA H200, NVIDIA L40S)",
        ),
        (CPU, SLURM, "set launcher.gpu_type as the cluster calls them, or say it with hardware="),
        (
            CPU,
            [*SLURM, "launcher.gpu_type=a100"],
            "launcher.gpu_type=a100 may be a100_40gb or a100_80gb; say it with hardware=NAME",
        ),
        (CPU, [*SLURM, "launcher.gpu_type=z9"], "launcher.gpu_type=z9 is nothing that is known"),
        (CPU, ["launcher=slurm"], "set launcher.memory_per_node, such as 64G, or say it with"),
        (
            H200,
            ["launcher=torchrun", "hardware=h200x4"],
            "hardware= has 4 devices, but launcher.nproc_per_node comes to 8",
        ),
        (H200, ["hardware=cpu"], "hardware= has hardware.device=cpu, but the ranks run on"),
        (H200, ["strategy=zero9"], "strategy=zero9: there is no such option"),
    ],
)
def test_too_little_is_known(
    here: Machine,
    words: list[str],
    message: str,
    shardwright: Shardwright,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on(monkeypatch, here)
    outcome = shardwright("train", "--dry-run", *RUN, "strategy=auto", *words)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["launcher.gpu_type=h200"], "launcher.gpu_type=h200, as h200.yaml"),
        (
            ["launcher.gpu_type=nvidia_h100_80gb_hbm3"],
            "launcher.gpu_type=nvidia_h100_80gb_hbm3, as h100.yaml",
        ),
        (["hardware=a100_80gb"], "as hardware= says"),
    ],
)
def test_a_jobs_gpus_are_known_by_their_type_or_as_the_user_says(
    words: list[str], known: str, shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, CPU)
    outcome = shardwright("train", "--dry-run", *RUN, *ALL, *SLURM, *words)
    assert f"on 1 x 4 cuda rank(s), {known}" in " ".join(outcome.out.split("#")), outcome.err
    assert frozen(outcome).left_to_the_plan == ()


def test_hosts_of_a_hostfile_have_to_be_described(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on(monkeypatch, CPU)
    (tmp_path / "hosts").write_text("one slots=2\n")
    words = ("launcher=deepspeed", f"launcher.hostfile={tmp_path}/hosts", "launcher.device=cuda")
    outcome = shardwright("train", "--dry-run", *RUN, *ALL, *words)
    assert "what the hosts of launcher.hostfile have is not known here" in " ".join(
        outcome.err.split()
    )


def test_hardware_is_for_a_plan_alone(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, H200)
    outcome = shardwright("train", "--dry-run", *RUN, "hardware=h200")
    assert outcome.code == 2
    assert "hardware= says on what a plan is made, and this run leaves nothing to one" in " ".join(
        outcome.err.split()
    )


def test_what_is_prepared_depends_on_no_choice(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, CPU)
    monkeypatch.setattr(kept, "matching", lambda *_: pytest.fail("nothing is planned"))
    outcome = shardwright("prepare", "--dry-run", "model=gpt2_tiny", *ALL)
    assert (outcome.code, outcome.err) == (0, "")


def test_a_sweep_plans_each_of_its_points(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, CPU)
    words = ("trainer.micro_batch_size=auto,4", "strategy=auto", "launcher=torchrun")
    outcome = shardwright("sweep", "--dry-run", *RUN, *words, "launcher.device=cpu")
    assert outcome.code == 0, outcome.err
    assert "trainer.micro_batch_size=auto" in outcome.out


def test_a_frozen_config_leaves_nothing_open() -> None:
    open_ = {"micro_batch_size": "auto", "checkpoint_activations_every_blocks": "auto"}
    run = config(trainer={"max_steps": 1, **open_}, strategy={"kind": "auto"})
    with pytest.raises(UserError, match=r"trainer\.micro_batch_size=auto is replaced by"):
        _ = run.trainer.samples_per_pass
    with pytest.raises(UserError, match="blocks=auto is replaced .*; write a number or null for"):
        _ = run.trainer.recomputed_every_blocks
    with pytest.raises(UserError, match=r"strategy\.kind=auto is replaced .*; write one of single"):
        engine_of(run, 1)


@pytest.mark.parametrize("override", ALL)
def test_a_resumed_run_keeps_what_it_has(override: str) -> None:
    options = {"strategy": {"kind": "auto"}} if override == "strategy=auto" else {}
    with pytest.raises(UserError, match=f"{override}: what is planned is chosen once"):
        resuming.changed(resolved("torchrun", nproc_per_node=1), [override], options)


def test_a_plan_compares_the_best_of_each_strategy_and_says_what_auto_is(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "Looking", MadeUp)
    words = ("plan", *RUN, *ALL, "precision=bf16", "hardware=h200x8")
    outcome = shardwright(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "micro  recompute  strategy" in outcome.out
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("auto: "))
    assert line.endswith(
        "trainer.micro_batch_size=16 trainer.checkpoint_activations_every_blocks=null"
    )
    found = json.loads(shardwright(*words, "--json").out)
    (chosen,) = found["auto"]
    assert f"auto: {' '.join(chosen)}" == line
    rows = {name: row for plan in found["plans"] for name, row in plan["strategies"].items()}
    assert chosen[0] == "strategy=ddp"
    assert rows["ddp"]["fits"]
    assert "only you can give" in rows["zero3_nvme"]["problem"]

    small = shardwright(*words, "hardware.memory_mib=700", "hardware.host_memory_gib=1")
    assert small.code == 1
    assert "auto: " not in small.out
    assert "nothing fits: the least of a device, strategy=" in small.err
