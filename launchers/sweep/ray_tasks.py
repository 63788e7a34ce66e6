"""Points as tasks of Ray: on the cluster that there is, or on one that is started here.

A task is nothing but a process of `shardwright` and what it has to itself. Which points there are,
how often one is tried and what has come of it, the sweep decides and writes down, as everywhere;
Ray's own retries are off, and Ray Tune, which would keep a second state of its own, is not used.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.launchers.machine import handed_on
from shardwright.launchers.ranks import child
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.locally import BY_A_SIGNAL
from shardwright.launchers.sweep.places import Outcome, Task
from shardwright.train.errors import RESUMABLE, UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory import stop_request
from shardwright.train.units import counted

PIP = "pip install 'shardwright[ray]'"
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that is started here: what tasks hand over is an exit code."""
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Share:
    """What each point asks Ray for, and how many are asked for at a time."""

    cpus: int
    gpus: int
    parallel: int


def share(
    config: SweepConfig, ranks: int | None, on_gpus: bool, there: Mapping[str, float]
) -> Share:
    """Return what points ask for of what there is in a cluster, by Ray's names for it. Pure.

    ``ranks`` is the most that a point has, None where that follows from what it has to itself.
    Raises UserError where one point asks for more than the cluster has in all.
    """
    kind = "GPU" if on_gpus else "CPU"
    available = int(there.get(kind, 0))
    size = ranks or 1 if config.devices_per_point == "auto" else config.devices_per_point
    if size > available:
        raise UserError(
            f"a point asks for {counted(size, kind)}, and the cluster of Ray has {available}; "
            "lower sweep.devices_per_point, or start Ray with more"
        )
    parallel = available // size if config.max_parallel == "auto" else config.max_parallel
    return Share(0 if on_gpus else size, size if on_gpus else 0, parallel)


def check_installed() -> None:
    """Raise UserError where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"sweep.backend=ray needs Ray, which is not installed; `{PIP}` does it")


def connected(cores: int) -> tuple[Mapping[str, float], str]:
    """Join the cluster that there is, or start Ray here; return what it has, and what it is.

    RAY_ADDRESS names a cluster; without it one that was started on this machine is found.
    """
    check_installed()
    # Unless its user has decided otherwise, nothing is sent to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    try:
        # Workers import this module by its name.
        ray.init(address="auto", runtime_env={"env_vars": _variables()}, **common)
        return ray.cluster_resources(), f"the Ray at {ray.get_runtime_context().gcs_address}"
    except ConnectionError as error:
        if address:
            first = str(error).partition("\n")[0]
            raise UserError(
                f"RAY_ADDRESS={address}: there is no Ray ({first}); start it with `ray start "
                "--head`, or unset RAY_ADDRESS for one that is started here"
            ) from None
    ray.init(
        address="local",
        num_cpus=cores,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": _variables()},
        **common,
    )
    return ray.cluster_resources(), f"a Ray that was started on {socket.gethostname()}"


def opened(config: SweepConfig, ranks: int | None, on_gpus: bool, cores: int) -> Tasks:
    """Join Ray, or start it here, and return where points run below it."""
    there, what = connected(cores)
    on_gpus = on_gpus or (there.get("GPU", 0) > 0 and ranks is None)
    return Tasks(share(config, ranks, on_gpus, there), what, sys.executable, Path.cwd())


def _variables() -> dict[str, str]:
    """Return by what a worker finds this package.

    Ray keeps and shows what it is told of workers, so that all else, keys among it, goes to a point
    by its task's arguments.
    """
    return {"PYTHONPATH": package_environment(os.environ)["PYTHONPATH"]}


def variables_of_points(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a point gets of the environment of whoever starts the sweep. Pure."""
    return {**handed_on.of_the_user(environment), **package_environment(environment)}


def run_point(argv: Sequence[str], log: str, cwd: str, variables: Mapping[str, str]) -> int:
    """Run a point below a worker of Ray; return its exit code. It gets SIGTERM if that is killed.

    ``variables`` are those of whoever has started the sweep, as for a point that is started there.
    Which GPUs are its own, Ray says in CUDA_VISIBLE_DEVICES.
    """
    environment = {**os.environ, **variables}
    process = child.in_background(argv, environment, Path(log), cwd=Path(cwd))
    return process.wait()


@dataclass
class Tasks:
    """Each point is a task of Ray; the run directories lie where all of its nodes see them."""

    share: Share
    what: str
    """The cluster, in words."""
    python: str
    cwd: Path
    _running: dict[int, tuple[Any, Task]] = field(default_factory=dict)
    _stopping: dict[int, bool] = field(default_factory=dict)
    """Which points are told to stop, and whether at once."""

    stays = True
    outlives = False

    def take_over(self, numbers: Iterable[int]) -> set[int]:
        """None: tasks end with the sweep that has started them."""
        del numbers
        return set()

    def how_to_stop(self) -> str:
        return BY_A_SIGNAL

    def described(self) -> str:
        each = (
            counted(self.share.gpus, "GPU") if self.share.gpus else counted(self.share.cpus, "CPU")
        )
        return f"{self.share.parallel} at a time, each with {each}, on {self.what}"

    def room(self) -> int:
        return self.share.parallel - len(self._running)

    def start(self, tasks: Sequence[Task]) -> list[str]:
        import ray

        remote = ray.remote(run_point)
        for task in tasks:
            argv = [self.python, "-m", "shardwright", *task.command()]
            reference = remote.options(
                name=f"point {task.point.number}",
                num_cpus=self.share.cpus,
                num_gpus=self.share.gpus,
                max_retries=0,
            ).remote(argv, str(task.log), str(self.cwd), variables_of_points(os.environ))
            self._running[task.point.number] = (reference, task)
        return [
            f"task {self._running[t.point.number][0].task_id().hex()[:8]} of Ray" for t in tasks
        ]

    def ended(self, timeout_seconds: float) -> list[Outcome]:
        import ray

        deadline = time.monotonic() + timeout_seconds
        while True:
            self._request_stops()
            by_reference = {reference: n for n, (reference, _) in self._running.items()}
            left = max(0.0, min(LOOK_SECONDS, deadline - time.monotonic()))
            found: list[Any] = []
            if by_reference:
                found, _ = ray.wait([*by_reference], num_returns=1, timeout=left)
            else:
                time.sleep(left)
            if found or time.monotonic() > deadline:
                return [self._outcome(by_reference[each]) for each in found]

    def _outcome(self, number: int) -> Outcome:
        import ray

        reference, _ = self._running.pop(number)
        self._stopping.pop(number, None)
        try:
            return Outcome(number, ray.get(reference))
        except ray.exceptions.TaskCancelledError:
            return Outcome(number, RESUMABLE, "it was stopped before Ray had started it")
        except ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            return Outcome(number, RESUMABLE, f"Ray has lost it: {first}", is_lost=True)

    def stop(self, numbers: Iterable[int], *, at_once: bool = False) -> None:
        self._stopping |= dict.fromkeys(numbers, at_once)
        self._request_stops()

    def _request_stops(self) -> None:
        """Ask through the run directory, as signals reach no other node; until it has ended."""
        import ray

        by = f"shardwright sweep on {socket.gethostname()}"
        for number, at_once in self._stopping.items():
            reference, task = self._running[number]
            is_watched = stop_request.request(task.run_dir, by, kill=at_once)
            # Of a task that waits for room this is the end. Where it has begun, Ray would raise
            # KeyboardInterrupt below the run.
            if not is_watched and not task.log.exists():
                ray.cancel(reference)

    def close(self) -> None:
        import ray

        ray.shutdown()
