"""Attention within documents: of several in a row of tokens, each sees itself alone.

One way for all architectures, as transformers lets attention be registered by name; a name that has
no mask function gets no mask (5.17 and 5.23, masking_utils._preprocess_mask_arguments), so that
nothing of the size of a row times a row is made, and no position id is read back from a device.
What tells documents apart comes with each call, and so is there when a block is computed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as dropped
from torch.nn.functional import pad, scaled_dot_product_attention, softmax
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardwright.train.config import RunConfig, documents
from shardwright.train.config.positions import POSITIONS_START_AFTER_PADDING
from shardwright.train.errors import UserError
from shardwright.train.model.documents import DocumentBounds, Form
from shardwright.train.process import inherited

Heads = torch.Tensor
"""Of shape (batch, heads, sequence, size of a head)."""

PREFIX = "documents_"
"""Of the names by which transformers knows these; config.json holds none of them."""


def enable(model: PreTrainedModel, config: RunConfig) -> None:
    """Have a model attend within documents, by the kernel that suits the run.

    Raises UserError where the architecture cannot be told of them.
    """
    section, model_config = config.model, model.config
    if model_config.model_type not in documents.MODELS:
        field = "data.unpad" if config.data.line_by_line else "data.document_attention"
        raise UserError(
            f"{field}=true, but it is not known how to tell {model_config.model_type} where "
            f"documents begin and end; set {field}=false, or choose one of: "
            f"{', '.join(sorted(documents.MODELS))}"
        )
    kernel = documents.kernel(
        section.attention,
        on_gpu=config.launcher.device == "cuda",
        in_16_bits=config.precision.computes_in.size_bytes == 2,
        dropout=documents.attention_dropout(vars(model_config)),
        has_varlen=_has_varlen(),
        has_flash_attn=_has_flash_attn(),
    )
    model_config._attn_implementation = PREFIX + kernel


def bounds_of(model: PreTrainedModel, config: RunConfig) -> DocumentBounds | None:
    """Return what tells a model of its documents; None where it is not to be told."""
    kernel, is_told = kernel_in_use(model)
    if not is_told:
        return None
    model_config = model.config
    after_padding = model_config.model_type in POSITIONS_START_AFTER_PADDING
    return DocumentBounds(
        _KERNELS[kernel][1],
        config.data.longest_sample,
        first_position=model_config.pad_token_id + 1 if after_padding else 0,
        one_group=is_compiled(model),
    )


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether any of a model's modules is compiled in place."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def kernel_in_use(model: PreTrainedModel) -> tuple[Any, bool]:
    """Return by which attention a model runs, and whether it is told of documents."""
    name: Any = model.config._attn_implementation
    is_told = isinstance(name, str) and name.startswith(PREFIX)
    return name.removeprefix(PREFIX) if is_told else name, is_told


# --- the kernels ----------------------------------------------------------------------------------


class _Spread(torch.autograd.Function):
    """Tokens to slots. A token has one slot, so that backward is a choice of rows too, not a sum:
    it repeats its bits on a GPU."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, slots: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        return tokens.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Collect(torch.autograd.Function):
    """Slots to tokens; those that only fill up have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        filled: torch.Tensor,
        slots: torch.Tensor,
        places: torch.Tensor,
        is_token: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(slots, is_token)
        return filled.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        slots, is_token = ctx.saved_tensors
        spread = gradient.index_select(0, slots)
        return spread.masked_fill(~is_token[:, None, None], 0), None, None, None


def attend_in_slots(
    module: nn.Module,
    query: Heads,
    key: Heads,
    value: Heads,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_slots: torch.Tensor | None = None,
    document_places: torch.Tensor | None = None,
    document_groups: tuple[torch.Tensor, ...] = (),
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in padded groups of documents of about one length: on any device, in any dtype."""
    _check(module, query, key, attention_mask, others)
    assert document_slots is not None, _UNTOLD
    assert document_places is not None, _UNTOLD
    causal = _is_causal(module, is_causal)
    tokens = (_tokens(heads) for heads in (query, key, value))
    spread = [_Spread.apply(t, document_slots, document_places) for t in tokens]
    # Keys that several heads share: the kernels that know of it are not those that take a mask.
    heads = query.shape[1]
    spread = [t.repeat_interleave(heads // t.shape[1], dim=1) for t in spread]
    sizes = [group.numel() for group in document_groups]
    filled = []
    for group, *parts in zip(document_groups, *(t.split(sizes) for t in spread), strict=True):
        q, k, v = (p.view(*group.shape, *p.shape[1:]).transpose(1, 2) for p in parts)
        found = _within_group(q, k, v, group, causal, sliding_window, dropout, scaling)
        filled.append(found.transpose(1, 2).flatten(0, 1))
    is_token = torch.cat([group.flatten() for group in document_groups])
    found = _Collect.apply(torch.cat(filled), document_slots, document_places, is_token)
    return found.view(query.shape[0], query.shape[2], *found.shape[1:]), None


def _within_group(
    query: Heads,
    key: Heads,
    value: Heads,
    is_token: torch.Tensor,
    causal: bool,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Heads:
    """Attend where each row is one document, padded at its end; ``is_token`` (rows, sequence)."""
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    longest = is_token.shape[1]
    if window is not None and window < longest:
        return _within_window(query, key, value, is_token, causal, window - 1, settings)
    if causal:  # what fills up comes last, and so is before nothing
        return scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    mask = is_token[:, None, None, :]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


def _within_window(
    query: Heads,
    key: Heads,
    value: Heads,
    is_token: torch.Tensor,
    causal: bool,
    reach: int,
    settings: dict[str, Any],
) -> Heads:
    """As `_within_group`, where a token sees those at most ``reach`` away.

    Queries come in blocks, each with the keys that any of it sees: what is computed grows with the
    sequence, not with its square.
    """
    rows, longest = is_token.shape
    block = max(1, reach)
    blocks = -(-longest // block)
    behind = blocks * block - longest
    after = 0 if causal else block
    width = 2 * block + after

    def with_neighbours(x: torch.Tensor, dim: int) -> torch.Tensor:
        sides = [0, 0] * (x.dim() - 1 - dim) + [block, behind + after]
        return pad(x, sides).unfold(dim, width, block)

    in_blocks = pad(query, (0, 0, 0, behind)).unflatten(2, (blocks, block)).transpose(1, 2)
    seen = [with_neighbours(x, 2).permute(0, 2, 1, 4, 3) for x in (key, value)]
    distance = torch.arange(width, device=query.device) - block
    distance = distance - torch.arange(block, device=query.device)[:, None]
    near = (distance >= -reach) & (distance <= (0 if causal else reach))
    mask = with_neighbours(is_token, 1)[:, :, None, None, :] & near
    mask = mask | (distance == 0)  # what fills up would see nothing, and its gradients be NaN
    queries, keys, values, mask = (x.flatten(0, 1) for x in (in_blocks, *seen, mask))
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **settings)
    found = found.unflatten(0, (rows, blocks)).transpose(1, 2).flatten(2, 3)
    return found[:, :, :longest]


def attend_by_bounds(
    module: nn.Module,
    query: Heads,
    key: Heads,
    value: Heads,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_bounds: torch.Tensor | None = None,
    longest_document: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by torch's kernel for rows of several lengths: on GPUs, in 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0, "another kernel is chosen where there is dropout"
    _check(module, query, key, attention_mask, others)
    assert document_bounds is not None, _UNTOLD
    assert longest_document is not None, _UNTOLD
    q, k, v = _in_16_bits(query, key, value)
    settings: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if _knows_shared_keys():
            settings["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    found: Any = varlen_attn(
        q,
        k,
        v,
        document_bounds,
        document_bounds,
        longest_document,
        longest_document,
        scale=scaling,
        window_size=_window(sliding_window, _is_causal(module, is_causal)),
        **settings,
    )
    return found.view(query.shape[0], query.shape[2], *found.shape[1:]), None


def attend_by_flash_attention(
    module: nn.Module,
    query: Heads,
    key: Heads,
    value: Heads,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_bounds: torch.Tensor | None = None,
    longest_document: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by the flash-attn package, where it is installed."""
    installed: Any = import_module("flash_attn")

    _check(module, query, key, attention_mask, others)
    assert document_bounds is not None, _UNTOLD
    causal = _is_causal(module, is_causal)
    found = installed.flash_attn_varlen_func(
        *_in_16_bits(query, key, value),
        document_bounds,
        document_bounds,
        longest_document,
        longest_document,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=causal,
        window_size=_window(sliding_window, causal),
        deterministic=os.environ.get(inherited.FLASH_ATTENTION) == "1",
    )
    return found.view(query.shape[0], query.shape[2], *found.shape[1:]), None


def attend_by_numbers(
    module: nn.Module,
    query: Heads,
    key: Heads,
    value: Heads,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    document_numbers: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as written down, each token of a row with each: what the others are measured by."""
    _check(module, query, key, attention_mask, others)
    assert document_numbers is not None, _UNTOLD
    at = torch.arange(query.shape[2], device=query.device)
    distance = at - at[:, None]
    seen = document_numbers[:, :, None] == document_numbers[:, None, :]
    if _is_causal(module, is_causal):
        seen = seen & (distance <= 0)
    if sliding_window is not None:
        seen = seen & (distance.abs() < sliding_window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = dropped(softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


_UNTOLD = "the batch does not say where documents begin and end"

_KERNELS: dict[documents.Kernel, tuple[Callable[..., Any], Form]] = {
    "sdpa": (attend_in_slots, "slots"),
    "varlen": (attend_by_bounds, "bounds"),
    "flash_attention_2": (attend_by_flash_attention, "bounds"),
    "eager": (attend_by_numbers, "numbers"),
}
for _name, (_function, _) in _KERNELS.items():
    ALL_ATTENTION_FUNCTIONS.register(PREFIX + _name, _function)


def _tokens(heads: Heads) -> torch.Tensor:
    """Return heads as (tokens, heads, size of a head), row after row."""
    return heads.transpose(1, 2).flatten(0, 1)


def _in_16_bits(query: Heads, key: Heads, value: Heads) -> tuple[torch.Tensor, ...]:
    # Rotary embeddings may have left queries and keys in fp32.
    return tuple(_tokens(heads).to(value.dtype) for heads in (query, key, value))


def _window(window: int | None, causal: bool) -> tuple[int, int]:
    """Return how far a token sees to the left and to the right; -1 is without a limit."""
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)


def _check(
    module: nn.Module,
    query: Heads,
    key: Heads,
    mask: torch.Tensor | None,
    others: dict[str, Any],
) -> None:
    """Raise UserError where attention is more than what is computed here."""
    names = ("softcap", "s_aux", "position_bias", "cache")
    beyond = [name for name in names if others.get(name) is not None]
    if mask is not None:
        beyond.append("attention_mask")
    if query.shape[2] != key.shape[2]:
        beyond.append("keys of other tokens")
    if beyond:
        raise UserError(
            f"{type(module).__name__} attends with {', '.join(beyond)}, which attention within "
            "documents does not know; set data.document_attention=false, or with "
            "data.line_by_line=true data.unpad=false"
        )


@cache
def _has_varlen() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    capability, minor = torch.cuda.get_device_capability()
    new_enough = capability + minor / 10 >= documents.VARLEN_COMPUTE_CAPABILITY
    return new_enough and {"scale", "window_size"} <= signature(varlen_attn).parameters.keys()


@cache
def _knows_shared_keys() -> bool:
    """Whether torch's kernel lets heads share keys without more ado: from 2.13 on, not in 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


def _has_flash_attn() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())
