"""A model by its config.json alone, keys of it overridden, and modules that register classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    ViTConfig,
)

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.config import ConfigModel, RunConfig, from_tree
from shardwright.train.data.tokens.tokenizer import wanted_vocabulary
from shardwright.train.errors import UserError
from shardwright.train.model.build import build, fitted
from shardwright.train.model.directory import rehearse
from shardwright.train.model.origin import keep
from shardwright.train.model.user_modules import import_all, import_for, not_found
from shardwright.train.plan.facts import Traced
from shardwright.train.plan.model import facts_of, planned, stand_in
from shardwright.train.plan.trace import traced
from tests import own_code
from tests.unit.trees import TREE, ZERO3

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def write(directory: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(directory)
    return directory


def run(
    directory: Path, objective: str = "clm", kind: str = "from_config", **model: Any
) -> RunConfig:
    return from_tree(
        {
            **TREE,
            "model": {"kind": kind, "name": str(directory), **model},
            "objective": {"kind": objective},
            "data": {**TREE["data"], "sequence_length": 32},
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 261},
            "trainer": {**TREE["trainer"], "micro_batch_size": 2, "compile": False},
        }
    )


def built(config: RunConfig) -> Any:
    return build(config, stand_in(), reads_weights=False)[0]


def test_any_architecture_is_built_from_its_config_alone(tmp_path: Path) -> None:
    write(tmp_path, GPTNeoXConfig(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    config = run(tmp_path, vocab_size=310, pad_vocab_to_multiple=64)
    model = built(config)
    assert isinstance(model, GPTNeoXForCausalLM)
    assert model.get_input_embeddings().weight.shape == (320, 32)
    words = stand_in()
    assert model.config.eos_token_id == words.eos_token_id == model.generation_config.eos_token_id
    assert (model.config.bos_token_id, model.config.pad_token_id) == (0, 1)
    found = fitted(config, model).model
    assert found.parameters == model.num_parameters()
    assert getattr(found, "hidden_size", None) == 32
    rehearse(model, words, {}, "clm", tmp_path / "rehearsal", trusts_code=False)


def test_overrides_are_those_of_the_architecture(tmp_path: Path) -> None:
    write(tmp_path, GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300))
    overrides = {"activation_function": "gelu", "num_hidden_layers": 4, "resid_pdrop": 0.0}
    model = built(run(tmp_path, overrides=overrides))
    assert (model.config.n_layer, model.config.activation_function) == (4, "gelu")
    assert len(model.transformer.h) == 4
    assert model.transformer.h[0].mlp.dropout.p == 0.0


def test_fewer_layers_of_several_kinds_are_the_first_ones(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {**SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16}
    write(tmp_path, Qwen3Config(**sizes, layer_types=kinds, sliding_window=16))
    model = built(run(tmp_path, overrides={"num_hidden_layers": 3}))
    assert model.config.layer_types == kinds[:3]
    with pytest.raises(UserError, match=r"give model\.overrides\.layer_types as well, a list of 5"):
        built(run(tmp_path, overrides={"num_hidden_layers": 5}))
    more = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    assert len(built(run(tmp_path, overrides=more)).model.layers) == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hiden_act": "gelu"},
            "unknown key model.overrides.hiden_act: LlamaConfig has no such key; did you mean "
            "hidden_act",
        ),
        ({"num_hidden_layers": "four"}, "num_hidden_layers=four: must be a number, as 2 is"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: TypeError: Field 'num_hidden_layers'"),
        ({"mlp_bias": 1}, "model.overrides.mlp_bias=1: must be true or false, as false is"),
        (
            {"hidden_size": 33},
            "LlamaConfig does not take these values (The hidden size (33) is not a multiple of",
        ),
        ({"hidden_act": "gelux"}, "cannot be loaded: KeyError: "),
        ({"hidden_act": "gelux"}, "correct model.overrides, its config.json and files"),
    ],
)
def test_an_override_that_the_architecture_does_not_take(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    write(tmp_path, LlamaConfig(**SMALL))
    with pytest.raises(UserError) as told:
        built(run(tmp_path, overrides=overrides))
    assert message in str(told.value)


def test_one_key_by_two_names(tmp_path: Path) -> None:
    write(tmp_path, GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300))
    with pytest.raises(UserError, match=r"n_embd and model\.overrides\.hidden_size are one key"):
        built(run(tmp_path, overrides={"n_embd": 64, "hidden_size": 32}))


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("vocab_size", "model.vocab_size"),
        ("dtype", "precision"),
        ("eos_token_id", "the tokenizer"),
        ("attn_implementation", "model.attention"),
    ],
)
def test_what_the_run_decides_is_no_override(key: str, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"model\.overrides\.{key} is decided by {remedy}; leave"):
        run(Path("x"), overrides={key: 1})


def test_an_architecture_without_the_head(tmp_path: Path) -> None:
    write(tmp_path, BertConfig(**SMALL))
    assert isinstance(built(run(tmp_path, "mlm")), BertForMaskedLM)
    with pytest.raises(UserError, match="no head for objective=clm; choose objective=mlm"):
        built(run(tmp_path))
    write(tmp_path, ViTConfig(hidden_size=32))
    with pytest.raises(UserError, match="no head for objective=clm; choose another model"):
        built(run(tmp_path))


def test_a_quantised_models_config_trains_in_full(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    write(tmp_path, config)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    assert not hasattr(built(run(tmp_path)).config, "quantization_config")


def test_code_that_comes_with_a_config_is_kept_and_run_where_trusted(tmp_path: Path) -> None:
    source, run_dir = own_code.write(tmp_path / "own"), tmp_path / "run"
    (source / "model.safetensors").unlink()
    run_dir.mkdir()
    with pytest.raises(UserError, match=r"set model\.trust_remote_code=true"):
        built(run(source))
    config = run(source, trust_remote_code=True, overrides={"layers": 3}, vocab_size=400)
    assert isinstance(config.model, ConfigModel)
    kept = keep(config.model, "clm", run_dir, None).directory
    for path in source.iterdir():
        path.unlink()
    names = {path.name for path in kept.iterdir()}
    assert names == {"config.json", *own_code.FILES}
    model: Any = build(config, stand_in(), kept)[0]
    assert (type(model).__name__, len(model.layers)) == ("OwnForCausalLM", 3)
    assert model.get_input_embeddings().weight.shape[0] == 400


# --- pretrained -----------------------------------------------------------------------------------


def test_dropout_of_weights_is_overridden_and_shapes_are_not(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    tree = {"kind": "pretrained"}
    model = built(run(tmp_path, **tree, overrides={"attention_dropout": 0.25}))
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    with pytest.raises(UserError) as told:
        built(run(tmp_path, **tree, overrides={"attention_dropout": 0.2, "intermediate_size": 96}))
    assert str(told.value) == (
        'model.overrides={"attention_dropout": 0.2, "intermediate_size": 96} does not fit the '
        f"weights of model.name={tmp_path}: 6 parameter(s) would be others: "
        "model.layers.0.mlp.down_proj.weight is [32, 96], [32, 64] in the weights; leave out what "
        "changes shapes, or train from scratch with model=from_config"
    )
    with pytest.raises(UserError, match=r"3\.\S+ is \[\d+, \d+\]|would be others"):
        built(run(tmp_path, **tree, overrides={"num_hidden_layers": 3}))


# --- what the launcher knows of it ----------------------------------------------------------------


def test_the_launcher_reads_sizes_of_the_config_with_what_is_overridden(tmp_path: Path) -> None:
    write(tmp_path, LlamaConfig(**SMALL))
    config = run(tmp_path, overrides={"hidden_size": 64, "max_position_embeddings": 48})
    tree = config.model_dump(mode="json")
    tree["strategy"], tree["data"]["sequence_length"] = ZERO3, "auto"
    found = resolve(from_tree(tree), Machine(cores=2), str(tmp_path / "run"))
    assert getattr(found.model, "vocab_size", None) == 300
    assert getattr(found.model, "hidden_size", None) == 64
    assert found.data.sequence_length == 48
    assert built(found).config.hidden_size == 64


def test_a_tokenizer_takes_the_vocabulary_of_the_config(tmp_path: Path) -> None:
    write(tmp_path, LlamaConfig(**SMALL))
    tree = run(tmp_path).model_dump(mode="json")
    tree["tokenizer"]["vocab_size"] = None
    found = resolve(from_tree(tree), Machine(cores=2), str(tmp_path / "run"))
    assert found.tokenizer.kind == "byte_bpe"
    assert wanted_vocabulary(found, found.tokenizer) == 300
    elsewhere = from_tree({**tree, "model": {"kind": "from_config", "name": "some/model"}})
    assert elsewhere.tokenizer.kind == "byte_bpe"
    with pytest.raises(UserError, match=r"does not say here; set model\.vocab_size or tokenizer"):
        wanted_vocabulary(elsewhere, elsewhere.tokenizer)
    with pytest.raises(UserError, match="which is not known here by the model's config.json"):
        run(tmp_path, pad_vocab_to_multiple=64)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=261 is more than model\.vocab_siz"):
        run(tmp_path, vocab_size=200)
    config = run(tmp_path, hidden_size=64)
    with pytest.raises(UserError, match=r"has 32; leave it out, or set model\.overrides\.hidden_s"):
        fitted(config, built(config))


def test_it_is_planned_and_traced(tmp_path: Path) -> None:
    write(tmp_path, GPTNeoXConfig(**SMALL))
    config = run(tmp_path)
    facts = facts_of(planned(config), config)
    assert sum(each.elements for each in facts.parameters) == built(config).num_parameters()
    found: Traced = traced(config, autocast=False)
    assert found.flops > 0
    assert found.kept > 0


# --- modules of the user's own --------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lying_about.py").write_text("LOADED = True\n")
    (tmp_path / "failing_model.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    return tmp_path


def test_a_module_that_is_not_there(package: Path) -> None:
    told = (
        "model.import=absent_models: there is no such module; PYTHONPATH is /some/where, and the "
        f"current directory, {package}, is not looked into. Install it, or set PYTHONPATH to the "
        "directory that holds it"
    )
    assert list(not_found(["absent_models", "json"])) == [told]
    with pytest.raises(UserError) as error:
        import_all(["absent_models"])
    assert str(error.value) == told
    (message,) = not_found(["lying_about.models"])
    assert message.endswith(
        f"It lies in the current directory: set PYTHONPATH={package}, or install it"
    )


def test_a_module_that_fails(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(package)
    with pytest.raises(UserError) as error:
        import_all(["failing_model"], "--import")
    assert str(error.value).startswith(
        "--import=failing_model cannot be imported: ModuleNotFoundError: No module named "
        "'nothing_of_this_name'; PYTHONPATH is /some/where, and the current directory"
    )


def test_modules_of_a_run_are_known_by_its_directory(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package)
    tree = run(Path("x"), **{"import": "lying_about"}).model_dump(mode="json")
    (package / "config.yaml").write_text(yaml.safe_dump(tree))
    (package / "final").mkdir()
    import_for(package / "final")
    assert sys.modules.pop("lying_about").LOADED
    import_for(package)
    assert sys.modules.pop("lying_about").LOADED


def test_a_path_is_not_a_module() -> None:
    with pytest.raises(UserError, match=r"model\.import=\./mine\.py is not the name of a module"):
        run(Path("x"), "clm", "from_config", **{"import": ["./mine.py"]})
