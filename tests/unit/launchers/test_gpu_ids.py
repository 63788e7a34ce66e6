"""`launcher.gpu_ids`: which GPUs of this machine a run takes, and what each launcher is told."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers import messages
from shardwright.launchers.machine import facts, health
from shardwright.launchers.machine.facts import Machine, detect, given_to, lacking, not_there
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.launchers.sweep import choice
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.translating import accelerate_yaml, source
from shardwright.train.config import PrecisionConfig, RunConfig
from shardwright.train.errors import UserError
from tests.unit.launchers.configs import config, resolved

FOUR = Machine(compute_capabilities=(9.0, 8.0, 7.5, 7.0), gpu_names=("a", "b", "c", "d"), cores=8)
LAUNCHERS = ("torchrun", "deepspeed", "accelerate")


def chosen(kind: str, *gpu_ids: int, here: Machine = FOUR, **settings: Any) -> RunConfig:
    return resolved(kind, here, gpu_ids=list(gpu_ids), **settings)


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_rank_for_each_gets_them_in_nvidia_smis_order(kind: str) -> None:
    run = chosen(kind, 3, 1)
    assert (run.launcher.device, run.launcher.world_size) == ("cuda", 2)
    by_hand = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    for user in ({}, by_hand):
        environment = rank_environment(run, FOUR, user)
        assert environment["CUDA_VISIBLE_DEVICES"] == "3,1"
        assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "2 x cuda" in messages.header(run, {}, FOUR, {}, 80)
    assert f"2 x cuda ({kind}) on GPUs 3,1" in messages.header(run, {}, FOUR, {}, 80)


def test_each_launcher_hears_of_them_in_its_own_way() -> None:
    argv = rank_command(chosen("deepspeed", 3, 1), Path("/runs/a"), machine=FOUR)
    assert "--include=localhost:3,1" in argv
    (text,) = launcher_of(chosen("accelerate", 3, 1)).files({}, FOUR).values()
    assert yaml.safe_load(text)["gpu_ids"] == "3,1"
    (text,) = launcher_of(resolved("accelerate", FOUR)).files({}, FOUR).values()
    assert yaml.safe_load(text)["gpu_ids"] == "all"
    run = config(launcher={"kind": "local", "gpu_ids": [2]}, strategy={"kind": "single"})
    run = facts.resolve(run, FOUR, "/runs/a")
    assert rank_environment(run, FOUR, {})["CUDA_VISIBLE_DEVICES"] == "2"


def test_nothing_is_chosen_where_nobody_says() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment(resolved("torchrun", FOUR), FOUR, {})


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"kind": "torchrun", "gpu_ids": []}, "gpu_ids=[] leaves no GPU; name some, or set"),
        ({"kind": "torchrun", "gpu_ids": [1, 1]}, "gpu_ids=[1, 1] names a GPU twice"),
        ({"kind": "torchrun", "gpu_ids": [-1]}, "must be at least 0"),
        (
            {"kind": "torchrun", "gpu_ids": [0], "device": "cpu"},
            "gpu_ids=[0] chooses among NVIDIA GPUs, but device=cpu; set device=cuda, or leave",
        ),
        (
            {"kind": "torchrun", "gpu_ids": [0, 1], "nproc_per_node": 4},
            "gpu_ids=[0, 1] is one GPU for each rank, but there are 2 of them and 4 rank(s); name "
            "4, or choose launcher=torchrun with nproc_per_node=2",
        ),
        ({"kind": "local", "gpu_ids": [0, 1]}, "there are 2 of them and 1 rank(s); name 1"),
        (
            {"kind": "torchrun", "gpu_ids": [0], "nodes": 2, "head_address": "a"},
            "gpu_ids=[0] are GPUs of one machine, but nodes=2, of which each may have others free; "
            "leave it out, and set CUDA_VISIBLE_DEVICES on each node",
        ),
        (
            {"kind": "deepspeed", "gpu_ids": [0], "hostfile": "/hosts"},
            "gpu_ids=[0] are GPUs of this machine, but hostfile=/hosts names hosts with slots of",
        ),
        (
            {"kind": "slurm", "gpu_ids": [0]},
            "gpu_ids=[0] chooses among a machine's GPUs, but SLURM gives a job those that are "
            "free, and shows it no others; say how many with gpus_per_node and which with gpu_type "
            "or constraint, and leave gpu_ids out",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(launcher: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config(launcher=launcher)
    assert message in str(refused.value)


def test_where_there_is_no_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match=r"gpu_ids=\[0\] chooses among NVIDIA GPUs, but device=cpu"):
        chosen("torchrun", 0, here=Machine(cores=2))


# --- against the machine --------------------------------------------------------------------------


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvidia-smi that knows four GPUs."""
    program = tmp_path / "nvidia-smi"
    rows = "\n".join(f"GPU-{uuid * 4}, 9.0, H100" for uuid in "abcd")
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{rows}\nEOF\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize(
    ("variable", "numbers"),
    [(None, (0, 1, 2, 3)), ("3,1", (3, 1)), ("GPU-cc,0", (2, 0)), ("MIG-1", (None,)), ("", ())],
)
@pytest.mark.usefixtures("smi")
def test_gpus_keep_the_numbers_that_nvidia_smi_gives_them(
    variable: str | None, numbers: tuple[int | None, ...]
) -> None:
    user = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    here = detect(user)
    assert here.numbers == here.gpu_indices == numbers


def test_one_that_the_environment_hides_is_told() -> None:
    hidden = Machine(
        compute_capabilities=(9.0, 9.0), gpu_indices=(3, 1), cuda_visible_devices="3,1"
    )
    assert not_there([1, 3], hidden) == []
    assert not_there([2], hidden) == [
        "launcher.gpu_ids=[2]: this machine shows no GPU 2, but 3, 1 "
        "(CUDA_VISIBLE_DEVICES=3,1 hides any other); choose among these, or leave it out"
    ]
    assert not_there([7], FOUR)[0].startswith("launcher.gpu_ids=[7]: this machine shows no GPU 7, ")
    assert lacking("cuda", 1, PrecisionConfig(), hidden, [2]) == not_there([2], hidden)


def test_only_the_chosen_ones_have_to_suit_the_precision() -> None:
    bf16 = PrecisionConfig(compute_dtype="bf16")
    assert lacking("cuda", 2, bf16, FOUR, [1, 0]) == []
    (problem,) = lacking("cuda", 2, bf16, FOUR, [0, 2])
    assert "needs compute capability 8.0, but a GPU here has 7.5" in problem


def test_a_plan_looks_at_the_chosen_ones() -> None:
    here = given_to(FOUR, chosen("torchrun", 2, 0).launcher)
    assert (here.gpu_names, here.compute_capabilities) == (("c", "a"), (7.5, 9.0))
    assert (here.numbers, here.cuda_visible_devices) == ((2, 0), "2,0")
    assert given_to(FOUR, resolved("torchrun", FOUR).launcher) is FOUR


def test_doctor_judges_the_chosen_ones() -> None:
    seen = health.Gpus(names=("a", "b", "a"), memory_bytes=(1, 2, 3), links=("NV18", "SYS"))
    alike = health.chosen(seen, [0, 2])
    assert alike is not None
    assert (alike.names, alike.memory_bytes, alike.links) == (("a", "a"), (1, 3), seen.links)
    (one,) = [health.chosen(seen, [1])]
    assert one is not None
    assert one.links == ()
    assert health.chosen(seen, None) is seen
    assert health.chosen(None, [0]) is None


# --- sweeps, and other programs -------------------------------------------------------------------


def test_a_sweep_divides_the_chosen_ones_alone() -> None:
    points = [chosen("torchrun", 3, 1)] * 2
    (slot,) = choice.slots_of(SweepConfig(), points, FOUR)
    assert slot.environment() == {"CUDA_VISIBLE_DEVICES": "3,1"}
    seen = choice.machine_of(slot, FOUR)
    assert (seen.numbers, seen.compute_capabilities) == ((3, 1), (7.0, 8.0))
    assert not_there([3, 1], seen) == []
    assert len(choice.slots_of(SweepConfig(), [resolved("torchrun", FOUR)], FOUR)) == 1


def test_a_sweep_whose_points_choose_others_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        choice.slots_of(SweepConfig(), [chosen("torchrun", 1), chosen("torchrun", 2)], FOUR)
    assert str(refused.value).startswith(
        "launcher.gpu_ids is [1] of one point and [2] of another, but a sweep gives its points"
    )
    with pytest.raises(UserError, match=r"backend=ray with launcher.gpu_ids=\[1\]: Ray says which"):
        choice.check_launchers([chosen("torchrun", 1)], "ray")


@pytest.mark.parametrize(
    ("value", "machines", "becomes"),
    [
        ("all", 1, ("ignored", "all is the default")),
        ("0,2", 1, ("set", "launcher.gpu_ids=[0,2]")),
        (3, 1, ("set", "launcher.gpu_ids=[3]")),
        ("0,2", 2, ("refused", "of several nodes each has its own CUDA_VISIBLE_DEVICES; set it")),
        ("first", 1, ("refused", "give the numbers of GPUs, such as 0,1")),
    ],
)
def test_accelerates_gpu_ids_are_these(value: Any, machines: int, becomes: tuple[str, str]) -> None:
    tree = {"distributed_type": "MULTI_GPU", "num_machines": machines, "gpu_ids": value}
    found = accelerate_yaml.translate(tree, lambda path: {})
    (entry,) = [entry for entry in found.entries if entry.key == "gpu_ids"]
    assert (entry.outcome, entry.text) == becomes


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--include localhost:1,3", "launcher.gpu_ids", [1, 3]),
        ("--hostfile hosts --include localhost:1,3", "launcher.include", "localhost:1,3"),
        ("--include node1:1,3", "launcher.include", "node1:1,3"),
    ],
)
def test_a_filter_of_deepspeeds_may_choose_gpus_of_this_machine(
    flags: str, key: str, value: Any
) -> None:
    line = f"deepspeed {flags} run_clm.py --model_type gpt2 --train_file a.txt"
    found = source.of_line(shlex.split(line))
    assert found.overrides[key] == value
    if key == "launcher.gpu_ids":
        assert found.overrides["trainer.global_batch_size"] == 8 * len(value)
