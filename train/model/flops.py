"""The two halves of MFU: what a token costs in training, and what a device can give."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardwright.train.config import RunConfig
from shardwright.train.config.devices import peak_flops

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cost:
    """What makes a speed the part of a peak that it is."""

    flops_per_token: int
    peak_flops: float
    """Of all ranks."""

    def mfu(self, tokens_per_second: float) -> float:
        return tokens_per_second * self.flops_per_token / self.peak_flops


def device_name(device: torch.device) -> str | None:
    """Return CUDA's name of a device; None for a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name(device)


def cost(
    model: PreTrainedModel, config: RunConfig, device_name: str | None, ranks: int
) -> Cost | None:
    """Return the cost of a run's tokens; None where it or the device's peak is not known.

    ``device_name`` is CUDA's, None on a CPU. In fp32, TF32 and fp8 products of several dtypes take
    turns, so that there is no one peak.
    """
    dtype = config.precision.compute_dtype
    if device_name is None or dtype not in ("bf16", "fp16") or config.data.stages:
        return None
    peak, per_token = peak_flops(device_name, dtype), flops_per_token(model, config)
    if config.precision.fp8_recipe is not None or peak is None or per_token is None:
        return None
    return Cost(per_token, peak * ranks)


def flops_per_token(model: PreTrainedModel, config: RunConfig) -> int | None:
    """Return what a token of a run costs; None for a model whose layout is not known."""
    layout = _attention(model)
    if layout is None:
        return None
    layers, heads, head_dim = layout
    if config.objective.is_encoder_decoder:
        read = config.data.tokens_per_sample
        of = {"layers": layers, "heads": heads, "head_dim": head_dim, "read": read}
        return _of_encoder_decoder(model, **of, written=config.tokens_per_sample - read)
    return training_flops_per_token(
        parameters=matmul_parameters(model),
        frozen=matmul_parameters(model, frozen=True),
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        sequence_length=config.data.tokens_per_sample,
    )


def _attention(model: PreTrainedModel) -> tuple[int, int, int] | None:
    """Return layers, heads and the size of a head; None for what calls them otherwise."""
    found = model.config
    layers = getattr(found, "num_hidden_layers", None)
    heads = getattr(found, "num_attention_heads", None)
    size = getattr(found, "hidden_size", None)
    if not layers or not heads or not size or model.get_output_embeddings() is None:
        return None
    return layers, heads, getattr(found, "head_dim", None) or size // heads


def training_flops_per_token(
    *,
    parameters: int,
    layers: int,
    heads: int,
    head_dim: int,
    sequence_length: int,
    frozen: int = 0,
) -> int:
    """Return 6N + 12 L H Q T: forward and backward pass, nothing recomputed.

    Source: "PaLM: Scaling Language Modeling with Pathways" (arXiv 2204.02311), appendix B. N is
    ``parameters`` as `matmul_parameters` counts them. The attention term counts every pair of
    tokens, for causal models and documents kept apart too, as the source does. Those of N that are
    ``frozen`` have no gradient of their own, which is a third of their cost.
    """
    return 6 * parameters - 2 * frozen + 12 * layers * heads * head_dim * sequence_length


def _of_encoder_decoder(
    model: PreTrainedModel, *, layers: int, heads: int, head_dim: int, read: int, written: int
) -> int:
    """Return the mean over the tokens of a sample that are read and those that are written.

    As `training_flops_per_token`: of matrices, those of the encoder are multiplied with what is
    read, as are keys and values of the decoder's attention to it, and all others with what is
    written; every pair of tokens of which one can attend to the other counts.
    """
    from shardwright.train.model.blocks import whole_elements

    elements = whole_elements(model)
    of_encoder = set(map(id, model.get_encoder().parameters()))
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    of_reader = of_writer = 0
    for name, parameter in _multiplied(model):
        of_source = re.search(r"EncDecAttention\.[kv]\.", name) is not None
        if id(parameter) not in head and (id(parameter) in of_encoder or of_source):
            of_reader += elements[parameter]
        else:
            of_writer += elements[parameter]
    pairs = read * read + written * written + read * written
    flops = 6 * (of_reader * read + of_writer * written) + 12 * layers * heads * head_dim * pairs
    return round(flops / (read + written))


def matmul_parameters(model: PreTrainedModel, *, frozen: bool = False) -> int:
    """Return how many parameters are multiplied with each token; or those of them not trained.

    That leaves out embedding tables, which are only looked up (token types, positions, tokens),
    except for the token embedding that is tied to the head: the head does multiply by it.
    """
    from shardwright.train.model.blocks import whole_elements

    elements = whole_elements(model)
    counted = (p for _, p in _multiplied(model) if not (frozen and p.requires_grad))
    return sum(elements[p] for p in counted)


def _multiplied(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    from torch import nn

    head = model.get_output_embeddings()
    used_by_head = {id(parameter) for parameter in head.parameters()}
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    } - used_by_head
    for name, parameter in model.named_parameters():
        # Beside an adapter, what a module was that is trained whole is not used.
        if id(parameter) not in looked_up and ".original_module." not in name:
            yield name, parameter
