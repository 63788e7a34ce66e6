"""Runs that begin with pretrained weights: what they export, and what they need to be resumed."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shardwright.train.config import load
from shardwright.train.data.tokens.training import train_byte_bpe
from shardwright.train.errors import UserError
from shardwright.train.export.card import Card
from shardwright.train.export.final import export
from shardwright.train.export.recover import Options, recover
from shardwright.train.loop.trainer import Trainer
from shardwright.train.sampling.sample import sample
from tests import own_code
from tests.distributed.curves import curve
from tests.distributed.interrupted import interrupted
from tests.distributed.jobs import trained, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

Pools = RanksOf


def save_tokenizer(directory: Path) -> None:
    trained_one = train_byte_bpe(
        ["def f(x):\n    return x\n"] * 4, 270, 1, ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    )
    PreTrainedTokenizerFast(
        tokenizer_object=trained_one,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=64,
    ).save_pretrained(directory)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a model that brings its code along."""
    directory = own_code.write(tmp_path / "source")
    save_tokenizer(directory)
    return directory


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """Return a small GPT-2 whose embedding and head differ, so that they are not tied."""
    directory = tmp_path / "source"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2,
        bos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SAVED_IN_ANOTHER_FORM: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mixtral": (
        lambda: MixtralForCausalLM(
            MixtralConfig(
                **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
            )
        ),
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    ),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)), "embed_out.weight"),
}
"""A small model of each kind, and a name on the disk that it does not have in memory."""


@pytest.fixture(params=SAVED_IN_ANOTHER_FORM)
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build, name = SAVED_IN_ANOTHER_FORM[request.param]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "source")
    assert name in load_file(tmp_path / "source" / "model.safetensors")
    assert name not in model.state_dict()
    save_tokenizer(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def run_from(tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    def freeze(
        source: Path,
        strategy: dict[str, Any],
        ranks: int = 2,
        *,
        trusts: bool = False,
        **trainer: Any,
    ) -> Path:
        tree = tiny_tree("clm")
        tree["model"] = {"kind": "pretrained", "name": str(source), "trust_remote_code": trusts}
        tree["tokenizer"] = {"kind": "pretrained", "name": str(source)}
        tree["strategy"] = strategy
        tree["launcher"]["nproc_per_node"] = ranks
        tree["trainer"] |= {"max_steps": 4, "save_every_steps": 2, **trainer}
        return frozen_run(tree)

    return freeze


def recovered(source: Path, out: Path, **options: Any) -> str:
    err = io.StringIO()
    recover(Options(source=source, out=out, **options), io.StringIO(), err)
    return err.getvalue()


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_a_model_with_code_of_its_own_is_exported_and_recovered_with_it(
    strategy: str, own: Path, run_from: Callable[..., Path], ranks: Pools, tmp_path: Path
) -> None:
    run_dir = run_from(own, STRATEGIES[strategy], trusts=True)
    # Whatever lies at the source later: what was trained is what was there.
    ranks(2)(whole_run, run_dir)
    shutil.rmtree(own)
    final = run_dir / "final"
    for name, text in own_code.FILES.items():
        assert (final / name).read_text() == text
    assert json.loads((final / "config.json").read_text())["auto_map"] == own_code.CLASSES
    model: Any = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert model.layers[0].scale.item() == 0.75, "a buffer is that of the weights"
    assert sample(final, ["def f("], new_tokens=3, trust_remote_code=True)[0]
    with pytest.raises(UserError, match=r"OwnForCausalLM.*blocks|add --trust-remote-code") as told:
        sample(final, ["def f("], new_tokens=3)
    assert "\n" not in str(told.value)

    with pytest.raises(UserError, match="read it, then add --trust-remote-code") as told:
        recovered(run_dir, tmp_path / "refused")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "refused").exists()
    recovered(run_dir, tmp_path / "out", trusts_code=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in final.iterdir()}
    for name in ("model.safetensors", "config.json", *own_code.FILES):
        assert (tmp_path / "out" / name).read_bytes() == (final / name).read_bytes(), name


@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("zero3", 2), ("fsdp", 2)])
def test_a_model_that_lies_on_a_disk_in_another_form_is_loaded_a_tensor_at_a_time(
    strategy: str, world_size: int, converted: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    # Steps too small to change anything but a zero: what is exported is what was loaded.
    run_dir = run_from(
        converted, STRATEGIES[strategy], world_size,
        learning_rate=1e-30, weight_decay=0.0, max_steps=1, save_every_steps=1,
    )  # fmt: skip
    (said, *_) = ranks(world_size)(whole_run, run_dir)
    assert "warning" not in said
    expected, found = (load_file(d / "model.safetensors") for d in (converted, run_dir / "final"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-25), name


LOAD = """
import json, sys
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    print(json.dumps({key: sorted(map(str, info[key])) for key in info}))
"""


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_a_model_that_lies_on_a_disk_in_another_form_is_exported_and_recovered_in_it(
    strategy: str, converted: Path, run_from: Callable[..., Path], ranks: Pools, tmp_path: Path
) -> None:
    run_dir = run_from(converted, STRATEGIES[strategy], max_steps=2)
    ranks(2)(whole_run, run_dir)
    final, out = run_dir / "final", tmp_path / "out"
    recovered(run_dir, out)
    begun, ended = (load_file(d / "model.safetensors") for d in (converted, final))
    assert ended.keys() == begun.keys()
    assert all(not torch.equal(ended[name], tensor) for name, tensor in begun.items())
    assert (out / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    told = subprocess.run(
        [sys.executable, "-c", LOAD, final, out], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(lines) == 2
    assert not any(found for line in lines for found in line.values())


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "of an earlier version"])
def test_a_resume_needs_nothing_but_the_run_directory(
    strategy: str, kept: bool, gpt2: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    tensors = load_file(gpt2 / "model.safetensors")
    head = {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
    save_file(tensors | head, gpt2 / "model.safetensors", metadata={"format": "pt"})
    whole, cut = (run_from(gpt2, STRATEGIES[strategy]) for _ in range(2))
    ranks(2)(whole_run, whole)
    shutil.copytree(whole, cut, dirs_exist_ok=True)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    shutil.rmtree(cut / "final")
    if not kept:
        shutil.rmtree(cut / "model")
    shutil.rmtree(gpt2)
    # What lies there now is another's.
    gpt2.mkdir()
    (gpt2 / "config.json").write_text("{}")
    ranks(2)(whole_run, cut)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (cut / "final" / name).read_bytes() == (whole / "final" / name).read_bytes(), name
    final = load_file(cut / "final" / "model.safetensors")
    assert "lm_head.weight" in final, "what began untied stays so"


def test_a_run_that_has_saved_nothing_says_that_its_weights_are_gone(
    gpt2: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    run_dir = run_from(gpt2, STRATEGIES["single"], ranks=1)
    ranks(1)(whole_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(gpt2)
    with pytest.raises(Exception, match=f"model.name={gpt2} cannot be loaded"):
        ranks(1)(whole_run, run_dir)


GREEDY = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    "settings", [GREEDY, {"num_return_sequences": 3}, {"max_new_tokens": 0}], ids=str
)
def test_settings_that_transformers_refuses_are_left_out_and_said_before_the_first_step(
    settings: dict[str, Any], gpt2: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    path = gpt2 / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 5, **settings}))
    run_dir = run_from(gpt2, STRATEGIES["single"], ranks=1)
    (said,) = ranks(1)(whole_run, run_dir)
    key, value = list(settings.items())[-1]
    told, _, later = said.partition("4 steps")
    assert f"{key}={value!r}" in told
    assert "warning" not in later
    written = json.loads((run_dir / "final" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 5]
    assert key not in written
    assert written.get("do_sample") == settings.get("do_sample")
    AutoModelForCausalLM.from_pretrained(run_dir / "final")


def export_without_accessories(trainer: Trainer) -> list[str]:
    """Export where tokenizer, settings and card cannot be written; return what is said."""

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("not JSON serializable")

    trainer.processing_class.save_pretrained = fail  # type: ignore[union-attr,method-assign]
    assert trainer.model.generation_config is not None
    trainer.model.generation_config.max_new_tokens = 0
    said: list[str] = []
    export(trainer, fail, say=said.append)  # type: ignore[arg-type]
    return said


def test_weights_are_exported_where_nothing_else_can_be(
    gpt2: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    run_dir = run_from(gpt2, STRATEGIES["single"], ranks=1)
    (said,) = ranks(1)(trained, run_dir, export_without_accessories)
    final = run_dir / "final"
    assert {path.name for path in final.iterdir()} == {"config.json", "model.safetensors"}
    AutoModelForCausalLM.from_pretrained(final)
    assert said == [
        f"warning: {final} is without {what}"
        for what in (
            "generation_config.json: `max_new_tokens` must be greater than 0, but is 0.",
            "the tokenizer: TypeError: not JSON serializable",
            "README.md: TypeError: not JSON serializable",
        )
    ]


def export_without_a_config(trainer: Trainer) -> str:
    trainer.model.config.no_json = object()
    with pytest.raises(RuntimeError) as caught:
        export(trainer, lambda: Card(""))
    return str(caught.value)


def test_weights_without_a_config_are_kept_and_the_run_fails(
    gpt2: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    run_dir = run_from(gpt2, STRATEGIES["single"], ranks=1)
    (message,) = ranks(1)(trained, run_dir, export_without_a_config)
    final = run_dir / "final"
    assert message.startswith(
        f"{final} holds the whole weights, but does not load: config.json failed (TypeError: "
    )
    assert load_file(final / "model.safetensors")
    AutoTokenizer.from_pretrained(final)


def test_what_the_weights_lack_is_said_on_the_terminal_and_in_the_card(
    gpt2: Path, run_from: Callable[..., Path], ranks: Pools
) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (gpt2 / "config.json").write_text(json.dumps(config))
    (gpt2 / "README.md").write_text(
        "---\nlibrary_name: transformers\n---\n\n# small_code\n\nText.\n"
    )
    run_dir = run_from(gpt2, STRATEGIES["single"], ranks=1)
    (said,) = ranks(1)(whole_run, run_dir)
    assert (
        f"warning: {gpt2} has no weights of the head (lm_head.weight): they start from random "
        "values" in said.splitlines()
    )
    card = (run_dir / "final" / "README.md").read_text()
    assert (
        "Trained with Shardwright from the weights of `small_code`, a `GPT2LMHeadModel`. These "
        "had no weights of the head: its 1 parameter (`lm_head.weight`) started from random "
        "values." in card
    )
    assert "| Tokenizer | that of the weights of `small_code`, a `GPT2LMHeadModel` |" in card
    assert "source" not in card
    assert load(run_dir).model.kind == "pretrained"


def test_a_run_starts_from_the_checkpoint_of_another_under_any_strategy(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    run_from: Callable[..., Path],
    ranks: Pools,
    tmp_path: Path,
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES["zero2"]
    tree["trainer"] |= {"max_steps": 2, "save_every_steps": 2}
    source = frozen_run(tree)
    ranks(2)(whole_run, source)
    checkpoint = source / "checkpoints/checkpoint-2"

    def started(at: Path, strategy: str) -> Path:
        frozen = run_from(at, STRATEGIES[strategy])
        tree = yaml.safe_load((frozen / "config.yaml").read_text())
        tree["tokenizer"]["name"] = str(source / "tokenizer")
        (frozen / "config.yaml").write_text(yaml.safe_dump(tree))
        return frozen

    expected, found, other = (
        started(source / "final", "zero3"),
        started(checkpoint, "zero3"),
        started(checkpoint, "fsdp"),
    )
    for run_dir in (expected, found, other):
        ranks(2)(whole_run, run_dir)
    assert curve(found) == curve(expected), "the weights are those of the whole model, bit for bit"
    assert curve(other) == pytest.approx(curve(expected), rel=1e-5)

    damaged = checkpoint / "rng-1.pt"
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    with pytest.raises(AssertionError, match=r"model.name=.*-2 is not whole: rng-1.pt has"):
        ranks(2)(whole_run, started(checkpoint, "zero3"))

    resumed = interrupted(found, tmp_path / "resumed", step=2)
    shutil.copytree(found / "model", resumed / "model")
    shutil.move(source, tmp_path / "elsewhere")
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(found), "a resume needs nothing of the other run"
