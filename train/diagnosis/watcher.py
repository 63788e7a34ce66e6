"""The watcher of a node's ranks, a process of its own: a rank that is stopped or stuck cannot see.

`python -m shardwright.train.diagnosis.watcher SETTINGS`, which the first rank of each node starts,
whoever has started that one. It imports neither torch nor the config.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from shardwright.train.diagnosis import beats, incident, report, verdict
from shardwright.train.diagnosis.beats import GONE, Beat, LiveRank
from shardwright.train.diagnosis.incident import Request
from shardwright.train.diagnosis.patience import Patience, Setting
from shardwright.train.durable import write_text
from shardwright.train.errors import Hang
from shardwright.train.process.heartbeat import Announcement, process
from shardwright.train.process.rank import Rank
from shardwright.train.program import package_environment
from shardwright.train.run_directory import names
from shardwright.train.run_directory.failures import note_failure

LOOK_SECONDS = 0.5
"""Between two looks at the ranks' memory."""
LONGEST_LOOK_SECONDS = 2.0
"""What a look counts for at most: whoever stops a whole node stops this process, too."""
FILE_SECONDS = 5.0
"""Between two times that the node's heartbeats are written down, and that requests are read."""
COLLECT_SECONDS = 30.0
"""How long other nodes may take to show their ranks."""
RACE_SECONDS = 1.0
"""After which the watchers of all nodes agree whose request counts."""
END_SECONDS = 5.0
FIND_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a watcher is told."""

    run_dir: str
    rank: int
    local_rank: int
    ranks_here: int
    world_size: int
    pid: int
    """Of the rank that starts the watcher."""
    hang_timeout_seconds: Setting
    grace_seconds: float


@contextlib.contextmanager
def watched(
    run_dir: Path,
    rank: Rank,
    *,
    ranks_here: int,
    hang_timeout_seconds: Setting,
    grace_seconds: float,
) -> Iterator[None]:
    """Have this node's ranks watched while it is inside of the block: its first rank starts that.

    It is left behind at the end, and ends by itself once all ranks have.
    """
    if rank.local_index != 0 or sys.platform != "linux":
        yield
        return
    settings = Settings(
        str(run_dir),
        rank.index,
        rank.local_index,
        ranks_here,
        rank.world_size,
        os.getpid(),
        hang_timeout_seconds,
        grace_seconds,
    )
    # What tells who a rank is would make it one in the eyes of launchers.
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    inherited = {name: value for name, value in os.environ.items() if name not in told}
    if rank.index == 0:
        with suppress(OSError):
            incident.prepare(run_dir)
    with suppress(OSError), log_of(run_dir).open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(asdict(settings))],
            env={**inherited, **package_environment(inherited)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield


def log_of(run_dir: Path) -> Path:
    """Return where the watcher of this node says what it does."""
    return run_dir / names.LOGS / names.watcher_log(socket.gethostname())


def main(argv: Sequence[str]) -> int:
    """Watch until all ranks of this node have ended."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {socket.gethostname()} %(message)s"
    )
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.Signals)
    watcher = Watcher(Settings(**json.loads(argv[0])))

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        watcher.close()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        watcher.run()
    except Exception:  # it must not be the end of the run
        logger.exception("the ranks of this node are no longer watched")
        return 1
    return 0


class Watcher:
    """Looks at the heartbeats of this node's ranks, writes them down, and says who hangs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.run_dir = Path(settings.run_dir)
        self.host = socket.gethostname()
        self.patience = Patience(settings.hang_timeout_seconds, settings.grace_seconds)
        self.ranks: list[LiveRank] = []
        self._lost: list[Announcement] = []
        self.beats: list[Beat] = []
        self._moved: dict[int, tuple[tuple[int, bool], float]] = {}
        """Of each rank, how often it had moved and whether it is gone, and when that was so first
        on the clock below."""
        self._clock = 0.0
        """Seconds that this process itself has run: it stands still as long as the node does."""
        stale = incident.asked(self.run_dir)
        self._stale = self._answered = stale.id if stale is not None else None
        """Of an earlier start, which is over; and the last request that is answered."""

    def run(self) -> None:
        looked_at = time.monotonic()
        found_at = filed_at = -FILE_SECONDS
        while True:
            now = time.monotonic()
            self._clock += min(now - looked_at, LONGEST_LOOK_SECONDS)
            looked_at = now
            if len(self.ranks) < self.settings.ranks_here and now - found_at >= FIND_SECONDS:
                found_at = now
                self._find()
            self._look()
            if now - filed_at >= FILE_SECONDS:
                filed_at = now
                self.write_down()
            self._serve(incident.asked(self.run_dir))
            if self.is_over():
                self.close()
                return
            if self._overdue():
                self._open()
            time.sleep(LOOK_SECONDS)

    def is_over(self) -> bool:
        """Return whether nothing is left to watch: all that were found have ended."""
        if not self.ranks:
            return os.getppid() != self.settings.pid
        return all(rank.state() == GONE or beat.is_ended for rank, beat in self._pairs())

    def write_down(self) -> None:
        with suppress(OSError):  # a file server that is away for a while
            beats.write_node(self.run_dir, self.host, self.beats)

    def close(self) -> None:
        """Write down how the ranks have ended; a log that says nothing goes."""
        self._look()
        self.write_down()
        log = log_of(self.run_dir)
        with suppress(OSError):
            if log.stat().st_size == 0:
                log.unlink()

    def _pairs(self) -> list[tuple[LiveRank, Beat]]:
        return list(zip(self.ranks, self.beats, strict=False))

    def _find(self) -> None:
        """Look for ranks of this node that are not known yet, first where they should be."""
        settings = self.settings
        first = settings.rank - settings.local_rank
        known = {rank.announced.pid for rank in self.ranks}
        found = beats.alive_here(self.run_dir, self.host, range(first, first + settings.ranks_here))
        if not found:
            found = beats.alive_here(self.run_dir, self.host)
        self.ranks += [rank for rank in found if rank.announced.pid not in known]
        # Ranks that have ended before they were found; a new start announces itself in their place.
        there = {rank.announced.rank for rank in self.ranks}
        expected = range(first, first + settings.ranks_here)
        self._lost = [
            each
            for each in beats.announced(self.run_dir, expected)
            if each.host == self.host and each.rank not in there and not any(process(each.pid))
        ]

    def _look(self) -> None:
        self.beats = [rank.beat() for rank in self.ranks]
        self.beats += [beats.of_lost(each) for each in self._lost]
        for beat in self.beats:
            seen = beat.count, beat.is_gone
            if beat.pid not in self._moved or self._moved[beat.pid][0] != seen:
                self._moved[beat.pid] = seen, self._clock

    def _overdue(self) -> list[Beat]:
        found = []
        for beat in self.beats:
            seconds = self.patience.seconds(beat)
            if seconds is not None and self._clock - self._moved[beat.pid][1] > seconds:
                found.append(beat)
        return found

    # --- what is asked --------------------------------------------------------------------------

    def _serve(self, request: Request | None) -> None:
        """Answer who asks, and end the ranks where they are to end."""
        if request is None or (request.id == self._answered and not request.ends):
            return
        if request.ends:
            if request.id != self._stale:
                self._end()
        elif request.id != self._answered:
            self._answered = request.id
            answers = self.run_dir / names.DIAGNOSIS / request.id
            with suppress(OSError):
                incident.answer(answers, self.host, self._collected())

    def _collected(self) -> list[report.Report]:
        lost = [report.Report(beats.of_lost(each)) for each in self._lost]
        return report.collect(self.ranks) + lost

    def _open(self) -> None:
        """Have all ranks show themselves, say who hangs, and end the run if it still does."""
        request = incident.new_request(self.host, is_hang=True)
        overdue = self._overdue()
        logger.info("no sign of %s", verdict.ranks_said([beat.rank for beat in overdue]))
        answers = incident.publish(self.run_dir, request)
        time.sleep(RACE_SECONDS)
        if (current := incident.asked(self.run_dir)) is not None and current.id != request.id:
            self._serve(current)
            return
        self._answered = request.id
        incident.answer(answers, self.host, self._collected())
        now = time.time()
        last = {node.host: now - node.time for node in beats.nodes(self.run_dir)}
        found = incident.wait_for(answers, list(last), COLLECT_SECONDS)
        self._look()
        if not self._overdue():
            write_text(answers / names.VERDICT, "It has moved again meanwhile.\n")
            logger.info("it has moved again")
            return
        silent = {host: seconds for host, seconds in last.items() if host not in found}
        self._conclude(answers, request, found, silent)

    def _conclude(
        self,
        answers: Path,
        request: Request,
        found: Mapping[str, Sequence[report.Report]],
        silent: Mapping[str, float],
    ) -> None:
        reports = [each for of_node in found.values() for each in of_node]
        said = verdict.of(reports, silent)
        write_text(answers / names.VERDICT, f"{said.text}\n")
        logger.info("%s", said.text)
        hosts = {each.beat.rank: each.beat.host for each in reports}
        rank = min(said.culprits, default=min(hosts, default=self.settings.rank))
        text = f"{said.text}\nStacks and collectives: {answers}"
        with suppress(OSError):
            note_failure(self.run_dir, rank, Hang(text), host=hosts.get(rank))
        incident.publish(self.run_dir, Request(**{**asdict(request), "ends": True}))
        self._end()

    def _end(self) -> None:
        report.end(self.ranks, END_SECONDS)
        self.close()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
