"""Train from a cell of a notebook: ranks of this machine, with a live line and the curve below."""

from __future__ import annotations

import html
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from shardwright.launchers import api, runs
from shardwright.launchers.composition.compose import quoted
from shardwright.launchers.watching import line, watch
from shardwright.train import config as run_config
from shardwright.train.charts import charts, drawing, series
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, RESUMABLE, UserError, not_installed
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import METRICS, RUN_CONFIG

LOOK_SECONDS = 1.0
"""Between two looks at a run's files."""
DRAW_SECONDS = 5.0
"""Between two drawings of its curve, each by a process of its own."""
COLUMNS = 100
LAST_LINES = 12
"""Of what the run has printed, where it ends otherwise than it was to."""

Show = Callable[[str], object]


def notebook_launch(
    *overrides: str, ranks: int | None = None, config_dir: str | Path | None = None
) -> api.Run:
    """Train a run on ranks of this machine and return it, its line and its curve in the cell.

    ``overrides`` are those of `shardwright train`; ``ranks`` says how many processes, which follow
    from the launcher else (a GPU each). Interrupting the cell has the run save and stop: the run
    that is returned can be resumed. Raises UserError on bad input, RunFailed where it fails.
    """
    show = _display()
    if ranks is not None:
        overrides = (*overrides, "launcher=torchrun", f"launcher.nproc_per_node={ranks}")
    config = api.compose(*overrides, config_dir=config_dir)
    _check_is_here(config)
    run_dir = Path(str(config.run_dir))
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    words = ["train", *flags, *overrides, f"run_dir={quoted(str(run_dir))}"]
    with tempfile.TemporaryFile() as output:
        code = _watched(words, run_dir, output, show)
        output.seek(0)
        printed = output.read().decode(errors="replace").splitlines()
    if code == BAD_INPUT:
        raise UserError("\n".join(_said(printed)).removeprefix("error: "))
    show(picture(run_dir, None, ended=printed[-LAST_LINES:] if code else None))
    if code not in (0, RESUMABLE):
        raise api.RunFailed(run_dir, code)
    return api.Run(run_dir)


def _display() -> Show:
    """Return what shows HTML in the cell, in place of what it has shown before."""
    try:
        from IPython.display import HTML, display
    except ImportError:
        raise UserError(not_installed("shardwright.notebook_launch", "ipython")) from None
    handle: Any = display(HTML("<pre>starting</pre>"), display_id=True)

    def show(text: str) -> None:
        if handle is not None:  # in no notebook there is nothing to be updated
            handle.update(HTML(text))

    return show


def _check_is_here(config: RunConfig) -> None:
    if config.launcher.is_elsewhere or config.launcher.is_job or config.launcher.nodes > 1:
        raise UserError(
            f"launcher={config.launcher.kind} starts ranks elsewhere, and notebook_launch those of "
            "this machine; choose launcher=local or launcher=torchrun, or call shardwright.train"
        )


def _watched(words: Sequence[str], run_dir: Path, output: IO[bytes], show: Show) -> int:
    """Run a command, show its run meanwhile, and return its exit code."""
    child = subprocess.Popen(
        [sys.executable, "-m", "shardwright", *words],
        env={**os.environ, **package_environment(os.environ)},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # A kernel that is interrupted sends the signal to all of its group, and twice it kills.
        start_new_session=True,
    )
    curve, drawn_at = None, -DRAW_SECONDS
    try:
        while True:
            try:  # an interrupt may come at any line
                if (code := child.poll()) is not None:
                    return code if code >= 0 else 128 - code
                if time.monotonic() - drawn_at >= DRAW_SECONDS:
                    curve, drawn_at = drawn(run_dir), time.monotonic()
                show(picture(run_dir, curve))
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_SECONDS)
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def picture(run_dir: Path, curve: str | None, *, ended: Sequence[str] | None = None) -> str:
    """Return the HTML that a cell shows of a run: its line, its curve, the end of its output."""
    curve = curve or drawn(run_dir) or ""
    lines = "".join(f"{text}\n" for text in ended or ())
    output = f"<pre>{html.escape(lines)}</pre>" if lines else ""
    return f"<pre>{html.escape(live_line(run_dir))}</pre>{curve}{output}"


def live_line(run_dir: Path) -> str:
    """Return what there is to say of a run now, in a line."""
    if not (run_dir / RUN_CONFIG).is_file():
        return f"{run_dir}  starting"
    config = run_config.load(run_dir)
    look = runs.look(run_dir, config)
    found, share, _ = watch.status(run_dir, config, look)
    if look.state.is_over:
        return f"{run_dir}  {look.state.text}  {line.fitted(found, COLUMNS)}"
    return f"{run_dir}\n{line.drawn(found, share, COLUMNS)}"


def drawn(run_dir: Path) -> str | None:
    """Return a run's curves as an SVG; None where there is nothing to draw yet, or by nothing."""
    found = series.read(run_dir / METRICS)
    spec = charts.losses(found.get("loss"), found.get("eval_loss"))
    if spec is None:
        return None
    try:
        return drawing.svg(spec)
    except drawing.CannotDraw:
        return None


def _said(printed: Sequence[str]) -> list[str]:
    """Return what is wrong, of all that was printed: from the line that says so."""
    first = next((i for i, text in enumerate(printed) if text.startswith("error: ")), 0)
    return list(printed[first:])
