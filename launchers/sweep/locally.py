"""Points as processes of this machine: each has its own devices or cores, or a hostfile's host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks import child
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.places import Outcome, Task
from shardwright.train.errors import UserError
from shardwright.train.program import package_environment
from shardwright.train.units import counted

LOOK_SECONDS = 0.1
BY_A_SIGNAL = "Ctrl-C or SIGTERM: points save, and the same command continues"


@dataclass(frozen=True)
class Slot:
    """What one point has to itself."""

    label: str
    devices: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    cores: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    """Settings that put the run there."""

    def environment(self) -> Mapping[str, str]:
        """Return the variables by which a point finds what is its own."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {}


def slots(
    config: SweepConfig, devices: Sequence[str], cores: Sequence[int], ranks: int | None
) -> list[Slot]:
    """Return what this machine is divided into: by GPU where there are ``devices``. Pure.

    ``ranks`` is the most that a point has, None where that follows from what it has to itself.
    """
    per_point, parallel = config.devices_per_point, config.max_parallel
    if devices:
        size = per_point if per_point != "auto" else ranks
        if size is None:
            size = max(1, len(devices) // parallel) if parallel != "auto" else 1
        count = len(devices) // size if parallel == "auto" else parallel
        if size * max(count, 1) > len(devices):
            raise UserError(
                f"{counted(max(count, 1), 'point')} at a time with {counted(size, 'GPU')} each "
                f"need {size * max(count, 1)}, and this machine has {len(devices)}; lower "
                "sweep.max_parallel or sweep.devices_per_point"
            )
        groups = [tuple(devices[n * size : (n + 1) * size]) for n in range(count)]
        each = max(1, len(cores) // count)
        return [
            Slot(f"GPU {','.join(group)}", group, _around(cores, n * each, each))
            for n, group in enumerate(groups)
        ]
    if per_point != "auto" and per_point > len(cores):
        raise UserError(
            f"sweep.devices_per_point={per_point} is more than the {len(cores)} core(s) of this "
            "machine; lower it"
        )
    if parallel == "auto":
        parallel = 1 if per_point == "auto" else len(cores) // per_point
    size = max(1, len(cores) // parallel) if per_point == "auto" else per_point
    found = [_around(cores, n * size, size) for n in range(parallel)]
    return [Slot(f"core{'s' * (len(own) > 1)} {','.join(map(str, own))}", (), own) for own in found]


def _around(cores: Sequence[int], first: int, count: int) -> tuple[int, ...]:
    """Return consecutive cores; where there are more points than cores, from the start again."""
    return tuple(cores[(first + n) % len(cores)] for n in range(min(count, len(cores))))


def devices_of(machine: Machine) -> list[str]:
    """Return the GPUs of this machine as CUDA_VISIBLE_DEVICES names them. Pure."""
    if not machine.torch_has_cuda:
        return []
    named = [name.strip() for name in machine.cuda_visible_devices.split(",") if name.strip()]
    return (named or [str(n) for n in range(machine.gpus)])[: machine.gpus]


@dataclass
class Processes:
    """Each point is a `shardwright` of its own below this process, in a slot that is free."""

    slots: Sequence[Slot]
    cwd: Path
    _running: dict[int, tuple[subprocess.Popen[bytes], Slot]] = field(default_factory=dict)

    stays = True
    outlives = False

    def take_over(self, numbers: Iterable[int]) -> set[int]:
        """None: what a killed sweep has left ends by itself, and is then resumed."""
        del numbers
        return set()

    def described(self) -> str:
        first = self.slots[0]
        each = (
            f"each on {first.label}"
            if len(self.slots) == 1
            else (
                f"on {'; '.join(slot.label for slot in self.slots[:8])}"
                + ("; ..." if len(self.slots) > 8 else "")
            )
        )
        return f"{len(self.slots)} at a time, {each}"

    def how_to_stop(self) -> str:
        return BY_A_SIGNAL

    def room(self) -> int:
        return len(self.slots) - len(self._running)

    def start(self, tasks: Sequence[Task]) -> list[str]:
        return [self._start_one(task) for task in tasks]

    def _start_one(self, task: Task) -> str:
        taken = [id(slot) for _, slot in self._running.values()]
        slot = next(slot for slot in self.slots if id(slot) not in taken)
        argv = [sys.executable, "-m", "shardwright", *task.command(*slot.words)]
        environment = {**package_environment(os.environ), **slot.environment()}
        process = child.in_background(argv, environment, task.log, cores=slot.cores, cwd=self.cwd)
        self._running[task.point.number] = (process, slot)
        return slot.label

    def ended(self, timeout_seconds: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout_seconds
        while True:
            found = [n for n, (process, _) in self._running.items() if process.poll() is not None]
            if found or time.monotonic() > deadline:
                return [Outcome(n, self._running.pop(n)[0].returncode) for n in found]
            time.sleep(LOOK_SECONDS)

    def stop(self, numbers: Iterable[int], *, at_once: bool = False) -> None:
        for number in numbers:
            process, _ = self._running[number]
            # A launcher takes its second SIGINT for impatience; what it has not heard yet, a signal
            # of the same number that is still pending, would be one with it.
            signal_number = signal.SIGINT if at_once else signal.SIGTERM
            process.send_signal(signal_number)
            if at_once:
                time.sleep(LOOK_SECONDS)
                process.send_signal(signal_number)

    def close(self) -> None:
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.wait()
        self._running.clear()
