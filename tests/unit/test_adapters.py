"""Adapters without ranks: what the config refuses, what is injected, and what is merged of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.launchers import preflight
from shardwright.train.checkpoint.read import merged, portable
from shardwright.train.config import Ia3Adapter, LowRankAdapter, PretrainedModel, from_tree
from shardwright.train.config.adapter import DoraAdapter, LoraAdapter
from shardwright.train.errors import UserError
from shardwright.train.export import adapter_files
from shardwright.train.model import adapter, flops
from shardwright.train.model.first_values import materialize
from shardwright.train.model.streaming import streamed
from shardwright.train.model.weights import InitialValues, drawn
from tests.unit import trees

PRETRAINED: dict[str, Any] = {
    **trees.TREE,
    "model": {"kind": "pretrained", "name": "some/model"},
    "tokenizer": {"kind": "pretrained", "name": "some/model"},
    "adapter": {"kind": "lora"},
    "run_dir": "/r",
}


def with_(**sections: Any) -> dict[str, Any]:
    tree = {**PRETRAINED}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def test_a_config_of_before_trains_all_weights() -> None:
    config = from_tree({**trees.TREE, "run_dir": "/r"})
    assert config.adapter.kind == "none"
    assert config.adapter.trains_all
    assert adapter.expected(config)["adapter"] == "none"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": trees.TREE["model"], "tokenizer": {"kind": "byte_bpe"}},
            "adapter=lora is trained beside weights that stay as they are, but model.kind=gpt2 "
            "begins from random ones; choose model=pretrained model.name=..., or adapter=none",
        ),
        (
            {"trainer": {"average_weights": "ema"}},
            "adapter=lora with trainer.average_weights=ema would average the weights that stay as "
            "they are, too; set it to null",
        ),
        (
            {"trainer": {"optimizer": "muon"}},
            "adapter=lora with trainer.optimizer=muon, which is made for all weights of a model; "
            "choose trainer.optimizer=adamw",
        ),
        (
            {"trainer": {"optimizer": "schedule_free", "lr_scheduler": "constant"}},
            "adapter=lora with trainer.optimizer=schedule_free, which is made for all weights of a "
            "model; choose trainer.optimizer=adamw",
        ),
        (
            {"precision": {**trees.BF16, "fp8_recipe": "tensorwise"}},
            "adapter=lora with precision.fp8_recipe=tensorwise, which converts linear layers that "
            "peft then does not know; choose precision=bf16",
        ),
        (
            {"strategy": {**trees.ZERO3, "node_local_checkpoints": True}},
            "adapter=lora has final/ made of a whole checkpoint, but "
            "strategy.node_local_checkpoints=true leaves it on several nodes' disks; set it to "
            "false",
        ),
        (
            {"adapter": {"kind": "dora"}, "strategy": {**trees.FSDP, "wrap": "size"}},
            "adapter=dora reads each layer's weight beside the layer, which strategy.wrap=size may "
            "gather for itself alone; set strategy.wrap=transformer, or choose adapter=lora",
        ),
        (
            {"adapter": {"target_modules": []}},
            "adapter.target_modules=[] leaves nothing to train; name some, or set it to null or "
            "all-linear",
        ),
        (
            {"adapter": {"target_modules": ["all-linear", "q_proj"]}},
            "adapter.target_modules has all-linear and q_proj, which it includes where they are "
            "linear layers; leave one of them out",
        ),
    ],
)
def test_what_an_adapter_does_not_allow(sections: dict[str, Any], message: str) -> None:
    tree = {**with_(**sections)}
    for name in ("model", "tokenizer", "strategy"):
        if name in sections:
            tree[name] = sections[name]
    with pytest.raises(UserError) as told:
        from_tree(tree)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"target_modules": ["k_proj"]},
            "adapter.target_modules is given and adapter.feedforward_modules=null, which is peft's "
            "choice for layers of its own choice; give both or neither",
        ),
        (
            {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]},
            "adapter.feedforward_modules has down_proj, which is not one of "
            "adapter.target_modules=['k_proj']; add it there, or leave it out",
        ),
    ],
)
def test_what_ia3_does_not_allow(values: dict[str, Any], message: str) -> None:
    tree = {**PRETRAINED, "adapter": {"kind": "ia3", **values}}
    with pytest.raises(UserError) as told:
        from_tree(tree)
    assert message in str(told.value)


def test_a_product_has_the_same_bits_whatever_rows_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, a = torch.randn(150, 7), torch.randn(7, 33)
    whole = merged._product(rows, a)
    torch.testing.assert_close(whole, rows @ a, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(merged, "_CACHED_ELEMENTS", 33 * 5)
    for start, stop in ((0, 150), (0, 1), (13, 14), (3, 96), (149, 150)):
        assert torch.equal(merged._product(rows[start:stop], a), whole[start:stop])


def test_a_single_name_is_a_list_of_one() -> None:
    config = from_tree(with_(adapter={"target_modules": "all-linear"}))
    assert isinstance(config.adapter, LoraAdapter)
    assert config.adapter.target_modules == ("all-linear",)


def test_peft_that_is_not_installed_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    found = preflight._missing_packages(from_tree(PRETRAINED))
    assert found[0] == (
        "adapter=lora needs the package peft, which is not installed; `pip install peft`"
    )
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="^adapter=lora needs the package peft, which is not"):
        adapter._settings(LoraAdapter(kind="lora"), from_tree(PRETRAINED), SimpleNamespace())  # type: ignore[arg-type]


# --- in a model -----------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
MODELS = {
    # Square weights, too, whose shape does not tell rows from columns.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
}
ADAPTERS: dict[str, LowRankAdapter | Ia3Adapter] = {
    "lora": LoraAdapter(kind="lora", rank=3, alpha=5.0, target_modules=("all-linear",)),
    "dora": DoraAdapter(kind="dora", rank=2, rank_stabilized=True, target_modules=("all-linear",)),
    "ia3": Ia3Adapter(kind="ia3"),
}


def saved(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, which begin alike
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory


def auto(name: str) -> Any:
    return AutoModelForMaskedLM if name == "roberta" else AutoModelForCausalLM


def injected(
    name: str, base: Path, section: LowRankAdapter | Ia3Adapter
) -> tuple[PreTrainedModel, InitialValues]:
    def build() -> PreTrainedModel:
        built: PreTrainedModel = auto(name).from_config(AutoConfig.from_pretrained(base))
        return built

    config: Any = SimpleNamespace(
        adapter=section,
        model=PretrainedModel(kind="pretrained", name=str(base)),
        objective=SimpleNamespace(kind="mlm" if name == "roberta" else "clm"),
        seed=0,
    )
    return adapter.inject(*streamed(build, [str(base / "model.safetensors")], 0), config)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_merged_is_what_peft_merges(name: str, kind: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    model, values = injected(name, base, ADAPTERS[kind])
    assert not drawn(values), "nobody need be told of an adapter's first values"
    facts = adapter.read_back(model)
    assert (facts["adapter"], facts["trained_beside_adapter"]) == (kind, [])
    materialize(model, values, torch.float32, "cpu")
    plain = auto(name).from_pretrained(base).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        trained = model(ids).logits
    assert (trained - plain(ids).logits).abs().max() > 0.01

    tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(tensors, tmp_path / "trained.safetensors")
    state = portable.read(tmp_path / "trained.safetensors")
    entry = adapter.entry(model)
    assert entry is not None
    found = merged.merged(state, entry).weights
    adapter_files.write_files(tmp_path / "adapter", entry, state)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    names = {n for n, _ in expected.named_parameters()}
    assert found.keys() == names
    assert {n for n, _ in adapter.bare(model).named_parameters()} == names
    for parameter, tensor in expected.named_parameters():
        whole = found[parameter].whole()
        torch.testing.assert_close(whole, tensor, atol=1e-6, rtol=1e-5)
        # A part of it is the same, wherever it begins.
        start, stop = tensor.numel() // 3, tensor.numel() - 1
        assert torch.equal(found[parameter].read(start, stop), whole.view(-1)[start:stop])
    with torch.no_grad():
        torch.testing.assert_close(expected(ids).logits, trained, atol=1e-5, rtol=1e-4)


def test_what_stayed_as_it_was_is_merged_into_in_fp32_and_written_so(tmp_path: Path) -> None:
    model, values = injected("llama", saved("llama", tmp_path / "base"), ADAPTERS["lora"])
    materialize(model, values, torch.float32, "cpu")
    tensors = {
        name: p.detach() if merged.is_of_adapter(name) else p.detach().bfloat16()
        for name, p in model.named_parameters()
    }
    save_file(tensors, tmp_path / "trained.safetensors")
    state, entry = portable.read(tmp_path / "trained.safetensors"), adapter.entry(model)
    assert entry is not None
    found = merged.merged(state, entry).weights
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    norm = found["model.norm.weight"]
    buffer = torch.empty(64 * 4, dtype=torch.uint8)
    assert torch.equal(norm.read(2, 9, buffer), tensors["model.norm.weight"][2:9].float())


def test_modules_that_are_trained_whole_begin_as_they_were(tmp_path: Path) -> None:
    section = LoraAdapter(kind="lora", target_modules=("q_proj",), modules_to_save=("lm_head",))
    base = saved("llama", tmp_path / "base")
    model, values = injected("llama", base, section)
    materialize(model, values, torch.float32, "cpu")
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    parameters = dict(model.named_parameters())
    own = parameters["lm_head.modules_to_save.default.weight"]
    assert torch.equal(own, head)
    assert own.requires_grad
    assert not parameters["lm_head.original_module.weight"].requires_grad
    # The head that is not used costs nothing, and frozen weights have no gradient to compute.
    frozen = flops.matmul_parameters(model, frozen=True)
    trained = adapter.trained_count(model)
    assert flops.matmul_parameters(model) == frozen + trained
    plain = flops.training_flops_per_token(
        parameters=10, layers=1, heads=1, head_dim=1, sequence_length=1
    )
    assert plain - 2 * 4 == flops.training_flops_per_token(
        parameters=10, layers=1, heads=1, head_dim=1, sequence_length=1, frozen=4
    )


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        (
            "gpt2",
            LoraAdapter(kind="lora", target_modules=("q_proj",)),
            r"adapter.target_modules=\[q_proj\] does not fit the model \(gpt2\): .* Its linear "
            r"layers end in c_attn, c_fc, c_proj, lm_head",
        ),
        (
            "gpt2",
            LoraAdapter(kind="lora", modules_to_save=("lm_head",)),
            r"adapter.modules_to_save=\[lm_head\] would train lm_head, which shares its weights",
        ),
        (
            "llama",
            LoraAdapter(kind="lora", target_modules=("lm_head",)),
            r"adapter.target_modules=\[lm_head\] has the model's head, lm_head; leave it out, or",
        ),
        (
            "llama",
            LoraAdapter(kind="lora", modules_to_save=("score",)),
            r"the model has no module of the name score; its head is lm_head",
        ),
        (
            "llama",
            LoraAdapter(kind="lora", target_modules=("embed_tokens",)),
            r"has model.embed_tokens, a Embedding; adapters are for linear layers here",
        ),
    ],
)
def test_what_does_not_fit_the_model(
    name: str, section: LoraAdapter, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as told:
        injected(name, saved(name, tmp_path / "base"), section)
    assert "\n" not in str(told.value)


def test_an_adapter_of_local_weights_names_no_path(tmp_path: Path) -> None:
    base = saved("llama", tmp_path / "base")
    model, values = injected("llama", base, ADAPTERS["lora"])
    materialize(model, values, torch.float32, "cpu")
    save_file(dict(model.named_parameters()), tmp_path / "trained.safetensors")
    entry = adapter.entry(model)
    assert entry is not None
    state = portable.read(tmp_path / "trained.safetensors")
    adapter_files.write_files(tmp_path / "local", entry, state)
    texts = [p.read_text() for p in (tmp_path / "local").iterdir() if p.suffix in (".md", ".json")]
    assert len(texts) == 2
    assert not any(str(tmp_path) in text for text in texts)
    of_hub = entry.model_copy(
        update={"config": {**entry.config, "base_model_name_or_path": "some/model"}}
    )
    adapter_files.write_files(tmp_path / "hub", of_hub, state)
    readme = (tmp_path / "hub" / "README.md").read_text()
    assert "base_model: some/model" in readme
    assert "LoRA of rank 3, alpha 5" in readme
