"""`shardwright checkpoints`: the table a person reads, and its exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.commands.checkpoints import strategy_name
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import to_yaml
from tests.checkpoints import FILE_DAMAGES, FILES, write_checkpoint
from tests.unit.launchers.composed import composed
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

ZERO2 = {"kind": "zero", "stage": 2, "offload_optimizer": "none", "offload_parameters": "none"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run that keeps every second checkpoint permanently, and the best."""
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    _, config = composed(
        *("strategy=zero2", "trainer.save_every_steps=5", "trainer.eval_every_steps=5"),
        *("checkpoint.keep_every_steps=10", "checkpoint.keep_best=1"),
    )
    config = resolve(config, Machine(compute_capabilities=(9.0,) * 2, cores=8), str(run_dir))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    for step, loss in ((10, 3.5), (15, 2.25), (20, 2.5), (25, 2.75)):
        path = write_checkpoint(
            run_dir / "checkpoints",
            step,
            strategy=ZERO2,
            world_size=2,
            metrics={"eval_loss": loss},
        )
        os.utime(path / layout.MANIFEST, (time.time() - 180,) * 2)
    return run_dir


def table(text: str) -> list[list[str]]:
    """Return the cells, which at least two spaces divide."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line[:2] == "  "]


def test_weights_that_are_not_finite_are_named(shardwright: Shardwright, run_dir: Path) -> None:
    write_checkpoint(run_dir / "checkpoints", 30, strategy=ZERO2, world_size=2, finite=False)
    for flags, code in (((), 0), (("--verify",), 1)):
        outcome = shardwright("checkpoints", str(run_dir), *flags)
        assert outcome.code == code
        last = table(outcome.out)[-2]
        assert (last[0], last[-2:]) == ("30", ["-", "not finite"])
        assert "checkpoint-30 cannot be used:\n  its weights are not finite" in outcome.out
    one = shardwright("checkpoints", str(run_dir / "checkpoints" / "checkpoint-30"))
    assert "not finite" in one.out


def test_the_table_of_a_run(shardwright: Shardwright, run_dir: Path) -> None:
    outcome = shardwright("checkpoints", str(run_dir))
    assert (outcome.code, outcome.err) == (0, "")
    first, head, *rows = outcome.out.splitlines()
    assert first == f"{run_dir}/checkpoints: 4 checkpoints, 512 B"
    assert table(outcome.out) == [
        ["step", "strategy", "ranks", "size", "age", "eval_loss", "kept", "state"],
        ["10", "zero2", "2", "128 B", "3 min", "3.5000", "permanent", "whole"],
        ["15", "zero2", "2", "128 B", "3 min", "2.2500", "best", "whole"],
        ["20", "zero2", "2", "128 B", "3 min", "2.5000", "last, permanent", "whole"],
        ["25", "zero2", "2", "128 B", "3 min", "2.7500", "last", "whole"],
    ]
    assert len({line.index("whole") for line in rows} | {head.index("state")}) == 1


def test_verify_reads_every_hash(shardwright: Shardwright, run_dir: Path) -> None:
    outcome = shardwright("checkpoints", str(run_dir), "--verify")
    assert (outcome.code, outcome.err) == (0, "")
    assert [row[-1] for row in table(outcome.out)[1:]] == ["whole, hashes checked"] * 4


def test_a_swapped_file_is_found_by_verify_only(shardwright: Shardwright, run_dir: Path) -> None:
    bad, other = (run_dir / "checkpoints" / f"checkpoint-{step}" for step in (25, 20))
    for file in FILES[:2]:
        FILE_DAMAGES["swap"](bad / file, other / file)
    assert shardwright("checkpoints", str(run_dir)).code == 0
    outcome = shardwright("checkpoints", "--verify", str(run_dir))
    assert outcome.code == 1
    rows = table(outcome.out.partition("\n\n")[0])
    assert rows[4][-2:] == ["-", "not whole"]
    hashes = r"has the hash \w{32} instead of \w{32}"
    assert re.search(
        rf"\n\ncheckpoint-25 is not whole:\n  {FILES[0]} {hashes}\n  {FILES[1]} {hashes}\n$",
        outcome.out,
    )
    # What is not whole keeps nothing else from being among the last.
    assert [row[-2] for row in rows[1:4]] == ["permanent", "last, best", "last, permanent"]


def test_sizes_are_checked_without_verify(shardwright: Shardwright, run_dir: Path) -> None:
    (run_dir / "checkpoints/checkpoint-20" / FILES[0]).unlink()
    (run_dir / "checkpoints/checkpoint-25/manifest.json").unlink()
    outcome = shardwright("checkpoints", str(run_dir))
    assert outcome.code == 0
    rows, _, problems = outcome.out.partition("\n\n")
    *_, before_last, last = table(rows)
    assert before_last[-1] == last[-1] == "not whole"
    assert last[1:3] == ["?", "?"]
    assert problems == (
        f"checkpoint-20 is not whole:\n  {FILES[0]} is missing\n\n"
        "checkpoint-25 is not whole:\n  it has no manifest\n"
    )


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/"])
def test_the_directory_of_checkpoints_will_do(
    shardwright: Shardwright, run_dir: Path, name: str
) -> None:
    outcome = shardwright("checkpoints", f"{run_dir}/{name}")
    assert outcome.out == shardwright("checkpoints", str(run_dir)).out


def test_one_checkpoint_wherever_it_lies(
    shardwright: Shardwright, run_dir: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "checkpoint-15"
    (run_dir / "checkpoints/checkpoint-15").rename(moved)
    outcome = shardwright("checkpoints", "checkpoint-15", "--verify")
    assert outcome.code == 0
    assert table(outcome.out) == [
        ["step", "strategy", "ranks", "size", "age", "eval_loss", "state"],
        ["15", "zero2", "2", "128 B", "3 min", "2.2500", "whole, hashes checked"],
    ]


def test_what_a_killed_save_left_is_named(shardwright: Shardwright, run_dir: Path) -> None:
    (run_dir / "checkpoints" / ".checkpoint-30.tmp").mkdir()
    assert shardwright("checkpoints", str(run_dir)).out.endswith(
        "\n.checkpoint-30.tmp is a save in progress, or an interrupted one that the next save "
        "deletes\n"
    )


def test_a_run_without_checkpoints(shardwright: Shardwright, run_dir: Path) -> None:
    (run_dir / "checkpoints").rename(run_dir / "elsewhere")
    outcome = shardwright("checkpoints", str(run_dir), "--verify")
    assert (outcome.code, outcome.out) == (0, f"{run_dir}/checkpoints: no checkpoints yet\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "error: nowhere is not a directory; give the run directory that"),
        (".", "error: {cwd} is not a run directory: cannot read {cwd}/config.yaml"),
    ],
)
def test_a_directory_that_is_no_run_is_bad_input(
    shardwright: Shardwright, tmp_path: Path, name: str, message: str
) -> None:
    outcome = shardwright("checkpoints", name)
    assert outcome.code == 2
    assert outcome.err.startswith(message.format(cwd=tmp_path))


def test_a_run_directory_must_be_given(shardwright: Shardwright) -> None:
    outcome = shardwright("checkpoints")
    assert outcome.code == 2
    assert "the following arguments are required: RUN_DIR" in outcome.err


@pytest.mark.parametrize(
    "name",
    [
        *("single", "ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"),
        *("zero3_nvme", "fsdp", "fsdp_grad_op", "fsdp_hybrid", "fsdp_hybrid_grad_op"),
        "fsdp_offload",
    ],
)
def test_a_strategy_has_its_presets_name(name: str) -> None:
    _, config = (
        composed(f"strategy={name}", "strategy.nvme_path=/disk")
        if name.endswith("nvme")
        else composed(f"strategy={name}")
    )
    section: dict[str, Any] = config.strategy.model_dump(mode="json")
    assert strategy_name(section) == name


def test_listing_and_verifying_import_no_torch(run_dir: Path) -> None:
    program = f"""
import sys
from shardwright.launchers.__main__ import main
run_dir = {str(run_dir)!r}
code = main(["checkpoints", run_dir]) or main(["checkpoints", run_dir, "--verify"])
heavy = {{"torch", "transformers", "deepspeed", "accelerate", "numpy"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
