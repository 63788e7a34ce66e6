"""What `shardwright report` reads, decides and writes; the page in a browser is in tests/e2e."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.__main__ import main
from shardwright.launchers.commands import report
from shardwright.launchers.commands.report import default_name
from shardwright.launchers.reporting import differences, pictures
from shardwright.launchers.reporting.importance import importance
from shardwright.launchers.reporting.pictures import file_name
from shardwright.launchers.reporting.scales import Scale, scale_of
from shardwright.train.charts import drawing
from tests import reports
from tests.unit.trees import TREE

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="Optuna is not installed"
)


def tree(**trainer: Any) -> dict[str, Any]:
    found = copy.deepcopy(TREE)
    found["trainer"] |= trainer
    return found


_javascript = drawing.javascript
_once = cache(_javascript)  # it is the same each time, and takes a second


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "javascript", _once)
    return tmp_path


class _Text(HTMLParser):
    """What a person reads of a page, in one line."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    def __str__(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    tree: dict[str, Any] = json.loads(found[1])
    return tree


def files_below(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_report_is_one_file_beside_the_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = reports.make_run(here / "runs" / "demo", tree(), reports.logged(30))
    before = files_below(run_dir)
    assert main(["report", "runs/demo"]) == 0
    page = here / "report-demo.html"
    assert re.fullmatch(rf"{page}: 1 run, \d+ kB\n", capsys.readouterr().out)
    assert files_below(run_dir) == before, "nothing is written where the run is"
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text.split("<script>")[0])
    assert "default-src 'none'" in text
    told = str(_Text(page))
    assert "30 of 10" in told
    assert "trainer.max_steps 10" in told, "the config is there without a script"
    assert re.search(r"as of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", told)


def test_a_report_replaces_a_report_and_nothing_else(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.make_run(here / "demo", tree())
    assert main(["report", "demo"]) == main(["report", "demo"]) == 0
    (here / "notes.html").write_text("mine")
    assert main(["report", "demo", "--out", "notes.html"]) == 2
    assert (here / "notes.html").read_text() == "mine"
    assert f"{here}/notes.html exists and is no report; give another name by --out" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--out", "demo"], "--out=.*/demo is a directory; give the name of a file"),
        (["demo", "--out", "a/b.html"], "--out=.*/a/b.html: there is no directory .*/a; make it"),
        (["nothing"], "nothing is not a run directory: cannot read .*config.yaml"),
        (["demo", "--png", "demo/config.yaml"], "--png=.*config.yaml is a file; give a directory"),
    ],
)
def test_bad_input_is_told_before_anything_is_read(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.make_run(here / "demo", tree())
    assert main(["report", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("flag", ["out", "png"])
def test_a_place_that_cannot_be_written_is_named(
    flag: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    reports.make_run(here / "demo", tree())
    monkeypatch.setattr(*{"out": (report, "write_text"), "png": (pictures, "write")}[flag], refuse)
    assert main(["report", "demo", f"--{flag}", "there"]) == 2
    assert capsys.readouterr().err == (
        f"error: --{flag}={here}/there cannot be written (Permission denied); give a place that is "
        f"writable by --{flag}\n"
    )


def test_where_nothing_can_be_drawn_the_command_fails(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.make_run(here / "demo", tree(), reports.logged(3))
    monkeypatch.setattr(drawing, "javascript", _javascript)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["report", "demo"]) == 1
    assert "nothing can be drawn here: the process that draws ended with 1" in (
        capsys.readouterr().err
    )


def test_runs_that_cannot_be_read_do_not_hide_the_others(here: Path) -> None:
    reports.make_run(here / "runs" / "good", tree(), reports.logged(5))
    reports.make_run(here / "runs" / "odd", tree(), reports.logged(5))
    (here / "runs" / "odd" / "config.yaml").write_text("model: [")
    (here / "runs" / "odd" / "history.jsonl").write_text('[1]\n{"checkpoint": 3}\n"a"\n')
    assert main(["report", "runs"]) == 0
    told = str(_Text(here / "report-runs.html"))
    assert "cannot be read" in told
    assert [run["label"] for run in data_of(here / "report-runs.html")["runs"]] == [
        *("runs/good", "runs/odd"),
    ]


def test_what_happened_to_a_run_is_marked_where_it_happened(here: Path) -> None:
    def lines() -> Any:
        for line in reports.logged(100):
            yield line | {"loss": None} if line["step"] == 70 else line

    run_dir = reports.make_run(here / "demo", tree(), lines())
    reports.resumed(run_dir, 40, "seed=3")
    with (run_dir / "history.jsonl").open("a") as file:
        file.write('{"by": "torchrun", "checkpoint": "checkpoint-40"}\n')
        file.write('{"requeued_at_step": 40, "checkpoint": "checkpoint-40"}\n')
        file.write('{"checkpoint": "checkpoint-900"}\n')  # of a step that is not there any more
    assert main(["report", "demo"]) == 0
    (run,) = data_of(here / "report-demo.html")["runs"]
    assert [(mark["kind"], mark["steps"], mark["text"]) for mark in run["marks"]] == [
        ("restart", 40, "resumed from checkpoint-40 with seed=3"),
        ("restart", 40, "restarted by torchrun from checkpoint-40"),
        ("restart", 40, "requeued from checkpoint-40"),
        ("checkpoint", 40, "checkpoint-40"),
        ("not finite", 70, "loss not finite at step 70"),
    ]
    assert run["marks"][0]["tokens"] == 40 * 8192


def points(count: int) -> list[dict[str, Any]]:
    return [{"trainer.learning_rate": 10.0 ** -(i % 4 + 2), "seed": i // 4} for i in range(count)]


def test_a_sweep_tells_which_point_is_the_best_and_which_failed(here: Path) -> None:
    values = [3.0, 2.5, 2.9, 2.0, 3.1, 2.6, 3.2, 2.1]
    states: list[Mapping[str, Any]] = [
        {"state": "done", "values": {"eval_loss": value}} for value in values
    ]
    states[3] = {"state": "pruned", "values": {"eval_loss": 1.0}}
    states[6] = {"state": "failed", "why": "rank 0 failed: <no memory>\nmore"}
    states[7] = {"state": "waiting"}
    sweep = reports.make_sweep(here / "rates", points(8), states)
    for number in range(7):
        reports.make_run(sweep.run_dir(number), tree(), reports.logged(20, seed=number, every=10))
    assert main(["report", "rates", "--png", "pictures"]) == 0
    page = here / "report-rates.html"
    told = str(_Text(page))
    assert "8 points, 5 done, 1 pruned, 1 failed, 1 waiting; objective eval_loss, minimized" in (
        told.replace("1 pruned, 5 done", "5 done, 1 pruned")
    )
    assert "Best so far is point 1 with eval_loss 2.5" in told
    assert "train model=gpt2_tiny trainer.learning_rate=0.001 seed=0" in told
    assert "6: trainer.learning_rate=0.0001 seed=1: rank 0 failed: <no memory>" in told
    assert {path.name for path in (here / "pictures").glob("*.png")} >= {
        *("loss.png", "eval_loss.png", "learning_rate.png", "grad_norm.png"),
        *("tokens_per_second.png", "mfu.png", "peak_memory_bytes.png"),
        *("parallel_eval_loss.png", "scatter_eval_loss_seed.png"),
        "scatter_eval_loss_learning_rate.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (here / "pictures").iterdir())


def test_a_sweep_of_several_objectives_has_charts_for_each(here: Path) -> None:
    reports.make_sweep(
        here / "two",
        points(4),
        [{"state": "done", "values": {"loss": 3 - i, "mfu": i / 9}} for i in range(4)],
        objectives=(
            {"metric": "mfu", "direction": "maximize"},
            {"metric": "loss", "direction": "minimize"},
        ),
    )
    assert main(["report", "two"]) == 0
    names = {chart["name"] for chart in data_of(here / "report-two.html")["sweepCharts"]}
    assert {"parallel_mfu", "parallel_loss", "scatter_loss_mfu"} <= names
    told = str(_Text(here / "report-two.html"))
    assert "objective mfu, maximized and loss, minimized" in told
    assert "Best is point 3" in told


def test_a_sweep_that_has_not_begun_has_a_page(here: Path) -> None:
    reports.make_sweep(here / "new", points(4), [])
    assert main(["report", "new"]) == 0
    told = str(_Text(here / "report-new.html"))
    assert "No point is done yet, and none is the best." in told
    assert "0 points with a value; it takes 4." in told or "Optuna is not installed" in told


def test_runs_and_sweeps_share_a_page_and_no_name_of_a_chart(here: Path) -> None:
    for name in ("a", "b"):
        sweep = reports.make_sweep(
            here / name,
            points(4),
            [{"state": "done", "values": {"eval_loss": i}} for i in range(4)],
        )
        reports.make_run(sweep.run_dir(0), tree(), reports.logged(5))
    reports.make_run(here / "alone", tree(seed=7), reports.logged(5))
    assert main(["report", "a", "b", "alone", "alone", "--out", "all.html"]) == 0
    data = data_of(here / "all.html")
    assert [run["label"] for run in data["runs"]][-1] == "alone"
    assert len({run["label"] for run in data["runs"]}) == len(data["runs"]) == 3
    names = [chart["name"] for chart in (*data["charts"], *data["sweepCharts"])]
    assert len(set(names)) == len(names)


def range_tested(steps: int = 120) -> list[dict[str, Any]]:
    """Return what a range test logs: the loss falls fastest at a rate of 1e-3, rises from 1e-2."""
    lines = []
    for step, line in enumerate(reports.logged(steps, every=steps + 1), start=1):
        exponent = -5 + 4 * step / steps  # from 1e-5 to 1e-1
        noise = 0.1 * math.sin(step * 2.4)
        loss = 8 - 2 / (1 + math.exp(-6 * (exponent + 3))) + max(0.0, exponent + 2) * 3 + noise
        lines.append({**line, "loss": loss, "learning_rate": 10**exponent})
    return lines


def test_a_range_test_has_its_loss_over_its_rate(here: Path) -> None:
    tested = tree(lr_scheduler="range_test", min_learning_rate_ratio=1e-4)
    reports.make_run(here / "tested", tested, iter(range_tested()))
    reports.make_run(here / "plain", tree(), reports.logged(5))
    assert main(["report", "tested", "plain", "--out", "page.html", "--png", "pictures"]) == 0
    (chart,) = data_of(here / "page.html")["sweepCharts"]
    spec = chart["specs"]["light"]
    assert chart["name"] == "loss_over_learning_rate"
    (curve,) = (layer for layer in spec["layer"] if layer["data"]["name"] == "curves")
    assert curve["encoding"]["x"]["scale"]["type"] == "log"
    raw = spec["datasets"]["raw"]
    assert [(row["x"], row["y"]) for row in raw] == [
        (line["learning_rate"], line["loss"]) for line in range_tested()
    ]
    assert (here / "pictures/loss_over_learning_rate.png").is_file()
    told = str(_Text(here / "page.html"))
    found = re.search(r"The smoothed loss falls fastest at (\S+) and is lowest at (\S+)\.", told)
    assert found is not None
    assert 7e-4 < float(found[1]) < 1.5e-3
    assert 5e-3 < float(found[2]) < 2e-2


def test_other_runs_have_no_range_test(here: Path) -> None:
    reports.make_run(here / "plain", tree(), reports.logged(5))
    assert main(["report", "plain"]) == 0
    assert "Range test" not in str(_Text(here / "report-plain.html"))


# --- what is decided ------------------------------------------------------------------------------


def test_only_settings_that_differ_are_told_apart() -> None:
    first = differences.flat({"a": {"b": 1, "c": [1, 2]}, "run_dir": "x", "d": "t", "e": {}})
    second = differences.flat({"a": {"b": 2, "c": [1, 2]}, "run_dir": "y", "d": "t", "f": None})
    assert first == {"a.b": "1", "a.c": "[1, 2]", "d": "t", "e": "{}"}
    assert differences.differing([first, second]) == {
        "a.b": ["1", "2"],
        "e": ["{}", "-"],
        "f": ["-", "null"],
    }
    assert differences.shared([first, second]) == {"a.c": "[1, 2]", "d": "t"}
    assert differences.differing([]) == differences.shared([]) == {}


def test_names_are_as_short_as_tells_them_apart() -> None:
    keys = ["trainer.learning_rate", "model.name", "data.name", "name", "seed"]
    assert differences.short_names(keys) == [
        *("learning_rate", "model.name", "data.name", "name", "seed"),
    ]


@pytest.mark.parametrize(
    ("values", "scale", "places", "ticks"),
    [
        ([1, 2, 3], Scale(1, 3), [0, 0.5, 1], [(0, "1"), (0.5, "2"), (1, "3")]),
        ([1e-4, 1e-3, 1e-2], Scale(1e-4, 1e-2, is_log=True), [0, 0.5, 1], None),
        ([5, 5], Scale(5, 5), [0.5, 0.5], [(0.5, "5")]),
        (["a", True, "a"], Scale(names=("a", "true")), [0, 1, 0], [(0, "a"), (1, "true")]),
        ([0, 100], Scale(0, 100), [0, 1], None),
        (list(range(20)), Scale(0, 19), None, [(0, "0"), (1, "19")]),
    ],
)
def test_a_setting_has_a_scale(
    values: list[Any],
    scale: Scale,
    places: list[float] | None,
    ticks: list[tuple[float, str]] | None,
) -> None:
    found = scale_of(values)
    assert found == scale
    if places is not None:
        assert [found.place(value) for value in values] == pytest.approx(places)
    if ticks is not None:
        assert found.ticks(values) == ticks


@needs_optuna
def test_the_setting_that_decides_has_the_largest_share() -> None:
    settings = [
        {"rate": rate, "kind": kind, "seed": seed}
        for rate in (1e-4, 1e-3, 1e-2)
        for kind in ("a", "b")
        for seed in range(4)
    ]
    values = [100 * each["rate"] + 0.01 * each["seed"] for each in settings]  # type: ignore[operator]
    found = importance(settings, values, "minimize")
    assert next(iter(found.shares)) == "rate"
    assert found.shares["rate"] > 0.5
    assert sum(found.shares.values()) == pytest.approx(1)
    assert re.fullmatch(r"By Optuna's (fANOVA|PED-ANOVA), of 24 points\.", found.how)


@needs_optuna
@pytest.mark.parametrize(
    ("settings", "values", "why"),
    [
        ([{"a": 1}] * 3, [1.0, 2.0, 3.0], "3 points with a value; it takes 4."),
        ([{"a": 1}] * 4, [1.0, 2.0, 3.0, 4.0], "All points have the same settings."),
        ([{"a": i} for i in range(4)], [1.0] * 4, "All points have the same value."),
    ],
)
def test_where_no_importance_is_known_it_is_told_why(
    settings: list[dict[str, Any]], values: list[float], why: str
) -> None:
    assert importance(settings, values, "minimize").how == why


def test_without_optuna_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = importance([{"a": i} for i in range(4)], [1.0, 2.0, 3.0, 4.0], "minimize")
    assert (found.shares, "Optuna is not installed" in found.how) == ({}, True)


def test_names_of_files_are_names_of_files() -> None:
    assert file_name("eval_loss_a/../b c") == "eval_loss_a_.._b_c"
    assert file_name("../..") == "_.."
    assert file_name("...") == "chart"
    assert default_name([Path("/a/b")]) == "report-b.html"
    assert default_name([Path("/a/b"), Path("/c")]) == "report.html"
