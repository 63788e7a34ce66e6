"""Our schedules and shapes of a decay, as transformers calls them."""

from __future__ import annotations

from typing import Any

from shardwright.train.config import Schedule

DECAYS = {"cosine": "cosine", "linear": "linear", "sqrt": "1-sqrt"}


def as_transformers(schedule: Schedule, peak: float) -> tuple[str, dict[str, Any]]:
    """Return a schedule's name and arguments in transformers, of a peak rate. Pure.

    A range test is none of theirs and is called a constant rate; its cosine that starts again has
    no floor.
    """
    floor = schedule.floor
    match schedule.name:
        case "cosine" if floor:
            return "cosine_with_min_lr", {"min_lr_rate": floor}
        case "linear" if floor:
            return "polynomial", {"lr_end": floor * peak, "power": 1.0}
        case "polynomial":
            return "polynomial", {"lr_end": floor * peak, "power": schedule.power}
        case "cosine_with_restarts":
            return schedule.name, {"num_cycles": schedule.cycles}
        case "warmup_stable_decay":
            decay = {
                "num_decay_steps": schedule.decay_steps,
                "decay_type": DECAYS[schedule.decay_shape],
            }
            return schedule.name, {**decay, "min_lr_ratio": floor} if floor else decay
        case "constant" | "range_test":
            return "constant_with_warmup", {}
        case name:
            return name, {}
