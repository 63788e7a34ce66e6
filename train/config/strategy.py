"""The section "strategy": how a model lies on its ranks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from shardwright.train.config.section import NonNegativeInt, PositiveInt, Section, Strings
from shardwright.train.errors import UserError


class Placed(NamedTuple):
    """Where a part of the model state lies."""

    is_divided: bool = False
    """Whether each rank of a replica holds a shard of it, or all of it."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where it waits for its use; none is on the device."""


PARTS = ("weights", "master_weights", "gradients", "moments")
"""Of the model state."""


class _Strategy(Section):
    """What a section says of its engine, for whoever asks no engine: rules, estimates and texts."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, for the model card."""

    @property
    def package(self) -> str | None:
        """What has to be installed for it besides."""
        return None

    def shards(self, ranks: int) -> int:
        """Return into how many parts so many ranks divide the model state of a replica. Pure.

        Raises UserError where they cannot.
        """
        return 1

    @property
    def placement(self) -> dict[str, Placed]:
        """Where each of PARTS lies."""
        return {part: Placed() for part in PARTS}

    @property
    def computes_with_copies(self) -> bool:
        """Whether weights of another dtype than the masters' are kept beside these."""
        return False

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is offloaded to a disk."""
        return False

    @property
    def has_own_adam(self) -> bool:
        """Whether an AdamW of DeepSpeed's updates what is offloaded."""
        return False

    @property
    def hooks_every_layer(self) -> bool:
        """Whether each layer within a block gathers its own weights, by hooks around it."""
        return False


class SingleStrategy(_Strategy):
    """One rank, no process group."""

    kind: Literal["single"]

    @property
    def description(self) -> str:
        return "one process"

    def shards(self, ranks: int) -> int:
        if ranks != 1:
            raise UserError(
                f"strategy=single runs one rank, but launcher.nproc_per_node={ranks}; "
                "choose strategy=ddp or launcher.nproc_per_node=1"
            )
        return 1


class DdpStrategy(_Strategy):
    """Each rank holds everything; gradients are all-reduced."""

    kind: Literal["ddp"]
    bucket_size_bytes: PositiveInt = 25 * 2**20
    """Gradients are all-reduced in buckets of about this many bytes."""

    @property
    def description(self) -> str:
        return "DDP"


class AsyncIo(Section):
    """How ZeRO-Infinity reads and writes its files (libaio)."""

    block_size_bytes: PositiveInt = 2**20
    """Size of one request."""
    queue_depth: PositiveInt = 8
    """Requests in flight on one thread."""
    threads: PositiveInt = 1
    """Threads that share one transfer."""
    single_submit: bool = False
    """Submit requests one by one instead of as many as fit the queue."""
    overlap_events: bool = True
    """Overlap submitting requests with waiting for others."""


class ZeroStrategy(_Strategy):
    """DeepSpeed ZeRO. Sizes are counted in elements, as DeepSpeed counts them."""

    kind: Literal["zero"]
    stage: Literal[0, 1, 2, 3]
    """Sharded over ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and moments live and are updated (stages 1 to 3; nvme: stage 3)."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW updates what is offloaded; deepspeed's is compiled on its first use."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards of the parameters wait for their use (stage 3)."""
    pin_memory: bool = True
    """Page-lock host memory, for faster copies between host and GPU; GPU runs only."""
    nvme_path: str | None = None
    """Existing directory on a fast local disk, for nvme; a run's own folder there is temporary."""
    nvme_buffer_count: PositiveInt = 5
    """Parameter buffers in host memory between disk and GPU."""
    nvme_buffer_elements: PositiveInt = 100_000_000
    """Elements of each; at least those of a rank's part of the largest parameter."""
    nvme_optimizer_buffer_count: Annotated[int, Field(ge=4)] = 4
    """Buffers in host memory between disk and optimizer, each of the largest sub-group: AdamW takes
    four at a time, for weights, two moments and gradients."""
    nvme_fast_init: bool = False
    """Bring the first master weights to the disk in pieces as they lie there, where the parameters
    are on it too: less memory at the start."""
    max_elements_in_cpu: NonNegativeInt = 1_000_000_000
    """Parameter elements kept in host memory when parameters live on nvme."""
    aio: AsyncIo = AsyncIo()
    """How its files are read and written."""

    reduce_bucket_elements: PositiveInt | Literal["auto"] = "auto"
    """Gradients reduced at once; auto is 100,000,000, or hidden_size squared where that is more,
    and no more than the model has. A buffer of this many is held, in the dtype of the weights."""
    allgather_bucket_elements: PositiveInt | Literal["auto"] = "auto"
    """Updated parameters gathered at once (stages 1 and 2); auto as above."""
    overlap_communication: bool | Literal["auto"] = "auto"
    """Communicate while the device computes: at stage 3 gather and reduce, at stages 1 and 2 reduce
    during the backward pass, which takes a second bucket of memory and has the host wait for the
    device at the end of each pass. auto is true at stage 3, as DeepSpeed's own default."""
    reduce_scatter: bool = True
    """Reduce-scatter gradients instead of reducing each to its owner (stages 1 and 2)."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come: no fragments, one copy more."""
    round_robin_gradients: bool = False
    """Spread gradients over ranks more finely, to copy them to the CPU in parallel (1 and 2)."""
    prefetch_elements: NonNegativeInt | Literal["auto"] = "auto"
    """Parameters gathered ahead of their use (stage 3); auto is 50,000,000, or 0.9 x hidden_size
    squared where that is more, and no more than the model has."""
    persistence_elements: NonNegativeInt | Literal["auto"] = "auto"
    """Parameters smaller than this are never sharded (stage 3); auto is 10 x hidden_size."""
    max_live_elements: NonNegativeInt = 1_000_000_000
    """Gathered parameters on one GPU before the least needed are released (stage 3)."""
    max_reuse_distance_elements: NonNegativeInt = 1_000_000_000
    """Keep a parameter that is used again within this many others (stage 3)."""
    sub_group_elements: PositiveInt = 1_000_000_000
    """Parameters updated at once (stage 3); smaller needs less memory where offloaded."""
    gather_16bit_weights_on_save: bool = False
    """Also gather 16-bit weights for DeepSpeed's own save; final/ needs none of it."""
    node_local_checkpoints: bool = False
    """Each node keeps its ranks' files on its own disk, instead of a shared file system."""

    hierarchical_partition_ranks: PositiveInt = 1
    """ZeRO++: keep a second copy of the shards within this many ranks (of a node), for backward."""
    quantized_weights: bool = False
    """ZeRO++: gather parameters in int8; changes the numerics."""
    quantized_gradients: bool = False
    """ZeRO++: reduce gradients in int4; changes the numerics."""

    extra: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed keys that have no field of their own, as in its JSON; unknown ones are refused."""

    @property
    def description(self) -> str:
        offloads = (self.offload_optimizer, self.offload_parameters) != ("none", "none")
        return f"DeepSpeed ZeRO stage {self.stage}" + (", offloaded" if offloads else "")

    @property
    def package(self) -> str | None:
        return "deepspeed"

    @property
    def overlaps_communication(self) -> bool:
        """``overlap_communication``, auto resolved."""
        return (
            self.stage == 3 if self.overlap_communication == "auto" else self.overlap_communication
        )

    def shards(self, ranks: int) -> int:
        # A second copy of the parameters within some of the ranks that shard is no replica: what is
        # updated exists once.
        return ranks if self.stage > 0 else 1

    @property
    def placement(self) -> dict[str, Placed]:
        return {
            "weights": Placed(self.stage == 3, self.offload_parameters),
            "master_weights": Placed(self.stage >= 1, self.offload_optimizer),
            "gradients": Placed(self.stage >= 2, self.offload_optimizer),
            "moments": Placed(self.stage >= 1, self.offload_optimizer),
        }

    @property
    def computes_with_copies(self) -> bool:
        return True

    @property
    def uses_nvme(self) -> bool:
        return "nvme" in (self.offload_optimizer, self.offload_parameters)

    @property
    def has_own_adam(self) -> bool:
        return self.cpu_adam == "deepspeed"

    @property
    def hooks_every_layer(self) -> bool:
        return self.stage == 3


class FsdpStrategy(_Strategy):
    """PyTorch FSDP2."""

    kind: Literal["fsdp"]
    reshard_after_forward: bool = True
    """Free gathered parameters after each forward (full shard); false keeps them (grad-op)."""
    reshard_ranks: PositiveInt | None = None
    """Between forward and backward this many ranks (of a node) keep a copy; null: none do."""
    replicas: PositiveInt = 1
    """Hybrid: this many copies of the sharded model; each is sharded over world size / replicas."""
    offload: bool = False
    """Keep shards, gradients and optimizer state in host memory; the optimizer runs on the CPU."""
    pin_memory: bool = True
    """Page-lock host memory where offloaded; GPU runs only."""
    wrap: Literal["transformer", "size", "none"] = "transformer"
    """Units: each transformer block; modules of at least min_unit_parameters; the whole model."""
    block_class: str | Strings | None = None
    """Class to wrap under wrap=transformer, or several; null infers it from the model."""
    min_unit_parameters: PositiveInt = 1_000_000
    """Smallest unit under wrap=size."""
    reduce_each_micro_batch: bool = True
    """Reduce after each micro-batch and keep gradients sharded; false: once a step, kept whole."""
    prefetch_units: NonNegativeInt = 1
    """Units gathered ahead of their use, forward and backward."""

    @property
    def description(self) -> str:
        return "FSDP2" + (", offloaded" if self.offload else "")

    @property
    def block_classes(self) -> tuple[str, ...]:
        """Those that ``block_class`` names; none where they are inferred."""
        named = self.block_class or ()
        return (named,) if isinstance(named, str) else tuple(named)

    def shards(self, ranks: int) -> int:
        if ranks % self.replicas:
            raise UserError(
                f"strategy.replicas={self.replicas} does not divide the {ranks} rank(s) into "
                "equal shards; choose a divisor"
            )
        return ranks // self.replicas

    @property
    def placement(self) -> dict[str, Placed]:
        return {part: Placed(True, "cpu" if self.offload else "none") for part in PARTS}


class AutoStrategy(_Strategy):
    """What the plan finds to be fastest where the run is to run; no run has it in config.yaml."""

    kind: Literal["auto"]

    @property
    def description(self) -> str:
        return "what the plan chooses"


StrategyConfig = Annotated[
    SingleStrategy | DdpStrategy | ZeroStrategy | FsdpStrategy | AutoStrategy,
    Field(discriminator="kind"),
]
