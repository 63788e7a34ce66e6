"""A run directory belongs to one live run: its launcher and its first rank hold locks for life."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import OWNER

FILE = OWNER
PREPARING = "preparing data"
STARTING = "starting its ranks"
"""What an owner may do before it trains."""
DYING_SECONDS = 10.0
"""How long a killed process of this host may take to give back its memory, and then its lock."""
LEASE_SECONDS = 180.0
"""How long a file server may keep the locks of a node that has died: NFSv4's lease is 90 s, and
Lustre drops a silent client after 150 s, unless they are set up otherwise."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_OWNED_BY = "SHARDWRIGHT_OWNED_BY"
# Which byte of owner.json is locked, by whom. Earlier versions lock all of the file.
_LAUNCHER, _RANK = 0, 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory."""

    host: str
    pid: int
    since: float
    """Seconds since 1970."""
    slurm_job: str | None
    doing: str | None = None
    """PREPARING or STARTING; None where it trains."""

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        doing = f", {self.doing}" if self.doing else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}{doing}, since {since}"


class Claim:
    """What a launcher holds of a run directory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def hand_on(self) -> None:
        """Let the first rank own it too: this process's children may, and nobody else."""
        _note(self._descriptor, STARTING)
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _RANK)


@contextmanager
def owned(run_dir: Path, say: Callable[[str], object], doing: str | None = None) -> Iterator[Claim]:
    """Own a run directory inside of the block; ``say`` hears of it where that has to wait.

    Raises UserError where another live process owns it, whatever it is ``doing``.

    The lock is the kernel's and not a file whose being there means something, so that it ends with
    its owner however that ends, and nothing stale is ever left to remove. It is a POSIX lock:
    unlike one of flock, which forked workers of a data loader would hold on to, it is the process's
    alone, and NFSv4 and Lustre share it between nodes. Only a node that has died cannot give it
    back; its file server does so when it has not heard of the node for a while, and so long another
    host's lock is waited for. owner.json just says who it is: no id in it is trusted, so that a
    requeued job, another launcher or a reused pid make no difference.

    The first rank owns it for all ranks: only it publishes and deletes, and its peers end soon
    after it. As no such lock passes from one process to another, there are two: a launcher takes
    both, gives the second one back for its first rank (`Claim.hand_on`) and keeps the first until
    it has told the end, so that nobody else comes in between. Its children, told by `inherited`,
    take the second only; a rank that was started by hand takes both.

    An owner must not open owner.json a second time, as closing any descriptor of it gives the locks
    back.
    """
    parts = (_RANK,) if is_launched() else (_LAUNCHER, _RANK)
    # Not truncated before it is owned.
    descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started, waits = time.monotonic(), False
        for part in parts:
            while not _locked(descriptor, part):
                owner = _owner(descriptor)
                is_elsewhere = owner is not None and owner.host != socket.gethostname()
                patience_seconds = LEASE_SECONDS if is_elsewhere else DYING_SECONDS
                if time.monotonic() - started > patience_seconds:
                    raise UserError(_refusal(run_dir, owner))
                if not waits:
                    waits = True
                    whose = owner or "another process"
                    say(
                        f"{run_dir} belongs to {whose}: waiting up to {patience_seconds:g} s "
                        "until it has ended"
                    )
                time.sleep(0.1)
        _note(descriptor, doing)
        yield Claim(descriptor)
    finally:
        os.close(descriptor)


def inherited(claim: Claim | None) -> Mapping[str, str]:
    """Return the variables of a launcher's children, whose run it, or another node's, owns."""
    return {_OWNED_BY: "launcher" if claim is not None else "another node"}


def is_launched() -> bool:
    """Return whether a launcher has started this process, and tells what comes of it."""
    return _OWNED_BY in os.environ


def acts_for_the_owner() -> bool:
    """Return whether the launcher that started this process owns the run."""
    return os.environ.get(_OWNED_BY) == "launcher"


def look(run_dir: Path) -> tuple[Owner | None, bool]:
    """Return who owns or has owned a run directory, and whether it is locked for somebody.

    Not for its owner, who would lose it.
    """
    try:
        descriptor = os.open(run_dir / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, False
    try:
        parts = (_LAUNCHER, _RANK)
        is_free = all(_locked(descriptor, part, fcntl.LOCK_SH) for part in parts)
        return _owner(descriptor), not is_free
    finally:
        os.close(descriptor)


@contextmanager
def locked_file(path: Path) -> Iterator[Owner | str | None]:
    """Hold the kernel's lock on a file of its own for a while, made if need be.

    Yields who has it instead, None where this process has got it. It must not be opened a second
    time by who holds it, as closing any descriptor of it gives the lock back.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _locked(descriptor, _LAUNCHER):
            yield _owner(descriptor) or "another process"
            return
        _note(descriptor, None)
        yield None
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether somebody holds a file by `locked_file`. Not for the holder, who loses it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _locked(descriptor, _LAUNCHER, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _note(descriptor: int, doing: str | None) -> None:
    mine = Owner(
        socket.gethostname(), os.getpid(), time.time(), os.environ.get("SLURM_JOB_ID"), doing
    )
    with suppress(OSError):  # a full disk: the lock is what counts
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{json.dumps(asdict(mine))}\n".encode(), 0)


def _locked(descriptor: int, part: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Return whether this process holds that lock now."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1, part)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "the file system of the run directory has no locks (%s): nothing keeps a second run "
            "out of it",
            error.strerror,
        )
    return True


def _owner(descriptor: int) -> Owner | None:
    """Return who says to own it; None while that is being written."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _refusal(run_dir: Path, owner: Owner | None) -> str:
    whose = f"a run that is alive ({owner})" if owner else "a process that is alive"
    return (
        f"{run_dir} belongs to {whose}; wait until it has ended, or stop it first: `shardwright "
        f"cancel {shlex.quote(str(run_dir))}`"
    )
