"""One micro-batch of a run, forward and backward, on tensors without values: what it keeps alive.

The model, its head's loss, recomputation and autocast are the run's own; only engine and data are
not there. The kernels are those of a CPU, whose fused attention keeps what a GPU's does.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from shardwright.train.config import MaskedFields, RunConfig, ScratchModel
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model import build as models
from shardwright.train.model import document_attention, host_checks
from shardwright.train.model.head_loss import HeadLoss
from shardwright.train.model.labelled_head import LabelledHead
from shardwright.train.model.loss_terms import LossTerms
from shardwright.train.plan.facts import Traced
from shardwright.train.plan.live import LiveBytes
from shardwright.train.plan.model import stand_in
from shardwright.train.plan.packed import pack
from shardwright.train.strategy.dtypes import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _added_product(total: Any, left: Any, right: Any, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


# Unknown to torch's counter (2.13), which has formulas for the fused attention of GPUs, and for a
# product that is added to something, but not in place. Arguments are shapes.
_FLOPS = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def depths(config: RunConfig) -> list[int]:
    """Return at which numbers of blocks to trace: that of the model, or two to go on from. Pure.

    Blocks repeat with a period: that of recomputed ones, of those that attend to a window. Both
    depths end in the same part of one.
    """
    whole = getattr(config.model, "num_hidden_layers", None)
    assert whole is not None, "of a pretrained model the whole is traced"
    every = config.trainer.recomputed_every_blocks or 1
    period = math.lcm(every, getattr(config.model, "global_attention_every_layers", 1))
    first = whole % period + 2 * period
    return [whole] if whole <= first + period else [first, first + period]


def traced(config: RunConfig, *, autocast: bool) -> Traced:
    """Return what one micro-batch of the run keeps alive, and its arithmetic.

    With ``autocast`` the weights are fp32 and cast as they are used; else they are in the dtype of
    compute. Raises UserError where the model cannot be built.
    """
    if not isinstance(config.model, ScratchModel):
        return _at(config, autocast=autocast)
    found = [_at(_with_blocks(config, blocks), autocast=autocast) for blocks in depths(config)]
    if len(found) == 1:
        return found[0]
    first, second = depths(config)
    return found[0].continued(found[1], (config.model.num_hidden_layers - first) / (second - first))


def _with_blocks(config: RunConfig, blocks: int) -> RunConfig:
    model = config.model.model_copy(update={"num_hidden_layers": blocks})
    return config.model_copy(update={"model": model})


def _at(config: RunConfig, *, autocast: bool) -> Traced:
    model, _ = models.build(config, stand_in(), reads_weights=False)
    if config.data.has_bounds:
        document_attention.enable(model, config)
    dtype = config.precision.master_dtype if autocast else config.precision.compute_dtype
    config = models.fitted(config, model)
    pack(model, config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialize(model, getattr(torch, TORCH_DTYPES[dtype]))
        batch, labels = _batch(config, model)
        return _Step(config, model, autocast).run(batch, labels)


def _materialize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model parameters and buffers on a CPU, without values."""

    def fresh(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor.clone()  # a buffer
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    model._apply(fresh)


def _batch(config: RunConfig, model: PreTrainedModel) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a micro-batch without padding, one document a row, and its labels, flat."""
    import numpy as np

    rows, length = config.trainer.samples_per_pass, config.data.tokens_per_sample
    bounds = document_attention.bounds_of(model, config)
    shape = (1, rows * length) if config.data.line_by_line and bounds else (rows, length)
    batch: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if bounds is not None:
        told = bounds.of(np.full(rows, length, dtype=np.int64), shape)
        batch |= {name: _fake(value) for name, value in told.items()}
    elif config.data.line_by_line:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    if config.objective.is_encoder_decoder:
        written = config.tokens_per_sample - length
        batch["decoder_input_ids"] = torch.zeros((rows, written), dtype=torch.int64)
        return batch, torch.zeros(rows * written, dtype=torch.int64)
    return batch, torch.zeros(rows * length, dtype=torch.int64)


def _body(model: PreTrainedModel) -> Any:
    """Return what a model computes last before its head; the model itself, where nothing is."""
    return model.get_decoder() if model.config.is_encoder_decoder else model.base_model


def _fake(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_fake, value))
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return value


class _Step:
    """A micro-batch under watch."""

    def __init__(self, config: RunConfig, model: PreTrainedModel, autocast: bool) -> None:
        self._config, self._model, self._autocast = config, model, autocast
        self._labelled, self._share, self._mean_share = None, 1.0, 1.0
        """The labelled head, and the share of positions that it sees: at most, and on average."""
        objective = config.objective
        if isinstance(objective, MaskedFields) and objective.head_on_labels_only:
            self._labelled, self._share = LabelledHead(model), objective.largest_masked_share
            self._mean_share = objective.mean_masked_share
        host_checks.take_padding_as_known(model)
        self._terms = LossTerms.of(config.objective)
        self._fused = HeadLoss(model, self._terms) if config.trainer.fused_loss else None
        self._live = LiveBytes()
        self._gradients = 0
        """Bytes of gradients that backward has given so far."""
        self._growing = 0
        """Most bytes alive where gradients stay as they come."""
        self._backward = 0
        """Most bytes alive in the backward pass so far."""
        self._before_head, self._of_blocks = 0, 0
        """Bytes alive when the head begins, and the most until then."""
        self._backward_of_loss = 0
        """Most bytes alive until the gradient of the head's input is there."""

    def run(self, batch: dict[str, Any], labels: torch.Tensor) -> Traced:
        model, live = self._model, self._live
        live.leave_out([*model.parameters(), *model.buffers()])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take)
        with live:
            live.take_in([v for n, v in batch.items() if n.endswith("input_ids")] + [labels])
            live.begin()
            if (body := _body(model)) is not model:
                at_head = body.register_forward_hook(self._begin_head)
            loss = self._forward(batch, labels)
            if body is not model:
                at_head.remove()
            forward, kept = live.peak, live.now()
            live.begin()
            loss.backward()
            self._look()
        return Traced(
            kept=kept,
            forward=max(forward, self._of_blocks),
            backward=self._backward,
            backward_growing=self._growing,
            flops=self._flops(batch, labels),
            kept_by_blocks=min(kept, self._before_head),
            forward_of_loss=forward if self._before_head else 0,
            backward_of_loss=self._backward_of_loss,
        )

    def _begin_head(self, body: Any, given: Any, found: Any) -> None:
        """Tell what comes now, the head and the loss, from what the blocks have had."""
        self._of_blocks, self._before_head = self._live.peak, self._live.now()
        self._live.begin()
        found[0].register_hook(self._end_head)

    def _end_head(self, gradient: torch.Tensor) -> None:
        self._look()
        self._backward_of_loss = self._backward

    def _flops(self, batch: dict[str, Any], labels: torch.Tensor) -> int:
        """Return the arithmetic of both passes, of a second run.

        Under torch's counter what is computed again stays alive (2.13): its own hooks hold it.
        """
        self._share = self._mean_share
        with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            self._forward(batch, labels).backward()
        return int(counter.get_total_flops())

    def _take(self, parameter: torch.Tensor) -> None:
        """Note a gradient and drop it, as engines do that reduce it at once."""
        assert parameter.grad is not None
        self._look()
        self._gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self._live.begin()

    def _look(self) -> None:
        """Note the most that was alive since the last gradient."""
        self._backward = max(self._backward, self._live.peak)
        self._growing = max(self._growing, self._live.peak + self._gradients)

    def _forward(self, batch: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        dtype = getattr(torch, TORCH_DTYPES[self._config.precision.compute_dtype])
        with ExitStack() as stack:
            labels = stack.enter_context(self._at_labels(labels))
            if self._fused is not None:
                stack.enter_context(self._fused.of(labels))
            stack.enter_context(host_checks.batches_have_documents("position_ids" in batch))
            with torch.autocast("cpu", dtype, enabled=self._autocast and dtype != torch.float32):
                outputs = self._model(**batch)
        return Trainer.loss(outputs, labels, terms=self._terms)

    @contextmanager
    def _at_labels(self, labels: torch.Tensor) -> Iterator[torch.Tensor]:
        if self._labelled is None:
            yield labels
            return
        positions = torch.zeros(max(1, round(len(labels) * self._share)), dtype=torch.int64)
        with self._labelled.at(positions):
            yield labels[positions]
