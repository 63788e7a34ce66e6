"""The part "debug" of the section "trainer": what a run looks at of its own arithmetic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from shardwright.train.config.section import PositiveFloat, PositiveInt, Section

Steps = Annotated[tuple[PositiveInt, ...], Field(strict=False)]
# YAML reads an unquoted off as false.
Numerics = Annotated[
    Literal["off", "watch"], BeforeValidator(lambda value: "off" if value is False else value)
]


class Debug(Section):
    """What is looked at in each module while it trains: slower, and nothing else changes."""

    numerics: Numerics = "off"
    """watch ends the run at the first module, forward or backward, whose output or gradient is not
    finite or past a bound, and says which, where and after what. It looks at every tensor between
    modules: the host waits for the device once a micro-batch. Nothing is compiled then."""
    largest_magnitude: PositiveFloat | None = None
    """A bound for watch: no element of an output or gradient may be larger; null is no bound.
    65504 is the largest number of fp16."""
    smallest_magnitude: PositiveFloat | None = None
    """Another: of each output and gradient the largest element must be at least this, as all of one
    that has underflowed is not; null is no bound. Losses that are scaled scale gradients, too."""
    trace_batches: Steps = ()
    """Steps of which the ranges in each module are written to RUN_DIR/diagnosis/, of every
    micro-batch on every rank. Nothing is compiled then."""
    statistics_every_steps: PositiveInt | None = None
    """Every N steps, and at step 1, measure the norms of weights, gradients and updates of each
    module, and its share of gradients that are zero, into metrics.jsonl. Such a step keeps a copy
    of this rank's part of the master weights; null measures none."""

    noise_scale: bool = False
    """Log the gradient noise scale: the batch, in samples, up to which a larger one saves steps
    (arXiv 1812.06162), as gradient_noise_scale with the two estimates that it is the quotient of,
    over the steps since the last logged one. It takes the norm of a smaller batch's gradient: of
    each rank under ddp, else of a step's first micro-batch."""

    @property
    def looks_into_modules(self) -> bool:
        """Whether hooks of modules have work, which compiled code would not call."""
        return self.numerics == "watch" or bool(self.trace_batches)

    @model_validator(mode="after")
    def _bounds_are_read(self) -> Debug:
        bounds = {k: getattr(self, k) for k in ("largest_magnitude", "smallest_magnitude")}
        given = {k: v for k, v in bounds.items() if v is not None}
        if given and self.numerics == "off":
            key, value = next(iter(given.items()))
            raise ValueError(
                f"{key}={value:g} is read with numerics=watch only, which is off; set "
                f"numerics=watch or leave {key} out"
            )
        if len(given) == 2 and given["smallest_magnitude"] > given["largest_magnitude"]:
            raise ValueError(
                f"smallest_magnitude={given['smallest_magnitude']:g} is more than "
                f"largest_magnitude={given['largest_magnitude']:g}, so that nothing is within "
                "both; lower one or raise the other"
            )
        return self
