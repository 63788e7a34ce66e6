"""MFU's two halves, against figures worked out by hand."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.flops import matmul_parameters, peak_bf16_flops, training_flops_per_token


def test_gpt2_small_leaves_out_its_positions_only() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    assert matmul_parameters(model) == 124_439_808 - 1024 * 768


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_embedding_counts_as_the_head_that_it_is_tied_to_or_not_at_all(tied: bool) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=100,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                tie_word_embeddings=tied,
            )
        )
    attention, mlp, norms = 4 * 32 * 32, 3 * 32 * 64, 3 * 32
    assert matmul_parameters(model) == attention + mlp + norms + 100 * 32


def test_flops_of_gpt2_small_at_1024_tokens() -> None:
    flops = training_flops_per_token(
        parameters=123_653_376, layers=12, heads=12, head_dim=64, sequence_length=1024
    )
    assert flops == 6 * 123_653_376 + 12 * 12 * 768 * 1024 == 855_166_464


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", None),
        ("CPU (x86_64)", None),
    ],
)
def test_peak_by_device_name(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak
