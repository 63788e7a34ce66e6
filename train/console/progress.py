"""What a person sees of work that takes a while: bars in a terminal, lines behind a pipe.

A process shows nothing unless it was told where, by `shown_on`: of a run's ranks only the first is.
"""

from __future__ import annotations

import logging
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from shardwright.train.units import duration, size

if TYPE_CHECKING:  # most commands draw no bar
    from tqdm import tqdm

LIFE_SECONDS = 9.0
"""Between two lines behind a pipe, whatever does not come to an end: a sign of life."""
BRIEF_SECONDS = 1.0
"""What comes again and again is shown where it takes longer than this."""
NOTED_SECONDS = 2.0
"""Between two notes of how far it is, for those who look from elsewhere."""
REFRESH_SECONDS = 0.5
"""Between two drawings of a bar, so that its clock keeps running."""
_COUNTING = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
)
"""Of a bar, where counts are to have room within 80 columns."""
LEAST_BAR, GAP = 8, "  "
"""Columns that a bar keeps beside its facts, and what is between them."""
BEGAN = "SHARDWRIGHT_BEGAN"
"""Variable: when a launcher said that it starts ranks, in seconds of the epoch."""

Item = TypeVar("Item")

_console: TextIO | None = None
_noted_in: Path | None = None
"""A file that tells others what is shown now."""
_told: Callable[[Phase], object] | None = None
"""Hears of each phase how far it is, for who shows it elsewhere."""
_open: list[Phase] = []
"""What is shown now, the innermost last."""
_last_lines: dict[str, float] = {}
"""When each kind of phase last had a line, on the monotonic clock."""
_lock = threading.RLock()


def is_terminal(console: TextIO) -> bool:
    """Return whether a bar can be drawn: mpirun gives ranks a terminal without any columns.

    What calls itself dumb shows the characters that draw a line again.
    """
    if os.environ.get("TERM") == "dumb":
        return False
    try:
        return console.isatty() and os.get_terminal_size(console.fileno()).columns > 0
    except OSError:  # closed in between
        return False


@contextmanager
def shown_on(
    console: TextIO | None,
    noted_in: Path | None = None,
    told: Callable[[Phase], object] | None = None,
) -> Iterator[None]:
    """Show this process's phases there inside of the block.

    How far the innermost is stands in the file ``noted_in``, too, which is there as long, and
    ``told`` hears of it, from any thread: when it begins, every now and then, and when it ends.
    """
    global _console, _noted_in, _told
    before = _console, _noted_in, _told
    _console, _noted_in, _told = console, noted_in, told
    _last_lines.clear()
    try:
        yield
    finally:
        end_all()
        _console, _noted_in, _told = before
        if noted_in is not None:
            with suppress(OSError):
                noted_in.unlink()


def write(text: str, console: TextIO | None = None) -> None:
    """Print a line above the bars, if there are any; nothing where nothing is shown.

    In a terminal one that is too wide is broken between words.
    """
    console = console or _console
    if console is not None:
        from tqdm import tqdm

        if is_terminal(console):
            columns = os.get_terminal_size(console.fileno()).columns
            text = "\n".join(wrapped(line, columns) for line in text.split("\n"))
        with _lock:
            tqdm.write(text, file=console)
            console.flush()


def wrapped(line: str, columns: int) -> str:
    """Return a line in pieces that fit, or as it is where it is to be copied: a command. Pure."""
    if len(line) <= columns or "shardwright " in line:
        return line
    parts = textwrap.wrap(
        line.strip(),
        columns,
        initial_indent=line[: len(line) - len(line.lstrip())],
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(parts)


class LogLines(logging.Handler):
    """Prints what is logged, above the bars."""

    def __init__(self, console: TextIO) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        write(self.format(record), self._console)


class Phase:
    """Something that takes a while, until `end`. Use `phase`, or `begin` where no block fits."""

    def __init__(
        self,
        name: str,
        *,
        total: float | None = None,
        unit: str = "",
        starts_at: float = 0,
        leave: bool = False,
        shows_start: bool = True,
        comes_again: bool = False,
        has_bar_name: bool = True,
        kind: str | None = None,
        console: TextIO | None = None,
        silent_seconds: float = 0,
    ) -> None:
        """``total`` counts in ``unit``, "B" for bytes; so does what is `advance`d.

        ``leave`` keeps a terminal's bar once it has ended. ``shows_start`` has the name shown at
        once behind a pipe, and else with the first sign of life. What ``comes_again`` is shown
        where it takes a while only, and behind a pipe not more often than other signs of life,
        those of the same ``kind`` counted together.
        ``console`` is another place than that of `shown_on`. It began ``silent_seconds`` ago, when
        somebody else said so.
        """
        self.name, self.total, self.unit = name, total, unit
        self.done = self._starts_at = starts_at
        self.note = ""
        """What else there is to say."""
        self.facts: Sequence[str] = ()
        """The same in parts, the most important first: a bar has as many as fit."""
        self.counts: Mapping[str, int] = {}
        """What else is counted, by what it is called."""
        self._leave, self._shows_start, self._comes_again = leave, shows_start, comes_again
        self._began = self._shown_at = time.monotonic() - silent_seconds
        self._kind = kind or name
        self._bar_name = name if has_bar_name else None
        self._bar: tqdm | None = None
        self._console = console or _console
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._was_shown = False
        self.is_drawn = self._console is not None and is_terminal(self._console)
        """As a bar, and not as lines."""
        if self._console is None and _told is None:
            return
        if not comes_again:
            self._show()
            self._say()
        _open.append(self)
        self._thread = threading.Thread(target=self._live, name="progress", daemon=True)
        self._thread.start()

    def advance(self, count: float = 1) -> None:
        """Count on, from any thread."""
        with _lock:
            self.done += count

    def at(
        self, done: float, note: str | None = None, counts: Mapping[str, int] | None = None
    ) -> None:
        """Set how far it is, what else there is to say, and what else is counted."""
        self.done = done
        if note is not None:
            self.note = note
        if counts is not None:
            self.counts = counts

    @property
    def starts_at(self) -> float:
        """How much of it was there already, which took no time."""
        return self._starts_at

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def skip(self, count: float) -> None:
        """Count on what was there already, which tells nothing of the rate."""
        with _lock:
            self.done += count
            self._starts_at += count
            if self._bar is not None:
                self._bar.initial += count

    def refresh(self) -> None:
        """Draw the bar, if there is one, without waiting for its next turn."""
        with _lock:
            if self._bar is not None:
                self._draw()

    def had_a_line(self) -> None:
        """Count a line that somebody else has printed as a sign of life."""
        self._shown_at = time.monotonic()

    def end(self) -> None:
        """End it; a second time changes nothing."""
        self._is_over.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._was_shown:
            self._say()
        with _lock:
            with suppress(ValueError):
                _open.remove(self)
            if self._bar is not None:
                self._draw()
                self._bar.close()
                self._bar = None
            for outer in _open:  # its own silence begins here
                outer.had_a_line()

    # --- what is shown ----------------------------------------------------------------------------

    def _live(self) -> None:
        if self._comes_again:
            if self._is_over.wait(BRIEF_SECONDS):
                return
            with _lock:
                self._show()
        noted_at = 0.0
        while not self._is_over.wait(REFRESH_SECONDS):
            with _lock:
                if self is _open[-1]:
                    self._say()
                    if time.monotonic() - noted_at >= NOTED_SECONDS:
                        noted_at = time.monotonic()
                        self._note()
                if self.is_drawn:
                    self._draw()
                elif self is _open[-1] and time.monotonic() - self._shown_at >= LIFE_SECONDS:
                    self._line(self.line())

    def _say(self) -> None:
        if _told is not None:
            _told(self)

    def _note(self) -> None:
        """Tell others how far it is, who see the last whole line."""
        if _noted_in is None:
            return
        temporary = _noted_in.with_name(f".{_noted_in.name}-{os.getpid()}")
        with suppress(OSError):  # a full disk: it is shown here
            temporary.write_text(self.line(), encoding="utf-8")
            os.replace(temporary, _noted_in)

    def _show(self) -> None:
        """Show it for the first time."""
        self._was_shown = True
        if self._console is None:
            return
        if self.is_drawn:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._bar_name,
                total=self.total,
                initial=self._starts_at,
                unit=f" {_plural(self.unit)}" if self.unit not in ("", "B", "step") else self.unit,
                unit_scale=self.unit == "B" or (self.total or 1e6) >= 1e6,
                file=self._console,
                dynamic_ncols=True,
                leave=self._leave,
                bar_format=None if self.unit else "{desc} [{elapsed}]{postfix}",
                miniters=0,
                mininterval=0,
            )
            self._bar.start_t -= time.monotonic() - self._began
        elif self._shows_start:
            now = time.monotonic()
            if now - _last_lines.get(self._kind, -LIFE_SECONDS) >= LIFE_SECONDS:
                self._line(self.name)

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.n = self.done
        if self.counts and self.total:
            self._bar.bar_format = _COUNTING
        said = self._said(_short) or self._fitting_facts()
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.refresh()

    def _fitting_facts(self) -> str:
        """Return the facts for which there is room beside a bar that is still one."""
        assert self._bar is not None
        known = self._bar.format_dict
        rest = self._bar.format_meter(**{**known, "ncols": 0, "postfix": None})
        room = (known["ncols"] or len(rest)) - len(rest) - LEAST_BAR
        shown = list(self.facts)
        while shown and len(GAP.join(shown)) > room:
            shown.pop()
        return GAP.join(shown)

    def _line(self, text: str) -> None:
        self._shown_at = _last_lines[self._kind] = time.monotonic()
        write(text, self._console)

    def _said(self, written: Callable[[float], str] = "{:,}".format) -> str:
        counts = (f"{written(count)} {what}" for what, count in self.counts.items())
        return ", ".join(filter(None, [self.note, *counts]))

    def line(self) -> str:
        """Return how far it is, as it is printed behind a pipe."""
        seconds = time.monotonic() - self._began
        facts = [said] if (said := self._said()) else []
        if self.unit:
            made = self.done - self._starts_at
            rate = made / max(seconds, 1e-9)
            facts.append(_counted(self.done, self.total, self.unit))
            if made:
                facts.append(_rate(rate, self.unit))
                if self.total:
                    facts.append(f"{duration((self.total - self.done) / rate)} left")
        if not self.unit or not self.done - self._starts_at:
            facts.append(duration(seconds))
        return f"{self.name}: {', '.join(facts)}"


begin = Phase


def now(note: str) -> None:
    """Say what the outermost phase is at."""
    if _open:
        _open[0].note = note


def end_all() -> None:
    """End every phase, the innermost first."""
    for shown in reversed(_open[:]):
        shown.end()


@contextmanager
def phase(name: str, **options: object) -> Iterator[Phase]:
    """Show a phase inside of the block; options as `Phase` takes them."""
    shown = Phase(name, **options)  # type: ignore[arg-type]
    try:
        yield shown
    finally:
        shown.end()


def over(items: Iterable[Item], name: str, **options: object) -> Iterator[Item]:
    """Yield the items, with a phase around them that counts them."""
    with phase(name, **options) as shown:
        for item in items:
            yield item
            shown.advance()


def _counted(done: float, total: float | None, unit: str) -> str:
    if unit == "B":
        return size(done) + (f" of {size(total)}" if total else "")
    return _many(done) + (f" of {_many(total)}" if total else "") + f" {_plural(unit)}"


def _rate(rate: float, unit: str) -> str:
    """Return a rate, or where it is slow the time of one. Pure."""
    if unit == "B":
        return f"{size(rate)}/s"
    if rate < 1:
        return f"{1 / rate:.1f} s a {unit}"
    return f"{rate:.1f} a second" if rate < 100 else f"{_many(rate)} a second"


def _short(count: float) -> str:
    """Return a count in a few characters, for which a bar has room. Pure."""
    from tqdm import tqdm

    return f"{count:.0f}" if count < 1000 else tqdm.format_sizeof(count)


def _many(count: float) -> str:
    return f"{count:,.0f}" if count < 1e6 else f"{count / 1e6:,.1f} million"


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"
