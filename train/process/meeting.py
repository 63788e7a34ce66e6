"""Where ranks wait for each other's disks: as long as it takes, while all of them are alive."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from shardwright.train.process.signals import SECONDS_BETWEEN_LOOKS

SILENT_SECONDS = 1800.0
"""How long a rank may give no sign of life; it gives one whatever its disk is at."""
_BEAT_SECONDS = 15.0
_SHORTEST_LOOK_SECONDS = 0.002
_TELLING_SECONDS = 5.0
"""How long a rank that has failed stays for the others to learn why."""
_ALL, _FAILED, _STOP = "all", "failed", "stop"


class PeerLost(RuntimeError):
    """A rank that others wait for has been silent for too long, or nothing can be heard at all."""


class Meeting:
    """A place that all ranks come to, each with work of its own before it does.

    A collective ends with an error once the group's timeout is over, which a slow disk may exceed,
    and no signal is handled meanwhile. Here a rank asks the group's store again and again. It waits
    until all have come, or until one has raised an error, whatever that is: then all raise it. One
    that is killed raises none: the launcher ends the others, and where it does not, for it runs on
    another node, the rank before it in their order notices that it is silent.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int) -> None:
        """Without a ``store`` this rank is alone."""
        self._rank, self._size = rank, size
        self._store: dist.Store | None = None
        if store is not None:
            # Counted there, as it is the group's: after a failure ranks would count differently.
            number = store.add(f"shardwright/meetings/{rank}", 1)
            self._store = dist.PrefixStore(f"shardwright/meeting/{number}", store)
        self._has_news = threading.Event()
        self._lost: Exception | None = None
        self._is_over = False

    def set(self, key: str) -> None:
        """Let another rank's `wait_for` end."""
        if self._store is not None:
            self._store.set(key, "")

    def wait_for(self, key: str) -> None:
        """Wait until a rank has set a key. Raises what another rank has raised."""
        seconds = _SHORTEST_LOOK_SECONDS
        while self._store is not None and not self._store.check([key]):
            self.look()
            time.sleep(seconds)
            seconds = min(2 * seconds, SECONDS_BETWEEN_LOOKS)

    def wait_for_all(self) -> None:
        """Wait until all ranks have come here, or return at once where the meeting is over."""
        if self._store is None or self._is_over:
            return
        if self._store.add("arrived", 1) == self._size:
            self._store.set(_ALL, "")
        self.wait_for(_ALL)
        self._is_over = True

    def look(self) -> None:
        """Raise what another rank has raised, if any has. Costs nothing."""
        if not self._has_news.is_set():
            return
        assert self._store is not None
        if self._lost is not None:
            raise PeerLost(
                "this rank can no longer hear of the others: the one that ran the group's store "
                "has ended"
            ) from self._lost
        error: Exception = pickle.loads(self._store.get(_FAILED))
        raise error

    def stop(self) -> None:
        """Tell all ranks that one was asked to stop: nobody waits any longer."""
        self._is_over = True
        self.set(_STOP)

    def fail(self, error: BaseException) -> None:
        """Have all ranks raise an error that this one has raised, unless they raise one already."""
        if self._store is None:
            return
        self._is_over = True
        with suppress(Exception):  # the error itself is what matters
            self._store.compare_set(_FAILED, "", _pickled(error))  # type: ignore[arg-type]
            told, until = self._store.add("told", 1), time.monotonic() + _TELLING_SECONDS
            while told < self._size and time.monotonic() < until:
                time.sleep(0.02)
                told = self._store.add("told", 0)

    @contextmanager
    def listening(self, on_stop: Callable[[], object] | None = None) -> Iterator[None]:
        """Hear of other ranks, and let them hear of this one, inside of the block.

        ``on_stop`` is called, in another thread, once one of them has called `stop`.
        """
        if self._store is None:
            yield
            return
        ended = threading.Event()
        arguments = (self._store, ended, on_stop)
        listener = threading.Thread(target=self._listen, args=arguments, name="peers", daemon=True)
        listener.start()
        try:
            yield
        finally:
            ended.set()
            listener.join()

    def _listen(
        self, store: dist.Store, ended: threading.Event, on_stop: Callable[[], object] | None
    ) -> None:
        beats = _Beats(store, self._rank, self._size)
        try:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                if store.check([_FAILED]):
                    self._has_news.set()
                    return
                if on_stop is not None and store.check([_STOP]):
                    on_stop()
                    return
                if silent := beats.beat():
                    store.compare_set(_FAILED, "", _pickled(PeerLost(silent)))  # type: ignore[arg-type]
        except Exception as error:  # the store's, of any class
            self._lost = error
            self._has_news.set()


class _Beats:
    """One rank's signs of life, and those of the next one in a ring of all."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._next = store, rank, (rank + 1) % size
        self._count = 0
        self._last = b""
        self._heard_at = time.monotonic()
        self._due = 0.0

    def beat(self) -> str | None:
        """Give a sign if it is time to, and say so where the next rank has given none for long."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due = now + _BEAT_SECONDS
        self._count += 1
        self._store.set(f"beat/{self._rank}", str(self._count))
        key = f"beat/{self._next}"
        if self._store.check([key]) and (last := self._store.get(key)) != self._last:
            self._last, self._heard_at = last, now
        silent_seconds = now - self._heard_at
        if silent_seconds < SILENT_SECONDS:
            return None
        return f"rank {self._next} has given no sign of life for {silent_seconds:.0f} s"


def _pickled(error: BaseException) -> bytes:
    """Return an error as others can raise it, or one with its text where it does not travel."""
    with suppress(Exception):
        data = pickle.dumps(error)
        if isinstance(pickle.loads(data), Exception):
            return data
    return pickle.dumps(RuntimeError(str(error) or type(error).__name__))
