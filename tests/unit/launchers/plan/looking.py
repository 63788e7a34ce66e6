"""Models looked at in this process instead of in a child: by the tracer itself, or made up."""

from __future__ import annotations

from typing import Self

from shardwright.launchers.plan.hardware import GIB
from shardwright.train.config import RunConfig
from shardwright.train.plan.facts import ModelFacts, Parameter, Traced


class InThisProcess:
    """What `Looking` is, by the same functions and without another process."""

    def __init__(self) -> None:
        self._facts: dict[str, ModelFacts] = {}
        self._traces: dict[tuple[str, bool], Traced] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def facts(self, config: RunConfig) -> ModelFacts:
        from shardwright.train.plan.model import facts_of, planned

        key = config.model.model_dump_json()
        if key not in self._facts:
            self._facts[key] = facts_of(planned(config), config)
        return self._facts[key]

    def traced(self, config: RunConfig, *, autocast: bool) -> Traced:
        from shardwright.train.plan.trace import traced

        trainer = config.trainer
        key = config.model.model_dump_json() + config.data.model_dump_json()
        key += config.precision.model_dump_json()
        key += f"{trainer.micro_batch_size} {trainer.checkpoint_activations_every_blocks}"
        if (key, autocast) not in self._traces:
            self._traces[key, autocast] = traced(config, autocast=autocast)
        return self._traces[key, autocast]


class MadeUp(InThisProcess):
    """A model of 1 GiB of parameters; each sample takes a GiB, half of it where recomputed."""

    def facts(self, config: RunConfig) -> ModelFacts:
        parameters = tuple(Parameter(f"matrix {n}", (2**14, 2**14), True) for n in range(4))
        return ModelFacts(parameters, 2**28, (2**28,) * 4)

    def traced(self, config: RunConfig, *, autocast: bool) -> Traced:
        trainer = config.trainer
        part = 1.0 if trainer.recomputed_every_blocks is None else 0.5
        size = round(GIB * part) * trainer.samples_per_pass
        flops = round(10**13 * (2 - part)) * trainer.samples_per_pass
        return Traced(size, size, size, size, flops)
