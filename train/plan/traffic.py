"""What a rank sends in a step under each engine: collectives, and copies to its host and disks.

`python -m benchmarks.collectives` counts the collectives of the live engines, and a test holds
these to its figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shardwright.train.config import (
    DdpStrategy,
    FsdpStrategy,
    RankLayout,
    RunConfig,
    ZeroStrategy,
    accumulation_steps,
    rank_layout,
)
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.precision import DTYPES
from shardwright.train.plan.facts import ModelFacts, Parameter
from shardwright.train.strategy.zero.settings import settings as zero_settings

CollectiveName = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
Phase = Literal["forward", "backward", "update"]
Link = Literal["host", "disk"]


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, and how many of them share a node."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True)
class Collective:
    """All of one kind in a step of one rank."""

    name: CollectiveName
    group: Group
    size_bytes: float
    """The larger of what goes in and what comes out."""
    calls: int
    phase: Phase
    passes: int = 1
    """Micro-batches of the step in which it takes place."""
    is_overlapped: bool = False
    """Whether it runs beside the arithmetic of its phase, but for the first or the last piece."""

    @property
    def sent_bytes(self) -> float:
        return sent_bytes(self.name, self.group, self.size_bytes)


@dataclass(frozen=True)
class Copy:
    """Bytes of one rank in a step between device and host, or host and disk."""

    link: Link
    size_bytes: float
    phase: Phase
    is_overlapped: bool = False


@dataclass(frozen=True)
class Traffic:
    """What a rank sends and copies in a step."""

    collectives: tuple[Collective, ...] = ()
    copies: tuple[Copy, ...] = ()

    @property
    def sent_bytes(self) -> float:
        """What a rank sends in all collectives of a step; it receives as much."""
        return sum(each.sent_bytes for each in self.collectives)


def sent_bytes(name: CollectiveName, group: Group, size_bytes: float) -> float:
    """Return what a rank sends in a collective of so many bytes, the larger of in and out. Pure.

    In a ring of n ranks everything but a rank's own part passes by it; a reduction that all get is
    a scattered one and a gathering of what came of it (Rajbhandari et al. 2020, "ZeRO", section
    7.1). NCCL's tests call the same, over the time of a collective, the bus bandwidth.
    """
    times = 2 if name == "all-reduce" else 1
    return times * size_bytes * (group.ranks - 1) / group.ranks


def traffic(config: RunConfig, model: ModelFacts, world_size: int | None = None) -> Traffic:
    """Return what a rank sends and copies in a step. Pure.

    ``world_size`` is the number of ranks that are there; without it the launcher's.
    """
    find = _Of(config, model, world_size or config.launcher.world_size)
    sent: Iterator[Collective] = iter(())
    copied: tuple[Copy, ...] = ()
    match config.strategy:
        case DdpStrategy():
            sent = find.ddp(config.strategy)
        case FsdpStrategy():
            sent, copied = find.fsdp(config.strategy), find.copies_of_fsdp(config.strategy)
        case ZeroStrategy():
            sent, copied = find.zero(config.strategy), find.copies_of_zero(config.strategy)
    several = [each for each in (*sent, *find.muon()) if each.group.ranks > 1 and each.size_bytes]
    return Traffic(tuple(several), (*copied, *find.activations()))


def group_of(layout: RankLayout, ranks_per_node: int, name: Literal["shards", "replicas"]) -> Group:
    """Return the ranks that share or copy a state, shards being neighbours. Pure."""
    if name == "shards":
        return Group(layout.shards, min(layout.shards, ranks_per_node))
    apart = max(1, ranks_per_node // layout.shards)
    return Group(layout.replicas, min(layout.replicas, apart))


class _Of:
    """The arithmetic of one run."""

    def __init__(self, config: RunConfig, model: ModelFacts, world_size: int) -> None:
        self.config, self.model, self.world_size = config, model, world_size
        self.layout = rank_layout(config.strategy, world_size)
        self.shards = self.group("shards")
        self.passes = accumulation_steps(config.trainer, self.layout)
        self.compute = config.precision.computes_in.size_bytes
        self.reduced = DTYPES[config.precision.reduce_dtype].size_bytes
        self.master = DTYPES[config.precision.master_dtype].size_bytes

    def group(self, name: Literal["shards", "replicas"]) -> Group:
        return group_of(self.layout, self.config.launcher.ranks_per_node, name)

    # --- replicated -------------------------------------------------------------------------------

    def ddp(self, strategy: DdpStrategy) -> Iterator[Collective]:
        """Gradients are all-reduced once a step, in buckets, as the last backward pass gives them.

        Source: torch 2.13, nn/parallel/distributed.py; the Trainer's micro-batches before the last
        are in no_sync.
        """
        size = self.reduced * self.model.trained.count
        calls = -(-size // strategy.bucket_size_bytes)
        yield Collective("all-reduce", self.group("replicas"), size, calls, "backward", 1, True)

    # --- DeepSpeed --------------------------------------------------------------------------------

    def zero(self, strategy: ZeroStrategy) -> Iterator[Collective]:
        """Dispatch by stage.

        Source: deepspeed 0.19.8. Stage 0 reduces at the end of a step (runtime/engine.py,
        allreduce_gradients). Stages 1 and 2 all-reduce where the paper reduces to owners, stage 1
        at the end of a step, stage 2 in each micro-batch, beside the backward pass with overlap
        only; then they gather what was updated (runtime/zero/stage_1_and_2.py).
        """
        section = zero_settings(self.config, self.layout)["zero_optimization"]
        count = self.model.trained.count
        if strategy.stage == 3:
            yield from self._zero_3(strategy, section)
            return
        group = self.group("replicas") if strategy.stage == 0 else self.shards
        pieces = max(1, -(-count // section["reduce_bucket_size"]))
        passes = self.passes if strategy.stage == 2 else 1
        overlaps = strategy.stage > 0 and strategy.overlaps_communication
        size = self.reduced * count * passes
        yield Collective("all-reduce", group, size, pieces * passes, "backward", passes, overlaps)
        if strategy.stage > 0:
            # One for each of the optimizer's groups at the least.
            groups = len({parameter.decays for parameter in self.model.trained.parameters})
            pieces = max(groups, -(-count // section["allgather_bucket_size"]))
            yield Collective("all-gather", self.shards, self.compute * count, pieces, "update")

    def _zero_3(self, strategy: ZeroStrategy, section: dict[str, int]) -> Iterator[Collective]:
        """Weights are gathered in each pass, gradients scattered in each backward pass.

        Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py: what is used again
        within max_reuse_distance elements stays gathered, and no more than max_live at once; at the
        turn of a micro-batch that is half of the distance, as it is walked both ways. Quantized
        weights are of one byte, quantized gradients of half a byte; a second partition serves the
        backward pass from within a node (docs/_tutorials/zeropp.md).
        """
        small = section["stage3_param_persistence_threshold"]
        sizes = [p.elements for p in self.model.parameters if p.elements > small]
        large = sum(sizes)
        kept = min(large, self._kept_gathered(strategy))
        each = 1 if strategy.quantized_weights else self.compute
        pieces = self._fetches(len(sizes), large, section["stage3_prefetch_bucket_size"])
        overlaps = strategy.overlaps_communication
        near = strategy.hierarchical_partition_ranks
        group = self.shards if near == 1 else Group(near, min(near, self.shards.per_node))
        yield self._each_pass("all-gather", self.shards, each * large, pieces, "forward", overlaps)
        again = large - kept
        pieces = -(-pieces * again // large) if large else 0
        yield self._each_pass("all-gather", group, each * again, pieces, "backward", overlaps)
        count = self.model.trained.count
        calls = max(1, -(-count // section["reduce_bucket_size"]))
        size = (0.5 if strategy.quantized_gradients else self.reduced) * count
        yield self._each_pass("reduce-scatter", self.shards, size, calls, "backward", overlaps)
        small_ones = self.model.count - large
        persistent = self.compute * small_ones
        yield Collective("all-gather", self.shards, persistent, min(1, small_ones), "update")

    @staticmethod
    def _kept_gathered(strategy: ZeroStrategy) -> int:
        return min(strategy.max_live_elements, strategy.max_reuse_distance_elements // 2)

    def _fetches(self, matrices: int, elements: int, ahead: int) -> int:
        """Return the gatherings of a pass: of each parameter, or of what is fetched ahead."""
        if not ahead or not matrices:
            return matrices
        at_the_least = 2 * len(self.model.units) + 2
        return min(matrices, max(at_the_least, -(-elements // ahead)))

    def _each_pass(
        self,
        name: CollectiveName,
        group: Group,
        size: float,
        calls: int,
        phase: Phase,
        overlaps: bool,
    ) -> Collective:
        passes = self.passes
        return Collective(name, group, size * passes, calls * passes, phase, passes, overlaps)

    def copies_of_zero(self, strategy: ZeroStrategy) -> tuple[Copy, ...]:
        """Return what is copied where states are offloaded.

        Source: deepspeed 0.19.8. A micro-batch's gradients go to the host, from the second on by
        way of the device, which adds them (runtime/zero/stage_1_and_2.py,
        async_accumulate_grad_in_cpu_via_gpu; stage3.py, partition_grads), at stages 1 and 2 once
        more as fp32 for the update; updated weights come back. Shards of parameters come from the
        host, or from disks by way of it, in each pass. An optimizer on disks is read and written in
        each step (runtime/swap_tensor/partitioned_optimizer_swapper.py), nothing beside it.
        """
        if strategy.stage == 0:
            return ()
        whole_part = self.model.count / self.layout.shards
        part = self.model.trained.count / self.layout.shards
        found = []
        if strategy.offload_optimizer != "none":
            passes = self.passes if strategy.stage >= 2 else 1
            gradients = self.reduced * part * (2 * passes - 1)
            if strategy.stage < 3:
                gradients += self.master * part if passes > 1 else 0
            found.append(Copy("host", gradients, "backward", strategy.overlaps_communication))
            if strategy.offload_parameters == "none":
                found.append(Copy("host", self.compute * part, "update"))
        if strategy.offload_optimizer == "nvme":
            numbers = self.master + 2 * DTYPES[self.config.precision.moments_dtype].size_bytes
            found.append(Copy("disk", 2 * numbers * part, "update"))
        if strategy.offload_parameters != "none":
            again = 1 - min(1.0, self._kept_gathered(strategy) / self.model.count)
            of_pass = self.compute * whole_part * self.passes
            links: list[Link] = ["host"]
            if strategy.offload_parameters == "nvme":
                links.append("disk")
            for link in links:
                found.append(Copy(link, of_pass, "forward", strategy.overlaps_communication))
                found.append(
                    Copy(link, again * of_pass, "backward", strategy.overlaps_communication)
                )
            if strategy.offload_parameters == "nvme":
                found.append(Copy("disk", self.compute * part, "update"))
        return tuple(found)

    # --- FSDP -------------------------------------------------------------------------------------

    def fsdp(self, strategy: FsdpStrategy) -> Iterator[Collective]:
        """Units are gathered ahead of each pass, gradients scattered behind the backward pass.

        Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param_group.py: streams of their
        own for gathering and scattering; the root is not gathered again. What is not resharded
        after the forward pass, or to fewer ranks, needs none, or a nearer one. Copies of a sharded
        model all-reduce their shards once a step. A matrix of fewer rows than ranks is padded.
        """
        ranks = self.layout.shards
        whole, trained = (
            sum(-(-p.rows // ranks) * ranks * (p.elements // p.rows) for p in each if p.elements)
            for each in (self.model.parameters, self.model.trained.parameters)
        )
        in_units = round(whole * sum(self.model.units) / max(1, self.model.count))
        units = len(self.model.units)
        size = self.compute * whole
        yield self._each_pass("all-gather", self.shards, size, units + 1, "forward", True)
        if strategy.reshard_after_forward:
            near = strategy.reshard_ranks
            group = self.shards if near is None else Group(near, min(near, self.shards.per_node))
            size = self.compute * in_units
            yield self._each_pass("all-gather", group, size, units, "backward", True)
        passes = self.passes if strategy.reduce_each_micro_batch else 1
        size = self.reduced * trained
        # Units of which nothing is trained, and a root, have no gradients.
        reduces = [u for u in self.model.trained.units if u]
        at_root = self.model.trained.count > sum(reduces)
        reductions = len(reduces) + at_root
        calls = reductions * passes
        yield Collective(
            "reduce-scatter", self.shards, size * passes, calls, "backward", passes, True
        )
        copies = self.group("replicas")
        yield Collective("all-reduce", copies, size / ranks, reductions, "backward", 1, True)

    @property
    def _parameters(self) -> list[Parameter]:
        return [p for p in self.model.parameters if p.elements]

    def copies_of_fsdp(self, strategy: FsdpStrategy) -> tuple[Copy, ...]:
        """Return what is copied where shards are offloaded.

        Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param.py, all_gather_inputs: the
        masters' shards come to the device before each gathering; and _fsdp_collectives.py,
        foreach_reduce: gradients go to the host as they are reduced.
        """
        if not strategy.offload:
            return ()
        part, trained = (
            self.master * each.count / self.layout.shards
            for each in (self.model, self.model.trained)
        )
        found = [Copy("host", part * self.passes, "forward", True)]
        if strategy.reshard_after_forward:
            found.append(Copy("host", part * self.passes, "backward", True))
        reductions = self.passes if strategy.reduce_each_micro_batch else 1
        return (*found, Copy("host", trained * reductions, "backward", True))

    # --- whatever the engine ----------------------------------------------------------------------

    def muon(self) -> Iterator[Collective]:
        """Each hidden matrix is worked on by one rank, which is sent its rows and sends back.

        Source: train/optimizer/dealing.py: in bf16, in rounds of one matrix a rank; where all ranks
        hold all, what came of it is broadcast.
        """
        if not OPTIMIZERS[self.config.trainer.optimizer].works_on_whole_matrices:
            return
        sizes = [p.elements for p in self._parameters if p.is_hidden_matrix]
        ranks = self.world_size
        rounds = -(-len(sizes) // ranks)
        if self.layout.shards > 1:
            size = 2 * sum(sizes) / self.layout.replicas / self.layout.shards
            yield Collective("all-to-all", self.shards, 2 * size, 2 * rounds, "update")
        copies, calls = self.group("replicas"), min(len(sizes), rounds * self.layout.replicas)
        size = 2 * sum(sizes) / self.layout.shards
        yield Collective("all-gather", copies, size, calls, "update")

    def activations(self) -> tuple[Copy, ...]:
        """Return the inputs of recomputed blocks, where they wait in host memory."""
        trainer = self.config.trainer
        if not trainer.offload_activations:
            return ()
        blocks = len(self.model.units) // (trainer.recomputed_every_blocks or 1)
        width = getattr(self.config.model, "hidden_size", 0)
        tokens = trainer.samples_per_pass * self.config.data.tokens_per_sample
        size = self.compute * blocks * tokens * width * self.passes
        return Copy("host", size, "forward", True), Copy("host", size, "backward", True)
