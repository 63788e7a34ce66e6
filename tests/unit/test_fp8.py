"""Which layers multiply in fp8, and who is told that they cannot."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import UserError
from shardwright.train.model import fp8
from tests.unit.trees import TREE

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="precision=fp8 needs the extra torchao"
)


def config(recipe: str | None, device: str = "cuda") -> RunConfig:
    model = {**TREE["model"], "kind": "llama", "num_key_value_heads": 2}
    return from_tree(
        {
            **TREE,
            "model": model,
            "precision": {"compute_dtype": "bf16", "fp8_recipe": recipe},
            "launcher": {**TREE["launcher"], "device": device},
        }
    )


def tiny_llama(**sizes: int) -> PreTrainedModel:
    base: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**base, **sizes}))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchao emulate fp8 on a CPU; what it converts is the same."""
    sound = fp8.torchao_config
    monkeypatch.setattr(fp8, "_check_device", lambda recipe, device: None)
    monkeypatch.setattr(
        fp8, "torchao_config", lambda recipe: dataclasses.replace(sound(recipe), emulate=True)
    )


@needs_torchao
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_layers_of_blocks_convert_and_embeddings_and_head_do_not(recipe: str) -> None:
    model = tiny_llama(intermediate_size=72)
    before = {name: id(p) for name, p in model.named_parameters()}
    fp8.convert(model, config(recipe))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    converted = [n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(converted) == 2 * 4
    assert all(".self_attn." in name for name in converted)
    assert fp8.read_back(model) == {
        "fp8_recipe": recipe,
        "fp8_layers": 8,
        "fp8_layers_left_out": 2 * 3,
        "fp8_layers_missed": 0,
    }


@needs_torchao
@pytest.mark.usefixtures("emulated")
def test_a_layer_that_was_not_converted_is_seen() -> None:
    model = tiny_llama()
    fp8.convert(model, config("tensorwise"))
    block: Any = model.model.layers[0]
    block.mlp.up_proj = torch.nn.Linear(32, 64, bias=False)
    assert fp8.read_back(model)["fp8_layers_missed"] == 1


@needs_torchao
@pytest.mark.usefixtures("emulated")
def test_gradients_are_near_those_of_bf16() -> None:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model: Any = BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model.bfloat16().eval()
    model(input_ids=tokens, labels=tokens).loss.backward()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    expected = weight.grad.float()
    model.zero_grad()
    fp8.convert(model, config("tensorwise"))
    model(input_ids=tokens, labels=tokens).loss.backward()
    found = weight.grad.float()
    assert not torch.equal(found, expected), "nothing ran in fp8"
    assert (found - expected).norm() < 0.2 * expected.norm()


def test_no_recipe_converts_nothing() -> None:
    model = tiny_llama()
    fp8.convert(model, config(None))
    assert fp8.read_back(model) == {"fp8_recipe": None, "fp8_layers": 0}


def test_a_cpu_cannot() -> None:
    with pytest.raises(UserError, match="fp8_recipe=rowwise needs a GPU, but the ranks run on cpu"):
        fp8.convert(tiny_llama(), config("rowwise", device="cpu"))


def test_a_gpu_before_ada_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(UserError, match=r"capability 8\.9, but this rank's GPU has 8\.6; choose"):
        fp8.convert(tiny_llama(), config("tensorwise"))


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package torchao, which is not installed"):
        fp8.convert(tiny_llama(), config("tensorwise"))


@needs_torchao
@pytest.mark.usefixtures("emulated")
def test_a_model_without_a_fitting_layer_is_an_error() -> None:
    odd = tiny_llama(hidden_size=40, intermediate_size=72)
    with pytest.raises(UserError, match="no linear layer in the blocks of LlamaForCausalLM"):
        fp8.convert(odd, config("tensorwise"))
