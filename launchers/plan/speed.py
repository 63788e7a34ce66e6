"""How long a step takes, and the run: arithmetic, memory, links and disks, and what hides what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from shardwright.launchers.machine.memory import moments_bytes
from shardwright.launchers.plan import links
from shardwright.launchers.plan.hardware import GIGA, Hardware
from shardwright.launchers.plan.saves import Checkpoint, checkpoint
from shardwright.train.config import (
    FsdpStrategy,
    RunConfig,
    TrainerConfig,
    ZeroStrategy,
    accumulation_steps,
    rank_layout,
    samples_wanted,
    total_steps,
)
from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.precision import DTYPES
from shardwright.train.plan.facts import ModelFacts, Traced
from shardwright.train.plan.traffic import Collective, Copy, Phase, Traffic, traffic


@dataclass(frozen=True)
class Timed:
    """The collectives of one kind in a step, and their time."""

    collective: Collective
    seconds: float

    @property
    def piece_seconds(self) -> float:
        """Of one piece in each pass: the first of a forward pass, the last of a backward pass."""
        return self.seconds / self.collective.calls * self.collective.passes


@dataclass(frozen=True)
class Parts:
    """Seconds of a step that nothing else hides."""

    compute: float
    """Both passes of all micro-batches."""
    communication: float
    """Collectives, as far as no arithmetic hides them."""
    copies: float
    """Between device, host and disks, as far as neither hides them."""
    update: float
    """The optimizer's step."""

    @property
    def step(self) -> float:
        return self.compute + self.communication + self.copies + self.update


@dataclass(frozen=True)
class Pace:
    """How fast a run goes, and how long it takes."""

    parts: Parts
    collectives: tuple[Timed, ...]
    """Hidden or not."""
    copy_seconds: float
    """Of all copies, hidden or not."""
    tokens_per_step: int
    mfu: float | None
    """As runs log it; None where they do not."""
    steps: int | None
    """Of the whole run; None where the data have to be prepared to know it."""
    ranks: int
    checkpoint: Checkpoint
    saves: int
    """Checkpoints of the whole run; 0 where its steps are not known."""

    @property
    def step_seconds(self) -> float:
        return self.parts.step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def communication_seconds(self) -> float:
        """Of all collectives, hidden or not."""
        return sum(each.seconds for each in self.collectives)

    @property
    def run_seconds(self) -> float | None:
        """Steps and checkpoints; no start, no evaluation."""
        if self.steps is None:
            return None
        return self.steps * self.step_seconds + self.saves * self.checkpoint.stalled_seconds

    @property
    def device_hours(self) -> float | None:
        seconds = self.run_seconds
        return None if seconds is None else seconds / 3600 * self.ranks

    def by_category(self) -> dict[str, float]:
        """Return the seconds of a step by what they are for; their sum is the step's."""
        return asdict(self.parts)


def pace(config: RunConfig, model: ModelFacts, traced: Traced, hardware: Hardware) -> Pace:
    """Return how fast a run goes on some hardware. Pure.

    Ranks and micro-batch have to be resolved; ``traced`` is of this run's micro-batch. The
    hardware has its products, as `lacking` says.

    A phase of a step takes as long as the longest of its arithmetic, the collectives beside it and
    the copies beside it: engines give these to streams of their own, and copies have engines of
    their own in a GPU. What no arithmetic can hide is the first piece that a forward pass waits
    for, the last that a backward pass gives, and whatever an engine does on the stream that
    computes. On CPUs nothing is hidden: collectives take the cores that compute. What kernels lose
    to collectives that run beside them is in the efficiencies.
    """
    passes = accumulation_steps(
        config.trainer, rank_layout(config.strategy, config.launcher.world_size)
    )
    compute = passes * compute_seconds(config, model, traced, hardware)
    backward = _backward_share(config)
    found = traffic(config, model)
    timed = tuple(_timed(each, hardware) for each in found.collectives)
    can_hide = hardware.device != "cpu"
    budget: dict[Phase, float] = {
        "forward": (1 - backward) * compute,
        "backward": backward * compute,
        "update": 0.0,
    }
    sent, copied = 0.0, 0.0
    for phase, seconds in budget.items():
        hidden = seconds if can_hide else 0.0
        exposed = _exposed([t for t in timed if t.collective.phase == phase], hidden, passes)
        sent += exposed
        copied += _exposed_copies(found, phase, hidden, exposed, hardware)
    update = update_seconds(config, model, hardware)
    parts = Parts(compute, sent, copied, update)
    tokens = config.trainer.global_batch_size * config.tokens_per_sample
    steps = _steps(config)
    return Pace(
        parts=parts,
        collectives=timed,
        copy_seconds=sum(copy_seconds(each, hardware) for each in found.copies),
        tokens_per_step=tokens,
        mfu=_mfu(config, model, hardware, tokens / parts.step),
        steps=steps,
        ranks=config.launcher.world_size,
        checkpoint=checkpoint(config, model, hardware),
        saves=0 if steps is None else _saves(config.trainer, steps, steps * tokens),
    )


def _saves(trainer: TrainerConfig, steps: int, tokens: int) -> int:
    """Return how many checkpoints a run writes; 1 where its epochs are not known. Pure."""
    if trainer.save_every_tokens is not None:
        return -(-tokens // trainer.save_every_tokens)
    if trainer.save_every_epochs is not None:
        return math.ceil((trainer.max_epochs or 0) / trainer.save_every_epochs) or 1
    return -(-steps // (trainer.save_every_steps or steps))


# --- arithmetic -----------------------------------------------------------------------------------


def compute_seconds(
    config: RunConfig, model: ModelFacts, traced: Traced, hardware: Hardware
) -> float:
    """Return the seconds of a micro-batch's forward and backward pass. Pure.

    Products counted in the trace, recomputed ones included, over the device's dense peak of the
    dtype that they are really in, times the part of it that training reaches. Under fp8 that is the
    linear layers of blocks alone, and not their weights' gradients where a recipe keeps these in
    bf16; head, attention and the rest are in bf16 (torchao 0.18, float8/config.py).
    """
    dtype = product_dtype(config)
    efficiency = hardware.compute_efficiency
    in_fp8 = 0.0
    if products := config.precision.fp8_products:
        tokens = config.trainer.samples_per_pass * config.tokens_per_sample
        times = products + _recomputed_share(config)
        in_fp8 = min(traced.flops, 2 * times * model.fp8_elements * tokens)
    seconds = (traced.flops - in_fp8) / (_peak(hardware, dtype) * efficiency)
    if in_fp8:
        seconds += in_fp8 / (_peak(hardware, "fp8") * efficiency)
    return seconds


def product_dtype(config: RunConfig) -> str:
    """Return in which dtype most products are, as hardware calls their peaks. Pure."""
    dtype = config.precision.compute_dtype
    return "tf32" if dtype == "fp32" and config.precision.allow_tf32 else dtype


def lacking(config: RunConfig, hardware: Hardware) -> str | None:
    """Return why nothing is known of a run's products on this hardware; None where it is. Pure."""
    if (bits := quantization_of(config.model)) != NOT_QUANTIZED:
        return (
            f"model.quantization={bits}: how long weights take to be unpacked for each product is "
            "not known here, and what is left to a plan is chosen by its speed; choose a strategy, "
            "of which fsdp divides packed weights, and a trainer.micro_batch_size, and look at the "
            "report of a few steps (trainer.max_steps=20)"
        )
    dtypes = [product_dtype(config), *(["fp8"] if config.precision.fp8_recipe else [])]
    there_are = [name for name, value in hardware.peak_teraflops if value is not None]
    for dtype in dtypes:
        if dtype not in there_are:
            return (
                f"this hardware has no products in {dtype} (hardware.peak_teraflops.{dtype}=null); "
                f"choose precision={' or '.join(there_are)}"
            )
    return None


def _peak(hardware: Hardware, dtype: str) -> float:
    peak = hardware.peak_flops(dtype)
    assert peak is not None, f"`lacking` has been asked about {dtype}"
    return peak


def _recomputed_share(config: RunConfig) -> float:
    """Return which part of the blocks' products is computed again."""
    every = config.trainer.recomputed_every_blocks
    return 0.0 if every is None or config.trainer.recompute == "selective" else 1 / every


def _backward_share(config: RunConfig) -> float:
    """Return which part of the arithmetic is of the backward pass: twice the forward pass's."""
    again = _recomputed_share(config)
    return (2 + again) / (3 + again)


def update_seconds(config: RunConfig, model: ModelFacts, hardware: Hardware) -> float:
    """Return the seconds of the optimizer's step: bytes over a memory's bandwidth. Pure.

    AdamW reads gradients, and reads and writes master weights and moments, each once (torch 2.13,
    native/cuda/fused_adamw_impl.cu); clipping reads gradients for their norm, and reads and writes
    them; copies for compute are written. Others say how often they go over fp32. Offloaded, all
    ranks of a node share the host's memory. Muon's iterations are products of bf16, each matrix's
    done by one rank: for one of s x l, s no more than l, an iteration has 2 s^2 (2 l + s) (Jordan
    2024, "Muon"), the busiest rank no more than a fair share and one matrix.
    """
    precision, strategy, trainer = config.precision, config.strategy, config.trainer
    part = model.trained.count / rank_layout(strategy, config.launcher.world_size).shards
    master = DTYPES[precision.master_dtype].size_bytes
    moments = moments_bytes(trainer, DTYPES[precision.moments_dtype].size_bytes)
    optimizer = OPTIMIZERS[trainer.optimizer]
    passes = 2.0 * (master + moments) + master
    if optimizer.passes is not None:
        passes = float(optimizer.passes * master)
    if trainer.max_grad_norm:
        passes += 3 * master
    if strategy.computes_with_copies and precision.compute_dtype != precision.master_dtype:
        passes += precision.computes_in.size_bytes
    seconds = part * passes / _update_bandwidth(config, hardware)
    if optimizer.works_on_whole_matrices:
        seconds += _muon_seconds(config, model, hardware)
    return seconds


def _update_bandwidth(config: RunConfig, hardware: Hardware) -> float:
    """Return the bytes a second of a rank's memory in which the optimizer works."""
    strategy = config.strategy
    is_offloaded = (isinstance(strategy, FsdpStrategy) and strategy.offload) or (
        isinstance(strategy, ZeroStrategy) and strategy.offload_optimizer != "none"
    )
    speed = hardware.memory_gb_per_second
    if is_offloaded and hardware.device == "cuda":
        speed = hardware.host_memory_gb_per_second / hardware.devices
    return speed * GIGA * hardware.memory_efficiency


def _muon_seconds(config: RunConfig, model: ModelFacts, hardware: Hardware) -> float:
    costs = []
    for parameter in model.parameters:
        if parameter.is_hidden_matrix:
            short, long = sorted(parameter.shape)
            costs.append(2 * short**2 * (2 * long + short))
    if not costs:
        return 0.0
    busiest = max(sum(costs) / config.launcher.world_size, max(costs))
    peak = hardware.peak_flops("bf16") or hardware.peak_teraflops.fp32 * 1e12
    iterations = config.trainer.muon_newton_schulz_steps
    return iterations * busiest / (peak * hardware.compute_efficiency)


# --- communication --------------------------------------------------------------------------------


def _timed(collective: Collective, hardware: Hardware) -> Timed:
    spent = links.seconds(
        collective.name, collective.group, collective.size_bytes, collective.calls, hardware
    )
    return Timed(collective, spent)


def _exposed(timed: Iterable[Timed], hidden: float, passes: int) -> float:
    """Return the seconds of a phase's collectives that its arithmetic does not hide.

    Those that take place in some of the micro-batches alone have only their arithmetic to hide in.
    """
    exposed = 0.0
    beside = [each for each in timed if each.collective.is_overlapped]
    exposed += sum(each.seconds for each in timed if not each.collective.is_overlapped)
    total = sum(each.seconds for each in beside)
    edges = sum(each.piece_seconds for each in beside)
    share = max((each.collective.passes / passes for each in beside), default=0.0)
    return exposed + min(total, max(edges, total - share * hidden))


def copy_seconds(copy: Copy, hardware: Hardware) -> float:
    """Return the seconds of a rank's copies; all ranks of a node share its disks. Pure."""
    if copy.link == "disk":
        return copy.size_bytes * hardware.devices / (hardware.nvme_gb_per_second * GIGA)
    if hardware.device == "cpu":
        return 0.0  # there is no other memory
    speed = hardware.host_link_gb_per_second * GIGA * hardware.link_efficiency
    return copy.size_bytes / speed


def _exposed_copies(
    found: Traffic, phase: Phase, hidden: float, communicated: float, hardware: Hardware
) -> float:
    own = [(c, copy_seconds(c, hardware)) for c in found.copies if c.phase == phase]
    exposed = sum(spent for c, spent in own if not c.is_overlapped)
    beside = sum(spent for c, spent in own if c.is_overlapped)
    return exposed + max(0.0, beside - hidden - communicated)


# --- the run --------------------------------------------------------------------------------------


def _mfu(
    config: RunConfig, model: ModelFacts, hardware: Hardware, tokens_per_second: float
) -> float | None:
    """Return what training logs: see train/model/flops.py."""
    dtype, per_token = config.precision.compute_dtype, model.flops_per_token
    if hardware.device == "cpu" or dtype not in ("bf16", "fp16") or per_token is None:
        return None
    peak = hardware.peak_flops(dtype)
    if peak is None or config.precision.fp8_recipe is not None or config.data.stages:
        return None
    return tokens_per_second * per_token / (peak * config.launcher.world_size)


def _steps(config: RunConfig) -> int | None:
    """Return the steps of a run; None where that takes its data.

    Samples are taken to be full.
    """
    trainer = config.trainer
    wanted = samples_wanted(config, None)
    if trainer.max_tokens is not None and wanted is None:
        wanted = math.ceil(trainer.max_tokens / config.tokens_per_sample)
    if trainer.max_steps is None and wanted is None:
        return None
    return total_steps(trainer, wanted)


def as_json(pace: Pace) -> Mapping[str, object]:
    """Return everything that is known of a pace."""
    return {
        "step_seconds": pace.step_seconds,
        "step_seconds_by_category": pace.by_category(),
        "communication_seconds": pace.communication_seconds,
        "copy_seconds": pace.copy_seconds,
        "collectives": [
            {
                "name": each.collective.name,
                "ranks": each.collective.group.ranks,
                "ranks_per_node": each.collective.group.per_node,
                "bytes": round(each.collective.size_bytes),
                "calls": each.collective.calls,
                "phase": each.collective.phase,
                "is_overlapped": each.collective.is_overlapped,
                "seconds": each.seconds,
            }
            for each in pace.collectives
        ],
        "tokens_per_step": pace.tokens_per_step,
        "tokens_per_second": pace.tokens_per_second,
        "mfu": pace.mfu,
        "steps": pace.steps,
        "run_seconds": pace.run_seconds,
        "device_hours": pace.device_hours,
        "checkpoint_bytes": pace.checkpoint.size_bytes,
        "checkpoint_seconds": pace.checkpoint.seconds,
        "checkpoints": pace.saves,
    }
