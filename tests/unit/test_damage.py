"""Damaged files of a model are named, each in one line with its remedy, wherever they are read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from shardwright.train.checkpoint.format import damage
from shardwright.train.config import PretrainedModel, from_tree
from shardwright.train.data.tokens.tokenizer import ensure_tokenizer
from shardwright.train.errors import UserError
from shardwright.train.export.recover import Options, recover
from shardwright.train.model.build import build
from shardwright.train.model.origin import keep
from shardwright.train.sampling.sample import sample
from tests.fixtures import TreeOf
from tests.unit.saved_models import POSITIONS, TOKENS
from tests.unit.saved_models import save as save_with_tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f3"
    "2b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def pointer(path: Path) -> None:
    path.write_text(POINTER)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_a_later_version(path: Path) -> None:
    tree = json.loads(path.read_text())
    tree["version"] = "2.0"
    tree["model"]["type"] = "BPE2"
    path.write_text(json.dumps(tree))


LFS = f"is a pointer of git-lfs ({len(POINTER)} bytes) in place of the file; run `git lfs pull`"
AGAIN = "copy or download it again"
LATER = f"(format '2.0') is not what tokenizers {tokenizers.__version__} reads"
CASES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "weights cut short": ("model.safetensors", cut, ("bytes too early", AGAIN)),
    "weights' pointer": ("model.safetensors", pointer, (LFS,)),
    "weights emptied": ("model.safetensors", emptied, ("is empty", AGAIN)),
    "config cut short": ("config.json", cut, ("cannot be read", AGAIN)),
    "config's pointer": ("config.json", pointer, (LFS,)),
    "tokenizer cut short": ("tokenizer.json", cut, ("is truncated or not JSON", AGAIN)),
    "tokenizer's pointer": ("tokenizer.json", pointer, (LFS,)),
    "tokenizer of a later version": ("tokenizer.json", of_a_later_version, (LATER, "install")),
    "settings' pointer": ("generation_config.json", pointer, (LFS,)),
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    config = GPT2Config(
        vocab_size=len(TOKENS), n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=1,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return save_with_tokenizer(GPT2LMHeadModel(config), tmp_path / "model")


@pytest.mark.parametrize("case", CASES)
def test_each_reader_names_the_file_what_it_is_and_the_remedy(
    case: str, model_dir: Path, tmp_path: Path, tiny_tree: TreeOf
) -> None:
    name, harm, wanted = CASES[case]
    tree = tiny_tree("clm")
    tree["model"] = {"kind": "pretrained", "name": str(model_dir)}
    tree["tokenizer"] = {"kind": "pretrained", "name": str(model_dir)}
    config = from_tree(tree)
    whole = PreTrainedTokenizerFast.from_pretrained(model_dir)
    harm(model_dir / name)
    assert damage.problem(model_dir / name), "seen without loading anything"

    def trained_from() -> None:
        assert isinstance(config.model, PretrainedModel)
        kept = keep(config.model, "clm", tmp_path, None)
        build(config, whole, kept.directory)

    def tokenized_with() -> None:
        ensure_tokenizer(config, tmp_path / "tokenizer", {})

    def recovered_from() -> None:
        recover(Options(model_dir, tmp_path / "out"), io.StringIO(), io.StringIO())

    def sampled_from() -> None:
        sample(model_dir, ["a"], new_tokens=1)

    of_tokenizer = name == "tokenizer.json"
    readers: list[Callable[[], None]] = [sampled_from]
    readers += [tokenized_with] if of_tokenizer else [trained_from]
    readers += [] if name == "generation_config.json" else [recovered_from]
    for read in readers:
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert str(model_dir / name) in message, read
        assert "\n" not in message
        for text in wanted:
            assert text in message, (read, message)
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_a_file_which_is_not_there(model_dir: Path) -> None:
    index = model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "x"}}))
    found = damage.problem(index)
    assert found is not None
    assert found.startswith(f"{index} names model-1.safetensors and 1 more, which is not there")


def test_nothing_is_seen_in_whole_files(model_dir: Path) -> None:
    assert list(damage.problems(model_dir)) == []
    assert load_file(model_dir / "model.safetensors")
    AutoConfig.from_pretrained(model_dir)


def test_a_tokenizer_that_stops_at_an_unknown_word_is_refused_before_the_corpus_is_read(
    tmp_path: Path, tiny_tree: TreeOf
) -> None:
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "def": 2}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    source = tmp_path / "words"
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(source)
    tree = tiny_tree("clm") | {"tokenizer": {"kind": "pretrained", "name": str(source)}}
    with pytest.raises(UserError) as caught:
        ensure_tokenizer(from_tree(tree), tmp_path / "tokenizer", {})
    assert str(caught.value) == (
        f"tokenizer={source}: it has no token for unknown text (WordLevel error: Missing [UNK] "
        "token from the vocabulary); give its model an unk_token that is in its vocabulary, or "
        "choose another tokenizer"
    )
