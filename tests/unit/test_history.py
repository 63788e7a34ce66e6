"""Each start of a run leaves its provenance; a resume that is taken back leaves no line."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from shardwright.train.config import from_tree, packages
from shardwright.train.process.provenance import write_provenance
from shardwright.train.run_directory import history
from tests.unit.trees import PACKED


def started(run_dir: Path, world_size: int) -> None:
    write_provenance(run_dir, world_size=world_size, parameters=1, own={})


def test_each_start_keeps_its_provenance(tmp_path: Path) -> None:
    started(tmp_path, 1)
    started(tmp_path, 2)  # by torchrun, or by a requeued job
    started(tmp_path, 3)
    for number in (1, 2, 10):
        (tmp_path / f"resumes/{number}.yaml").write_text("")
        started(tmp_path, 10 * number)
    started(tmp_path, 101)
    found = history.provenances(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "provenance.json",
        "resumes/0-1.provenance.json",
        "resumes/0-2.provenance.json",
        "resumes/1.provenance.json",
        "resumes/2.provenance.json",
        "resumes/10.provenance.json",
        "resumes/10-1.provenance.json",
    ]
    sizes = [json.loads(path.read_text())["world_size"] for path in found]
    assert sizes == [1, 2, 3, 10, 20, 100, 101]


def test_a_start_notes_the_versions_of_what_it_alone_needs(tmp_path: Path) -> None:
    write_provenance(
        tmp_path,
        world_size=1,
        parameters=1,
        own={},
        packages=packages.needed(from_tree(PACKED)).values(),
    )
    versions = json.loads((tmp_path / "provenance.json").read_text())["versions"]
    assert {name: versions[name] for name in ("peft", "bitsandbytes")} == {
        "peft": metadata.version("peft"),
        "bitsandbytes": metadata.version("bitsandbytes"),
    }


def test_the_first_start_that_comes_so_far_is_the_first(tmp_path: Path) -> None:
    (tmp_path / "resumes").mkdir()
    (tmp_path / "resumes/1.yaml").write_text("")
    assert history.provenances(tmp_path) == []
    started(tmp_path, 1)
    assert history.provenances(tmp_path) == [tmp_path / "provenance.json"]


def test_a_history_is_cut_at_the_last_line_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / history.FILE
    lines = [
        '{"n": 1}\n',
        '{"n": 2}\n',
        '{"n": 1, "again": true}\n',
        "cut by a cra\n",
        '{"n": 3}\n',
    ]
    path.write_text("".join(lines))
    history.cut(tmp_path, lambda entry: entry["n"] == 7)
    assert path.read_text() == "".join(lines)
    history.cut(tmp_path, lambda entry: entry["n"] == 1)
    assert path.read_text() == "".join(lines[:2])
    history.cut(tmp_path / "elsewhere", lambda entry: True)
