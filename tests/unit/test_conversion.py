"""Tensors that transformers converts between disk and memory are streamed as it converts them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from shardwright.train.errors import UserError
from shardwright.train.export.recover import Options, recover
from shardwright.train.model.conversion import CannotTrace, Piece, Traced, loaded, on_disk
from shardwright.train.model.directory import check_loads

Tensors = dict[str, torch.Tensor]

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
# What transformers 5 converts (experts merged, names changed) and what it leaves as it is.
CAUSAL: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "gpt_neox": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "olmoe": {**_EXPERTS},
    "gpt2": {},
    "llama": {},
}
MASKED: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {}, "modernbert": {}, "albert": {}}


def model_of(kind: str) -> PreTrainedModel:
    auto = AutoModelForMaskedLM if kind in MASKED else AutoModelForCausalLM
    config = AutoConfig.for_model(
        kind, **{**_SMALL, **CAUSAL.get(kind, {}), **MASKED.get(kind, {})}
    )
    torch.manual_seed(0)
    return auto.from_config(config)


def read(directory: Path) -> Tensors:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def put_together(traced: Traced, tensors: Tensors) -> torch.Tensor:
    parts = [tensors[p.name].flatten()[p.start : p.start + p.length] for p in traced.pieces]
    return torch.cat(parts).view(traced.shape)


@pytest.fixture(scope="module", params=[*CAUSAL, *MASKED])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    """Return a model and what `save_pretrained` writes of it."""
    model = model_of(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def test_what_goes_to_the_disk_is_what_transformers_writes(
    saved: tuple[PreTrainedModel, Path],
) -> None:
    model, directory = saved
    values = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    live = {name: values[name] for name, _ in model.named_parameters()}
    live |= {name: values[name] for name, _ in model.named_buffers() if name in values}
    written = read(directory)
    traced = on_disk(model, live)
    assert traced.keys() == written.keys()
    for name, tensor in traced.items():
        assert torch.equal(put_together(tensor, live), written[name]), name


def test_what_comes_from_the_disk_is_what_transformers_loads(
    saved: tuple[PreTrainedModel, Path],
) -> None:
    model, directory = saved
    written = read(directory)
    found = loaded(model, written)
    assert not found.unexpected
    assert not found.computed
    state = model.state_dict()
    assert found.tensors.keys() <= state.keys()
    assert {name for name, _ in model.named_parameters()} <= found.tensors.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(put_together(tensor, written), state[name]), name


def test_recovery_reads_and_writes_as_transformers_does(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = saved
    recover(Options(directory, tmp_path / "out"), io.StringIO(), io.StringIO())
    expected, found = read(directory), read(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    check_loads(tmp_path / "out", type(model))


def test_a_merged_tensor_is_streamed_in_slices_smaller_than_an_expert(tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "in")
    least = 43 * 2**20  # slices of a quarter MiB are what this leaves
    with torch.device("meta"):
        config = AutoConfig.for_model(
            "mixtral", **{**_SMALL, "hidden_size": 256, "intermediate_size": 640}
        )
        wide: Any = AutoModelForCausalLM.from_config(config)
    large = {n: torch.randn(t.shape) for n, t in wide.state_dict().items()}
    made = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(large)
    made.save_pretrained(tmp_path / "large")
    recover(
        Options(tmp_path / "large", tmp_path / "out", max_memory_bytes=least),
        io.StringIO(),
        io.StringIO(),
    )
    expected = read(tmp_path / "large")
    assert all(torch.equal(found, expected[n]) for n, found in read(tmp_path / "out").items())


@pytest.mark.parametrize("prefix", ["model.", "net.inner."])
def test_a_prefix_of_all_names_is_left_out_and_named(tmp_path: Path, prefix: str) -> None:
    model = model_of("gpt2")
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    (tmp_path / "in").mkdir()
    torch.save({"state_dict": state}, tmp_path / "in/last.ckpt")
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "in")
    warned = io.StringIO()
    recover(Options(tmp_path / "in", tmp_path / "out"), io.StringIO(), warned)
    assert f"every name in the checkpoint begins with {prefix}, which is left out" in (
        warned.getvalue()
    )
    loaded_again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.named_parameters():
        assert torch.equal(loaded_again.get_parameter(name), tensor), name


def test_a_missing_expert_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "in")
    tensors = read(tmp_path / "in")
    gone = next(name for name in tensors if ".experts.3." in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="holds another model than its config describes"):
        recover(Options(tmp_path / "in", tmp_path / "out"), io.StringIO(), io.StringIO())
    assert not (tmp_path / "out").exists()


# --- traced tensors -------------------------------------------------------------------------------


def test_operations_that_move_elements_are_followed() -> None:
    torch.manual_seed(0)
    values = {"a": torch.randn(4, 6, 5), "b": torch.randn(4, 6, 5)}
    for operation in (
        lambda a, b: torch.cat([a, b], dim=1),
        lambda a, b: torch.stack([a, b], dim=1).reshape(8, 30),
        lambda a, b: torch.chunk(torch.cat([b, a]), 4, dim=1)[2].contiguous(),
        lambda a, b: torch.split(a, [1, 4], dim=2)[1],
        lambda a, b: a.unbind(1)[3].unsqueeze(0).squeeze(0),
        lambda a, b: a.transpose(0, 1)[2:5, 1].clone(),
        lambda a, b: a.view(2, 2, 6, 5).transpose(0, 1).reshape(4, 6, 5),
        lambda a, b: b.permute(2, 0, 1).to(torch.float16).float(),
    ):
        traced = operation(*(Traced.named(name, value) for name, value in values.items()))
        expected = operation(*values.values())
        assert traced.shape == expected.shape
        assert isinstance(traced, Traced)
        found = put_together(traced, values)
        assert torch.allclose(found, expected, atol=1e-2)  # one of them passes through 16 bits


def test_operations_that_compute_are_refused() -> None:
    a = Traced.named("a", torch.empty(3, 4))
    for operation in (lambda: a + a, lambda: a * 2, lambda: a[:, ::2], lambda: a.sum()):
        with pytest.raises(CannotTrace):
            operation()
    assert a.pieces == (Piece("a", 0, 12),)


# --- names of older versions and of other programs ------------------------------------------------


def test_gpt2_as_it_was_first_published(tmp_path: Path) -> None:
    """Without the prefix of today's class, with the masks that were buffers then."""
    model = model_of("gpt2")
    tensors = {n.removeprefix("transformer."): p.detach() for n, p in model.named_parameters()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "in")
    recover(Options(tmp_path / "in", tmp_path / "out"), io.StringIO(), io.StringIO())
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = read(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bert_with_the_names_of_its_first_layer_norms(tmp_path: Path) -> None:
    model = model_of("bert")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    (tmp_path / "in").mkdir()
    torch.save(tensors, tmp_path / "in/pytorch_model.bin")
    model.config.architectures = ["BertForMaskedLM"]
    model.config.save_pretrained(tmp_path / "in")
    recover(Options(tmp_path / "in", tmp_path / "out"), io.StringIO(), io.StringIO())
    found = read(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
