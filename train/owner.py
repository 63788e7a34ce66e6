"""A run directory belongs to one live run: its first rank holds a lock for its life."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from train.errors import UserError

FILE = "owner.json"
DYING_SECONDS = 10.0
"""How long a killed process of this host may take to give back its memory, and then its lock."""
LEASE_SECONDS = 180.0
"""How long a file server may keep the locks of a node that has died: NFSv4's lease is 90 s, and
Lustre drops a silent client after 150 s, unless they are set up otherwise."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory."""

    host: str
    pid: int
    since: float
    """Seconds since 1970."""
    slurm_job: str | None

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}"


@contextmanager
def owned(run_dir: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Own a run directory inside of the block; ``say`` hears of it where that has to wait.

    Raises UserError where another live process owns it.

    The lock is the kernel's and not a file whose being there means something, so that it ends with
    its owner however that ends, and nothing stale is ever left to remove. It is a POSIX lock:
    unlike one of flock, which forked workers of a data loader would hold on to, it is the process's
    alone, and NFSv4 and Lustre share it between nodes. Only a node that has died cannot give it
    back; its file server does so when it has not heard of the node for a while, and so long another
    host's lock is waited for. owner.json just says who it is: no id in it is trusted, so that a
    requeued job, another launcher or a reused pid make no difference.

    The first rank owns it for all: only it publishes and deletes, and its peers end soon after it.
    It must not open owner.json a second time, as closing any descriptor of it gives the lock back.
    """
    # Not truncated before it is owned.
    descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started, waits = time.monotonic(), False
        while not _locked(descriptor):
            owner = _owner(descriptor)
            is_elsewhere = owner is not None and owner.host != socket.gethostname()
            patience_seconds = LEASE_SECONDS if is_elsewhere else DYING_SECONDS
            if time.monotonic() - started > patience_seconds:
                raise UserError(_refusal(run_dir, owner))
            if not waits:
                waits = True
                whose = owner or "another process"
                say(f"{run_dir} belongs to {whose}: waiting {patience_seconds:g} s for its end")
            time.sleep(0.1)
        mine = Owner(socket.gethostname(), os.getpid(), time.time(), os.environ.get("SLURM_JOB_ID"))
        with suppress(OSError):  # a full disk: the lock is what counts
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{json.dumps(asdict(mine))}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def look(run_dir: Path) -> tuple[Owner | None, bool]:
    """Return who owns or has owned a run directory, and whether it is locked for somebody.

    Not for its owner, who would lose it.
    """
    try:
        descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None, False
    try:
        return _owner(descriptor), not _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Return whether this process holds the lock now."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    if owner is None:
        return f"{run_dir} belongs to a process that is alive; wait for its end, or stop it"
    stop = f"scancel {owner.slurm_job}" if owner.slurm_job else f"kill {owner.pid}"
    where = "" if owner.slurm_job else f" on {owner.host}"
    return (
        f"{run_dir} belongs to a run that is alive ({owner}); wait for its end, or stop it first: "
        f"`{stop}`{where}"
    )
