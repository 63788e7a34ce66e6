"""Processes that tokenise a large corpus side by side; `python -m` runs one of them.

A rank's own tokenizer has one thread: it forks the data loader's workers, after which threads would
deadlock. And whatever has threads, Python puts tokens together with one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from shardwright.train.process.cores import keep_to
from shardwright.train.process.frames import read, write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardwright.train.data.sources.corpus import Piece
    from shardwright.train.data.tokens.encoding import Added, Encoder


def encoded(
    batches: Iterator[list[Piece]], encoder: Encoder, cores: Sequence[int]
) -> Iterator[tuple[list[Piece], Added]]:
    """Yield each batch with what it adds to the stores, in order; one batch a core is in memory.

    Raises RuntimeError where a worker ends, as one does that is killed for its memory.
    """
    with _started(encoder, cores) as workers:
        sent: list[list[Piece]] = []
        for worker, batch in zip(workers, islice(batches, len(workers)), strict=False):
            _send(worker, batch)
            sent.append(batch)
        turn = 0
        while sent:
            worker = workers[turn % len(workers)]
            added = _receive(worker)
            done = sent.pop(0)
            # It reads all of a batch before it writes: neither waits for the other to read.
            if following := next(batches, None):
                _send(worker, following)
                sent.append(following)
            yield done, added
            turn += 1


@contextmanager
def _started(encoder: Encoder, cores: Sequence[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    argv = [sys.executable, "-m", "shardwright.train.data.tokens.workers"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for _ in cores:
            workers.append(
                subprocess.Popen(
                    argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        for worker in workers:
            _send(worker, (encoder, cores))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            with worker:  # closes the pipes
                pass


def _send(worker: subprocess.Popen[bytes], value: Any) -> None:
    assert worker.stdin is not None
    try:
        write(worker.stdin, value)
    except BrokenPipeError:
        raise _ended(worker) from None


def _receive(worker: subprocess.Popen[bytes]) -> Any:
    assert worker.stdout is not None
    try:
        return read(worker.stdout)
    except EOFError:
        raise _ended(worker) from None


def _ended(worker: subprocess.Popen[bytes]) -> RuntimeError:
    code = worker.wait()
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return RuntimeError(f"a process that tokenises the corpus has ended ({how})")


def main() -> None:
    """Encode batches from standard input to standard output until that is closed."""
    # A Ctrl-C reaches every process of the terminal; this one ends with the one that it works for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write there
    try:
        encoder, cores = read(given)
        keep_to(cores)
        while True:
            write(answers, encoder.encode(read(given)))
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
