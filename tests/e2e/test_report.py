"""A report in a real browser: what is drawn, what its controls change, what it asks for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.support.wait import WebDriverWait

from shardwright.launchers.__main__ import main
from shardwright.train.charts import series, thinning
from tests import reports
from tests.browser import Browser, chromium, needs_chromium
from tests.unit.trees import TREE

pytestmark = needs_chromium

HOSTILE = "</script><script>document.title='owned'</script><img src=http://192.0.2.1/x onerror=a()>"
SETTINGS = [
    {"trainer.learning_rate": rate, "strategy": strategy}
    for strategy in ("zero2", "fsdp")
    for rate in (1e-4, 3e-4, 1e-3)
]
SPIKE = {
    **{"step": 700, "samples": 5_600, "tokens": 5_734_400, "time": reports.BEGUN + 350},
    **{"spike": "warn", "spike_step": 700, "spike_loss": 9.0, "spike_grad_norm": 40.0},
}
LOSSES = [3.4, 3.1, 3.6, 3.5, 3.2, 3.7]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def tree(**trainer: Any) -> dict[str, Any]:
    found = copy.deepcopy(TREE)
    found["trainer"] |= trainer
    return found


def of_sweep(directory: Path, *, steps: int = 300) -> Path:
    sweep = reports.make_sweep(
        directory / "sizes",
        SETTINGS,
        [{"state": "done", "values": {"eval_loss": loss}} for loss in LOSSES],
        arguments=("model=gpt2_tiny", "data.paths=[a b.txt]"),
    )
    for point, loss in zip(sweep.points, LOSSES, strict=True):
        rate = point.settings["trainer.learning_rate"]
        lines = reports.logged(steps, level=loss, seed=point.number)
        reports.make_run(sweep.run_dir(point.number), tree(learning_rate=rate), lines)
    return sweep.directory


def report(directory: Path, *paths: Path, out: str = "report.html") -> Path:
    page = directory / out
    assert main(["report", *map(str, paths), f"--out={page}"]) == 0
    return page


def shown(browser: Browser, page: Path) -> None:
    """Open a page with all of its charts in the window, and see that nothing went wrong."""
    browser.look(height=6_000)
    browser.open(page)
    browser.settled()
    assert browser.said() == []
    asked = [url for url in browser.requested() if not url.startswith(("chrome:", "data:"))]
    assert asked == [page.as_uri()], "a request has left the file"


def ink(browser: Browser, chart: str) -> int:
    """Return the pixels of a chart that are neither empty nor grey, as axes and text are."""
    found: int = browser.run(
        """
        const canvas = document.getElementById(`chart-${arguments[0]}`).querySelector("canvas");
        const { width, height } = canvas;
        const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        let count = 0;
        for (let i = 0; i < pixels.length; i += 4) {
          const [r, g, b, a] = pixels.slice(i, i + 4);
          if (a > 100 && Math.max(r, g, b) - Math.min(r, g, b) > 40) count += 1;
        }
        return count;
        """,
        chart,
    )
    return found


def rows(browser: Browser, chart: str) -> list[dict[str, Any]]:
    script = "return report.views.get(arguments[0]).view.data('curves')"
    found: list[dict[str, Any]] = browser.run(f"{script}.map((r) => ({{x: r.x, y: r.y}}))", chart)
    return found


def told_at(browser: Browser, chart: str, x: float, y: float, *, raised: int = 0) -> list[str]:
    """Return what is told where a pointer comes to a place of a chart, so many pixels above it."""
    left, top = browser.run(
        """
        const [name, x, y] = arguments, { view } = report.views.get(name);
        const canvas = document.getElementById(`chart-${name}`).querySelector("canvas");
        const { left, top } = canvas.getBoundingClientRect(), around = view.padding();
        const [dx, dy] = view.origin();
        return [left + around.left + dx + view.scale("x")(x),
          top + around.top + dy + view.scale("y")(y)];
        """,
        *(chart, x, y),
    )
    told = "const told = document.querySelector('.vg-tooltip.visible'); return told?.innerText"
    patient = WebDriverWait(browser.driver, 30)

    def move(*place: int) -> None:
        chain = ActionChains(browser.driver)
        chain.w3c_actions.pointer_action.move_to_location(*place)
        chain.perform()

    move(0, 0)
    patient.until_not(lambda _: browser.run(told))
    move(round(left), round(top) - raised)
    patient.until(lambda _: browser.run(told))
    return [word.strip() for word in browser.run(told).split("\n") if word.strip()]


def turn(browser: Browser, control: str, value: str, event: str = "change") -> None:
    browser.run(
        """
        const [id, value, event] = arguments, control = document.getElementById(id);
        if (control.type === "checkbox") control.checked = value === "on";
        else control.value = value;
        control.dispatchEvent(new Event(event, { bubbles: true }));
        """,
        control,
        value,
        event,
    )
    browser.settled()


def test_the_curves_of_a_run_are_drawn_and_follow_the_controls(
    browser: Browser, tmp_path: Path
) -> None:
    lines = [*reports.logged(3_000, sets=("wiki", "b")), SPIKE]
    run_dir = reports.make_run(tmp_path / "demo", tree(), iter(lines))
    reports.resumed(run_dir, 1_000, "trainer.max_steps=3000")
    shown(browser, report(tmp_path, run_dir))
    names = browser.run("return report.data.charts.map((chart) => chart.name)")
    assert names == [
        *("loss", "eval_loss_of_sets", "learning_rate", "grad_norm", "tokens_per_second"),
        *("mfu", "peak_memory_bytes"),
    ]
    for name in names:
        assert ink(browser, name) > 200, f"{name} is empty"

    smooth = rows(browser, "loss")
    turn(browser, "smoothing", "0", "input")
    raw = rows(browser, "loss")
    assert raw != smooth
    logged = series.read(run_dir / "metrics.jsonl")["loss"]
    part = thinning.thinned(logged)
    for share, drawn in ((0.0, raw), (0.01, smooth)):
        expected = thinning.line(part.steps, part, share)
        # As in pictures, point by point.
        assert [r["x"] for r in drawn][: len(expected)] == [x for x, _ in expected]
        assert [r["y"] for r in drawn][: len(expected)] == pytest.approx(
            [y for _, y in expected], rel=1e-5
        )
    assert min(r["y"] for r in raw) == pytest.approx(min(v for _, v in logged.finite), rel=1e-5)

    scale = "return report.views.get('loss').view.scale(arguments[0]).type"
    assert [browser.run(scale, axis) for axis in "xy"] == ["linear", "linear"]
    step = 1_200
    (held_out,) = [row["y"] for row in raw if row["x"] == step]  # of 3 losses others are drawn
    told = told_at(browser, "loss", step, held_out)
    assert told == ["curve", "held out", "step", "1,200", "value", f"{held_out:.6g}"]
    bottom = browser.run("return report.views.get('loss').view.scale('y').domain()[0]")
    (text,) = told_at(browser, "loss", 700, bottom, raised=5)
    assert text == "spike at step 700: loss 9, gradient norm 40"
    turn(browser, "log-x", "on")
    turn(browser, "log-y", "on")
    assert [browser.run(scale, axis) for axis in "xy"] == ["log", "log"]
    turn(browser, "x", "tokens")
    told = told_at(browser, "loss", step * 8_192, held_out)
    assert told[:3] == ["curve", "held out", "tokens"]
    assert max(r["x"] for r in rows(browser, "loss")) == 3_000 * 8_192
    turn(browser, "x", "times")
    assert max(r["x"] for r in rows(browser, "loss")) == pytest.approx(1_499.5 / 60)
    assert ink(browser, "loss") > 200

    marks = "return report.views.get('loss').view.data(arguments[0]).map((mark) => mark.text)"
    assert browser.run(marks, "restart") == [
        "resumed from checkpoint-1000 with trainer.max_steps=3000"
    ]
    assert browser.run(marks, "checkpoint") == ["checkpoint-1000"]
    turn(browser, "marks", "off")
    names = browser.run("return report.views.get('loss').vgSpec.data.map((data) => data.name)")
    assert not {"restart", "checkpoint", "spike"} & set(names)
    assert browser.said() == []


def test_a_sweep_is_sorted_compared_and_copied(browser: Browser, tmp_path: Path) -> None:
    shown(browser, report(tmp_path, of_sweep(tmp_path)))
    column = """
        const table = document.querySelector("table");
        return [...table.tBodies[0].rows].map((row) => row.cells[arguments[0]].textContent)
    """
    assert browser.run(column, 1) == ["1", "4", "0", "3", "2", "5"], "the best one first"
    browser.run("document.querySelectorAll('th button')[2].click()")
    assert browser.run(column, 3) == ["0.0001"] * 2 + ["0.0003"] * 2 + ["0.001"] * 2
    browser.run("document.querySelectorAll('th button')[2].click()")
    assert browser.run(column, 3) == ["0.001"] * 2 + ["0.0003"] * 2 + ["0.0001"] * 2
    assert (
        browser.run("return document.querySelector('[aria-sort]').textContent") == "learning_rate"
    )

    for chart in ("parallel_eval_loss", "scatter_eval_loss_learning_rate", "loss", "eval_loss"):
        assert ink(browser, chart) > 100, chart
    before = len(rows(browser, "loss"))
    browser.run("document.querySelector('[data-run]').click()")
    browser.settled()
    assert len(rows(browser, "loss")) == before * 5 // 6
    turn(browser, "colour", "1")
    assert ink(browser, "loss") > 100

    browser.run("document.querySelector('[data-copies]').focus()")
    assert browser.run("return document.activeElement.textContent") == "Copy"
    command = browser.run("return document.querySelector('.command pre').textContent")
    assert command.endswith(
        "train model=gpt2_tiny 'data.paths=[a b.txt]' trainer.learning_rate=0.0003 strategy=zero2"
    )
    browser.run("document.querySelector('[data-copies]').click()")
    browser.settled()
    assert browser.run("return document.querySelector('[data-copies]').textContent") == "Copied"


def test_names_of_runs_are_text_whatever_they_hold(browser: Browser, tmp_path: Path) -> None:
    """In tables, legends, tooltips and the data of the charts."""
    name = HOSTILE.replace("/", "\N{DIVISION SLASH}")
    for each in (name, "tame"):
        run_dir = reports.make_run(
            tmp_path / "runs" / each, tree() | {"name": "x"}, reports.logged(20)
        )
        reports.resumed(run_dir, 10, HOSTILE)
        with (run_dir / "metrics.jsonl").open("a") as file:
            place = {"step": 20, "tokens": 1, "time": reports.BEGUN}
            file.write(json.dumps(place | {f"eval_loss/{HOSTILE}": 3.0, "</script>": None}) + "\n")
    page = report(tmp_path, tmp_path / "runs")
    shown(browser, page)
    assert browser.run("return document.title") == "Runs of runs"
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelectorAll('script').length") == 3
    assert name in browser.run("return document.body.textContent")
    # Even a script that got into the page would not run.
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'owned = 1';"
        "document.body.append(s)"
    )
    assert browser.run("return typeof owned") == "undefined"
    assert any("Content Security Policy" in line for line in browser.said())


@pytest.mark.parametrize("lines", [[], [{"loss": 3.0}], [{"loss": None}], [{"loss": None}] * 3])
def test_a_run_of_hardly_anything_has_a_page(
    lines: list[dict[str, Any]], browser: Browser, tmp_path: Path
) -> None:
    placed = (
        {"step": i + 1, "tokens": i, "time": reports.BEGUN + i} | line
        for i, line in enumerate(lines)
    )
    shown(browser, report(tmp_path, reports.make_run(tmp_path / "new", tree(), placed)))
    text = browser.run("return document.body.textContent")
    is_drawn = any(line["loss"] is not None for line in lines)
    assert ("Nothing has been logged yet that a curve could show." in text) == (not is_drawn)
    assert bool(browser.run("return document.querySelector('canvas')")) == is_drawn


def test_the_tables_need_no_script_and_the_page_fits_a_telephone(
    browser: Browser, tmp_path: Path
) -> None:
    page = report(tmp_path, of_sweep(tmp_path, steps=20))
    for dark in (False, True):
        browser.look(width=390, height=4_000, dark=dark)
        browser.open(page)
        browser.settled()
        assert browser.run("return document.documentElement.scrollWidth") == 390
        right = "Math.max(...[...document.querySelectorAll('.chart:not(.scrolls) canvas')].map("
        assert browser.run(f"return {right}(c) => c.getBoundingClientRect().right))") <= 390
        ground = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    drive = browser.driver.execute_cdp_cmd
    drive("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(page)
        table = browser.driver.find_element("css selector", "table")
        assert "zero2" in table.text
        assert "The curves need JavaScript" in browser.driver.find_element("tag name", "body").text
        assert not browser.driver.find_element("css selector", ".controls").is_displayed()
    finally:
        drive("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.slow
def test_a_hundred_runs_of_ten_thousand_points(browser: Browser, tmp_path: Path) -> None:
    text = "".join(f"{json.dumps(line)}\n" for line in reports.logged(10_000, every=200))
    for number in range(100):
        run_dir = reports.make_run(
            tmp_path / "many" / str(number), tree(learning_rate=number / 1e5)
        )
        (run_dir / "metrics.jsonl").write_text(text)
    page = report(tmp_path, tmp_path / "many")
    assert page.stat().st_size < 8_000_000
    shown(browser, page)
    assert "groups of up to 34 neighbours are drawn" in browser.run(
        "return document.body.textContent"
    )
    assert len(rows(browser, "loss")) == 100 * 295
    assert ink(browser, "loss") > 200
