"""What the optimizer's step holds on a device for a while, besides what is there anyway."""

from __future__ import annotations

from shardwright.train.config import FsdpStrategy, RunConfig, ZeroStrategy, rank_layout
from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.precision import DTYPES
from shardwright.train.plan.facts import ModelFacts

QUANTISED = 8
"""Bytes of each element of the largest parameter, where moments are quantised: both in fp32,
assumed of torchao 0.18's compiled step, which may not make them."""


def temporaries(config: RunConfig, model: ModelFacts) -> int:
    """Return the bytes that the step takes at the most. Pure.

    torch 2.13's fused AdamW takes none. A test measures the others:

    - Adafactor (optim/_adafactor.py) on a GPU computes all updates at once, as many as there are
      parameters; on a CPU one after the other, while that of the one before is still there.
    - Muon's iteration (optim/_muon.py) has up to 12 bytes for each element of one matrix, in bf16;
      several ranks send rows of it, and of what came of it, 2 bytes each.
    - Of quantised moments: see above.

    DeepSpeed 0.19.8 lays the gradients of a group, at stage 3 of a sub-group, end to end once more
    for the update, cast where they are of another dtype than the master weights: stage_1_and_2.py
    and stage3.py (_prepare_fp32_grad_for_sub_group); stage 0 casts each as it lies, and has all
    casts together (fp16/unfused_optimizer.py, step: the optimizer is none of DeepSpeed's fused).
    """
    strategy, model = config.strategy, model.trained
    if isinstance(strategy, FsdpStrategy) and strategy.offload:
        return 0
    own = _of_optimizer(config, model)
    if isinstance(strategy, ZeroStrategy) and strategy.offload_optimizer == "none":
        return own + _of_zero(config, model, strategy)
    return own


def _of_optimizer(config: RunConfig, model: ModelFacts) -> int:
    master = DTYPES[config.precision.master_dtype].size_bytes
    shards = rank_layout(config.strategy, config.launcher.world_size).shards
    *_, second, largest = (0, *sorted(p.elements for p in model.parameters))
    facts = OPTIMIZERS[config.trainer.optimizer]
    if facts.holds_all_updates:
        everything = config.launcher.device == "cuda"
        return master * (-(-model.count // shards) if everything else largest + second)
    if facts.works_on_whole_matrices:
        matrix = max((p.elements for p in model.parameters if p.is_hidden_matrix), default=0)
        return matrix * (12 if config.launcher.world_size == 1 else 16)
    return QUANTISED * -(-largest // shards) if facts.quantises else 0


def _of_zero(config: RunConfig, model: ModelFacts, strategy: ZeroStrategy) -> int:
    precision = config.precision
    master = DTYPES[precision.master_dtype].size_bytes
    reduced = DTYPES[precision.reduce_dtype].size_bytes
    sizes: dict[bool, int] = {}
    for parameter in model.parameters:
        sizes[parameter.decays] = sizes.get(parameter.decays, 0) + parameter.elements
    if strategy.stage == 0:
        is_cast = precision.compute_dtype != precision.master_dtype
        return master * model.count if is_cast else 0
    group = max(sizes.values())
    part = -(-group // rank_layout(strategy, config.launcher.world_size).shards)
    if strategy.stage == 3:
        part = min(part, strategy.sub_group_elements)
    return part * (reduced + (master if master != reduced else 0))
