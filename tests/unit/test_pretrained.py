"""Weights streamed out of a checkpoint are bit for bit those that `from_pretrained` loads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.config import PretrainedModel
from shardwright.train.errors import UserError
from shardwright.train.model import conversion
from shardwright.train.model.first_values import materialize
from shardwright.train.model.streaming import CannotStream, loaded_whole, streamed, weight_files
from shardwright.train.model.weights import drawn, initialized

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
} | {
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def stream(directory: Path, auto: Any, seed: int = 0) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory)
    model, values = streamed(
        lambda: auto.from_config(config, dtype=torch.float32),
        weight_files(str(directory), None, config),
        seed,
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    materialize(model, values)
    return model


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert type(model) is type(expected)
    for find in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        ours: dict[str, torch.Tensor] = dict(find(model))
        theirs: dict[str, torch.Tensor] = dict(find(expected))
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


def roberta(**overrides: Any) -> RobertaForMaskedLM:
    return RobertaForMaskedLM(RobertaConfig(**SHAPE, max_position_embeddings=34, **overrides))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    )


CAUSAL, MASKED = AutoModelForCausalLM, AutoModelForMaskedLM
SAVED: dict[str, tuple[Any, Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "gpt2": (CAUSAL, lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), {}),
    "in several files": (
        CAUSAL,
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        {"max_shard_size": "20KB"},
    ),
    "in bf16": (CAUSAL, lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16(), {}),
    "tied": (
        CAUSAL,
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        {},
    ),
    # Those that transformers saves in another form than it has: experts one by one, other names.
    "experts": (CAUSAL, lambda: mixtral(), {}),
    "experts in several files": (CAUSAL, lambda: mixtral(), {"max_shard_size": "20KB"}),
    "experts in bf16": (CAUSAL, lambda: mixtral().bfloat16(), {}),
    "a head of another name": (CAUSAL, lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)), {}),
    "masked": (MASKED, roberta, {}),
    "bert": (MASKED, lambda: BertForMaskedLM(BertConfig(**SHAPE)), {}),
}


@pytest.mark.parametrize("case", SAVED)
def test_streamed_weights_equal_those_loaded_whole(case: str, tmp_path: Path) -> None:
    auto, build, options = SAVED[case]
    build().save_pretrained(tmp_path, **options)
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files > 2 if options else files == 1
    assert_same(stream(tmp_path, auto), auto.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("case", ["gpt2", "in bf16", "tied", "experts in several files"])
def test_any_part_of_a_streamed_value_is_that_of_the_whole(case: str, tmp_path: Path) -> None:
    auto, build, options = SAVED[case]
    build().save_pretrained(tmp_path, **options)
    config = AutoConfig.from_pretrained(tmp_path)
    build_anew = functools.partial(auto.from_config, config, dtype=torch.float32)
    model, values = streamed(build_anew, weight_files(str(tmp_path), None, config), 0)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape)
        values[name].write(whole)
        count = whole.numel()
        for start, stop in ((0, count // 3), (count // 3, count - 1), (count - 1, count)):
            part = torch.empty(stop - start)
            values[name].write(part, start)
            assert torch.equal(part, whole.flatten()[start:stop]), (name, start)


def test_a_checkpoint_of_the_base_model_gets_a_new_head_which_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = roberta()
    saved.roberta.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "shardwright.train"):
        model = stream(tmp_path, MASKED)
    expected = MASKED.from_pretrained(tmp_path, dtype=torch.float32)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("shardwright.train.")]
    assert message.startswith("not in the checkpoint, initialised from scratch: lm_head.")
    missing = message.partition("scratch: ")[2].split(", ")
    assert set(missing) == {
        "lm_head.bias",
        "lm_head.dense.weight",
        "lm_head.dense.bias",
        "lm_head.layer_norm.weight",
        "lm_head.layer_norm.bias",
    }
    assert_same(model.get_submodule("roberta"), expected.get_submodule("roberta"))
    head = model.get_parameter("lm_head.dense.weight").detach()
    assert head.std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(head, stream(tmp_path, MASKED).get_parameter("lm_head.dense.weight"))
    other = stream(tmp_path, MASKED, seed=1).get_parameter("lm_head.dense.weight")
    assert not torch.equal(head, other)
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_names_of_old_checkpoints_are_understood(tmp_path: Path) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)

    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    rewrite(tmp_path, age)
    assert any(name.endswith("gamma") for name in load_file(tmp_path / "model.safetensors"))
    assert_same(stream(tmp_path, MASKED), MASKED.from_pretrained(tmp_path, dtype=torch.float32))


def test_tensors_that_the_model_has_no_use_for_are_left_out(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(stray=torch.ones(3)))
    assert_same(stream(tmp_path, CAUSAL), CAUSAL.from_pretrained(tmp_path, dtype=torch.float32))


@pytest.mark.parametrize("equal", [True, False])
def test_an_embedding_stored_twice_is_tied_only_where_both_are_equal(
    equal: bool, tmp_path: Path
) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1

    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(tmp_path)
    rewrite(tmp_path, untie)
    model = stream(tmp_path, CAUSAL)
    assert_same(model, CAUSAL.from_pretrained(tmp_path, dtype=torch.float32))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal


def test_only_the_head_is_stored_of_a_tied_pair(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(tmp_path)
    rewrite(tmp_path, rename)
    assert_same(stream(tmp_path, CAUSAL), CAUSAL.from_pretrained(tmp_path, dtype=torch.float32))


def as_pytorch_file(directory: Path, **options: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", **options)


def test_files_of_torch_save_are_streamed_too(tmp_path: Path) -> None:
    roberta().save_pretrained(tmp_path)
    as_pytorch_file(tmp_path)
    assert_same(stream(tmp_path, MASKED), MASKED.from_pretrained(tmp_path, dtype=torch.float32))


def test_experts_in_files_of_torch_save_are_streamed_too(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    as_pytorch_file(tmp_path)
    assert_same(stream(tmp_path, CAUSAL), CAUSAL.from_pretrained(tmp_path, dtype=torch.float32))


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    gone = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(gone))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj") as told:
        stream(tmp_path, CAUSAL)
    assert "\n" not in str(told.value)


def test_what_cannot_be_streamed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roberta().save_pretrained(tmp_path / "old")
    as_pytorch_file(tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(CannotStream, match=r"pytorch_model\.bin cannot be mapped"):
        stream(tmp_path / "old", MASKED)

    # As a matrix would that is transposed: by single elements.
    mixtral().save_pretrained(tmp_path / "experts")
    monkeypatch.setattr(conversion, "_MOST_PIECES", 2)
    with pytest.raises(CannotStream, match=r"MixtralForCausalLM .*: its \w+ are \w+"):
        stream(tmp_path / "experts", CAUSAL)

    quantised = AutoConfig.from_pretrained(tmp_path / "old")
    quantised.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CannotStream, match="quantised"):
        weight_files(str(tmp_path / "old"), None, quantised)


# --- weights that do not fit ----------------------------------------------------------------------


def renamed(directory: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    changed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of what is compiled": lambda name: f"module._orig_mod.{name}",
    "recomputed blocks": lambda name: name.replace(".attn.", "._checkpoint_wrapped_module.attn."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('h.', 'h._fsdp_wrapped_module.')}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_taken_off(wrapper: str, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    model.save_pretrained(tmp_path)
    expected = CAUSAL.from_pretrained(tmp_path, dtype=torch.float32)
    renamed(tmp_path, WRAPPERS[wrapper])
    assert_same(stream(tmp_path, CAUSAL), expected)
    as_pytorch_file(tmp_path)
    assert_same(stream(tmp_path, CAUSAL), expected)


def test_weights_under_a_key_of_their_own_are_found(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(tmp_path)
    expected = CAUSAL.from_pretrained(tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": tensors, "step": 3}, tmp_path / "pytorch_model.bin")
    assert_same(stream(tmp_path, CAUSAL), expected)


def other_model(directory: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(directory)
    GPT2Config(**GPT2, architectures=["GPT2LMHeadModel"]).save_pretrained(directory)


def unknown_prefix(directory: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(directory)
    renamed(directory, lambda name: f"lightning.net.{name}")


def fewer_layers(directory: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(directory)
    GPT2Config(**GPT2 | {"n_layer": 3}).save_pretrained(directory)


@pytest.mark.parametrize(
    ("save", "lacking", "held"),
    [
        # Its head has the name of GPT-2's, which is tied to the embedding.
        (other_model, "27 of the 28", "model."),
        (unknown_prefix, "28 of the 28", "lightning.net.transformer.h.0.attn.c_attn."),
        (fewer_layers, "12 of the 40", ""),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "torch", "whole"])
def test_weights_that_do_not_fit_are_refused(
    save: Callable[[Path], None], lacking: str, held: str, kind: str, tmp_path: Path
) -> None:
    save(tmp_path)
    if kind != "safetensors":
        # What cannot be mapped is loaded as a whole, by transformers itself.
        old = {"_use_new_zipfile_serialization": False} if kind == "whole" else {}
        as_pytorch_file(tmp_path, **old)
    config = AutoConfig.from_pretrained(tmp_path)
    section = PretrainedModel(kind="pretrained", name=str(tmp_path))
    build = functools.partial(CAUSAL.from_config, config)
    load = (
        functools.partial(loaded_whole, CAUSAL, section, config, {}, build, 0)
        if kind == "whole"
        else functools.partial(stream, tmp_path, CAUSAL)
    )
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert f"lacks {lacking} parameters of GPT2LMHeadModel, such as transformer." in message
    assert str(tmp_path) in message
    assert held in message.partition("what it holds is named ")[2]
    assert "choose a size of model/ to begin from scratch" in message
    assert "\n" not in message


def test_a_head_that_is_drawn_anew_is_known_however_it_is_loaded(tmp_path: Path) -> None:
    roberta().roberta.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)

    def build() -> PreTrainedModel:
        return MASKED.from_config(config, dtype=torch.float32)

    model, values = streamed(build, weight_files(str(tmp_path), None, config), 0)
    head = {
        *("lm_head.dense.weight", "lm_head.dense.bias", "lm_head.bias"),
        *("lm_head.layer_norm.weight", "lm_head.layer_norm.bias"),
    }
    assert set(drawn(values)) == head
    section = PretrainedModel(kind="pretrained", name=str(tmp_path))
    whole, also = loaded_whole(MASKED, section, config, {"dtype": torch.float32}, build, 0)
    assert set(drawn(also)) == head
    materialize(model, values)
    materialize(whole, also)
    assert_same(whole, model)
    everything, all_drawn = initialized(build, 0)
    assert set(drawn(all_drawn)) == {name for name, _ in everything.named_parameters()}


def test_another_number_of_rows_than_the_config_says_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(tmp_path)
    GPT2Config(**GPT2 | {"vocab_size": 320}).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        stream(tmp_path, CAUSAL)
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'} holds transformer.wte.weight in the shape (300, 32), "
        "and its config.json makes it (320, 32); set vocab_size=300 there, or choose another model"
    )
