"""`shardwright compare`: differences and curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.launchers.watching import curves, differences
from shardwright.train.charts.series import Series
from tests.e2e.terminal import see
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright
from tests.unit.launchers.run_directories import a_trained_run

shardwright = pytest.fixture(make_shardwright)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    one = a_trained_run(tmp_path / "runs" / "one", [8.0, 6.0, 5.0, 4.0])
    other = a_trained_run(
        tmp_path / "runs" / "other", [9.0, 8.5, 8.0, 7.5], trainer={"learning_rate": 0.5}
    )
    for run_dir, text in ((one, "{}"), (other, '{"a": 1}')):
        (run_dir / "tokenizer").mkdir()
        (run_dir / "tokenizer" / "tokenizer.json").write_text(text)
    return one, other


def of(table: str, text: str) -> str:
    """Return a section of what is shown."""
    return text.partition(f"\n{table}")[2].partition("\n\n")[0]


def test_what_differs_is_shown_and_nothing_else(
    shardwright: Shardwright, two: tuple[Path, Path]
) -> None:
    facts = json.loads((two[1] / "provenance.json").read_text())
    facts["versions"]["torch"], facts["hardware"]["host"] = "2.11.0", "node2"
    (two[1] / "resumes").mkdir()
    (two[1] / "resumes" / "1.provenance.json").write_text(json.dumps(facts))
    outcome = shardwright("compare", *map(str, two))
    assert outcome.code == 0
    shown = outcome.out
    assert shown.splitlines()[1:3] == ["A  runs/one    done", "B  runs/other  done"]
    assert of("results", shown).split()[-3:] == ["tokens_per_second", "504", "504"]
    assert [line.split() for line in of("config", shown).splitlines()[1:]] == [
        ["A", "B"],
        ["trainer.learning_rate", "0.0006", "0.5"],
    ]
    assert [line.split() for line in of("versions", shown).splitlines()[2:]] == [
        ["torch", "2.13.0", "2.11.0"],
        ["hardware.host", "node1", "node2"],
    ]
    (tokenizer,) = of("data", shown).splitlines()[2:]
    assert tokenizer.startswith("  tokenizer.xxh3_128  ")
    assert "loss by step" in shown
    assert "\x1b" not in shown, "letters behind a pipe"
    assert shown.count("AA A   BB B") == 2
    (two[1] / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "data: the same" in shardwright("compare", "runs").out


def test_json_has_all_of_it(shardwright: Shardwright, two: tuple[Path, Path]) -> None:
    tree = json.loads(shardwright("compare", "--json", "runs").out)
    one, other = map(str, two)
    assert [run["run_dir"] for run in tree["runs"]] == [one, other]
    assert tree["config"] == {"trainer.learning_rate": {one: 0.0006, other: 0.5}}
    assert tree["versions"] == {}
    assert tree["results"]["best_eval_loss"] == {one: 2.0, other: 3.75}
    assert tree["curves"]["loss"][one] == [[1, 8.0], [2, 6.0], [3, 5.0], [4, 4.0]]
    assert tree["curves"]["eval_loss"][other] == [[2, 4.25], [4, 3.75]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/one"], "compare needs 2 to 26 runs, and runs/one is 1; name others, or choose"),
        (["runs/one", "runs/none"], "runs/none does not exist; give a run, a sweep or a directory"),
        (["runs/one", "runs/bad"], "runs/bad cannot be read: model is not set"),
    ],
)
def test_bad_input(
    shardwright: Shardwright, two: tuple[Path, Path], words: list[str], message: str
) -> None:
    (two[0].parent / "bad").mkdir()
    (two[0].parent / "bad" / "config.yaml").write_text("nonsense: 1\n")
    outcome = shardwright("compare", *words)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_run_without_metrics_has_no_curve(
    shardwright: Shardwright, two: tuple[Path, Path]
) -> None:
    for run_dir in two:
        (run_dir / "metrics.jsonl").unlink()
        (run_dir / "provenance.json").unlink()
    shown = shardwright("compare", "runs").out
    assert "by step" not in shown
    assert "versions: not known of any" in shown


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (40, 24)])
def test_it_fits_the_terminal(two: tuple[Path, Path], size: tuple[int, int]) -> None:
    seen = see(
        [sys.executable, "-m", "shardwright", "compare", "runs"],
        cwd=two[0].parents[1],
        environment=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
        size=size,
    )
    assert seen.code == 0
    assert max(map(len, seen.lines)) <= size[0]
    titles = [line for line in seen.lines if "loss by step" in line]
    assert len(titles) == (1 if size[0] == 160 else 2), "beside each other where there is room"
    assert "\x1b[34m" in seen.text
    assert any("⠑" in line or "⠒" in line for line in seen.lines)


def test_without_colours_curves_are_letters(two: tuple[Path, Path]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "shardwright", "compare", "runs"]
    seen = see(command, cwd=two[0].parents[1], environment=environment)
    assert "\x1b[3" not in seen.text
    assert any(line.startswith("│A") for line in seen.lines)
    piped = subprocess.run(
        command, cwd=two[0].parents[1], env=environment, capture_output=True, text=True, check=True
    )
    assert "\x1b" not in piped.stdout


def test_points_of_a_column_are_drawn_as_their_mean() -> None:
    points = [(step, float(step % 2)) for step in range(1000)]
    thin = curves.means(points, 10)
    assert len(thin) == 10
    assert {value for _, value in thin} == {0.5}
    assert curves.means(points[:3], 10) == [(0.0, 0.0), (1.0, 1.0), (2.0, 0.0)]
    nothing = Series((), (), (), ())
    assert curves.drawn("loss", {"A": nothing}, 80, 10, in_colours=False) == []
    one = Series((7,), (1,), (1.0,), (3.0,))
    assert curves.drawn("loss", {"A": one}, 80, 10, in_colours=False)


def test_values_of_other_types_differ() -> None:
    table, same = differences.differing([{"a": 1, "b": None, "c": 2}, {"a": 1, "c": True}])
    assert (table, same) == ({"c": [2, True]}, 2)
