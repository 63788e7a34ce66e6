"""The loss of a model's head, made with the logits in pieces: those of a whole batch never exist.

They are the largest tensors of a training step: a value for each token of the vocabulary at each
position, in the dtype of compute, in fp32, and once more for the gradient.

torch's own `linear_cross_entropy` (2.13) is not taken: it adds up a loss of bf16 logits in bf16,
cuts a usual micro-batch into pieces of eight positions, and counts no right predictions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardwright.train.errors import UserError
from shardwright.train.model.loss_terms import IGNORED, NONE, LossTerms

FEWEST_ROWS = 64
"""Positions of a piece, at least, and what several pieces are multiples of: what products like."""
STRIDE_MULTIPLE = 64
"""What a row of logits is padded to in memory, in elements: products whose rows begin anywhere,
as they do with a vocabulary of 50,257, are slow on any device (on a CPU by a quarter to a half)."""


# --- a model whose head gives the loss ------------------------------------------------------------


@dataclass
class _Asked:
    """What the head is to give in the forward passes of a block, and has given."""

    labels: Tensor
    counts: bool
    terms: LossTerms
    weights: Tensor | None
    loss: Tensor | None = None
    version: int = 0
    """How often the loss had been written to when it was given."""
    right: Tensor | None = None


class HeadLoss:
    """Has a model's head give the summed loss of its labels where it would give logits.

    It is computed within the head's own call, for which every engine gathers its weight. The model
    is one of which `why_not` finds that it can.
    """

    def __init__(self, model: PreTrainedModel, terms: LossTerms = NONE) -> None:
        """``terms`` are minimised besides, where predictions are not counted."""
        head: Any = _output_embedding(model)
        self._terms = terms
        self._asked: _Asked | None = None
        known = weakref.ref(head)  # it is to be freed with the model, not as part of a cycle

        def forward(hidden: Tensor) -> Tensor:
            layer = known()
            assert layer is not None
            if self._asked is None:
                return nn.Linear.forward(layer, hidden)
            return _answer(self._asked, hidden, layer)

        # Not by a hook: those of an engine have to stay around it.
        head.forward = forward

    @contextmanager
    def of(
        self, labels: Tensor, *, counts: bool = False, weights: Tensor | None = None
    ) -> Iterator[None]:
        """Let forward passes in the block give the summed loss of ``labels`` in place of logits.

        ``labels`` (positions,) are those of what the head sees, `IGNORED` where there is none. With
        ``counts`` those are counted, too, that the model takes for the most likely. Each label
        counts by its own of ``weights`` (positions,), where they are given.
        """
        self._asked = _Asked(labels, counts, self._terms, weights)
        try:
            yield
        finally:
            self._asked = None

    def check(self, logits: Tensor) -> Tensor:
        """Return what a forward pass has given in place of logits: the sum of losses, in fp32.

        Raises UserError where the model has made something else of what its head gave.
        """
        asked = self._asked
        if asked is None or asked.loss is None:
            raise refusal(_NOT_CALLED)
        # Hooks of an engine may have put a view in its place.
        is_same = logits.data_ptr() == asked.loss.data_ptr() and logits.shape == asked.loss.shape
        if not is_same or logits._version != asked.version:
            raise refusal(_CHANGED)
        return logits

    @property
    def right(self) -> Tensor:
        """For how many labels of the last forward pass the most likely token is the right one."""
        assert self._asked is not None
        assert self._asked.right is not None, "it was not to be counted"
        return self._asked.right


def is_in(model: nn.Module) -> bool:
    """Whether a model's head gives its loss where it is asked for it."""
    head = _output_embedding(model)
    return head is not None and getattr(vars(head).get("forward"), "__module__", "") == __name__


def refusal(reason: str) -> UserError:
    """Return the error for a model that `why_not` has something against."""
    return UserError(
        f"trainer.fused_loss=true is impossible with this model: {reason}; leave it at auto, or "
        "set it to false"
    )


def why_not(model: PreTrainedModel) -> str | None:
    """Return why a model's head cannot give the loss in place of logits, None where it can.

    The model needs no values: what is around its body is run once, on the device where it is.
    """
    head: Any = _output_embedding(model)
    if head is None:
        return "it has no output embedding"
    if type(head).forward is not nn.Linear.forward:
        return f"its output embedding is no linear layer ({type(head).__name__})"
    given: list[Tensor] = []

    def give(hidden: Tensor) -> Tensor:
        given.append(torch.zeros((), device=hidden.device))
        return given[-1]

    head.forward = give
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = _logits_around_any_body(model)
    except Exception as error:  # be it of code that came with the weights
        return f"its forward pass could not be followed ({type(error).__name__}: {error})"
    finally:
        del head.forward
    if not given:
        return _NOT_CALLED
    return None if logits is given[0] and logits._version == 0 else _CHANGED


_NOT_CALLED = "it does not call its output embedding"
_CHANGED = "it computes its logits from what its output embedding gives"


def _output_embedding(model: Any) -> nn.Module | None:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def _logits_around_any_body(model: PreTrainedModel) -> Any:
    """Return the logits of a forward pass in which the model's body, if it has one, does nothing.

    On the meta device a body may be unable to run: experts look which tokens are theirs.
    """
    parameter = next(model.parameters())
    ids = torch.zeros(1, 2, dtype=torch.long, device=parameter.device)
    body: Any = model.base_model
    if model.config.is_encoder_decoder:
        return model.forward(input_ids=ids, decoder_input_ids=ids).logits
    if body is model:
        return model.forward(input_ids=ids).logits
    size = model.config.get_text_config().hidden_size
    hidden = torch.zeros(1, 2, size, dtype=parameter.dtype, device=parameter.device)
    had = vars(body).get("forward")
    body.forward = lambda *arguments, **options: _BodyOutput(hidden)
    try:
        return model.forward(input_ids=ids).logits
    finally:
        if had is None:
            del body.forward
        else:
            body.forward = had


class _BodyOutput:
    """What a body returns, of any class: hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, slice):
            return (self.last_hidden_state,)[key]
        return self.last_hidden_state if key in (0, "last_hidden_state") else None


# --- the loss of a linear layer, in pieces --------------------------------------------------------


def _answer(asked: _Asked, hidden: Tensor, layer: nn.Linear) -> Tensor:
    hidden = hidden.flatten(0, -2)
    if len(hidden) != len(asked.labels):
        raise refusal(f"its head sees {len(hidden)} positions of {len(asked.labels)} labels")
    head = (hidden, layer.weight, layer.bias, asked.labels)
    if asked.counts:
        loss, asked.right = loss_and_right(*head, asked.weights)
    else:
        loss = summed_loss(*head, asked.terms, asked.weights)
    asked.loss, asked.version = loss.detach(), loss._version
    return loss


def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    terms: LossTerms = NONE,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the summed cross entropy of a linear layer's logits, never all of them at once.

    With what ``terms`` add of each label, all of it times the label's own of ``weights``.

    ``hidden`` (positions, features), ``labels`` (positions,). It computes in the dtype of autocast,
    where that is on, and otherwise in that of ``hidden``; from the softmax on in fp32.
    """
    dtype = _dtype_of_compute(hidden)
    total: Tensor = _SummedLoss.apply(hidden, weight, bias, labels, dtype, terms, weights)
    return total


@torch.no_grad()
def loss_and_right(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the same sum, and of how many labels the most likely token is the right one."""
    right = torch.zeros((), dtype=torch.long, device=hidden.device)

    def count(logits: Tensor, labels: Tensor) -> None:
        right.add_(logits.argmax(-1).eq(labels).sum())  # which an ignored one never is

    dtype = _dtype_of_compute(hidden)
    made = _in_pieces(hidden, weight, bias, labels, dtype, weights=weights, look=count)
    return made.loss, right


class _SummedLoss(torch.autograd.Function):
    """Gradients are made along with the loss, while a piece's logits are there.

    So nothing is computed twice, and the step's peak stays where it is: the head is the last that a
    forward pass computes and the first that a backward pass needs. In fp16 they have to be scaled
    before they are rounded, by what only the backward pass knows: there logits are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        dtype: torch.dtype,
        terms: LossTerms,
        weights: Tensor | None,
    ) -> Tensor:
        ctx.dtype, ctx.terms = dtype, terms
        wanted = ctx.needs_input_grad[:3]
        head = (hidden, weight, bias, labels)
        if not any(wanted) or dtype == torch.float16:
            ctx.save_for_backward(*head, weights)
            return _in_pieces(*head, dtype, terms, weights=weights).loss
        made = _in_pieces(*head, dtype, terms, weights=weights, wanted=wanted)
        ctx.save_for_backward(*made.gradients)
        return made.loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.dtype == torch.float16:
            wanted = ctx.needs_input_grad[:3]
            hidden, weight, bias, labels, weights = ctx.saved_tensors
            head = (hidden, weight, bias, labels, ctx.dtype, ctx.terms)
            made = _in_pieces(*head, weights=weights, wanted=wanted, scale=scale)
            return (*made.gradients, None, None, None, None)
        # In place: they are this function's own, and torch lets nobody come for them twice.
        gradients = [None if g is None else g.mul_(scale) for g in ctx.saved_tensors]
        return (*gradients, None, None, None, None)


@dataclass
class _Made:
    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    """Of hidden states, weight and bias, where they are wanted."""


def _in_pieces(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    dtype: torch.dtype,
    terms: LossTerms = NONE,
    *,
    weights: Tensor | None = None,
    wanted: tuple[bool, ...] = (False, False, False),
    scale: Tensor | None = None,
    look: Callable[[Tensor, Tensor], None] | None = None,
) -> _Made:
    """Go over the positions piece by piece; gradients are those of the sum, times ``scale``.

    ``look`` is shown each piece's logits and labels.
    """
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    # Over all pieces they are added up without rounding them to bf16 in between.
    of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
    rows = rows_of_a_piece(*hidden.shape)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        for piece in range(0, len(hidden), rows):
            here = slice(piece, piece + rows)
            inputs, is_label = hidden[here].to(dtype), labels[here].ne(IGNORED)[:, None]
            logits = _logits(inputs, matrix, shift)
            if look is not None:
                look(logits, labels[here])
            log_p = torch.log_softmax(logits, -1, dtype=wide)
            label = labels[here].clamp(min=0)[:, None]
            of_label, norm = log_p.gather(1, label), None
            if terms.z_loss:
                norm = logits.gather(1, label).to(wide) - of_label
            del logits
            of_labels = _of_labels(of_label, norm, log_p[:, : len(matrix)], terms)
            counts = None if weights is None else weights[here, None].to(wide)
            if counts is not None:
                of_labels = of_labels * counts
            total += of_labels.where(is_label, 0).sum()
            if not any(wanted):
                continue
            slope = _slope(log_p, label, norm, len(matrix), terms)
            slope = slope if counts is None else slope.mul_(counts)
            slope = (slope if scale is None else slope.mul_(scale)).to(dtype)
            slope = slope[:, : len(matrix)]
            if of_hidden is not None:
                of_hidden[here] = (slope @ matrix).where(is_label, 0)
            if of_weight is not None:
                _add_product(of_weight, slope.T, inputs.where(is_label, 0))
            if of_bias is not None:
                _add_product(of_bias, slope.T, is_label.squeeze(1).to(dtype))
    return _Made(total, (of_hidden, _as(weight, of_weight), _as(bias, of_bias)))


def _of_labels(of_label: Tensor, norm: Tensor | None, log_p: Tensor, terms: LossTerms) -> Tensor:
    """Return what is minimised of each label (positions, 1).

    ``norm`` is the logarithm of the softmax's denominator, where that counts.
    """
    found = -of_label
    if terms.label_smoothing:
        of_all = log_p.sum(1, keepdim=True) / log_p.shape[1]
        found = (1 - terms.label_smoothing) * found - terms.label_smoothing * of_all
    if norm is not None:
        found = found + terms.z_loss * norm.square()
    return found


def _slope(
    log_p: Tensor, label: Tensor, norm: Tensor | None, tokens: int, terms: LossTerms
) -> Tensor:
    """Return the gradient of the same by the logits, in place of their ``log_p``."""
    slope = log_p.exp_()
    if norm is not None:
        slope.mul_(1 + 2 * terms.z_loss * norm)
    if terms.label_smoothing:
        slope[:, :tokens] -= terms.label_smoothing / tokens
    slope.scatter_(1, label, slope.gather(1, label) - (1 - terms.label_smoothing))
    return slope


def rows_of_a_piece(positions: int, features: int) -> int:
    """Return for how many positions at a time there are logits: about equal parts of all. Pure.

    Each piece adds to the gradient of the whole weight: its logits are to weigh less than that, and
    not so little that adding costs more than computing. Several are whole tiles of a product.
    """
    most = max(FEWEST_ROWS, features // 2)
    pieces = max(1, -(-positions // most))
    if pieces == 1:
        return max(1, positions)
    return min(most, _up(-(-positions // pieces), FEWEST_ROWS))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _logits(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear layer's result, its last dimension padded with what has no probability."""
    tokens = len(matrix)
    padded = inputs.new_empty(len(inputs), _up(tokens, STRIDE_MULTIPLE))
    padded[:, tokens:] = -torch.inf
    if bias is None:
        torch.mm(inputs, matrix.T, out=padded[:, :tokens])
    else:
        torch.addmm(bias, inputs, matrix.T, out=padded[:, :tokens])
    return padded


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype != left.dtype:
        total += left @ right
    elif right.dim() == 1:
        total.addmv_(left, right)
    else:
        total.addmm_(left, right)


def _as(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _dtype_of_compute(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
