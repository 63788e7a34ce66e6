"""Processes that make the shards of a corpus side by side; `python -m` runs one of them."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from shardwright.train.console import progress
from shardwright.train.data.sources.shards import Shard
from shardwright.train.data.tokens import shards as on_disk
from shardwright.train.data.tokens.encoding import Encoder
from shardwright.train.data.tokens.packing import far
from shardwright.train.data.tokens.processes import cores_for
from shardwright.train.data.tokens.shards import Damaged, Made, Work
from shardwright.train.errors import UserError
from shardwright.train.process.cores import keep_to
from shardwright.train.process.parent import end_with


class WorkerEnded(RuntimeError):
    """A process was killed or has crashed; the message is written for the user."""


def pack(
    shards: Sequence[Shard],
    work: Work,
    sources: int,
    target: Path,
    cores: Set[int],
) -> dict[str, Any]:
    """Write a store for each source and split, as of the whole corpus; return what is kept beside.

    A process on each of the ``cores`` makes one shard at a time. Those that are whole already, as
    an earlier start has left them, are not made again.
    """
    while True:
        made = make(dict(enumerate(shards)), work, cores)
        in_order = [made[number] for number in range(len(shards))]
        try:
            with progress.phase("joining the shards"):
                return on_disk.join(
                    work.directory, in_order, sources, work.packing, target, work.before
                )
        except Damaged as error:  # between two looks at it: that shard is made again
            shutil.rmtree(on_disk.path_of(work.directory, error.number))
            for path in target.iterdir():
                path.unlink()


def make(shards: Mapping[int, Shard], work: Work, cores: Set[int]) -> dict[int, Made]:
    """Return all of some shards, by their numbers; raise what is wrong with the first that fails.

    Where one fails those that are in hand are finished, and kept.
    """
    work.directory.mkdir(parents=True, exist_ok=True)
    on_disk.remove_leftovers(work.directory)
    made: dict[int, Made] = {}
    failed: dict[int, BaseException] = {}
    waiting = iter(sorted(shards.items()))
    total = sum(shard.size_bytes for shard in shards.values())
    has_filter = work.data.filter is not None
    chosen = cores_for(sorted(cores), len(shards), has_filter=has_filter)
    with (
        progress.phase("tokenising", unit="B", total=total) as shown,
        _started(work, chosen, cores) as workers,
    ):
        so_far = _SoFar(shards)
        in_hand: dict[Connection, int] = {}

        def hand_out(connection: Connection) -> None:
            following = None if failed else next(waiting, None)
            if following is not None:
                in_hand[connection] = following[0]
                with suppress(
                    BrokenPipeError, ConnectionResetError
                ):  # seen where its answer is read
                    connection.send(following)

        for connection in workers:
            hand_out(connection)
        while in_hand:
            for ready in wait(list(in_hand)):
                connection = cast("Connection", ready)
                number = in_hand[connection]
                answer = _answer(connection)
                if isinstance(answer, tuple) and not isinstance(answer, Made):
                    so_far.at(number, answer)
                else:
                    del in_hand[connection]
                    if isinstance(answer, Made):
                        made[number] = answer
                        shown.skip(so_far.is_made(number, answer))
                        hand_out(connection)
                    else:
                        failed[number] = answer or _ended(
                            workers[connection], shards[number], len(made), len(shards)
                        )
                done, counts = so_far.shown()
                shown.at(done, counts=counts)
    if failed:
        raise failed[min(failed)]
    return made


class _SoFar:
    """How much of some shards is done, as far as their processes have told."""

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        self._sizes = {number: shard.size_bytes for number, shard in shards.items()}
        self._in_hand: dict[int, tuple[int, int, int]] = {}
        self._bytes = self._bytes_read = self._characters = 0
        self._documents = self._tokens = 0

    def at(self, number: int, told: tuple[int, int, int]) -> None:
        self._in_hand[number] = told

    def is_made(self, number: int, made: Made) -> int:
        """Count a shard; return its bytes where it was there already, which took no time."""
        documents, tokens = on_disk.counts_of({number: made})
        self._documents += documents
        self._tokens += tokens
        self._bytes += self._sizes[number]
        if number not in self._in_hand:  # it has told of no characters
            return self._sizes[number]
        self._characters += self._in_hand.pop(number)[0]
        self._bytes_read += self._sizes[number]
        return 0

    def shown(self) -> tuple[float, dict[str, int]]:
        """Return how many bytes are done, and what else is counted.

        How far a shard is its characters tell, going by how many others had in their bytes.
        """
        bytes_each = self._bytes_read / self._characters if self._characters else 1.0
        begun = sum(
            min(characters * bytes_each, self._sizes[number])
            for number, (characters, _, _) in self._in_hand.items()
        )
        documents = sum(told[1] for told in self._in_hand.values())
        tokens = sum(told[2] for told in self._in_hand.values())
        return self._bytes + begun, far(self._documents + documents, self._tokens + tokens)


@contextmanager
def _started(
    work: Work, cores: Sequence[int], all_cores: Set[int]
) -> Iterator[dict[Connection, subprocess.Popen[bytes]]]:
    """Start a process for each of ``cores``, all of which may run on all of them."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    workers: dict[Connection, subprocess.Popen[bytes]] = {}
    try:
        for _ in cores:
            mine, its = Pipe()
            with its:
                argv = [sys.executable, "-m", __name__, str(its.fileno()), str(os.getpid())]
                workers[mine] = subprocess.Popen(
                    argv,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what it says is no result of this process's
                    pass_fds=[its.fileno()],
                )
        encoder = Encoder.of_corpus(work.tokenizer, work.packing)
        for connection in workers:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.send((work, encoder, all_cores))
        yield workers
    finally:
        for worker in workers.values():
            worker.kill()
        for connection, worker in workers.items():
            connection.close()
            worker.wait()


def _answer(connection: Connection) -> Any:
    """Return what a process says; None where it has ended instead."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _ended(worker: subprocess.Popen[bytes], shard: Shard, made: int, shards: int) -> WorkerEnded:
    code = worker.wait()
    how = f"has ended with exit code {code}"
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    memory = " (the kernel does this when memory runs out)" if code == -signal.SIGKILL else ""
    return WorkerEnded(
        f"a process that tokenises the corpus {how}{memory} at {shard}; what is whole, "
        f"{made:,} of {shards:,} shards, is kept for the next start"
    )


def main(descriptor: int, parent: int) -> None:
    """Make shards as they are told through a descriptor, until that is closed."""
    # A Ctrl-C reaches every process of the terminal; this one ends with the one that it works for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not end_with(parent):
        return
    connection: Connection = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        work, encoder, cores = connection.recv()
        keep_to(cores)
        while True:
            number, shard = connection.recv()
            try:
                answer: Any = on_disk.make(
                    work, encoder, number, shard, lambda *so_far: connection.send(so_far)
                )
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                answer = _portable(error, shard)
            connection.send(answer)


def _portable(error: Exception, shard: Shard) -> Exception:
    """Return an error that can be sent, with what its traceback says where nothing else does."""
    if not isinstance(error, UserError):
        error.add_note(f"at {shard}\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    os._exit(0)
