"""Steps of runs made again by the command line: which module failed, and where two runs part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.cli import losses, processes, shardwright

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (
    *("strategy=zero2", "precision=fp32"),
    *("data.eval_fraction=0", "trainer.eval_max_samples=null"),
    *("trainer.save_every_steps=2", "trainer.lr_scheduler=constant"),
)


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[[str], tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that gives the directory of a run, which is trained once for all tests."""
    here = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str, exit_code: int = 0) -> Path:
        if not (here / name).exists():
            arguments = (*tiny("clm"), *SETTINGS, *overrides, f"run_dir={name}")
            ended = shardwright("train", *arguments, cwd=here)
            assert ended.returncode == exit_code, ended.stdout + ended.stderr
            (here / f"{name}.told").write_text(ended.stdout + ended.stderr)
        return here / name

    return run


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(processes(tmp_path)) == []


def in_a_line(text: str) -> str:
    return " ".join(text.split())


def test_a_step_of_a_sound_run_is_made_again_bit_for_bit(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = runs("a")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    scratch = ("--scratch", str(tmp_path))
    ended = shardwright("diagnose", str(run_dir), "--replay", "4", *scratch, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = in_a_line(ended.stdout)
    assert told.startswith(f"replaying in {tmp_path}/")
    assert "Replayed steps 3 to 4 from checkpoint-2. " in told
    assert "2 logged step(s), up to 4, are those of the run, bit for bit." in told
    assert "No module gave anything that is not finite" in told
    (again,) = tmp_path.iterdir()
    assert losses(again) == losses(run_dir)[2:]
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_the_module_that_failed_is_named_in_the_way_that_the_run_tells_of(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = runs("wild", "trainer.learning_rate=1e30", exit_code=1)
    told = run_dir.with_suffix(".told").read_text()
    said = re.search(r"shardwright diagnose (\S+) --replay (\d+)", told)
    assert said is not None
    assert said[1] == str(run_dir)
    scratch = ("--scratch", str(tmp_path))
    ended = shardwright("diagnose", said[1], "--replay", said[2], *scratch, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = in_a_line(ended.stdout)
    found = re.search(
        r"First in the forward pass of (\S+) \(\w+\), on rank \d, in micro-batch 1 of "
        rf"step {said[2]}: .* ranges: ({tmp_path}/\S+)",
        told,
    )
    assert found is not None, told
    finding = json.loads(Path(found[2]).with_suffix(".json").read_text())
    assert finding["module"] == found[1]


def test_two_runs_part_in_the_first_module_behind_what_differs(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = runs("a"), runs("b", "trainer.adam_beta2=0.9")
    first = next(
        step for step, (x, y) in enumerate(zip(losses(a), losses(b), strict=True), 1) if x != y
    )
    scratch = ("--scratch", str(tmp_path))
    ended = shardwright("diagnose", str(a), str(b), *scratch, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = in_a_line(ended.stdout)
    assert "Of what they have logged, " in told
    assert f" of step {first} is the first that differs: " in told
    assert "Settings that differ: trainer.adam_beta2 (0.95 and 0.9)." in told
    assert told.count("Replaying ") == 2
    parted = re.search(r"They part in the forward pass of (\S+) .*of step (\d+): ", told)
    assert parted is not None, told
    assert f"the update of step {int(parted[2]) - 1} was another" in told

    same = shardwright("diagnose", str(a), str(a), cwd=tmp_path)
    assert same.returncode == 0, same.stderr
    assert "All figures of the 4 steps" in in_a_line(same.stdout)
