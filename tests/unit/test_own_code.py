"""Which code of the user's own a start had is noted, and told where a later one has another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.launchers import resuming
from shardwright.launchers.reporting import facts
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.process.provenance import write_provenance
from shardwright.train.run_directory import metrics, own_code
from tests.unit.trees import TREE


def run(tmp_path: Path, name: str = "own.py") -> RunConfig:
    text = f"{tmp_path / name}:"
    trainer = {
        **TREE["trainer"],
        **{"callbacks": [f"{text}Mine"], "optimizer": "custom", "custom_class": f"{text}Step"},
    }
    return from_tree(
        {
            **TREE,
            "objective": {"kind": "clm", "loss": "json.decoder:JSONDecoder"},
            "data": {"kind": "python", "source": f"{text}documents", "sequence_length": 64},
            "trainer": trainer,
            "run_dir": str(tmp_path / "run"),
        }
    )


@pytest.fixture
def started(tmp_path: Path) -> RunConfig:
    (tmp_path / "own.py").write_text("one")
    (tmp_path / "run").mkdir()
    config = run(tmp_path)
    write_provenance(tmp_path / "run", world_size=1, parameters=1, own=own_code.of(config))
    return config


def test_every_part_is_noted_with_its_file(started: RunConfig, tmp_path: Path) -> None:
    noted = own_code.noted(tmp_path / "run")
    assert noted == own_code.of(started)
    assert noted.keys() == {
        "trainer.callbacks: Mine",
        "trainer.custom_class: Step",
        "objective.loss: JSONDecoder",
        "data.source: documents",
    }
    assert noted["trainer.callbacks: Mine"]["file"] == str(tmp_path / "own.py")
    assert noted["objective.loss: JSONDecoder"]["version"] is None
    assert not list(own_code.changes(noted, own_code.of(started)))


def test_a_resume_says_what_has_changed(started: RunConfig, tmp_path: Path) -> None:
    assert "own code" not in resuming._start(started, started, None, is_chosen=False)
    (tmp_path / "own.py").write_text("two")
    told = " ".join(resuming._start(started, started, None, is_chosen=False).split())
    where = f"has changed since the run's last start ({tmp_path / 'own.py'})"
    assert f"own code trainer.callbacks: Mine {where}; trainer.custom_class: Step {where}" in told
    assert "objective.loss" not in told


def test_a_resume_says_which_import_of_a_part_has_changed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import helpers, json")
    (tmp_path / "helpers.py").write_text("one")
    before = own_code.of(run(tmp_path))
    (tmp_path / "helpers.py").write_text("two")
    now = own_code.of(run(tmp_path))
    changed = f"imports, has changed since the run's last start ({tmp_path / 'helpers.py'})"
    assert f"helpers, which data.source: documents {changed}" in list(own_code.changes(before, now))
    without = {
        name: {k: v for k, v in part.items() if k != "imports"} for name, part in before.items()
    }
    assert not list(own_code.changes(without, now)), "an older start has noted none"


def test_a_file_that_has_moved_is_the_same_code(started: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "own.py").rename(tmp_path / "moved.py")
    noted = own_code.noted(tmp_path / "run")
    assert not list(own_code.changes(noted, own_code.of(run(tmp_path, "moved.py"))))
    assert "trainer.callbacks: Mine" not in own_code.of(started), "one that is gone is left out"


def test_the_version_of_a_package_is_told() -> None:
    before = {"objective.loss: f": {"file": "/a.py", "hash": "1", "version": "1.0"}}
    now = {"objective.loss: f": {"file": "/a.py", "hash": "2", "version": "1.1"}}
    assert list(own_code.changes(before, now)) == [
        "objective.loss: f is of version 1.1, and was of 1.0"
    ]
    assert own_code._version("pytest") == pytest.__version__
    assert not list(own_code.changes({}, now)), "an older run has noted nothing"


def test_modules_that_a_model_imports_are_parts_as_well() -> None:
    named = {"kind": "from_config", "name": "a/b", "vocab_size": 512, "import": ["json"]}
    (part,) = own_code.of(from_tree({**TREE, "model": named})).items()
    assert part[0] == "model.import: json"
    assert part[1]["file"] == json.__file__


def test_a_line_of_the_metrics_says_it_and_a_report_marks_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n')
    metrics.note_changed_code(tmp_path, 2, "a has changed")
    assert metrics.changed_code(path) == [(2, "a has changed")]
    curves = {"loss": facts.Series([1, 2], [1, 2], [0.0, 1.0], [1.0, 1.0])}
    marks = list(facts._marks(tmp_path, curves))
    assert [(mark.kind, mark.step, mark.text) for mark in marks] == [
        ("restart", 2, "a has changed")
    ]
