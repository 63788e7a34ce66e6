"""A resume from a chosen checkpoint: which may be chosen, and what becomes of what is newer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shardwright.launchers import requeue, resumes, resuming
from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from shardwright.train.run_directory import history, rollbacks, set_aside
from shardwright.train.run_directory.rollbacks import Rollback
from tests.unit.launchers.ended_runs import checkpoint, contents, finished, make_ended_run
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)
run_dir = pytest.fixture(make_ended_run)


@pytest.fixture
def branched(run_dir: Path) -> Path:
    """Return the run of `run_dir` with checkpoints of 20, 40 and 60, and with two rollbacks."""
    for step in (20, 40):
        checkpoint(run_dir, step)
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(10, 61, 10)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    rollbacks.append(run_dir, Rollback(25, 20, 1_700, 420))
    rollbacks.append(run_dir, Rollback(55, 40, 3_600, 960))
    return run_dir


def steps_in(directory: Path) -> list[int]:
    return [step for step, _ in layout.named(directory)]


def test_what_is_newer_is_set_aside_and_nothing_of_it_is_lost(branched: Path) -> None:
    before = contents(branched)
    config = finished(branched)
    chosen = resumes.check(branched, config, 20)
    assert chosen == branched / "checkpoints/checkpoint-20"
    number = resumes.write(branched, config, [], chosen, 20)
    assert steps_in(branched / "checkpoints") == [20], "no restart finds a newer one"
    aside = branched / "set-aside/resume-1"
    assert steps_in(aside) == [40, 60]
    after = contents(branched)
    for name, content in before.items():
        name = re.sub("^checkpoints/(?=checkpoint-[46]0)", "set-aside/resume-1/", name)
        assert content in (after.get(name), after.get(f"set-aside/resume-1/{name}")), name
    # The data of the rollback that is undone are trained on; those of the other are not.
    assert [each.step for each in rollbacks.read(branched)] == [25]
    assert history.asked_step(history.read(branched)) == 20

    resumes.take_back(branched, number)
    assert contents(branched) == before | {"history.jsonl": b""}
    assert not (branched / "set-aside").exists()


def test_the_newest_is_chosen_without_anything_being_set_aside(run_dir: Path) -> None:
    config = finished(run_dir)
    resumes.write(run_dir, config, [], resumes.check(run_dir, config, 60), 60)
    assert steps_in(run_dir / "checkpoints") == [60]
    assert not (run_dir / "set-aside").exists()


def test_a_job_is_requeued_from_what_it_has_written_since(branched: Path) -> None:
    history.append(branched, {"requeued_at_step": 60})
    config = finished(branched)
    resumes.write(branched, config, [], resumes.check(branched, config, 20), 20)
    assert requeue.main([str(branched), "--restarts", "1"]) == 0
    assert history.read(branched)[-1]["checkpoint"] == "checkpoint-20"
    assert requeue.main([str(branched), "--restarts", "2"]) == 1, "no progress since"
    checkpoint(branched, 30)
    assert requeue.main([str(branched), "--restarts", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--step", "50"], "run has no checkpoint of step 50; choose one of 20, 60"),
        (["{run}", "--step", "40"], "checkpoint-40 is not whole: rng-0.pt is missing; restore it "),
        (["{run}", "--step", "40"], "or choose one of 20, 60"),
        (["{run}/checkpoints/checkpoint-50"], "run has no checkpoint of step 50; choose one of"),
        (["{run}/checkpoints/checkpoint-40/"], "checkpoint-40 is not whole: rng-0.pt is missing"),
        (["{run}/checkpoints/checkpoint-20", "--step", "60"], "of step 20, and --step=60 asks for"),
        (["{run}/../checkpoint-7"], "checkpoint-7 lies in no run: .* has no config.yaml whose run"),
        (["{run}", "{run}/../checkpoint-7"], "continues one run, from a checkpoint of its own"),
        (["{run}", "--step", "best"], "argument --step: best is not the number of a step; a"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_chosen_is_refused_and_changes_nothing(
    words: list[str],
    message: str,
    dry_run: bool,
    branched: Path,
    shardwright: Shardwright,
) -> None:
    (branched / "checkpoints/checkpoint-40/rng-0.pt").unlink()
    checkpoint(branched.parent, 7)
    (branched.parent / "checkpoints/checkpoint-7").rename(branched.parent / "checkpoint-7")
    before = contents(branched)
    words = [word.format(run=branched) for word in words]
    outcome = shardwright("resume", *words, *["--dry-run"] * dry_run)
    assert outcome.code == 2
    assert re.search(message, " ".join(outcome.err.split())), outcome.err
    assert contents(branched) == before


def test_what_was_set_aside_is_found_again_by_its_name(branched: Path) -> None:
    config = finished(branched)
    resumes.write(branched, config, [], resumes.check(branched, config, 20), 20)
    with pytest.raises(UserError, match="any more: an earlier resume has set it aside in .*-1; mo"):
        resumes.check(branched, config, 60)
    with pytest.raises(UserError, match="was set aside by an earlier resume; to resume from it"):
        resuming.asked(branched / "set-aside/resume-1/checkpoint-60", None)
    assert set_aside.found(branched) == [(branched / "set-aside/resume-1", 2)]


def test_a_run_without_checkpoints_has_none_to_choose(
    run_dir: Path, shardwright: Shardwright
) -> None:
    (run_dir / "checkpoints/checkpoint-60").rename(run_dir / "elsewhere")
    outcome = shardwright("resume", str(run_dir), "--step", "60")
    assert outcome.code == 2
    assert "has no checkpoint yet; leave --step=60 out to begin anew" in outcome.err


def test_a_dry_run_tells_what_would_be_set_aside(branched: Path, shardwright: Shardwright) -> None:
    outcome = shardwright("resume", f"{branched}/checkpoints/checkpoint-40", "--dry-run")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "resumes from checkpoint-40" in said
    assert f"set aside checkpoint-60, in {branched}/set-aside/resume-1" in said
    assert steps_in(branched / "checkpoints") == [20, 40, 60]


def test_the_listing_of_checkpoints_names_those_set_aside(
    branched: Path, shardwright: Shardwright
) -> None:
    config = finished(branched)
    resumes.write(branched, config, [], resumes.check(branched, config, 20), 20)
    outcome = shardwright("checkpoints", str(branched))
    assert f"{branched}/set-aside/resume-1: 2 checkpoints that a resume has gone" in outcome.out
