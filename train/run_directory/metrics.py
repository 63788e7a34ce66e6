"""metrics.jsonl: what a run has logged, read in one place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import METRICS

TAIL_BYTES = 2**16
"""Of metrics.jsonl; a line has some 250, or one of statistics 70 for each number of a module."""
MOST_TAIL_BYTES = 2**25
"""Of what is searched for a loss: lines of statistics may lie behind it."""

CHANGED_CODE = "changed_code"
"""Key of a line of metrics.jsonl: a part of the user's own has changed since the start before."""


def tail(path: Path) -> list[dict[str, Any]]:
    """Return the last lines of a file of JSON lines; one that is being written is left out.

    They go back to a line with a loss, where there is one that is not far.
    """
    length = TAIL_BYTES
    while True:
        lines, is_whole = _last(path, length)
        if is_whole or length >= MOST_TAIL_BYTES or any("loss" in line for line in lines):
            return lines
        length *= 8


def _last(path: Path, length: int) -> tuple[list[dict[str, Any]], bool]:
    """Return the lines in the last bytes of a file, and whether that is all of it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - length))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return [], True
    lines = []
    for line in text.splitlines()[size > length :]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        lines += [entry] if isinstance(entry, dict) else []
    return lines, size <= length


def lines(path: Path) -> list[dict[str, Any]]:
    """Return what each line of a file of JSON lines says; nothing where there is no such file.

    A line that cannot be read, such as one that a full disk has cut off, is left out.
    """
    found = []
    # A link to a device has no end.
    with suppress(OSError):
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def last_step(path: Path) -> int:
    """Return the step of the last line of a metrics.jsonl, 0 where there is none."""
    return next((line["step"] for line in reversed(tail(path)) if "step" in line), 0)


@dataclass(frozen=True)
class HeldOut:
    """A run's losses on held-out documents: the best one and the last."""

    best: float
    best_step: int
    last: float
    last_step: int


def held_out(path: Path) -> HeldOut | None:
    """Return the held-out losses of a metrics.jsonl, of which only lines with one are parsed."""
    found: list[tuple[float, int]] = []
    for line in _with(b'"eval_loss":', path):
        with suppress(ValueError, KeyError, TypeError):
            found.append((float(line["eval_loss"]), int(line["step"])))
    if not found:
        return None
    return HeldOut(*min(found), *found[-1])


@dataclass(frozen=True)
class SpikeLine:
    """What a line of metrics.jsonl says of a spike."""

    at_step: int
    """Of the line: of the spike, or of the checkpoint to which the run went back."""
    text: str


def spikes(path: Path) -> list[SpikeLine]:
    """Return the spikes in a metrics.jsonl, of which only lines with one are parsed."""
    found = []
    for line in _with(b'"spike":', path):
        with suppress(ValueError, KeyError, TypeError):
            step, loss, norm = line["spike_step"], line["spike_loss"], line["spike_grad_norm"]
            text = f"spike at step {step:,}: loss {loss:.4g}, gradient norm {norm:.4g}"
            if (skipped := line.get("spike_skipped_samples")) is not None:
                text += f"; went back to step {line['step']:,}, past {skipped:,} samples"
            elif line["spike"] == "skip_update":
                text += "; its update was left out"
            found.append(SpikeLine(int(line["step"]), text))
    return found


def note_changed_code(run_dir: Path, step: int, text: str) -> None:
    """Leave a line that says which code of the user's own is another one behind a step."""
    with (run_dir / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, CHANGED_CODE: text}) + "\n")


def changed_code(path: Path) -> list[tuple[int, str]]:
    """Return step and text of these lines."""
    found = []
    for line in _with(f'"{CHANGED_CODE}":'.encode(), path):
        with suppress(ValueError, KeyError, TypeError):
            found.append((int(line["step"]), str(line[CHANGED_CODE])))
    return found


def _with(key: bytes, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl that have a key."""
    try:
        data = path.read_bytes()
    except OSError:
        return
    at = data.find(key)
    while at >= 0:
        begins, ends = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
        ends = len(data) if ends < 0 else ends
        with suppress(ValueError):
            line = json.loads(data[begins:ends])
            if isinstance(line, dict):
                yield line
        at = data.find(key, ends)


def trim_metrics(run_dir: Path, step: int = 0, *, is_evaluated: bool = False) -> None:
    """Drop the lines of metrics.jsonl that are written again after a step: all where that is 0.

    Those are the lines of later steps, those that a kill has cut short, and an evaluation that came
    after the checkpoint of the same step, at the end of a run or where one was stopped:
    ``is_evaluated`` says that the checkpoint knows its own.
    """
    path = run_dir / METRICS
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            entry = json.loads(line)
            again = entry["step"] == step and "eval_loss" in entry and not is_evaluated
            if line.endswith("\n") and entry["step"] <= step and not again:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))


@dataclass(frozen=True)
class Point:
    """What was measured at one step; None where it was not."""

    step: int
    tokens: int
    loss: float | None = None
    """Of training, the mean since the point before."""
    eval_loss: float | None = None


@dataclass(frozen=True)
class Curve:
    """The points of a run in order, and how long the training between them took."""

    points: tuple[Point, ...]
    training_seconds: float | None
    """Evaluations, saves and pauses left out."""
    last_logged_at: float | None
    """Seconds since 1970."""


NO_CURVE = Curve((), None, None)


def read(metrics: Path, until_step: int | None = None) -> Curve:
    """Return the curve that a metrics.jsonl holds, up to a step; an empty one where there is none.

    Lines that cannot be read are skipped.
    """
    points: dict[int, Point] = {}
    seconds, tokens_before, logged_at = 0.0, 0, None
    for entry in lines(metrics):
        try:
            step, tokens, logged_at_line = entry["step"], entry["tokens"], entry["time"]
        except KeyError:
            continue
        if until_step is not None and step > until_step:
            continue
        before = points.get(step, Point(step, tokens))
        loss, eval_loss = entry.get("loss"), entry.get("eval_loss")
        points[step] = Point(
            step,
            tokens,
            before.loss if loss is None else loss,
            before.eval_loss if eval_loss is None else eval_loss,
        )
        if speed := entry.get("tokens_per_second"):
            seconds += (tokens - tokens_before) / speed
            tokens_before = tokens
        logged_at = logged_at_line
    return Curve(tuple(points[step] for step in sorted(points)), seconds or None, logged_at)
