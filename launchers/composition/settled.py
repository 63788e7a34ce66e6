"""What a run leaves to the plan, chosen before anything else is: its job without any `auto`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from shardwright.launchers.composition.compose import Job, plain
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan.at_hand import at_hand
from shardwright.launchers.plan.automatic import EVERY_BLOCKS, MICRO_BATCH, STRATEGY, Ways, ways
from shardwright.launchers.plan.candidates import nodes_needed, option_values, usable_bytes
from shardwright.launchers.plan.child import Looking
from shardwright.launchers.plan.choice import Way
from shardwright.launchers.plan.hardware import GIB, GROUP, Hardware
from shardwright.train.config import from_tree
from shardwright.train.errors import UserError
from shardwright.train.run_directory.choice import Choice


@dataclass(frozen=True)
class Settled:
    """A run whose every setting has a value, and why."""

    job: Job
    reason: tuple[str, ...] = ()
    """Lines; none where nothing was left open."""
    choice: Choice | None = None
    """What `auto` came to; None where nothing was left open."""


def settled(job: Job, here: Machine, said: Hardware | None = None) -> Settled:
    """Return a job with the plan's choice in place of each `auto` that is left to it.

    ``said`` is the hardware that its user names. Raises UserError where too little is known to
    plan, where nothing fits, and where hardware is named and nothing is left to choose.
    """
    tree = plain(job.tree)
    config = from_tree(tree, job.typed)
    left = config.left_to_the_plan
    if not left:
        if said is not None:
            raise UserError(
                f"{GROUP}= says on what a plan is made, and this run leaves nothing to one; leave "
                f"it out, set {STRATEGY}=auto, or ask `shardwright plan`"
            )
        return Settled(job)
    launcher = config.launcher.model_dump(mode="json")
    machine.resolve_launcher(launcher, config, here)
    tree = {**tree, "launcher": launcher}
    on = from_tree(tree).launcher
    hardware, known = at_hand(on, here, said, left[0])
    with Looking() as look:
        found = ways(tree, hardware, here, look)
        way = found.chosen()
        if way is None:
            raise UserError(nothing_fits(found, left))
        smaller = found.smaller_than(way)
        reason = tuple(reasons(found, way, smaller, left, known))
        choice = _choice(found, way, smaller, left)
    return Settled(_with(job, left, way), reason, choice)


def _choice(found: Ways, way: Way, smaller: Way | None, left: tuple[str, ...]) -> Choice:
    planned = found.peak(way)
    choice = Choice(words(left, way), planned.device, planned.host)
    if smaller is None:
        return choice
    less = found.peak(smaller)
    return replace(
        choice,
        smaller=words(left, smaller),
        smaller_device_bytes=less.device,
        smaller_host_bytes=less.host,
    )


def _with(job: Job, left: tuple[str, ...], way: Way) -> Job:
    """Return a job with what a way says."""
    tree: dict[str, Any] = plain(job.tree)
    choices: Mapping[str, str] = job.choices
    if STRATEGY in left:
        tree["strategy"] = option_values(way.strategy)
        choices = {**choices, "strategy": way.strategy}
    for key, value in ((MICRO_BATCH, way.micro_batch_size), (EVERY_BLOCKS, way.every_blocks)):
        if key in left:
            tree["trainer"][key.partition(".")[2]] = value
    merged = OmegaConf.create(tree)
    assert isinstance(merged, DictConfig)
    return replace(job, tree=merged, choices=choices)


def words(left: tuple[str, ...], way: Way) -> tuple[str, ...]:
    """Return what a way says of what was left to it, as it is typed. Pure."""
    blocks = "null" if way.every_blocks is None else way.every_blocks
    values = {
        STRATEGY: way.strategy,
        MICRO_BATCH: way.micro_batch_size,
        EVERY_BLOCKS: blocks,
    }
    return tuple(f"{key}={values[key]}" for key in left)


# --- why ------------------------------------------------------------------------------------------


def reasons(
    found: Ways, way: Way, smaller: Way | None, left: tuple[str, ...], known: str
) -> Iterator[str]:
    """Yield in lines what was chosen, why, and what to take where it is too much."""
    hardware, config = found.hardware, found.configs[way]
    yield f"auto: {' '.join(words(left, way))}"
    yield (
        f"  the fastest that fits of {len(found.configs):,} looked at: {way.seconds:.3g} s a step, "
        f"{_takes(found, way)}"
    )
    yield f"  on {hardware.nodes} x {hardware.devices} {hardware.device} rank(s), {known}"
    if MICRO_BATCH in left:
        sizes = sorted({each.micro_batch_size for each in found.configs})
        batch, ranks = config.trainer.global_batch_size, config.launcher.world_size
        yield (
            f"  of micro-batches of {_listed(sizes)}: trainer.global_batch_size={batch} has to be "
            f"a multiple of one on {ranks} rank(s)"
        )
    if smaller is not None:
        yield f"  should it be too much: {' '.join(words(left, smaller))}, {_takes(found, smaller)}"


def _takes(found: Ways, way: Way) -> str:
    planned, hardware = found.peak(way), found.hardware
    if hardware.device == "cpu":
        of_node = (planned.device + planned.host) * hardware.devices
        return f"{_gib(of_node)} of a host's {_gib(hardware.host_memory_bytes)} GiB"
    text = f"{_gib(planned.device)} of {_gib(usable_bytes(hardware))} usable GiB a device"
    if planned.host:
        of_node = planned.host * hardware.devices
        text += f", {_gib(of_node)} of a host's {_gib(hardware.host_memory_bytes)} GiB"
    return text


def _gib(size_bytes: float) -> str:
    gib = size_bytes / GIB
    return f"{gib:,.1f}" if gib >= 0.1 else f"{gib:.3f}"


def _listed(sizes: list[int]) -> str:
    if len(sizes) > 12:
        return f"{', '.join(map(str, sizes[:6]))}, ... {sizes[-1]}"
    return ", ".join(map(str, sizes))


def nothing_fits(found: Ways, left: tuple[str, ...]) -> str:
    """Say what would be needed."""
    least = min(found.configs, key=lambda way: _of_a_node(found, way))
    hardware = found.hardware
    settings = " ".join(words(left, least))
    text = (
        f"{left[0]}=auto: nothing fits: the least, {settings}, takes {_takes(found, least)} on "
        f"{hardware.nodes} x {hardware.devices} {hardware.device} rank(s)"
    )
    if (enough := _enough_nodes(found)) is not None:
        way, nodes = enough
        text += f"; {' '.join(words(left, way))} fits {nodes} such node(s)"
    smaller = []
    if MICRO_BATCH not in left and least.micro_batch_size > 1:
        smaller.append(f"{MICRO_BATCH}=auto")
    if EVERY_BLOCKS not in left and least.every_blocks is None:
        smaller.append(f"{EVERY_BLOCKS}=auto")
    if STRATEGY not in left:
        smaller.append(f"{STRATEGY}=auto")
    if smaller:
        text += f"; less may do with {' '.join(smaller)}"
    return f"{text}; otherwise choose a smaller model or a shorter data.sequence_length"


def _enough_nodes(found: Ways) -> tuple[Way, int] | None:
    """Return what fits the fewest such nodes, of the least of each strategy, and how many."""
    least: dict[str, Way] = {}
    for way in found.configs:
        before = least.get(way.strategy)
        if before is None or _of_a_node(found, way) < _of_a_node(found, before):
            least[way.strategy] = way
    needed = [(way, nodes_needed(found.candidate(way), found.hardware)) for way in least.values()]
    enough = [(way, nodes) for way, nodes in needed if nodes is not None]
    return min(enough, key=lambda pair: pair[1], default=None)


def _of_a_node(found: Ways, way: Way) -> float:
    """Return by how much a way is too much, of what it lacks most."""
    planned, hardware = found.at_least(way), found.hardware
    host = (planned.host + (planned.device if hardware.device == "cpu" else 0)) * hardware.devices
    of_host = host / hardware.host_memory_bytes
    if hardware.device == "cpu":
        return of_host
    return max(planned.device / usable_bytes(hardware), of_host)
