"""The runs that a plan compares: one config on supposed hardware, under each strategy.

Reads the options of conf/strategy/, and starts the child that traces the model once for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import ValidationError

from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import child
from shardwright.launchers.plan.hardware import CONF, MIB, Hardware
from shardwright.launchers.plan.peak import Peak, peak, uses_autocast
from shardwright.launchers.plan.speed import Pace, lacking, pace
from shardwright.train.config import (
    FsdpStrategy,
    RunConfig,
    accumulation_steps,
    from_tree,
    rank_layout,
)
from shardwright.train.config.optimizers import OptimizerFields
from shardwright.train.config.trainer import Amount
from shardwright.train.errors import UserError
from shardwright.train.plan.facts import ModelFacts, Traced

STRATEGIES = CONF.parent / "strategy"
CONTEXT_BYTES = 600 * MIB
"""What CUDA and NCCL take of a device before there is a tensor: assumed, until it is measured."""
FRAGMENTS = 0.05
"""Share of a device that torch's allocator cannot use for what it is asked for: likewise."""
MOST_NODES = 2**13
"""Up to which a plan looks for how many would be enough."""


@dataclass(frozen=True)
class Candidate:
    """A run under one strategy."""

    strategy: str
    """The option of conf/strategy/."""
    config: RunConfig | None
    """None where there is no such run."""
    problem: str = ""
    """Why there is none."""
    peak: Peak | None = None
    traced: tuple[ModelFacts, Traced] | None = None
    """What the peak was made of."""
    pace: Pace | None = None
    """How fast it goes."""

    def fits(self, hardware: Hardware) -> bool:
        """Whether device, host and disks of a node have what it takes."""
        if self.peak is None:
            return False
        ranks = hardware.devices
        if hardware.device == "cpu":
            return (self.peak.device + self.peak.host) * ranks <= hardware.host_memory_bytes
        return (
            self.peak.device <= usable_bytes(hardware)
            and self.peak.host * ranks <= hardware.host_memory_bytes
            and self.peak.disk * ranks <= hardware.nvme_gib * 2**30
        )


def usable_bytes(hardware: Hardware) -> int:
    """Return the bytes of a device that tensors can take. Pure."""
    if hardware.device == "cpu":
        return hardware.memory_bytes
    return round(hardware.memory_bytes * (1 - FRAGMENTS)) - CONTEXT_BYTES


def option_values(name: str) -> dict[str, Any]:
    """Return the values of an option of conf/strategy/, those of the one it builds on included."""
    tree: dict[str, Any] = yaml.safe_load((STRATEGIES / f"{name}.yaml").read_text("utf-8"))
    found: dict[str, Any] = {}
    for below in tree.pop("defaults", []):
        if isinstance(below, str) and below != "_self_":
            found |= option_values(below)
    return found | tree


def strategies() -> list[str]:
    """Return the options of conf/strategy/ in the order in which they take less of a device."""
    there_are = {path.stem for path in STRATEGIES.glob("*.yaml")} - {"auto"}
    order = ["single", "ddp", "zero0", "zero1", "zero2", "fsdp_grad_op", "fsdp", "zero3"]
    return [name for name in order if name in there_are] + sorted(there_are - set(order))


def candidates(tree: Mapping[str, Any], hardware: Hardware, own: str | None) -> list[Candidate]:
    """Return a run for each strategy, with its peak and its pace where there is such a run.

    ``tree`` is a composed config on this hardware, as `on_hardware` gives it; ``own`` names the
    option that its strategy is of, where no other is to be looked at. Raises UserError where there
    is no such run at all.
    """
    return candidates_of_each([Asked(tree, hardware, own)])[0]


@dataclass(frozen=True)
class Asked:
    """What `candidates` is asked."""

    tree: Mapping[str, Any]
    hardware: Hardware
    own: str | None


def candidates_of_each(asked: Sequence[Asked]) -> list[list[Candidate]]:
    """Return the same for several runs. What they have in common is traced once.

    Raises UserError where none of them is a run.
    """
    found = [
        [
            _candidate(each.tree, each.hardware, name, is_own=each.own is not None)
            for name in (strategies() if each.own is None else [each.own])
        ]
        for each in asked
    ]
    configs = [c.config for each in found for c in each if c.config is not None]
    if not configs:
        raise UserError("\n".join(dict.fromkeys(c.problem for each in found for c in each)))
    first: dict[str, RunConfig] = {}
    autocasts: dict[str, set[bool]] = {}
    for config in configs:
        key = _what_is_traced(config)
        first.setdefault(key, config)
        autocasts.setdefault(key, set()).add(uses_autocast(config))
    looked = child.looked_at_each(
        [(as_traced(config), sorted(autocasts[key])) for key, config in first.items()]
    )
    known = {
        key: (model, dict(zip(sorted(autocasts[key]), traces, strict=True)))
        for key, (model, traces) in zip(first, looked, strict=True)
    }
    return [
        [_planned(c, known, one.hardware) for c in each]
        for one, each in zip(asked, found, strict=True)
    ]


def _what_is_traced(config: RunConfig) -> str:
    """Return all that the child's answer depends on, but for autocast, as text. Pure."""
    tree = config.model_dump(mode="json")
    fields = {*Amount.model_fields, *OptimizerFields.model_fields} - {"micro_batch_size"}
    trainer = {key: value for key, value in tree["trainer"].items() if key not in fields}
    strategy = config.strategy if isinstance(config.strategy, FsdpStrategy) else _FSDP
    units = {name: getattr(strategy, name) for name in _UNIT_FIELDS}
    sections = {name: tree[name] for name in ("model", "adapter", "objective", "data", "precision")}
    return json.dumps([sections, trainer, units, config.launcher.device], sort_keys=True)


_FSDP = FsdpStrategy(kind="fsdp")
_UNIT_FIELDS = ("wrap", "block_class", "min_unit_parameters")


def _planned(
    candidate: Candidate,
    known: Mapping[str, tuple[ModelFacts, Mapping[bool, Traced]]],
    hardware: Hardware,
) -> Candidate:
    config = candidate.config
    if config is None:
        return candidate
    model, by_autocast = known[_what_is_traced(config)]
    traced = by_autocast[uses_autocast(config)]
    return replace(
        candidate,
        peak=peak(config, model, traced),
        pace=pace(config, model, traced, hardware),
        traced=(model, traced),
    )


def fastest(found: Iterable[Candidate], hardware: Hardware) -> Candidate | None:
    """Return the run with most tokens a second of those that fit, the first of equals. Pure."""
    fitting = [each for each in found if each.pace is not None and each.fits(hardware)]
    return max(fitting, key=lambda c: c.pace.tokens_per_second if c.pace else 0.0, default=None)


def _candidate(
    tree: Mapping[str, Any], hardware: Hardware, strategy: str, *, is_own: bool
) -> Candidate:
    try:
        section = tree["strategy"] if is_own else option_values(strategy)
        config = from_tree({**tree, "strategy": section})
        if problem := lacking(config, hardware):
            return Candidate(strategy, None, problem)
        return Candidate(strategy, _on(config, hardware))
    except (UserError, ValidationError) as error:
        return Candidate(strategy, None, str(error))


def on_hardware(tree: Mapping[str, Any], hardware: Hardware) -> dict[str, Any]:
    """Return a composed config with the ranks that the hardware has. Pure."""
    launcher = {
        "kind": "torchrun",
        "device": hardware.device,
        "nproc_per_node": hardware.devices,
        "nodes": hardware.nodes,
        "head_address": "HOST" if hardware.nodes > 1 else None,
        "head_port": 29500,
    }
    return {**tree, "launcher": launcher}


def machine_of(hardware: Hardware) -> Machine:
    """Return a machine that has what its hardware has, and nothing old. Pure."""
    return Machine(compute_capabilities=(9.0,) * hardware.devices, cores=64)


def _on(config: RunConfig, hardware: Hardware) -> RunConfig:
    resolved = machine.resolve(config, machine_of(hardware), "plan")
    layout = rank_layout(resolved.strategy, resolved.launcher.world_size)
    accumulation_steps(resolved.trainer, layout)  # raises where the batch is not to be had
    return resolved


def as_traced(config: RunConfig) -> RunConfig:
    """Return a config as the child traces it: on a CPU, by attention that is one kernel there too.

    A fused kernel of a GPU drops attention weights without keeping them; those of CPUs cannot.
    """
    tree = config.model_dump(mode="json")
    is_fused = tree["model"]["attention"] != "eager" and config.launcher.device == "cuda"
    if is_fused and "attention_dropout" in tree["model"]:
        tree["model"]["attention_dropout"] = 0.0
    if tree["model"]["attention"] == "flash_attention_2":
        tree["model"]["attention"] = "sdpa"
    tree["launcher"] |= {"device": "cpu"}
    return from_tree(tree)


def nodes_needed(candidate: Candidate, hardware: Hardware) -> int | None:
    """Return with how many such nodes a run would fit, None where no number is enough. Pure.

    What a trace has found stays: a micro-batch is the same on any number of ranks.
    """
    if candidate.config is None or candidate.peak is None or candidate.traced is None:
        return None
    nodes = hardware.nodes
    while nodes <= MOST_NODES:
        larger = hardware.model_copy(update={"nodes": nodes})
        tree = on_hardware(candidate.config.model_dump(mode="json"), larger)
        per_rank = candidate.config.trainer.samples_per_pass
        tree["trainer"] |= {"global_batch_size": per_rank * larger.ranks}
        try:
            config = from_tree(tree)
        except UserError:  # one rank only, or no such number of them
            return None
        found = peak(config, candidate.traced[0], candidate.traced[1])
        if replace(candidate, config=config, peak=found).fits(larger):
            return nodes
        nodes *= 2
    return None
