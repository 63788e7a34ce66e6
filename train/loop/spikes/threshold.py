"""What counts as a spike: a robust threshold over the recent steps. Pure."""

from __future__ import annotations

import ctypes
import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations of a normal distribution, in its median absolute deviations."""
LEAST_SHARE = 0.01
"""Of the median, which the estimated standard deviation has at least: a curve that is flat to the
last digit would leap by noise."""
LAG = 2
"""A step is judged by those up to the LAG-th before it. Of the step before, a GPU may still compute
the numbers while the next one is launched, and every device is to decide alike."""


class Seen(NamedTuple):
    """What all ranks know alike of one step."""

    step: int
    loss: float
    norm: float
    """Of the gradients, before they are clipped."""


class Limits(NamedTuple):
    """Beyond them a step is a spike."""

    loss: float = math.inf
    norm: float = math.inf

    def are_exceeded_by(self, seen: Seen) -> bool:
        is_finite = math.isfinite(seen.loss) and math.isfinite(seen.norm)
        return is_finite and (seen.loss > self.loss or seen.norm > self.norm)


class Spike(NamedTuple):
    """A step that is one."""

    seen: Seen
    limits: Limits

    def __str__(self) -> str:
        parts = [
            f"{name} {value:.4g} is above {limit:.4g}"
            for name, value, limit in (
                ("the loss", self.seen.loss, self.limits.loss),
                ("the gradient norm", self.seen.norm, self.limits.norm),
            )
            if value > limit
        ]
        return f"step {self.seen.step:,} is a spike: {' and '.join(parts)}"

    def values(self) -> dict[str, float]:
        """Return what metrics.jsonl says of it."""
        found = {
            "spike_step": self.seen.step,
            "spike_loss": self.seen.loss,
            "spike_loss_limit": self.limits.loss,
            "spike_grad_norm": self.seen.norm,
            "spike_grad_norm_limit": self.limits.norm,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


def limit(values: Sequence[float], factor: float) -> float:
    """Return the largest number that is no spike after these, as fp32 has it."""
    middle = median(values)
    deviation = DEVIATIONS_PER_MAD * median(abs(value - middle) for value in values)
    return ctypes.c_float(middle + factor * max(deviation, LEAST_SHARE * abs(middle))).value


class Window:
    """The recent steps of a run, those of spikes too: a level that lasts becomes the usual one."""

    def __init__(self, steps: int, factor: float, seen: Iterable[Seen] = ()) -> None:
        self._steps, self._factor = steps, factor
        self._seen = deque(seen, maxlen=steps + LAG)

    def take(self, seen: Seen) -> None:
        """Add a step, unless it is one of fp16 that has overflowed."""
        if math.isfinite(seen.loss) and math.isfinite(seen.norm):
            self._seen.append(seen)

    def limits_for(self, step: int) -> Limits:
        """Return what makes a step a spike; nothing does before the window is full."""
        known = [seen for seen in self._seen if seen.step <= step - LAG][-self._steps :]
        if len(known) < self._steps:
            return Limits()
        return Limits(
            limit([seen.loss for seen in known], self._factor),
            limit([seen.norm for seen in known], self._factor),
        )

    def to_json(self) -> str:
        return json.dumps([list(seen) for seen in self._seen])


def seen_in(text: str | bytes) -> list[Seen]:
    """Return the steps that `Window.to_json` has written down. Raises ValueError."""
    rows = json.loads(text)
    try:
        return [Seen(int(step), float(loss), float(norm)) for step, loss, norm in rows]
    except TypeError as error:
        raise ValueError(str(error)) from error
