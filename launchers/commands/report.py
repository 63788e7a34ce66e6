"""`shardwright report`: runs and sweeps as one page to look at, and as pictures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shardwright.launchers.messages import error_text
from shardwright.launchers.reporting import curves, facts, page, pictures, range_tests
from shardwright.launchers.reporting.facts import Run, Standing
from shardwright.launchers.reporting.importance import importance
from shardwright.launchers.reporting.page import Report, Swept
from shardwright.launchers.reporting.payload import payload
from shardwright.launchers.reporting.range_tests import Tested
from shardwright.launchers.reporting.sweep_charts import SweepChart, sweep_charts
from shardwright.train import program
from shardwright.train.charts import drawing
from shardwright.train.durable import write_text
from shardwright.train.errors import FAILED, UserError
from shardwright.train.paths import absolute
from shardwright.train.process import exhausted
from shardwright.train.units import counted, size


def main(arguments: Sequence[str]) -> int:
    """Write the report, and the pictures where they are asked for."""
    options = parser().parse_args(arguments)
    paths = [Path(absolute(path)) for path in options.directories]
    out = Path(absolute(options.out)) if options.out else Path.cwd() / default_name(paths)
    _check_out(out, Path(absolute(options.png)) if options.png else None)
    again = program.command("report", *arguments)
    report = _report(paths, again)
    try:
        library = drawing.javascript()
        with _writing("out", out):
            write_text(out, page.page(report, library))
        print(f"{out}: {counted(len(report.runs), 'run')}, {size(out.stat().st_size)}")
        if options.png:
            specs = pictures.pictures(
                report.charts,
                report.choices,
                _whole_charts(report.sweeps, report.range_tests),
                report.runs,
                report.payload["state"],
            )
            with _writing("png", Path(absolute(options.png))):
                written = pictures.write(Path(absolute(options.png)), specs)
            print(f"{absolute(options.png)}: {counted(len(written), 'picture')}")
    except drawing.CannotDraw as error:
        print(error_text(f"nothing can be drawn here: {error}"), file=sys.stderr)
        return FAILED
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright report`."""
    found = argparse.ArgumentParser(
        prog="shardwright report",
        description="Render runs and sweeps as one HTML file that is read without a network: "
        "curves, what differs, and of a sweep which settings mattered. It tells of the moment at "
        "which it is made; nothing is written into the directories of runs.",
        epilog="Examples: shardwright report runs/demo-20260131-120000; shardwright report "
        "sweeps/a sweeps/b --out both.html --png pictures.",
    )
    found.add_argument("directories", nargs="+", metavar="RUN_DIR|SWEEP_DIR")
    found.add_argument(
        "--out", metavar="FILE.html", help="default: report-NAME.html in the working directory"
    )
    found.add_argument("--png", metavar="DIR", help="draw each chart as a PNG into DIR, too")
    return found


def default_name(paths: Sequence[Path]) -> str:
    """Return what a report is called that was given no name. Pure."""
    return f"report-{paths[0].name}.html" if len(paths) == 1 else "report.html"


def _check_out(out: Path, png: Path | None) -> None:
    """Raise UserError where the report cannot take this name, before anything is read."""
    if png is not None and png.exists() and not png.is_dir():
        raise UserError(f"--png={png} is a file; give a directory for the pictures")
    if out.is_dir():
        raise UserError(f"--out={out} is a directory; give the name of a file, such as report.html")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}; make it first")
    if out.exists() and page.GENERATOR not in out.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{out} exists and is no report; give another name by --out")


@contextmanager
def _writing(flag: str, place: Path) -> Iterator[None]:
    """Turn what a place does not allow into a UserError that names it and its flag."""
    try:
        yield
    except OSError as error:
        if exhausted.explained(error) is not None:
            raise  # a full disk, of which all commands say the same
        raise UserError(
            f"--{flag}={place} cannot be written ({error.strerror}); give a place that is writable "
            f"by --{flag}"
        ) from None


def _report(paths: Sequence[Path], again: str) -> Report:
    runs, standings = facts.gathered(paths, Path.cwd())
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    shown = curves.charts_of(runs)
    choices = curves.choices(runs, standings)
    several = len(standings) > 1
    sweeps = [_swept(s, f"{i}_" if several else "") for i, s in enumerate(standings)]
    tests = range_tests.tested(runs)
    return Report(
        title=_title(paths, runs, standings),
        made=made,
        again=again,
        runs=runs,
        charts=shown,
        choices=choices,
        sweeps=sweeps,
        range_tests=tests,
        payload=payload(runs, shown, choices, _whole_charts(sweeps, tests)),
    )


def _whole_charts(sweeps: Sequence[Swept], tests: Sequence[Tested]) -> list[SweepChart]:
    """Return the charts that no control of the page changes."""
    of_sweeps = [chart for swept in sweeps for chart in swept.charts]
    return [*of_sweeps, *([range_tests.chart(tests)] if tests else [])]


def _title(paths: Sequence[Path], runs: Sequence[Run], standings: Sequence[Standing]) -> str:
    if len(paths) == 1:
        kind = "Sweep" if standings else "Run" if len(runs) == 1 else "Runs of"
        return f"{kind} {paths[0].name}"
    return (
        f"{counted(len(standings), 'sweep')}, {counted(len(runs), 'run')}"
        if standings
        else (counted(len(runs), "run"))
    )


def _swept(standing: Standing, prefix: str) -> Swept:
    importances = []
    for objective in standing.sweep.objectives:
        known = [trial for trial in standing.trials if objective.metric in trial.values]
        importances.append(
            importance(
                [trial.point.settings for trial in known],
                [trial.values[objective.metric] for trial in known],
                objective.direction,
            )
        )
    best, command = standing.best, None
    if best is not None:
        words = [*standing.sweep.arguments, *best.point.overrides]
        command = program.command("train", *words)
    charts = [
        replace(chart, name=prefix + chart.name) for chart in sweep_charts(standing, importances)
    ]
    return Swept(standing, importances, charts, command)
