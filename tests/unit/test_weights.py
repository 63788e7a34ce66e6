"""Initial values: drawn parameter by parameter, distributed as the architecture's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.model.first_values import materialize
from shardwright.train.model.weights import (
    InitialValues,
    InMemory,
    Wanted,
    in_turn,
    initialized,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 66,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 1000,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 66,
} | {
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SHAPE)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHAPE, cls_token_id=0, sep_token_id=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
}


def tensors(model: PreTrainedModel, values: InitialValues) -> dict[str, torch.Tensor]:
    """Return every value, written into memory that holds something else."""
    written = {n: torch.full(p.shape, float("nan")) for n, p in model.named_parameters()}
    for name, value in values.items():
        value.write(written[name])
    return written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_distributed_as_in_a_model_built_as_usual(architecture: str) -> None:
    build = ARCHITECTURES[architecture]
    model, values = initialized(build, seed=5)
    plain = build()
    expected = dict(plain.named_parameters())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert list(values) == list(expected)
    found = tensors(model, values)
    for name, parameter in expected.items():
        value = found[name]
        deviation = parameter.std().item()
        if deviation == 0:  # ones and zeros
            assert torch.equal(value, parameter), name
        else:
            count = parameter.numel()
            # Six standard errors of a deviation and of a mean.
            assert value.std().item() == pytest.approx(deviation, rel=9 / count**0.5), name
            assert abs(value.mean().item() - parameter.mean().item()) < 9 * deviation / count**0.5
            assert value.abs().max() < parameter.abs().max() * 2, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_buffers_ties_and_padding_rows_are_those_of_a_model_built_as_usual(
    architecture: str,
) -> None:
    build = ARCHITECTURES[architecture]
    model, values = initialized(build, seed=5)
    plain = build()
    materialize(model, values)
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in plain.parameters()]

    buffers, expected = dict(model.named_buffers()), dict(plain.named_buffers())
    assert list(buffers) == list(expected)
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert list(model.state_dict()) == list(plain.state_dict())
    for tied in (model, plain):
        head = tied.get_output_embeddings()
        assert head is not None
        assert (head.weight is tied.get_input_embeddings().weight) == (architecture != "llama")
    empty_rows = [
        [not row.any() for row in built.get_input_embeddings().get_parameter("weight")]
        for built in (model, plain)
    ]
    assert empty_rows[0] == empty_rows[1]
    tokens = torch.arange(5, 20)[None]
    assert model(input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["gpt2", "modernbert"])
def test_residual_projections_are_scaled_by_the_depth(architecture: str) -> None:
    found = tensors(*initialized(ARCHITECTURES[architecture], seed=5))
    scaled = [v.std() for n, v in found.items() if n.endswith(("c_proj.weight", "Wo.weight"))]
    assert len(scaled) == 8
    for deviation in scaled:
        # ModernBERT's are truncated at two deviations, which takes an eighth off.
        assert deviation == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.15)


def test_a_partition_that_is_all_padding_takes_no_values() -> None:
    assert list(in_turn([], {})) == []


def test_parts_in_turn_are_those_of_the_whole_values_drawn_or_not() -> None:
    model, values = initialized(ARCHITECTURES["gpt2"], seed=5)
    whole = tensors(model, values)
    name = "transformer.h.0.attn.c_attn.weight"
    values["read"] = InMemory(torch.arange(15.0).view(3, 5))
    whole["read"] = torch.arange(15.0)
    wanted = [
        *(Wanted("read", 15, 4, 7), Wanted(name, whole[name].numel(), 100, 300)),
        *(Wanted("read", 15, 15, 0), Wanted(name, whole[name].numel(), whole[name].numel(), 0)),
        *(Wanted("read", 15, 0, 15), Wanted(name, whole[name].numel(), 0, 1)),
    ]
    for part, found in zip(wanted, in_turn(wanted, values), strict=True):
        expected = whole[part.name].flatten()[part.start : part.start + part.length]
        assert torch.equal(found, expected), part


def test_each_value_depends_on_seed_and_name_alone() -> None:
    build = ARCHITECTURES["gpt2"]
    torch.manual_seed(1)
    first = tensors(*initialized(build, seed=5))
    torch.manual_seed(2)
    model, values = initialized(build, seed=5)
    again = tensors(model, dict(reversed(values.items())))
    other = tensors(*initialized(build, seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["transformer.h.1.attn.c_attn.weight"])


def test_nothing_is_drawn_from_the_callers_generator_and_torch_is_left_as_it_was() -> None:
    initialize, register = nn.init.normal_, nn.Module.register_parameter
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tensors(*initialized(ARCHITECTURES["llama"], seed=5))
    assert torch.equal(torch.rand(3), expected)
    assert (nn.init.normal_, nn.Module.register_parameter) == (initialize, register)
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_parameter_that_is_set_in_another_way_has_no_value() -> None:
    class Own(PreTrainedModel):
        config_class = BertConfig

        def __init__(self) -> None:
            super().__init__(BertConfig())
            self.linear = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.full((2,), 3.0))
            self.post_init()

    _, values = initialized(Own, seed=5)
    assert set(values) == {"linear.weight", "linear.bias"}
