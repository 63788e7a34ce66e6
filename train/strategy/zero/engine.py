"""DeepSpeed ZeRO, stages 0 to 3."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, ZeroStrategy, rank_layout
from train.strategy.zero import nvme
from train.strategy.zero.adam import adamw as adamw
from train.strategy.zero.facts import expected as expected
from train.strategy.zero.facts import read_back as read_back
from train.strategy.zero.masters import complete as complete
from train.strategy.zero.masters import (
    flat_partitions,
    has_own_masters,
    joined,
    master_partitions,
    replicated_masters,
    to_hold,
)
from train.strategy.zero.settings import settings
from train.strategy.zero.settings import training_arguments as training_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from train.checkpoint.format.lazy import PortableState
    from train.model.weights import Values
    from train.strategy.engine import EngineState
    from train.strategy.training import Training


def machine_problems(config: RunConfig) -> Iterator[str]:
    assert isinstance(config.strategy, ZeroStrategy)
    return nvme.problems(config.strategy)


def clean_up(config: RunConfig) -> None:
    nvme.discard(config)


def shard(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    """Partition the parameters one by one at stage 3; the other stages start from the whole model.

    What this costs beside the shards is the largest parameter in the dtype of compute and, in fp32,
    this rank's part of it, or all where it is drawn. There is no communication. What has a master
    weight of its own gets its value with that, in `complete`: so it is read once.
    """
    from train.model.weights import Zeros

    if has_own_masters(config):
        later = {name for name, p in model.named_parameters() if p.requires_grad}
        values = {name: Zeros() if name in later else value for name, value in values.items()}
    return _filled(model, values, config)


def _filled(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    import deepspeed
    import torch
    import torch.distributed as dist

    from train.model.weights import Owners, in_turn, materialize

    assert isinstance(config.strategy, ZeroStrategy)
    layout = rank_layout(config.strategy, dist.get_world_size())
    if config.strategy.uses_nvme:
        from train.strategy.zero.operators import ready_to_build

        elements = {name: p.numel() for name, p in model.named_parameters()}
        nvme.check_model(config, elements, layout)
        ready_to_build("pin_memory", "async_io")
    if config.strategy.stage < 3:
        materialize(model, values)
        return model

    # Given a module, be it an empty one, DeepSpeed puts its own linear layer in place, without
    # which autograd would keep every gathered weight until the backward pass.
    context = deepspeed.zero.Init(
        module=torch.nn.Module(), config_dict_or_path=settings(config, layout)
    )
    owners = Owners(model)
    largest = max(p.numel() for p in model.parameters())
    # Each parameter is this memory until it is partitioned; only this rank's part of it is written.
    buffer = torch.zeros(largest, dtype=context.dtype, device=context.local_device)
    parameters: dict[str, Any] = {}
    for name, empty in list(model.named_parameters()):
        parameter = owners.replace(empty, buffer[: empty.numel()].view(empty.shape))
        # What zero.Init does to each parameter of a module that exists already, less its broadcast:
        # every rank has the same value.
        context._convert_to_deepspeed_param(parameter)
        parameters[name] = parameter
    wanted = [to_hold(name, parameter) for name, parameter in parameters.items()]
    for parameter, (*_, start, length), part in zip(
        parameters.values(), wanted, in_turn(wanted, values), strict=True
    ):
        parameter.data.view(-1)[start : start + length].copy_(part)
        parameter.partition()
        # With hierarchical partitions it is made of the gathered parameter, as after each step.
        parameter.ds_secondary_tensor = None
    for buffer in model.buffers():
        # The engine leaves a partitioned model where it is.
        buffer.data = buffer.data.to(context.local_device)
    return model


def serve(model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
    import deepspeed
    import torch.distributed as dist

    model = _filled(model, values, config).eval()
    layout = rank_layout(config.strategy, dist.get_world_size())
    # Without an optimizer the engine only gathers what each module needs.
    deepspeed.initialize(model=model, config=settings(config, layout))
    return model


def adopt_process_group() -> None:
    """Without it deepspeed 0.19 takes the world size for 1 while ZeRO-3 builds the model."""
    import deepspeed

    # On a CPU it would compile a shared-memory all-reduce first: a minute, or a crash where there
    # is no compiler (deepspeed 0.19 comm/torch.py, build_shm_op). gloo serves every strategy.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def restore_optimizer(trainer: Training, state: PortableState) -> None:
    from train.strategy.state.moments import check_names, restore_flat, restore_whole
    from train.strategy.zero import swapped

    engine, optimizer = trainer.model_wrapped, trainer.innermost_optimizer()
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    check_names(state, names.values())
    stage = engine.zero_optimization_stage()
    if stage == 0:
        masters = replicated_masters(engine)
        restore_whole(optimizer, state, {name: masters.get(p, p) for p, name in names.items()})
        return
    for index, (flat, pieces) in enumerate(flat_partitions(engine, names)):
        with swapped.in_memory(engine.optimizer, index):
            restore_flat(optimizer, flat, state, pieces)


def after_evaluation(trainer: Training) -> None:
    pass


def full_parameters(trainer: Training) -> Iterator[tuple[str, torch.Tensor | None]]:
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    engine = trainer.model_wrapped
    masters = replicated_masters(engine)
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # stage 0, where DeepSpeed links no master to its parameter
            whole = masters.get(parameter, parameter).detach()
        whole = whole.to("cpu", torch.float32)
        yield name, whole if trainer.is_world_process_zero() else None


def local_weights(trainer: Training) -> Iterator[torch.Tensor]:
    from train.strategy.zero import swapped

    engine = trainer.model_wrapped
    if engine.zero_optimization_stage() == 0:
        yield from replicated_masters(engine).values() or engine.module.parameters()
        return
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    partitions = swapped.masters(engine.optimizer, master_partitions(engine.optimizer))
    for flat, (_, pieces) in zip(partitions, flat_partitions(engine, names), strict=True):
        # What pads a partition is memory that nothing was ever written to, and may be NaN.
        for start, stop in joined((place, place + length) for _, _, length, place in pieces):
            yield flat.flatten()[start:stop]


def release() -> None:
    # While its config lives, transformers loads every model into ZeRO-3 shards.
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def save_state(trainer: Training, *, is_first: bool, copy: bool) -> EngineState:
    from train.checkpoint.format.layout import PARAMETER_ORDER
    from train.strategy.state.deepspeed_files import DeepSpeedState

    engine = trainer.model_wrapped
    texts: dict[str, str] = {}
    if engine.zero_optimization_stage() == 0:
        # The file of this stage counts parameters as the optimizer does, and names none.
        masters = replicated_masters(engine)
        names = {masters.get(p, p): name for name, p in engine.module.named_parameters()}
        groups = trainer.innermost_optimizer().param_groups
        order = [names[parameter] for group in groups for parameter in group["params"]]
        texts[f"engine/{PARAMETER_ORDER}"] = json.dumps(order)
    return DeepSpeedState(engine, texts, is_first=is_first, copy=copy)
