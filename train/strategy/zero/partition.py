"""A model that ZeRO is to train gets its values: one parameter after the other at stage 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.config import RankLayout, RunConfig, ZeroStrategy
from shardwright.train.strategy.dtypes import TORCH_DTYPES
from shardwright.train.strategy.zero import nvme
from shardwright.train.strategy.zero.masters import to_hold
from shardwright.train.strategy.zero.settings import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shardwright.train.model.weights import InitialValues


def partitioned(
    model: PreTrainedModel, values: InitialValues, config: RunConfig, layout: RankLayout
) -> PreTrainedModel:
    """Give a model on the meta device its values: this rank's part of each at stage 3, else all.

    What this costs beside the shards is the largest parameter in the dtype of compute and, in fp32,
    this rank's part of it, or all where it is drawn.
    """
    import deepspeed
    import torch

    from shardwright.train.model import quantised
    from shardwright.train.model.first_values import dealt_in_turn
    from shardwright.train.model.weights import Owners

    assert isinstance(config.strategy, ZeroStrategy)
    if config.strategy.uses_nvme:
        from shardwright.train.strategy.zero.operators import ready_to_build

        elements = {name: p.numel() for name, p in model.named_parameters()}
        nvme.check_model(config, elements, layout)
        ready_to_build("pin_memory", "async_io")
    if config.strategy.stage < 3:
        # The engine would make them of this dtype, and put them there, one time later.
        dtype = getattr(torch, TORCH_DTYPES[config.precision.compute_dtype])
        quantised.fill(model, values, config, dtype)
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
        parameters.values(), wanted, dealt_in_turn(wanted, values, layout.shards), strict=True
    ):
        parameter.data.view(-1)[start : start + length].copy_(part)
        parameter.partition()
        # With hierarchical partitions it is made of the gathered parameter, as after each step.
        parameter.ds_secondary_tensor = None
    for buffer in model.buffers():
        # The engine leaves a partitioned model where it is.
        buffer.data = buffer.data.to(context.local_device)
    return model
