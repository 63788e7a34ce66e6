"""The two halves of MFU: what a token costs in training, and what a device can give."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense bf16 peaks in FLOP/s with fp32 accumulation, from NVIDIA's data sheets (half of the figure
# printed there "with sparsity"). The first row whose words all stand in the device's name holds.
_PEAK_BF16_FLOPS = [
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
]


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
    """Return a device's dense bf16 peak in FLOP/s by its CUDA name; None where it is not known."""
    words = set(re.split(r"[\s-]+", device_name))
    return next((peak for key, peak in _PEAK_BF16_FLOPS if words.issuperset(key.split())), None)
