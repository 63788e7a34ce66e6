"""What stays of a run's checkpoints, by example; and that deleting bears crashes and company."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from shardwright.train.checkpoint import retention
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.retention import Saved, best, expendable, marks
from shardwright.train.config import CheckpointConfig
from tests.checkpoints import FILES, write_checkpoint


def steps_of(directory: Path) -> list[int]:
    return [step for step, _ in layout.whole_checkpoints(directory)]


def saved(*steps: int, verified: int | None = None, **losses: float) -> list[Saved]:
    """Return checkpoints of these steps; ``at_<step>=loss`` says what was evaluated there."""
    return [
        Saved(
            step,
            {"eval_loss": losses[f"at_{step}"]} if f"at_{step}" in losses else {},
            verified=step == (steps[-1] if verified is None else verified),
        )
        for step in steps
    ]


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "checkpoints", "may_go"),
    [
        pytest.param({}, saved(1, 2, 3, 4), [1, 2], id="the newest two stay"),
        pytest.param({"keep_last": 1}, saved(1, 2, 3), [1, 2], id="the newest stays"),
        pytest.param({"keep_last": 9}, saved(1, 2, 3), [], id="fewer than are to be kept"),
        pytest.param({}, [], [], id="none at all"),
        pytest.param(
            {"keep_last": 1, "keep_every_steps": 20},
            saved(10, 20, 30, 40, 50),
            [10, 30],
            id="multiples stay permanently",
        ),
        pytest.param(
            {"keep_last": 1, "keep_best": 1},
            saved(1, 2, 3, 4, at_1=3.0, at_2=2.0, at_3=2.5),
            [1, 3],
            id="the best stays",
        ),
        pytest.param(
            {"keep_last": 1, "keep_best": 2},
            saved(1, 2, 3, 4, at_1=3.0, at_2=2.0, at_3=2.5, at_4=1.0),
            [1, 3],
            id="the newest may be among the best",
        ),
        pytest.param(
            {"keep_last": 1, "keep_best": 1},
            saved(1, 2, 3, at_1=2.0, at_2=2.0),
            [2],
            id="of equal ones the earlier is the best",
        ),
        pytest.param(
            {"keep_last": 1, "keep_best": 2},
            saved(1, 2, 3, at_1=float("nan"), at_2=float("inf")),
            [1, 2],
            id="what is not finite is never the best",
        ),
        pytest.param(
            {"keep_last": 1, "keep_best": 1, "keep_every_steps": 2},
            saved(1, 2, 3, 4, 5, at_3=1.0),
            [1],
            id="each reason is enough",
        ),
        pytest.param({"keep_last": 1}, saved(1, 2, 3, verified=0), [], id="none is verified"),
        pytest.param(
            {"keep_last": 1}, saved(1, 2, 3, verified=2), [1], id="the newest is not verified"
        ),
        pytest.param(
            {"keep_last": 2},
            saved(1, 2, 3, 500, 600, verified=3),
            [1],
            id="a run that went on from step 2 keeps what it writes",
        ),
    ],
)
def test_what_may_go(rule: dict[str, int], checkpoints: list[Saved], may_go: list[int]) -> None:
    assert expendable(checkpoints, CheckpointConfig(**rule)) == may_go  # type: ignore[arg-type]


def test_a_high_accuracy_is_good_and_a_high_loss_is_not() -> None:
    measured = [Saved(s, {"eval_loss": s, "eval_masked_accuracy": s / 10}) for s in (1, 2, 3)]
    assert best(measured, CheckpointConfig(keep_best=1)) == [1, 2, 3]
    by_accuracy = CheckpointConfig(keep_best=1, best_metric="eval_masked_accuracy")
    assert best(measured, by_accuracy) == [3, 2, 1]


def test_marks_name_every_reason() -> None:
    rule = CheckpointConfig(keep_last=1, keep_every_steps=2, keep_best=1)
    assert marks(saved(0, 1, 2, 3, 4, at_4=1.0), rule) == {
        0: [],
        1: [],
        2: ["permanent"],
        3: [],
        4: ["last", "permanent", "best"],
    }


# --- on disk -------------------------------------------------------------------------------------


def test_metrics_are_read_from_the_manifests(tmp_path: Path) -> None:
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        write_checkpoint(tmp_path, step, metrics={"eval_loss": loss})
    rule = CheckpointConfig(keep_last=1, keep_best=1)
    assert retention.retain(tmp_path, rule, newest=4) == [1, 3]
    assert steps_of(tmp_path) == [2, 4]


def test_nothing_goes_where_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    rule, newest = CheckpointConfig(keep_last=1), tmp_path / "checkpoint-3"
    shutil.copy(tmp_path / "checkpoint-2" / FILES[0], newest / FILES[0])
    with caplog.at_level(logging.WARNING):
        assert retention.retain(tmp_path, rule, newest=3, wrong=layout.verify(newest)) == []
    assert "checkpoint-3 is damaged, so no older one is deleted: engine/shard-0.pt" in caplog.text
    assert steps_of(tmp_path) == [1, 2, 3]


def test_nothing_goes_where_the_newest_has_vanished(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    assert retention.retain(tmp_path, CheckpointConfig(keep_last=1), newest=3) == []


def test_what_is_not_whole_counts_for_nothing_and_is_left_to_look_at(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-2" / FILES[0]).unlink()
    assert retention.retain(tmp_path, CheckpointConfig(keep_last=2), newest=4) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{step}" for step in (2, 3, 4)
    ]


def test_a_directory_that_cannot_be_deleted_is_reported_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "checkpoint-1":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)  # root may delete whatever the modes say
    assert retention.retain(tmp_path, CheckpointConfig(keep_last=1), newest=3) == [2]
    assert "checkpoint-1 cannot be deleted: [Errno 13] Permission denied" in caplog.text


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.retain(tmp_path, CheckpointConfig(keep_last=1), newest=2)
    assert layout.what_is_wrong(tmp_path / "checkpoint-1") == "it has no manifest"
    assert retention.remove_leftovers(tmp_path) == [tmp_path / "checkpoint-1"]
    assert steps_of(tmp_path) == [2]


def test_processes_that_delete_the_same_at_the_same_time_do_not_disturb_each_other(
    tmp_path: Path,
) -> None:
    rule = CheckpointConfig(keep_last=1)
    for round_ in range(20):
        directory = tmp_path / str(round_)
        for step in (1, 2, 3, 4):
            write_checkpoint(directory, step)
        errors: list[BaseException] = []
        start = threading.Barrier(4)

        def delete(
            directory: Path = directory,
            errors: list[BaseException] = errors,
            start: threading.Barrier = start,
        ) -> None:
            start.wait()
            try:
                retention.retain(directory, rule, newest=4)
                retention.remove_leftovers(directory)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=delete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert [path.name for path in directory.iterdir()] == ["checkpoint-4"]


# --- leftovers -----------------------------------------------------------------------------------


def test_temporaries_of_killed_saves_go_and_those_in_flight_stay(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    killed, in_flight = tmp_path / ".checkpoint-2.tmp", tmp_path / ".checkpoint-3.tmp"
    for temporary in (killed, in_flight):
        (temporary / "engine").mkdir(parents=True)
        (temporary / "engine" / "shard.pt").write_bytes(b"half")
    assert retention.remove_leftovers(tmp_path, in_flight=[in_flight]) == [killed]
    assert sorted(os.listdir(tmp_path)) == [".checkpoint-3.tmp", "checkpoint-1"]


def test_a_save_that_was_killed_while_it_replaced_another_gives_that_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    path.rename(layout.set_aside(path))
    assert retention.remove_leftovers(tmp_path) == []
    assert layout.verify(path) == []


def test_a_checkpoint_that_was_replaced_goes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1)
    shutil.copytree(path, layout.set_aside(path))
    assert retention.remove_leftovers(tmp_path) == [layout.set_aside(path)]
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_the_newest_stays_to_look_at_even_without_its_manifest(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-2" / layout.MANIFEST).unlink()
    assert retention.remove_leftovers(tmp_path) == []
    assert (tmp_path / "checkpoint-2").is_dir()


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    for name in ("notes", "checkpoint-best", "checkpoint-01", ".checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-0").write_text("a file")
    assert retention.remove_leftovers(tmp_path) == []
    assert retention.remove_leftovers(tmp_path / "nowhere") == []
