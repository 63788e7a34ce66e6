"""What `auto` comes to: every way to train a run on some hardware, and the one that is chosen."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan.candidates import (
    Candidate,
    as_traced,
    option_values,
    strategies,
)
from shardwright.launchers.plan.child import Looking
from shardwright.launchers.plan.choice import Way, choose, next_smaller
from shardwright.launchers.plan.hardware import Hardware
from shardwright.launchers.plan.peak import Peak, peak, uses_autocast
from shardwright.launchers.plan.speed import lacking, pace
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.config.rules.sections import contradictions
from shardwright.train.errors import UserError
from shardwright.train.plan.facts import ModelFacts, Traced

STRATEGY = "strategy"
MICRO_BATCH = "trainer.micro_batch_size"
EVERY_BLOCKS = "trainer.checkpoint_activations_every_blocks"
LARGEST_MICRO_BATCH = 1024
"""Samples up to which micro-batches are looked at."""
RECOMPUTED = (None, 2, 1)
"""Of which blocks activations may be recomputed."""
OPEN = "???"
"""What conf/ has where only the user can know a value."""


class Ways:
    """All ways to train a run whose sections agree, each with the config and the peak it has."""

    def __init__(self, hardware: Hardware, look: Looking) -> None:
        self.hardware = hardware
        self.configs: dict[Way, RunConfig] = {}
        self.problems: dict[str, str] = {}
        """Why there is none under a strategy."""
        self.model: ModelFacts | None = None
        self._look = look
        self._ends: dict[Way, tuple[RunConfig, RunConfig]] = {}
        self._least: dict[Way, Peak] = {}
        self._peaks: dict[Way, Peak] = {}
        self._traces: dict[tuple[int, int | None, bool], Traced] = {}
        """By micro-batch, recomputation and autocast, in which alone ways differ to a trace."""

    def add(self, name: str, place: int, config: RunConfig) -> None:
        """Take in the ways that differ in their micro-batch alone."""
        sizes = []
        for size in micro_batches(config):
            if problems := list(contradictions(with_micro_batch(config, size))):
                self.problems[name] = "\n".join(problems)
            else:
                sizes.append(size)
        if not sizes:
            return
        # It has to fit where nodes have been lost, and its batch to divide wherever it may run.
        config = _on_fewest_nodes(config, self.hardware)
        smallest, largest = (with_micro_batch(config, size) for size in (sizes[0], sizes[-1]))
        if self.model is None:
            self.model = self._look.facts(as_traced(smallest))
        for size in sizes:
            each = with_micro_batch(config, size)
            traced = self._between(each, smallest, largest)
            way = Way(
                strategy=name,
                place=place,
                micro_batch_size=size,
                tokens=size * each.tokens_per_sample,
                every_blocks=each.trainer.recomputed_every_blocks,
                seconds=pace(each, self.model, traced, self.hardware).step_seconds,
            )
            self.configs[way], self._ends[way] = each, (smallest, largest)

    def _traced(self, config: RunConfig) -> Traced:
        trainer, autocast = config.trainer, uses_autocast(config)
        key = (trainer.samples_per_pass, trainer.recomputed_every_blocks, autocast)
        if key not in self._traces:
            self._traces[key] = self._look.traced(as_traced(config), autocast=autocast)
        return self._traces[key]

    def _between(self, config: RunConfig, smallest: RunConfig, largest: RunConfig) -> Traced:
        """Return what lies between two traces: arithmetic grows with the samples.

        Bytes need not, where what counts at few samples is something else than at many.
        """
        first, size = self._traced(smallest), config.trainer.samples_per_pass
        low, high = smallest.trainer.samples_per_pass, largest.trainer.samples_per_pass
        if low == high:
            return first
        return first.continued(self._traced(largest), (size - low) / (high - low))

    def at_least(self, way: Way) -> Peak:
        """Return less than the peak of a way, or as much; nothing is traced for it.

        A micro-batch takes no less than a smaller one, and for each sample no less than a larger.
        """
        if way not in self._least:
            config, (smallest, largest) = self.configs[way], self._ends[way]
            share = way.micro_batch_size / largest.trainer.samples_per_pass
            traced = self._traced(smallest).no_less_than(self._traced(largest), share)
            assert self.model is not None
            self._least[way] = peak(config, self.model, traced)
        return self._least[way]

    def peak(self, way: Way) -> Peak:
        """Return the peak of a way, by a trace of its own micro-batch."""
        if way not in self._peaks:
            config = self.configs[way]
            assert self.model is not None
            self._peaks[way] = peak(config, self.model, self._traced(config))
        return self._peaks[way]

    def fits(self, way: Way) -> bool:
        """Whether the hardware has what a way takes."""
        candidate = Candidate(way.strategy, self.configs[way], peak=self.at_least(way))
        if not candidate.fits(self.hardware):
            return False
        return replace(candidate, peak=self.peak(way)).fits(self.hardware)

    def candidate(self, way: Way) -> Candidate:
        """Return a way as a plan shows it."""
        config = self.configs[way]
        assert self.model is not None
        traced = self._traced(config)
        return Candidate(
            way.strategy,
            config,
            peak=self.peak(way),
            pace=pace(config, self.model, traced, self.hardware),
            traced=(self.model, traced),
        )

    def chosen(self) -> Way | None:
        """Return the fastest that fits; None where none does."""
        return choose(list(self.configs), self.fits)

    def best_of_each(self) -> list[Candidate]:
        """Return of each strategy the fastest that fits, else what takes least of a device."""
        by_strategy: dict[str, list[Way]] = {}
        for way in self.configs:
            by_strategy.setdefault(way.strategy, []).append(way)
        return [
            self.candidate(
                choose(own, self.fits) or min(own, key=lambda each: self.at_least(each).device)
            )
            for own in by_strategy.values()
        ]

    def smaller_than(self, way: Way) -> Way | None:
        """Return the fastest that takes noticeably less of a device; None without one."""
        return next_smaller(
            list(self.configs),
            way,
            self.fits,
            lambda each: self.peak(each).device,
            lambda each: self.at_least(each).device,
        )


def ways(tree: Mapping[str, Any], hardware: Hardware, here: Machine, look: Looking) -> Ways:
    """Return every way to train a composed run whose launcher is resolved.

    Raises UserError where there is none, whatever the hardware.
    """
    found = Ways(hardware, look)
    is_open = tree["strategy"]["kind"] == "auto"
    for place, name in enumerate(strategies() if is_open else [""]):
        try:
            for config in _of_strategy(tree, name, hardware, here):
                found.add(name, place, config)
        except (UserError, ValidationError) as error:
            found.problems[name] = str(error)
    if not found.configs:
        raise UserError("\n".join(dict.fromkeys(found.problems.values())))
    return found


def _of_strategy(
    tree: Mapping[str, Any], name: str, hardware: Hardware, here: Machine
) -> Iterator[RunConfig]:
    """Yield a config for each choice of what is recomputed; raise UserError where there is none."""
    section = option_values(name) if name else dict(tree["strategy"])
    if unknown := [key for key, value in section.items() if value == OPEN]:
        raise UserError(f"strategy={name} needs strategy.{unknown[0]}, which only you can give")
    every = tree["trainer"]["checkpoint_activations_every_blocks"]
    problems: list[str] = []
    is_one = False
    for blocks in RECOMPUTED if every == "auto" else (every,):
        trainer = {**tree["trainer"], "checkpoint_activations_every_blocks": blocks}
        try:
            config = from_tree({**tree, "strategy": section, "trainer": trainer})
            config = machine.resolve(config, here, "plan")
        except (UserError, ValidationError) as error:
            problems.append(str(error))
            continue
        package = config.strategy.package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"strategy={name} needs the package {package}, which is not installed")
        if lack := lacking(config, hardware):
            raise UserError(lack)
        is_one = True
        yield config
    if not is_one:
        raise UserError(problems[0])


def _on_fewest_nodes(config: RunConfig, hardware: Hardware) -> RunConfig:
    """Return a config as it is on the fewest nodes that it may be left with. Pure."""
    launcher = config.launcher
    if launcher.nodes == hardware.nodes:
        return config
    fewer = launcher.model_copy(update={"nodes": hardware.nodes, "min_nodes": None})
    return config.model_copy(update={"launcher": fewer})


def micro_batches(config: RunConfig) -> Sequence[int]:
    """Return the one that is given, or all that divide what each rank has of a batch. Pure."""
    given = config.trainer.micro_batch_size
    if isinstance(given, int):
        return (given,)
    batch = config.trainer.global_batch_size
    part = math.gcd(*(batch // ranks for ranks in config.launcher.world_sizes))
    return [n for n in range(1, min(part, LARGEST_MICRO_BATCH) + 1) if part % n == 0]


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """Return a config with another micro-batch, unchecked. Pure."""
    trainer = config.trainer.model_copy(update={"micro_batch_size": size})
    return config.model_copy(update={"trainer": trainer})
