"""A trained model fills masks or continues prompts; what it cannot answer is explained."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.train.errors import UserError
from shardwright.train.sampling.sample import check_strategy, main, model_directory, sample, show
from tests.unit.saved_models import POSITIONS, TOKENS, save


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GPT-2 of random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENS), n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=1,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a RoBERTa that fills in one letter only: x."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(TOKENS), max_position_embeddings=POSITIONS + 2, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, type_vocab_size=1,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    with torch.no_grad():
        model.lm_head.bias[TOKENS.index("x")] = 10
    return save(model, tmp_path_factory.mktemp("roberta"))


def test_a_seed_fixes_the_continuation(causal: Path) -> None:
    first, again, other = (sample(causal, ["def "], seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert not first[0][0].startswith("def ")


def test_each_prompt_gets_its_continuation(causal: Path) -> None:
    assert [len(completions) for completions in sample(causal, ["a", "b", ""])] == [1, 1, 1]


def test_a_continuation_is_as_long_as_asked_for(causal: Path) -> None:
    ((text,),) = sample(causal, ["def "], new_tokens=1)
    assert len(text) <= 1


def test_a_continuation_ends_where_the_positions_end(causal: Path) -> None:
    ((text,),) = sample(causal, ["d" * (POSITIONS - 3)], new_tokens=1000)
    assert 0 <= len(text) <= 3


def test_a_continuation_without_room_for_all_tokens_says_so(causal: Path) -> None:
    out = io.StringIO()
    show(causal, ["d" * (POSITIONS - 3)], out, new_tokens=1000)
    assert out.getvalue().endswith(
        "\n  (at most 3 of 1,000 new tokens: the model has no more positions behind this prompt)\n"
    )
    out = io.StringIO()
    show(causal, ["d" * (POSITIONS - 3)], out, new_tokens=3)
    assert "new tokens" not in out.getvalue()


def test_likeliest_fillings_come_first_with_their_probability(masked: Path) -> None:
    ((best, *others),) = sample(masked, ["import <mask>"], top=3)
    assert best == "x (99%)"
    assert [text[-4:] for text in others] == ["(0%)"] * 2


def test_no_more_fillings_than_there_are_tokens(masked: Path) -> None:
    ((*fillings,),) = sample(masked, ["import <mask>"], top=10_000)
    assert len(fillings) == len(TOKENS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("none here", "prompt 'none here' has 0 masks; this model fills exactly one <mask>"),
        ("<mask> <mask>", "prompt '<mask> <mask>' has 2 masks; this model fills exactly one"),
        ("<mask>" + "y" * 64, r"prompt '<mask>y{51}\.\.\.' has 65 tokens; .* takes at most 64, sh"),
    ],
)
def test_prompt_that_a_masked_model_cannot_answer(masked: Path, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(masked, [prompt])


def test_prompt_that_leaves_no_room_to_continue(causal: Path) -> None:
    with pytest.raises(UserError, match="has 64 tokens; this model takes at most 63, shorten it"):
        sample(causal, ["y" * 64])


def test_prompts_and_answers_are_shown_together(causal: Path, masked: Path) -> None:
    out = io.StringIO()
    show(causal, ["def f("], out, new_tokens=3)
    show(masked, ["a <mask> b"], out, top=2)
    assert "\n  def f(│" in out.getvalue()
    assert "\n  a <mask> b\n    x (99%), " in out.getvalue()


def test_a_run_means_its_final_model(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "final").symlink_to(causal)
    assert model_directory(tmp_path) == tmp_path / "final"
    assert model_directory(causal) == causal


def test_a_checkpoint_is_no_model_and_its_run_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "config.json").write_text("{}")  # the model's, for a recovery
    with pytest.raises(UserError) as error:
        model_directory(checkpoint)
    assert str(error.value) == (
        f"{checkpoint} is a checkpoint, in the shards of the engine that trained it; give its run "
        f"directory {tmp_path / 'run'}, whose final/ is read once the training has ended, or "
        f"make a model directory with `shardwright recover {checkpoint} OUT`"
    )


@pytest.mark.parametrize("strategy", ["zero2", "ddp", "fsdp_hybrid", "zeor3"])
def test_strategy_that_divides_no_weights_is_refused(strategy: str) -> None:
    message = (
        f"--strategy={strategy} does not divide the weights of a model that only generates; "
        "choose one of fsdp, fsdp_offload, zero3, zero3_offload, or leave it out"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        check_strategy(strategy, 2)


def test_ranks_without_a_strategy_are_refused() -> None:
    with pytest.raises(UserError, match=r"--nproc-per-node=2 is for several ranks .* add --strat"):
        check_strategy(None, 2)
    check_strategy(None, None)
    check_strategy("zero3", 2)


def test_command_line(masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(masked), "--prompt", "a <mask>", "--prompt", "<mask> b", "--top", "2"]) == 0
    assert capsys.readouterr().out.count("x (99%), ") == 2

    assert main([str(tmp_path), "--prompt", "a"]) == 2
    ended = capsys.readouterr()
    assert f"error: {tmp_path} holds no model: neither {tmp_path}/config.json" in ended.err
    assert "give a run directory whose training has ended, or a model directory" in ended.err

    assert main([str(masked), "--prompt", "a"]) == 2
    assert "\nerror: prompt 'a' has 0 masks" in capsys.readouterr().err


CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
print("their code runs")
class OurConfig(GPT2Config):
    model_type = "ours"
class OurModelForCausalLM(GPT2LMHeadModel):
    config_class = OurConfig
"""


@pytest.fixture
def own_cache_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have code of models imported from a cache of the test's own, which leaves nothing behind.

    A package that stays would hide the usual cache from every later test of this process.
    """

    def taken() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = taken()
    yield
    taken()
    sys.modules.update(before)


@pytest.mark.usefixtures("own_cache_of_modules")
def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(causal, tmp_path / "model")
    (directory / "ours.py").write_text(CODE)
    config = json.loads((directory / "config.json").read_text())
    parts = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModelForCausalLM"}
    config |= {"model_type": "ours", "architectures": ["OurModelForCausalLM"], "auto_map": parts}
    (directory / "config.json").write_text(json.dumps(config))

    assert main([str(directory), "--prompt", "a"]) == 2
    ended = capsys.readouterr()
    assert "their code runs" not in ended.out
    assert ended.err == (
        f"loading {directory}\nerror: {directory} holds OurModelForCausalLM, a model with Python "
        "code of its own (ours.py), which is not run by default; read it, then add "
        "--trust-remote-code\n"
    )
    assert main([str(directory), "--prompt", "a", "--trust-remote-code"]) == 0
    assert "their code runs" in capsys.readouterr().out


def _without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _cut(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 100)


def _nameless(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["architectures"]
    (directory / "config.json").write_text(json.dumps(config))


def _no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_weights, "holds a model that cannot be loaded (OSError: "),
        (
            _cut,
            "model.safetensors is not a safetensors file, or is truncated; copy or download it "
            "again",
        ),
        (_nameless, 'config.json names no architecture; add "architectures", such as ["GPT2LMHead'),
        (_no_json, "config.json cannot be read (Expecting property name "),
    ],
)
def test_a_directory_that_is_no_whole_model_is_bad_input(
    damage: Callable[[Path], None],
    said: str,
    causal: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = shutil.copytree(causal, tmp_path / "model")
    damage(directory)
    assert main([str(directory), "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {directory}")
    assert said in err
    assert "Traceback" not in err


def test_a_model_for_which_there_is_no_memory(
    causal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("transformers.pipeline", no_room)
    assert main([str(causal), "--prompt", "a"]) == 1
    assert capsys.readouterr().err == (
        f"loading {causal}\n"
        "error: the GPU's memory has run out: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        "less is needed with --strategy fsdp --nproc-per-node N, which divides the model among N "
        "ranks, or fewer --new-tokens\n"
    )


@pytest.mark.parametrize("arguments", [["--top", "0"], ["--new-tokens", "-3"], ["--seed", "x"]])
def test_numbers_out_of_range_are_refused(
    masked: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(masked), "--prompt", "<mask>", *arguments])
    assert ended.value.code == 2
    assert arguments[1] in capsys.readouterr().err
