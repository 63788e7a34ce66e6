"""`tracking=trackio`: one run over all resumes, in a database that runs may share."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.config import from_tree
from shardwright.train.errors import UserError
from tests.unit.trackers import (
    FIRST,
    RESUMED,
    expected,
    freeze,
    make_run_dir,
    of_trackio,
    track,
    write,
)

run_dir = pytest.fixture(make_run_dir)


def test_one_curve_over_a_resume(run_dir: Path, tiny_tree: Any) -> None:
    config = freeze(run_dir, tiny_tree("clm"), kind="trackio")
    write(run_dir, FIRST[:2])
    (where,) = track(run_dir)
    assert where == f"TRACKIO_DIR='{run_dir / 'trackio'}' trackio show --project shardwright"
    write(run_dir, FIRST)  # stopped and resumed: nothing is trained again
    track(run_dir)
    (first,) = of_trackio(run_dir / "trackio")
    assert first.values == expected(FIRST, "time")
    assert first.times == {_iso(entry["time"]) for entry in FIRST}
    assert (first.name, first.config) == ("run", config.model_dump(mode="json", by_alias=True))

    write(run_dir, RESUMED)
    track(run_dir)
    (resumed,) = of_trackio(run_dir / "trackio")
    assert resumed.run_id == first.run_id
    assert resumed.values == expected(RESUMED, "time")
    assert resumed.times == {_iso(entry["time"]) for entry in RESUMED}
    assert resumed.config == first.config


def test_runs_share_a_directory_and_rewrite_only_what_is_theirs(
    run_dir: Path, tmp_path: Path, tiny_tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "shared"))
    other = tmp_path / "another run"
    for directory, lines in ((run_dir, FIRST), (other, FIRST[:1])):
        freeze(directory, tiny_tree("clm"), kind="trackio", project="both")
        write(directory, lines)
        track(directory)
    write(run_dir, RESUMED)
    track(run_dir)
    shown = {len(run.values["loss"]): run.values for run in of_trackio(tmp_path / "shared", "both")}
    assert shown == {1: expected(FIRST[:1], "time"), 3: expected(RESUMED, "time")}


def test_a_directory_that_cannot_be_written_is_told(
    run_dir: Path, tmp_path: Path, tiny_tree: Any
) -> None:
    (tmp_path / "file").write_text("")
    freeze(run_dir, tiny_tree("clm"), kind="trackio", directory=str(tmp_path / "file"))
    write(run_dir, FIRST)
    where, fails, lacks = track(run_dir)
    assert where.startswith("TRACKIO_DIR=")
    assert fails.startswith("warning: Trackio fails (")
    assert lacks.startswith("warning: Trackio lacks a part of this run (")


def test_a_project_names_a_file(tiny_tree: Any) -> None:
    tree = {**tiny_tree("clm"), "tracking": {"kind": "trackio", "project": "a/b"}}
    with pytest.raises(UserError, match=r"tracking\.project=a/b"):
        from_tree(tree)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
