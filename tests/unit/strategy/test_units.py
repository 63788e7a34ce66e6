"""Which modules become units of FSDP: found on the model alone, without ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, RobertaConfig
from transformers import RobertaForMaskedLM as Roberta

from shardwright.train.errors import UserError
from shardwright.train.strategy.fsdp import units as fsdp_units
from tests.unit.strategy.configs import config
from tests.unit.trees import FSDP


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return gpt2()


def gpt2(**settings: Any) -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, **settings)
        )


def units(model: PreTrainedModel, **strategy: Any) -> list[str]:
    found = fsdp_units.units(model, config(strategy={**FSDP, **strategy}))
    return [type(unit.module).__name__ for unit in found]


def test_blocks_are_inferred_or_named(model: GPT2LMHeadModel) -> None:
    assert units(model) == ["GPT2Block"] * 3
    assert units(model, block_class="GPT2MLP") == ["GPT2MLP"] * 3
    assert units(model, wrap="none") == []


def test_classes_within_one_another_are_units_inner_ones_first(model: GPT2LMHeadModel) -> None:
    found = units(model, block_class=["GPT2Block", "GPT2MLP"])
    assert found == ["GPT2MLP", "GPT2Block"] * 3
    with pytest.raises(UserError, match="block_class=LlamaMLP is not a class of modules"):
        units(model, block_class=["GPT2Block", "LlamaMLP"])


def test_an_embedding_and_a_head_that_share_nothing_are_units() -> None:
    model = gpt2(tie_word_embeddings=False)
    assert units(model) == ["Embedding", *["GPT2Block"] * 3, "Linear"]
    found = fsdp_units.units(model, config(strategy=FSDP))
    assert [unit.is_last for unit in found] == [False] * 4 + [True]
    assert [unit.backward_needs_parameters for unit in found] == [False] + [True] * 4


def test_a_head_is_one_unit_with_what_shares_its_bias() -> None:
    with torch.device("meta"):
        model = Roberta(RobertaConfig(num_hidden_layers=2, tie_word_embeddings=False))
    assert units(model) == ["Embedding", *["RobertaLayer"] * 2, "Linear"]
    model.lm_head.decoder.bias = model.lm_head.bias
    assert units(model) == ["Embedding", *["RobertaLayer"] * 2, "RobertaLMHead"]


def test_an_unknown_block_class_is_an_error_that_lists_those_of_the_model(
    model: GPT2LMHeadModel,
) -> None:
    with pytest.raises(
        UserError,
        match=r"strategy\.block_class=LlamaDecoderLayer is not a class of modules in this model; "
        r"it repeats .*GPT2Attention, GPT2Block, GPT2MLP.*; choose one, or null to infer it",
    ):
        units(model, block_class="LlamaDecoderLayer")


def test_a_wrap_that_leaves_the_whole_model_as_one_unit_is_an_error(
    model: GPT2LMHeadModel,
) -> None:
    with pytest.raises(UserError, match="block_class=GPT2LMHeadModel is not a class of modules"):
        units(model, block_class="GPT2LMHeadModel")
    with pytest.raises(UserError, match="wrap=size finds no module of strategy.min_unit_param"):
        units(model, wrap="size", min_unit_parameters=10**9)
