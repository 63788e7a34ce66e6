"""Run a command as a child: a signal to stop reaches its ranks, and nothing of it is left."""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from shardwright.train.console import terminal
from shardwright.train.process import inherited, signals
from shardwright.train.process.cores import keep_to
from shardwright.train.process.open_files import raise_open_file_limit
from shardwright.train.run_directory import profile_request, stop_request

ASKS_TO_STOP = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
)
STOP = signal.SIGUSR1
"""What ranks are told, whatever this process was. The launchers between have no use for it, so the
child has it blocked from birth: it cannot kill them, and a rank gets it once it listens."""
PROFILE = signals.PROFILE
"""What asks for a profile of a run; blocked from birth likewise, as it would kill a launcher."""
HANDLED = (*ASKS_TO_STOP, PROFILE)
GRACE_SECONDS = 30.0
"""From the signal to SIGKILL: as SLURM, Kubernetes and torchrun have it where nobody says more."""
LEFTOVER_SECONDS = 5.0
"""From SIGTERM to SIGKILL for what a child left behind."""

# Linux's prctl(2).
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    stopped_by: int | None
    """The signal that this process was sent meanwhile, if any."""


def run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    stderr_file: Path | None = None,
    grace_seconds: float = GRACE_SECONDS,
    run_dir: Path | None = None,
    is_elsewhere: bool = False,
    at_ctrl_c: str = "stopping as soon as all is saved",
    inherit_all: bool = False,
) -> Ended:
    """Run a command to its end, under this process's environment and the one given.

    Of its own it does not hand on what says who a rank is or which engine runs, unless
    ``inherit_all``.

    PROFILE has the run asked for a profile, or where ``run_dir`` is not known its ranks here.
    Each of ASKS_TO_STOP has the ranks told STOP; those that have not ended ``grace_seconds`` later
    are killed, and after a second SIGINT at once; 0 is for those that do not watch for STOP. When
    the child has ended, all that descends from it is ended too; when this process is killed, the
    child gets SIGTERM. What asks to stop is blocked behind a run that was stopped: another one
    must not keep its end from being told.

    ``run_dir`` is the directory of the run, through which its first rank is told who asks. Where
    the ranks are ``is_elsewhere`` and do not descend from the child, as other nodes' do not, they
    are asked and killed through it, and what they print comes back here. ``at_ctrl_c`` is what is
    said at the first SIGINT.
    """
    raise_open_file_limit()
    # Blocked until the child is there to be told, and before anything that takes time.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    before = set(descendants(os.getpid()))
    shown = None
    request = _Request(grace_seconds, run_dir, is_elsewhere, at_ctrl_c)

    def left_over() -> set[int]:
        return set(descendants(os.getpid())) - before

    _become_subreaper()
    with _noting_signals(request, mask):
        try:
            inherited_here = os.environ if inherit_all else handed_on(os.environ)
            child = _start(argv, {**inherited_here, **environment}, stderr_file, is_elsewhere, mask)
            request.child = child.pid
            shown = None if child.stdout is None else _shown(child.stdout)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask - set(HANDLED))
            code = _wait(child, request)
        finally:
            _end_left_over(left_over, request)
            if shown is not None:
                shown.join(LEFTOVER_SECONDS)
    return Ended(code, request.signals[0] if request.signals else None)


def in_background(
    argv: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    cores: Sequence[int] = (),
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a launcher in a session of its own, what it prints appended to a log.

    It has no other cores than those given, if any, and gets SIGTERM when this process is killed.
    """
    set_up = _child_setup(os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    def with_cores() -> None:
        set_up()
        if cores:
            keep_to(cores)

    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            env={**handed_on(os.environ), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=with_cores,
        )


@contextlib.contextmanager
def _noting_signals(request: _Request, mask: set[int | signal.Signals]) -> Iterator[None]:
    """Have what asks to stop noted by a request; after a run that was stopped, leave it blocked."""
    handled = [n for n in ASKS_TO_STOP if signal.getsignal(n) != signal.SIG_IGN or n == STOP]
    handlers = {number: signal.signal(number, request.note) for number in handled}
    handlers[PROFILE] = signal.signal(PROFILE, request.pass_on_profile)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not request.signals:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stderr_file: Path | None,
    is_elsewhere: bool,
    mask: set[int | signal.Signals],
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, its output where somebody reads it."""
    # Launchers in between print a line or two, and end by it where nobody reads that.
    stdout = None if terminal.is_read(1) else subprocess.DEVNULL
    if is_elsewhere:
        stdout = subprocess.PIPE
    with stderr_file.open("ab") if stderr_file else contextlib.nullcontext() as stderr:
        return subprocess.Popen(
            argv,
            env=environment,
            stdout=stdout,
            stderr=stderr,
            # A Ctrl-C at the terminal reaches the ranks once, through this process.
            start_new_session=True,
            preexec_fn=_child_setup(os.getpid(), mask),
        )


def _wait(child: subprocess.Popen[bytes], request: _Request) -> int:
    """Return how a child ends, which is killed where that takes longer than a stop may."""
    while child.poll() is None and time.monotonic() < request.deadline:
        request.hear()
        # Ranks may be started, and begin to listen, after the signal has come.
        request.tell()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.1 if request.signals else 1.0)
    if child.poll() is None:
        if request.is_elsewhere:
            request.write_down(kill=True)
        child.kill()
    return child.wait()


def _end_left_over(left_over: Callable[[], set[int]], request: _Request) -> None:
    """End what a child left behind; what may have to save gets the rest of the time for that."""
    left_seconds = max(min(request.deadline - time.monotonic(), request.grace_seconds), 0.0)
    if request.signals and not left_seconds:
        end(left_over, grace_seconds=0.0)
    elif any(map(_is_rank, left_over())):
        # Whoever stood above them is gone, and they may have to save.
        end(left_over, grace_seconds=left_seconds)
    else:
        end(left_over)


def _shown(pipe: IO[bytes]) -> threading.Thread:
    """Show what comes out of a pipe, until its end.

    pdsh, mpirun and srun end, and the ranks with them, when nobody reads what those print.
    """

    def show() -> None:
        with pipe, io.BufferedWriter(terminal.Descriptor(1)) as out:
            while text := os.read(pipe.fileno(), 65536):
                out.write(text)
                out.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    return thread


@dataclass
class _Request:
    """What this process was sent, and which of the processes below know of it."""

    grace_seconds: float
    run_dir: Path | None = None
    is_elsewhere: bool = False
    at_ctrl_c: str = ""
    child: int | None = None
    signals: list[int] = field(default_factory=list)
    told: set[int] = field(default_factory=set)
    deadline: float = math.inf
    """On the monotonic clock."""

    def note(self, number: int, frame: FrameType | None) -> None:
        del frame
        impatient = number == signal.SIGINT and number in self.signals
        if number == signal.SIGINT and not self.signals and self.grace_seconds:
            with contextlib.suppress(OSError):  # nobody is left to read it
                os.write(2, f"\n{self.at_ctrl_c}; Ctrl-C again kills\n".encode())
        self.signals.append(number)
        left = 0.0 if impatient else self.grace_seconds
        self.deadline = min(self.deadline, time.monotonic() + left)
        self.tell()

    def pass_on_profile(self, number: int, frame: FrameType | None) -> None:
        """Ask for a profile: through the run's directory, or the ranks here, one of which will do.

        A rank that has not begun to listen has PROFILE blocked.
        """
        del number, frame
        if self.run_dir is not None:
            profile_request.request(self.run_dir, f"SIGUSR2 on {socket.gethostname()}")
            return
        for pid in filter(_is_rank, descendants(os.getpid())):
            if _has_in_mask(pid, ("SigBlk", "SigCgt"), PROFILE):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, PROFILE)

    def hear(self) -> None:
        """Take a STOP that somebody sent to a launcher in between as one to this process."""
        if self.signals or self.child is None:
            return
        if any(_has_in_mask(pid, _PENDING) for pid in _launchers(self.child)):
            self.note(STOP, None)

    def tell(self) -> None:
        """Send STOP to the child and its ranks, once to each that it does not kill."""
        if not self.signals or self.child is None:
            return
        self.write_down()
        below = [pid for pid in descendants(self.child) if _is_rank(pid)]
        for pid in {self.child, *below} - self.told:
            if listens(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, STOP)
                self.told.add(pid)

    def write_down(self, *, kill: bool = False) -> None:
        """Tell the first rank who asks, which no signal does, and it alone where it is elsewhere.

        Before the signals: it reads it when the ranks have agreed to stop.
        """
        if self.run_dir is None:
            return
        with contextlib.suppress(OSError):  # their own node may still tell them
            stop_request.request(self.run_dir, asked_by(self.signals[0]), kill=kill)


def asked_by(number: int) -> str:
    """Return who asks a run to stop by a signal to this process."""
    by = signals.by_whom(number)
    return by if by == signals.CTRL_C else f"{by} to the launcher on {socket.gethostname()}"


def _is_rank(pid: int) -> bool:
    """Return whether a process was started as a rank; what it starts itself is none."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return False
    mine = _rank_variables(pid)
    # Some clusters set RANK for whatever they start, launchers included.
    return any(v.startswith(b"RANK=") for v in mine) and mine != _rank_variables(parent)


def _rank_variables(pid: int) -> set[bytes]:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return set()
    return {v for v in variables if v.startswith((b"RANK=", b"LOCAL_RANK="))}


def listens(pid: int) -> bool:
    """Return whether a process catches, blocks or ignores STOP; any other it would kill."""
    return _has_in_mask(pid, ("SigBlk", "SigIgn", "SigCgt"))


def _has_in_mask(pid: int, names: tuple[str, ...], number: int = STOP) -> bool:
    """Return whether one of these masks in /proc/PID/status has a signal in it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = (line.split()[1] for line in status.splitlines() if line.startswith(names))
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


_PENDING = ("SigPnd", "ShdPnd")


def _launchers(pid: int) -> Iterator[int]:
    """Yield a process and those below it that are above ranks."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            if not _is_rank(child):
                yield from _launchers(child)


def handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a child of a launcher gets of its environment. Pure."""
    ignored = {*inherited.of_ranks(environment), *inherited.of_engine(environment)}
    return {name: value for name, value in environment.items() if name not in ignored}


def replace(
    argv: Sequence[str], environment: Mapping[str, str], *, inherit_all: bool = False
) -> None:
    """Let a command take the place of this process, as `run` starts one; does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.environ if inherit_all else handed_on(os.environ)
    os.execve(argv[0], list(argv), {**before, **environment})


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that descend from ``pid``, as far as /proc tells."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; state and parent follow it.
            parent = int(stat.read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    pending = children.get(pid, [])
    while pending:
        found = pending.pop()
        yield found
        pending.extend(children.get(found, []))


def end(processes: Callable[[], set[int]], grace_seconds: float = LEFTOVER_SECONDS) -> None:
    """Send SIGTERM, then SIGKILL to whatever is left of some processes, and reap them."""
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, LEFTOVER_SECONDS)):
        for pid in processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while left := processes():
            for pid in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        else:
            return


def _become_subreaper() -> None:
    """Have orphans of the child handed to this process instead of to init (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _child_setup(parent: int, mask: set[int | signal.Signals]) -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def set_up() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)
        # A terminal sends its Ctrl-C to the child too as long as that has no session of its own.
        # Once unblocked it would run this process's handler in the child; to ignore it drops it.
        for number in HANDLED:
            if number not in (STOP, PROFILE) and callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_IGN)
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask | {STOP, PROFILE})

    return set_up
