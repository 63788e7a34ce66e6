"""Have the hosts of a hostfile prepare data: each makes a part, and the first joins them."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.launchers.hosts.remote import (
    SHELL_FAILED,
    Ended,
    Printed,
    Remote,
    heard,
    script,
)
from shardwright.launchers.kinds.launcher import OF_PYTHON
from shardwright.launchers.machine import directories, handed_on
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig
from shardwright.train.console import progress
from shardwright.train.console.reports import Far, Said
from shardwright.train.data.sources.corpus import shards_of
from shardwright.train.data.tokens.cache import cache_root
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE
from shardwright.train.process import signals
from shardwright.train.process.stop_request import watch_for_stop
from shardwright.train.program import package_environment
from shardwright.train.run_directory import owner
from shardwright.train.run_directory.names import DATA_JSON, LOGS, PROGRESS
from shardwright.train.units import counted

OUTER, TOKENISING = "preparing the data", "tokenising"
"""What a preparation calls its phases: all of it, and that which nodes share."""


class Outcome(NamedTuple):
    """How a preparation has ended."""

    code: int
    noted: Mapping[str, Any] | None = None
    """What data.json says, where all is there."""
    stopped_by: str | None = None


class Plan(NamedTuple):
    """Who does what."""

    hosts: tuple[str, ...]
    """Those that make a part each; none where one does it all."""
    first: str
    """The one that joins them."""
    size_bytes: int
    """Of all that they share."""


def planned(config: RunConfig) -> Plan:
    """Return which hosts make a part of a corpus: no more than it has shards."""
    hosts = list(launcher_of(config).hosts())
    shards = shards_of(config.data, cache_root(config.data))
    size_bytes = sum(shard.size_bytes for shard in shards)
    parts = hosts[: len(shards)] if len(shards) > 1 else []
    return Plan(tuple(parts), hosts[0], size_bytes)


def show(config: RunConfig) -> str:
    """Return the commands of all nodes, as `--dry-run` prints them."""
    plan, run_dir = planned(config), Path(str(config.run_dir))
    marker = cache_root(config.data) / "MARKER"
    calls = [command(config, host, run_dir, marker, part) for host, part in _parts(plan)]
    calls.append(command(config, plan.first, run_dir, marker))
    return "# commands\n" + "\n".join(map(shlex.join, calls))


def command(
    config: RunConfig,
    host: str,
    run_dir: Path,
    shared: Path,
    part: str | None = None,
) -> list[str]:
    """Return the argv that has a host make a part, or without one join all of them."""
    words = [sys.executable, "-m", "shardwright.train.data", str(run_dir), f"--shared={shared}"]
    variables = {
        **package_environment(os.environ),
        **OF_PYTHON,
        **handed_on.places(os.environ),
        **owner.inherited(None),
    }
    what = script([*words, *([f"--part={part}"] if part else [])], Path.cwd(), variables)
    return launcher_of(config).on_host(host, what)


def over_hosts(config: RunConfig, *, is_generated: bool) -> Outcome:
    """Prepare the data of one run on all hosts of its launcher, in a directory that does not stay.

    They share it, as they do the cache.
    """
    signals.install()
    # Another node may have another default.
    data = config.data.model_copy(update={"cache_dir": str(cache_root(config.data))})
    config = config.model_copy(update={"data": data})
    plan = planned(config)
    with ExitStack() as stack:

        def claim(run_dir: Path) -> None:
            stack.enter_context(owner.owned(run_dir, _say, doing=owner.PREPARING))

        config, made = directories.create_named(config, is_generated=is_generated, claim=claim)
        run_dir = Path(str(config.run_dir))
        try:
            if plan.hosts:
                what = f"each of {counted(len(plan.hosts), 'node')} makes a part"
            else:
                what = f"the corpus is not divided, and {plan.first} prepares all of it"
            _say(f"{run_dir}: {what}")
            with (
                watch_for_stop(run_dir),
                progress.shown_on(sys.stderr, run_dir / LOGS / PROGRESS),
                progress.phase(OUTER),
                _marker(cache_root(data)) as shared,
            ):
                return _Preparation(config, run_dir, plan, shared).run()
        finally:
            stack.close()  # an open file would keep the directory on NFS
            directories.take_back(made)


def _say(text: str) -> None:
    progress.write(text, sys.stderr)


@contextmanager
def _marker(root: Path) -> Iterator[Path]:
    """Make a file in the cache by which other nodes tell that theirs is the same."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".shared-", dir=root)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        with suppress(OSError):
            os.unlink(name)


def _parts(plan: Plan) -> list[tuple[str, str]]:
    return [(host, f"{i}/{len(plan.hosts)}") for i, host in enumerate(plan.hosts)]


class _Preparation:
    """The commands of all nodes, and what is shown of them."""

    def __init__(self, config: RunConfig, run_dir: Path, plan: Plan, shared: Path) -> None:
        self._config, self._run_dir, self._plan, self._shared = config, run_dir, plan, shared
        self._said: set[str] = set()
        self._mirror = _Mirror()
        self._failed: dict[str, int] = {}

    def run(self) -> Outcome:
        """Have all parts made, and then joined; a node that fails is named at once."""
        try:
            self._on(_parts(self._plan), self._plan.size_bytes)
            if not self._failed:
                self._on([(self._plan.first, None)])
        except signals.Stop:
            return Outcome(RESUMABLE, stopped_by=signals.asked())
        finally:
            self._mirror.end()
        if self._failed:
            bad = BAD_INPUT in self._failed.values()
            return Outcome(BAD_INPUT if bad else FAILED)
        noted = json.loads((self._run_dir / DATA_JSON).read_text(encoding="utf-8"))
        return Outcome(0, noted)

    def _on(self, parts: Sequence[tuple[str, str | None]], size_bytes: int | None = None) -> None:
        """Run a command on each of some hosts until all have ended. Raises Stop."""
        remotes: list[Remote] = []
        far: dict[str, Far] = {}
        try:
            with signals.at_once():
                for host, part in parts:
                    argv = command(self._config, host, self._run_dir, self._shared, part)
                    remotes.append(Remote(host, argv))
                for remote, told in heard(remotes):
                    if isinstance(told, Far):
                        self._mirror.show(together(far, remote.host, told, size_bytes))
                    elif isinstance(told, Ended):
                        self._ended(remote, told.code, remotes)
                    elif isinstance(told, Printed):
                        progress.write(f"{remote.host}: {told.text}")
                    else:
                        self._say(told)
        except signals.Stop:
            self._stop(remotes, str(signals.asked()))
            raise
        finally:
            for remote in remotes:
                remote.close()
            self._mirror.end()

    def _say(self, told: Said) -> None:
        """Print what nodes say, once where several say the same."""
        if told.text not in self._said:
            self._said.add(told.text)
            progress.write(told.text)

    def _ended(self, remote: Remote, code: int, others: Sequence[Remote]) -> None:
        if code == 0 or self._failed.keys() & {remote.host}:
            return
        if self._failed and code == RESUMABLE:  # it was told to
            return
        self._failed[remote.host] = code
        progress.write(f"error: {why(remote, code)}")
        if not makes_sense_without(code, remote.is_heard_of):
            for other in others:
                other.stop(f"the failure of {remote.host}")

    def _stop(self, remotes: Sequence[Remote], by: str) -> None:
        """Tell all to stop, and give them the time for it."""
        seconds = self._config.launcher.grace_seconds
        progress.write(f"stopping {counted(len(remotes), 'node')}; Ctrl-C again kills")
        for remote in remotes:
            remote.stop(by)
        for _ in heard(remotes, time.monotonic() + seconds):
            pass


def together(far: dict[str, Far], host: str, told: Far, size_bytes: int | None) -> Far:
    """Return how far all nodes are that share ``size_bytes``; None of these: as one tells.

    ``far`` keeps what each has told of what they share, and gets what a ``host`` tells now. Before
    any of them has begun with that, it is what it tells.
    """
    if size_bytes is None:
        return told
    if told.phase == TOKENISING:
        far[host] = told
    if not far:
        return told
    names = dict.fromkeys(name for each in far.values() for name in each.counts)
    return Far(
        TOKENISING,
        "B",
        size_bytes,
        sum(each.done for each in far.values()),
        sum(each.starts_at for each in far.values()),
        {name: sum(each.counts.get(name, 0) for each in far.values()) for name in names},
        is_over=False,
    )


def makes_sense_without(code: int, was_reached: bool) -> bool:
    """Return whether the others are to end their parts when one has failed. Pure.

    Not where nothing comes of it: what is wrong with the corpus has to be corrected first, and
    whoever gave a host that is not reached wants to know before hours have passed.
    """
    return code != BAD_INPUT and was_reached


def why(remote: Remote, code: int) -> str:
    """Return how a node has failed, and what to do about it."""
    host = remote.host
    last = remote.last_lines[-1].removeprefix("error: ") if remote.last_lines else "it said nothing"
    if code == SHELL_FAILED and not remote.is_heard_of:
        return (
            f"{host} was not reached ({last}); see that `ssh {host} true` works without a "
            f"password, or leave it out by launcher.exclude={host}"
        )
    if not remote.is_heard_of and code != BAD_INPUT:
        return (
            f"{host} could not start its part, exit code {code} ({last}); all nodes need "
            f"{sys.executable} and {Path.cwd()}"
        )
    if code == RESUMABLE:
        return f"{host} was told to stop by somebody else"
    if code == SHELL_FAILED:
        return f"{host} was lost, or its process killed ({last})"
    return f"{host} has failed with exit code {code}; what it said is above"


class _Mirror:
    """A phase of another process, shown as one of this."""

    def __init__(self) -> None:
        self._phase: progress.Phase | None = None

    def show(self, far: Far) -> None:
        if far.phase == OUTER:
            return
        if self._phase is None or self._phase.name != far.phase:
            self.end()
            self._phase = progress.begin(
                far.phase, total=far.total, unit=far.unit, starts_at=far.starts_at
            )
        self._phase.skip(far.starts_at - self._phase.starts_at)
        self._phase.at(far.done, counts=far.counts)
        if far.is_over:
            self.end()

    def end(self) -> None:
        if self._phase is not None:
            self._phase.end()
            self._phase = None
