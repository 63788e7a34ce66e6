"""DeepSpeed ZeRO, stages 0 to 3."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, ZeroStrategy, accumulation_steps
from train.errors import UserError
from train.strategy import nvme

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from train.checkpoint.lazy import PortableState
    from train.strategy.engine import EngineState
    from train.strategy.training import Training
    from train.weights import Values

logger = logging.getLogger(__name__)


_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

MIN_BUCKET_ELEMENTS = 2**20
"""Below this a collective costs more for its start than for its bytes."""


def settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed JSON, every derived field written out, explicit false included."""
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    trainer, precision = config.trainer, config.precision
    bf16, fp16 = precision.compute_dtype == "bf16", precision.compute_dtype == "fp16"
    values: dict[str, Any] = {
        "train_batch_size": trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": trainer.samples_per_pass,
        "gradient_accumulation_steps": accumulation_steps(trainer, world_size),
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": _zero_section(config, strategy),
        "bf16": {
            "enabled": bf16,
            "bf16_master_weights_and_grads": precision.master_dtype == "bf16",
            "bf16_optimizer_states": precision.moments_dtype == "bf16",
            "check_grad_overflow": True,
        },
        "fp16": {
            "enabled": fp16,
            "loss_scale": 0,
            "initial_scale_power": round(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_growth_steps,
            "hysteresis": 1,
        },
        "communication_data_type": precision.reduce_dtype,
        # Accumulate in the dtype in which it is reduced; stage 0 knows only that of its parameters.
        "data_types": {
            "grad_accum_dtype": precision.reduce_dtype
            if strategy.stage > 0
            else precision.compute_dtype
        },
        "checkpoint": {"use_node_local_storage": strategy.node_local_checkpoints},
        # The optimizer is ours, the same as under every other strategy.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        # Its own progress lines would repeat ours.
        "steps_per_print": 2**31 - 1,
    }
    if strategy.uses_nvme:
        aio = strategy.aio
        values["aio"] = {
            "block_size": aio.block_size_bytes,
            "queue_depth": aio.queue_depth,
            "intra_op_parallelism": aio.threads,
            "single_submit": aio.single_submit,
            "overlap_events": aio.overlap_events,
        }
    return _merged(values, strategy.extra)


def _zero_section(config: RunConfig, strategy: ZeroStrategy) -> dict[str, Any]:
    hidden = _hidden_size(config)
    swap_directory = str(nvme.directory(config))
    bucket = max(MIN_BUCKET_ELEMENTS, (hidden or 4096) ** 2)

    def auto(value: int | str, derived: int) -> int:
        return derived if isinstance(value, str) else value

    section: dict[str, Any] = {
        "stage": strategy.stage,
        "reduce_bucket_size": auto(strategy.reduce_bucket_elements, bucket),
        "allgather_bucket_size": auto(strategy.allgather_bucket_elements, bucket),
        "overlap_comm": strategy.overlap_communication,
        "reduce_scatter": strategy.reduce_scatter,
        "contiguous_gradients": strategy.contiguous_gradients,
        "round_robin_gradients": strategy.round_robin_gradients,
        "sub_group_size": strategy.sub_group_elements,
        "offload_optimizer": {"device": strategy.offload_optimizer},
    }
    if strategy.offload_optimizer != "none":
        section["offload_optimizer"]["pin_memory"] = strategy.pin_memory
        if strategy.offload_optimizer == "nvme":
            section["offload_optimizer"]["nvme_path"] = swap_directory
    if strategy.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": auto(
                strategy.prefetch_elements, int(0.9 * hidden**2) if hidden else 50_000_000
            ),
            "stage3_param_persistence_threshold": auto(
                strategy.persistence_elements, 10 * hidden if hidden else 100_000
            ),
            "stage3_max_live_parameters": strategy.max_live_elements,
            "stage3_max_reuse_distance": strategy.max_reuse_distance_elements,
            "stage3_gather_16bit_weights_on_model_save": strategy.gather_16bit_weights_on_save,
            "zero_hpz_partition_size": strategy.hierarchical_partition_ranks,
            "zero_quantized_weights": strategy.quantized_weights,
            "zero_quantized_gradients": strategy.quantized_gradients,
            "offload_param": {"device": strategy.offload_parameters},
        }
        if strategy.offload_parameters != "none":
            section["offload_param"] |= {
                "pin_memory": strategy.pin_memory,
                "max_in_cpu": strategy.max_elements_in_cpu,
            }
        if strategy.offload_parameters == "nvme":
            section["offload_param"] |= {
                "nvme_path": swap_directory,
                "buffer_count": strategy.nvme_buffer_count,
                "buffer_size": strategy.nvme_buffer_elements,
            }
    return section


def _hidden_size(config: RunConfig) -> int | None:
    # Pretrained weights bring theirs along: unknown in a dry run where they are not here yet.
    return getattr(config.model, "hidden_size", None)


def _merged(values: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def training_arguments(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {
        "bf16": config.precision.compute_dtype == "bf16",
        "deepspeed": settings(config, world_size),
    }


def machine_problems(config: RunConfig) -> Iterator[str]:
    assert isinstance(config.strategy, ZeroStrategy)
    return nvme.problems(config.strategy)


def clean_up(config: RunConfig) -> None:
    nvme.discard(config)


def shard(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    """Partition the parameters one by one at stage 3; the other stages start from the whole model.

    What this costs beside the shards is the largest parameter in fp32 and, where that is another,
    in the dtype of compute. There is no communication.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    from train.weights import Owners, in_turn, materialize

    assert isinstance(config.strategy, ZeroStrategy)
    if config.strategy.uses_nvme:
        from train.strategy.deepspeed_ops import ready_to_build

        elements = {name: p.numel() for name, p in model.named_parameters()}
        nvme.check_model(config, elements, dist.get_world_size())
        ready_to_build("pin_memory", "async_io")
    if config.strategy.stage < 3:
        materialize(model, values)
        return model

    # Given a module, be it an empty one, DeepSpeed puts its own linear layer in place, without
    # which autograd would keep every gathered weight until the backward pass.
    context = deepspeed.zero.Init(
        module=torch.nn.Module(), config_dict_or_path=settings(config, dist.get_world_size())
    )
    owners = Owners(model)
    for _, empty, whole in in_turn(model.named_parameters(), values, context.dtype):
        parameter = owners.replace(empty, whole.to(context.local_device))
        # What zero.Init does to each parameter of a module that exists already, less its broadcast:
        # every rank has the same value.
        context._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
    for buffer in model.buffers():
        # The engine leaves a partitioned model where it is.
        buffer.data = buffer.data.to(context.local_device)
    return model


def serve(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    import deepspeed
    import torch.distributed as dist

    model = shard(model, values, config).eval()
    # Without an optimizer the engine only gathers what each module needs.
    deepspeed.initialize(model=model, config=settings(config, dist.get_world_size()))
    return model


def adopt_process_group() -> None:
    """Without it deepspeed 0.19 takes the world size for 1 while ZeRO-3 builds the model."""
    import deepspeed

    # On a CPU it would compile a shared-memory all-reduce first: a minute, or a crash where there
    # is no compiler (deepspeed 0.19 comm/torch.py, build_shm_op). gloo serves every strategy.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def adamw(
    config: RunConfig, groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    import torch

    if config.strategy.has_own_adam:
        moments_dtype = config.precision.moments_dtype
        return deepspeed_cpu_adam(groups, moments_dtype=moments_dtype, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def deepspeed_cpu_adam(
    groups: list[dict[str, Any]], *, moments_dtype: str, **settings: Any
) -> Optimizer:
    """Return DeepSpeed's vectorised AdamW for host memory, compiled where it is not yet.

    Raises UserError where that fails.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from train.strategy.deepspeed_ops import ready_to_build

    ready_to_build("cpu_adam")
    try:
        return DeepSpeedCPUAdam(
            groups, fp32_optimizer_states=moments_dtype == "fp32", adamw_mode=True, **settings
        )
    except RuntimeError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"strategy.cpu_adam=deepspeed cannot be compiled here ({reason}); install a C++ "
            "compiler and ninja, or set strategy.cpu_adam=torch"
        ) from error


def complete(trainer: Training) -> None:
    """Mend what deepspeed 0.19 gets wrong.

    With round_robin_gradients it links parameters to the masters of others. In bf16 and fp16 it
    clones the fp32 masters from the rounded parameters. At stage 0 it also makes room for the
    moments by a step with zero gradients, which decays the masters and counts as Adam's first; in
    fp32 it drops the gradient norm there, and steps whatever it is: everywhere else it skips a step
    whose gradient norm is not finite. Of gradients on NVMe it reads most not at all.
    """
    from torch.nn.utils import clip_grad_norm_, get_total_norm

    from train.strategy import swapped

    engine = trainer.model_wrapped
    precision = trainer.config.precision
    _link_masters(engine.optimizer)
    swapped.align_gradients(engine.optimizer)
    if getattr(engine.optimizer, "swap_optimizer", False) and not swapped.elements(
        engine.optimizer
    ):
        logger.warning(
            "strategy.offload_optimizer=nvme puts nothing on the disk: what is smaller than a MiB, "
            "or strategy.aio.block_size_bytes, stays in memory, and all parts of this model are"
        )
    is_new = bool(trainer.initial_values)
    if is_new and precision.compute_dtype != "fp32" and precision.master_dtype == "fp32":
        _start_from_fp32(trainer)
    if engine.zero_optimization_stage() > 0:
        return
    if _replicated_masters(engine):
        if is_new:
            engine.optimizer.optimizer.state.clear()
        return

    trainer.gate.guard(engine.optimizer)

    def clip() -> None:
        limit = engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), limit)
        trainer.gate.judge(engine._global_grad_norm)

    step = engine.optimizer.step

    def measured(*arguments: Any, **options: Any) -> Any:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = get_total_norm(gradients)
        trainer.gate.judge(engine._global_grad_norm)
        return step(*arguments, **options)

    if engine.gradient_clipping() > 0:
        engine.clip_fp32_gradients = clip
    else:
        engine.optimizer.step = measured


def _link_masters(zero: Any) -> None:
    """Link each parameter to its own master weight, for DeepSpeed's safe_get and safe_set.

    They lie in the order of round_robin_bit16_groups, but deepspeed 0.19 links them in that of
    bit16_groups (runtime/zero/stage_1_and_2.py, _link_all_hp_params).
    """
    if hasattr(zero, "round_robin_bit16_groups"):
        plain, zero.bit16_groups = zero.bit16_groups, zero.round_robin_bit16_groups
        zero._link_all_hp_params()
        zero.bit16_groups = plain


def _start_from_fp32(trainer: Training) -> None:
    """Give the master weights their values unrounded, one parameter at a time, on every rank."""
    from train.strategy import swapped
    from train.weights import in_turn

    engine, values = trainer.model_wrapped, trainer.initial_values
    parameters = dict(engine.module.named_parameters())
    if masters := _replicated_masters(engine):
        for _, parameter, whole in in_turn(parameters.items(), values):
            masters[parameter].data.copy_(whole)
        return
    names = {parameter: name for name, parameter in parameters.items()}
    for index, (flat, pieces) in enumerate(_flat_partitions(engine, names)):
        mine = [(name, parameters[name]) for name, *_ in pieces]
        with swapped.in_memory(engine.optimizer, index):
            for piece, (_, _, whole) in zip(pieces, in_turn(mine, values), strict=True):
                _, start, length, place = piece
                flat.data[place : place + length].copy_(whole.flatten()[start : start + length])


def _replicated_masters(engine: Any) -> dict[Any, torch.Tensor]:
    """Return the fp32 master of each bf16 or fp16 parameter at stage 0; none at other stages."""
    if engine.zero_optimization_stage() > 0 or not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {p: m for low, high in groups for p, m in zip(low, high, strict=True)}


def expected(config: RunConfig, world_size: int) -> dict[str, Any]:
    values = settings(config, world_size)
    section = values["zero_optimization"]
    stage = section["stage"]
    facts = {
        "engine": "DeepSpeedEngine",
        "world_size": world_size,
        "stage": stage,
        "bf16": values["bf16"]["enabled"],
        "fp16": values["fp16"]["enabled"],
        "reduce_dtype": _TORCH_NAMES[values["communication_data_type"]],
        "engine_clip": values["gradient_clipping"],
        "engine_global_batch_size": values["train_batch_size"],
        "engine_micro_batch_size": values["train_micro_batch_size_per_gpu"],
        "engine_accumulation_steps": values["gradient_accumulation_steps"],
        "parameters_sharded": stage == 3,
        "offload_optimizer": section["offload_optimizer"]["device"],
        "offload_parameters": section.get("offload_param", {}).get("device", "none"),
    }
    if stage > 0:
        facts["master_dtypes"] = [_TORCH_NAMES[config.precision.master_dtype]]
    if stage > 1:
        facts["reduce_bucket_elements"] = section["reduce_bucket_size"]
    if stage == 3:
        facts["persistence_elements"] = section["stage3_param_persistence_threshold"]
    return facts


def read_back(trainer: Training) -> dict[str, Any]:
    import deepspeed

    from train.strategy import loop, swapped

    engine = trainer.model_wrapped
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        return {"engine": type(engine).__name__}
    zero: Any = engine.optimizer
    stage = engine.zero_optimization_stage()

    def device(offload: Any) -> str:
        return "none" if offload is None else str(getattr(offload.device, "value", offload.device))

    facts = {
        "engine": "DeepSpeedEngine",
        "world_size": engine.dp_world_size,
        "stage": stage,
        "bf16": engine.bfloat16_enabled(),
        "fp16": engine.fp16_enabled(),
        "reduce_dtype": str(engine.communication_data_type).removeprefix("torch."),
        "engine_clip": engine.gradient_clipping(),
        "engine_global_batch_size": engine.train_batch_size(),
        "engine_micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "engine_accumulation_steps": engine.gradient_accumulation_steps(),
        "parameters_sharded": all(hasattr(p, "ds_id") for p in engine.module.parameters()),
        "zero_optimizer": type(zero).__name__,
        "offload_optimizer": device(engine.zero_offload_optimizer()),
        "offload_parameters": device(engine.zero_offload_param()),
    }
    if stage > 1:
        facts["reduce_bucket_elements"] = int(zero.reduce_bucket_size)
    if stage > 0:
        facts["master_dtypes"] = sorted(
            {str(p.dtype).removeprefix("torch.") for p in _master_partitions(zero)}
        )
    if stage == 3:
        facts["persistence_elements"] = engine.zero_param_persistence_threshold()
        if facts["offload_optimizer"] == "nvme":
            facts["optimizer_elements_on_nvme"] = swapped.elements(zero)
    computed = _most_common_dtype(engine.module)
    masters = facts.get("master_dtypes") or {m.dtype for m in _replicated_masters(engine).values()}
    masters = masters or {computed}
    facts["precision"] = {
        "compute": loop.in_words([computed]),
        "reduction": loop.in_words([facts["reduce_dtype"]]),
        "master": loop.in_words(masters),
        "moments": loop.in_words(loop.moments_dtypes(trainer.innermost_optimizer(), masters)),
    }
    return {**facts, **(loss_scaling(zero) if facts["fp16"] else loop.loss_scaling(None))}


def _most_common_dtype(model: torch.nn.Module) -> torch.dtype:
    # strategy.extra can ask DeepSpeed to keep some modules in fp32.
    elements: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        elements[parameter.dtype] += getattr(parameter, "ds_numel", parameter.numel())
    return elements.most_common(1)[0][0]


def loss_scaling(optimizer: Any) -> dict[str, Any]:
    """Return the facts of DeepSpeed's loss scaling: stage 0 keeps them in a class of its own."""
    if (config := getattr(optimizer, "loss_scale_config", None)) is not None:
        scale, window, dynamic = config.cur_scale, config.scale_window, config.dynamic_loss_scale
    else:
        scaler = optimizer.loss_scaler
        scale, window, dynamic = scaler.cur_scale, scaler.scale_window, scaler.dynamic
    assert dynamic, "fp16.loss_scale=0 asks for it"
    return {"initial_loss_scale": float(scale), "loss_scale_growth_steps": window}


def restore_optimizer(trainer: Training, state: PortableState) -> None:
    from train.checkpoint.moments import check_names, restore_flat, restore_whole
    from train.strategy import swapped

    engine, optimizer = trainer.model_wrapped, trainer.innermost_optimizer()
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    check_names(state, names.values())
    stage = engine.zero_optimization_stage()
    if stage == 0:
        masters = _replicated_masters(engine)
        restore_whole(optimizer, state, {name: masters.get(p, p) for p, name in names.items()})
        return
    for index, (flat, pieces) in enumerate(_flat_partitions(engine, names)):
        with swapped.in_memory(engine.optimizer, index):
            restore_flat(optimizer, flat, state, pieces)


def _flat_partitions(
    engine: Any, names: dict[Any, str]
) -> Iterator[tuple[torch.Tensor, list[tuple[str, int, int, int]]]]:
    """Yield this rank's flat fp32 partitions and what lies where in them.

    A piece is a parameter's name, its first element there, how many, and their place in the flat
    tensor.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            place, pieces = 0, []
            for parameter in group:
                share = parameter.ds_tensor.ds_numel
                start = parameter.ds_zero_partition_rank * share
                length = max(0, min(share, parameter.ds_numel - start))
                pieces.append((names[parameter], start, length, place))
                place += share
            yield flat, pieces
        return
    # Stage 1 in bf16 is a class of its own, BF16_Optimizer.
    is_bf16 = hasattr(zero, "fp32_groups_flat_partition")
    flats = zero.fp32_groups_flat_partition if is_bf16 else zero.single_partition_of_fp32_groups
    groups = zero.bf16_groups if is_bf16 else zero.round_robin_bit16_groups
    for flat, group in zip(flats, groups, strict=True):
        begin = engine.global_rank * flat.numel()
        offset, pieces = 0, []
        for parameter in group:
            first = max(begin, offset)
            last = min(begin + flat.numel(), offset + parameter.numel())
            if first < last:
                pieces.append((names[parameter], first - offset, last - first, first - begin))
            offset += parameter.numel()
        yield flat, pieces


def after_evaluation(trainer: Training) -> None:
    pass


def full_parameters(trainer: Training) -> Iterator[tuple[str, torch.Tensor | None]]:
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    engine = trainer.model_wrapped
    masters = _replicated_masters(engine)
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # stage 0, where DeepSpeed links no master to its parameter
            whole = masters.get(parameter, parameter).detach()
        whole = whole.to("cpu", torch.float32)
        yield name, whole if trainer.is_world_process_zero() else None


def local_weights(trainer: Training) -> Iterator[torch.Tensor]:
    from train.strategy import swapped

    engine = trainer.model_wrapped
    if engine.zero_optimization_stage() == 0:
        yield from _replicated_masters(engine).values() or engine.module.parameters()
        return
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    partitions = swapped.masters(engine.optimizer, _master_partitions(engine.optimizer))
    for flat, (_, pieces) in zip(partitions, _flat_partitions(engine, names), strict=True):
        # What pads a partition is memory that nothing was ever written to, and may be NaN.
        for start, stop in _joined((place, place + length) for _, _, length, place in pieces):
            yield flat.flatten()[start:stop]


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ascending ranges with those joined that follow on one another, empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif stop > start:
            joined.append((start, stop))
    return joined


def _master_partitions(zero: Any) -> list[torch.Tensor]:
    """Return this rank's flat master weights, one tensor for each group, at any stage but 0."""
    # Stage 1 with bf16 and fp32 accumulation is a class of its own, BF16_Optimizer.
    names = (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    )
    partitions = next(getattr(zero, name) for name in names if hasattr(zero, name))
    return [partition for partition in partitions if partition is not None]


def release() -> None:
    # While its config lives, transformers loads every model into ZeRO-3 shards.
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def save_state(trainer: Training, *, is_first: bool, copy: bool) -> EngineState:
    from train.checkpoint.deepspeed_files import DeepSpeedState
    from train.checkpoint.read_zero_0 import PARAMETER_ORDER

    engine = trainer.model_wrapped
    texts: dict[str, str] = {}
    if engine.zero_optimization_stage() == 0:
        # The file of this stage counts parameters as the optimizer does, and names none.
        masters = _replicated_masters(engine)
        names = {masters.get(p, p): name for name, p in engine.module.named_parameters()}
        groups = trainer.innermost_optimizer().param_groups
        order = [names[parameter] for group in groups for parameter in group["params"]]
        texts[f"engine/{PARAMETER_ORDER}"] = json.dumps(order)
    return DeepSpeedState(engine, texts, is_first=is_first, copy=copy)
