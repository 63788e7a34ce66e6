"""The two halves of MFU: what a token costs in training, and what a device can give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwright.launchers.plan import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def training_flops_per_token(
    *, parameters: int, layers: int, heads: int, head_dim: int, sequence_length: int
) -> int:
    """Return 6N + 12 L H Q T: forward and backward pass, nothing recomputed.

    Source: "PaLM: Scaling Language Modeling with Pathways" (arXiv 2204.02311), appendix B. N is
    ``parameters`` as `matmul_parameters` counts them. The attention term counts every pair of
    tokens, for causal models too, as the source does.
    """
    return 6 * parameters + 12 * layers * heads * head_dim * sequence_length


def matmul_parameters(model: PreTrainedModel) -> int:
    """Return how many parameters are multiplied with each token.

    That leaves out embedding tables, which are only looked up (token types, positions, tokens),
    except for the token embedding that is tied to the head: the head does multiply by it.
    """
    from torch import nn

    head = model.get_output_embeddings()
    used_by_head = {id(parameter) for parameter in head.parameters()}
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    } - used_by_head
    return sum(p.numel() for p in model.parameters() if id(p) not in looked_up)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 peak in FLOP/s by its CUDA name; None where it is not known.

    From the data sheets that conf/hardware/ names.
    """
    device = hardware.of_device(device_name)
    return None if device is None else device.peak_flops("bf16")
