"""plan.json: of each start of a run what was planned and what was measured.

Its `planned` comes from the launcher, its `measured` from the ranks; numbers are those of the rank
with most, bytes and seconds, and null is what nobody could tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import PLAN_JSON

if TYPE_CHECKING:
    from shardwright.train.config import RunConfig

VERSION = 1


@dataclass(frozen=True)
class _Figures:
    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Self:
        """Return figures that may be of another version: what is not known here is left out."""
        return cls(**{each.name: found[each.name] for each in fields(cls) if each.name in found})


@dataclass(frozen=True)
class Planned(_Figures):
    """What a plan says of a rank."""

    device_bytes: int
    """Alive at the most on its device, without what CUDA and the allocator take for themselves."""
    host_bytes: int
    disk_bytes: int
    by_category: Mapping[str, int]
    """Of the device's: as `shardwright plan --json` has them."""
    parameters_bytes: int
    """Of the model, wherever they lie; of ZeRO-3 without what is kept gathered."""
    gradients_bytes: int
    """Between two micro-batches, with the buckets that stay."""
    optimizer_bytes: int
    """Master weights that lie beside the weights, and moments."""
    step_seconds: float | None = None
    """None where the hardware is not known."""
    tokens_per_second: float | None = None
    """Of all ranks."""
    hardware: str | None = None
    """What the time was planned for."""


@dataclass(frozen=True)
class Measured(_Figures):
    """What a run has taken."""

    device: str
    """cuda or cpu."""
    peak_bytes: int | None = None
    """Of the GPU allocator, the most it has given out; of a CPU's rank nobody can tell."""
    reserved_bytes: int | None = None
    """What that allocator has taken of the GPU."""
    resident_bytes: int | None = None
    """Most memory of a process on the host, libraries included."""
    parameters_bytes: int | None = None
    gradients_bytes: int | None = None
    optimizer_bytes: int | None = None
    steps: int = 0
    """That were timed: without the first of each start."""
    seconds: float = 0.0
    """Of these, evaluations and saves left out."""
    tokens: int = 0
    """In these, padding left out."""

    @property
    def step_seconds(self) -> float | None:
        return self.seconds / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        speed = {"step_seconds": self.step_seconds, "tokens_per_second": self.tokens_per_second}
        return {**asdict(self), **speed}

    def continued(self, later: Measured) -> Measured:
        """Return what both starts of the same training have taken. Pure."""

        def most(name: str) -> int | None:
            found = [v for v in (getattr(self, name), getattr(later, name)) if v is not None]
            return max(found, default=None)

        sizes = [each.name for each in fields(Measured) if each.name.endswith("_bytes")]
        return Measured(
            device=later.device,
            steps=self.steps + later.steps,
            seconds=self.seconds + later.seconds,
            tokens=self.tokens + later.tokens,
            **{name: most(name) for name in sizes},
        )


@dataclass(frozen=True)
class Start:
    """Starts of a run that follow each other with the same settings."""

    settings: Mapping[str, Any]
    """What memory and speed depend on, as `settings_of` has it."""
    planned: Planned | None = None
    measured: Measured | None = None


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return what of a config a run's memory and speed depend on; of a run the model stays. Pure.

    By the names that they have in config.yaml, where they have one.
    """
    trainer = config.trainer
    return {
        "strategy": config.strategy.model_dump(mode="json"),
        "precision": config.precision.model_dump(mode="json"),
        "optimizer": trainer.optimizer,
        "device": config.launcher.device,
        "ranks": config.launcher.world_size,
        "micro_batch_size": trainer.micro_batch_size,
        "global_batch_size": trainer.global_batch_size,
        "checkpoint_activations_every_blocks": trainer.checkpoint_activations_every_blocks,
        "recompute": trainer.recompute,
        "sequence_length": config.data.tokens_per_sample,
    }


def read(run_dir: Path) -> list[Start]:
    """Return what plan.json holds, the newest last; nothing where there is none to be read."""
    try:
        tree = json.loads((run_dir / PLAN_JSON).read_text(encoding="utf-8"))
        return [_start(each) for each in tree["starts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def newest(run_dir: Path, settings: Mapping[str, Any]) -> Start:
    """Return what is known of a run with such settings, if its newest start has had them."""
    starts = read(run_dir)
    if starts and starts[-1].settings == settings:
        return starts[-1]
    return Start(settings)


def note(
    run_dir: Path,
    settings: Mapping[str, Any],
    *,
    planned: Planned | None = None,
    measured: Measured | None = None,
) -> Start:
    """Write down what has become known of the newest start; return all that is known of it.

    One process at a time: of a run that lives its first rank, else who owns it. Raises OSError.
    """
    starts = read(run_dir)
    if not starts or starts[-1].settings != settings:
        starts.append(Start(settings))
    last = starts[-1]
    starts[-1] = replace(last, planned=planned or last.planned, measured=measured or last.measured)
    text = json.dumps({"version": VERSION, "starts": [as_json(each) for each in starts]}, indent=2)
    write_text(run_dir / PLAN_JSON, text + "\n")
    return starts[-1]


def as_json(start: Start) -> dict[str, Any]:
    """Return a start as plan.json has it. Pure."""
    return {
        "settings": dict(start.settings),
        "planned": start.planned.as_json() if start.planned else None,
        "measured": start.measured.as_json() if start.measured else None,
    }


def _start(found: Mapping[str, Any]) -> Start:
    planned, measured = found["planned"], found["measured"]
    return Start(
        found["settings"],
        Planned.of_json(planned) if planned else None,
        Measured.of_json(measured) if measured else None,
    )


# --- the difference -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One figure that was both planned and measured."""

    name: str
    planned: float
    measured: float

    @property
    def missed(self) -> float:
        """By what part of the measured the plan was too much; below 0 too little."""
        return self.planned / self.measured - 1 if self.measured else math.inf


def differences(start: Start) -> list[Difference]:
    """Return what can be compared of a start, the peak first. Pure."""
    planned, measured = start.planned, start.measured
    if planned is None or measured is None:
        return []
    pairs = (
        ("peak_bytes", planned.device_bytes, measured.peak_bytes),
        ("parameters_bytes", planned.parameters_bytes, measured.parameters_bytes),
        ("gradients_bytes", planned.gradients_bytes, measured.gradients_bytes),
        ("optimizer_bytes", planned.optimizer_bytes, measured.optimizer_bytes),
        ("step_seconds", planned.step_seconds, measured.step_seconds),
        ("tokens_per_second", planned.tokens_per_second, measured.tokens_per_second),
    )
    return [
        Difference(name, of_plan, of_run)
        for name, of_plan, of_run in pairs
        if of_plan is not None and of_run
    ]
