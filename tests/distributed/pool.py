"""Worker processes that stay alive between tests and are the ranks of one group after another."""

from __future__ import annotations

import gc
import itertools
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tests import forked

TIMEOUT_SECONDS = 240
_PORTS = itertools.count()


class RanksFailed(AssertionError):
    """Some ranks raised; the message holds each one's traceback."""


class Ranks:
    """``ranks(function, *arguments)`` calls the function in every rank and returns their results.

    The function is given as torchrun would: RANK, WORLD_SIZE, MASTER_PORT and so on stand in the
    environment. It must be importable, and what it takes and returns must pickle. It fails where
    it leaves a thread of a group behind, unless ``threads_may_stay``.
    """

    def __init__(self, world_size: int, *, may_use_a_gpu: bool = False) -> None:
        self.world_size = world_size
        self._may_use_a_gpu = may_use_a_gpu
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        threads_may_stay: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> list[Any]:
        if not self._workers:
            self._start()
        try:
            port = free_port()
            for rank, (_, pipe) in enumerate(self._workers):
                environment = _environment(rank, self.world_size, port)
                pipe.send((function, arguments, environment, threads_may_stay))
            return self._answers(timeout_seconds)
        except RanksFailed:
            raise
        except BaseException:  # a test that is ended meanwhile: the next would get its answers
            self.stop()
            raise

    def _answers(self, timeout_seconds: float) -> list[Any]:
        """Return what the ranks return. Raises RanksFailed where some do not."""
        results: list[Any] = []
        failures: list[str] = []
        all_answered = True
        for rank, (process, pipe) in enumerate(self._workers):
            # A rank that fails leaves its peers waiting in a collective: they get no time then.
            if not pipe.poll(5 if failures else timeout_seconds):
                failures.append(f"rank {rank} did not answer")
                all_answered = False
                continue
            try:
                ok, value = pipe.recv()
            except EOFError:
                process.join()
                failures.append(f"rank {rank} died with exit code {process.exitcode}")
                all_answered = False
                continue
            if ok:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        if not all_answered:
            self.stop()
        if failures:
            raise RanksFailed("\n".join(failures))
        return results

    def stop(self) -> None:
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(5)
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = forked.anywhere() if self._may_use_a_gpu else forked.on_cpus()
        for _ in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def free_port() -> int:
    """Return a port that nothing else takes until a rank listens on it.

    Below those that the kernel gives to connections, and another each time: the tests that run
    beside this one open hundreds. Each of their processes has a thousand of its own, and one that
    is started beside them, of another suite, begins elsewhere in its thousand.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    begin = os.getpid() * 89  # from one process to the next: further than a file's tests go
    for number in _PORTS:
        port = 10_000 + 1_000 * worker + (begin + number) % 1_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("not reached")


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _work(pipe: Connection) -> None:
    from shardwright.train.charts import drawing
    from shardwright.train.model import first_values  # which brings torch
    from shardwright.train.process.leave import gloo_worker_count

    first_values.DEALT_FROM_ELEMENTS = 1  # tiny models start as large ones do
    drawing.svg = _drawn_once(drawing.svg)  # type: ignore[assignment]
    while True:
        try:
            function, arguments, environment, threads_may_stay = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            before = gloo_worker_count()
            value = function(*arguments)
            gc.collect()  # what a test itself has held in the frame that left the group
            left = 0 if threads_may_stay else gloo_worker_count() - before
            pipe.send((False, f"{left} gloo threads are left behind") if left else (True, value))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        forked.look_away_from_what_stays()


def _drawn_once(svg: Callable[[Any], str]) -> Callable[[Any], str]:
    """Have every run's card get the picture of the first: each costs a process, of a second.

    What is drawn of which run, the tests of the card and of the command line look at.
    """
    drawn = ""

    def draw(spec: Any) -> str:
        nonlocal drawn
        drawn = drawn or svg(spec)
        return drawn

    return draw
