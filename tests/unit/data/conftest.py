"""Small corpora, configs and tokenizers for the tests of shardwright.train.data."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shardwright.train.config import RunConfig, from_tree

MakeConfig = Callable[..., RunConfig]

TEXT = """
The light dove, cleaving the air in her free flight, and feeling its resistance, might imagine that
its flight would be still easier in empty space. Thoughts without content are empty, intuitions
without concepts are blind. The understanding can intuit nothing, the senses can think nothing.
"""
WORDS = re.findall(r"\w+", TEXT.lower())


def _sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(count))


@pytest.fixture
def sentences() -> Callable[..., str]:
    """Return ``f(count, seed=0)``: so many sentences of eight words."""
    return _sentences


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty .txt files of sixty sentences each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(_sentences(60, seed=i))
    return folder


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Return a function from changed sections to a whole config that caches under tmp_path."""

    def make(mlm: bool = False, seed: int = 0, **changed: dict[str, Any]) -> RunConfig:
        tree: dict[str, Any] = {
            "seed": seed,
            "model": {
                "kind": "roberta" if mlm else "gpt2",
                "vocab_size": 400,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 16,
                "max_position_embeddings": 130,
            },
            "objective": {"kind": "mlm" if mlm else "clm"},
            "data": {
                "kind": "text",
                "paths": [str(tmp_path / "corpus" / "*.txt")],
                "sequence_length": 32,
                "eval_fraction": 0.1,
                "cache_dir": str(tmp_path / "cache"),
                "document_attention": bool(changed.get("data", {}).get("line_by_line")),
                "unpad": False,
            },
            "tokenizer": {"kind": "byte_bpe"},
            "strategy": {"kind": "ddp"},
            "precision": {},
            "trainer": {"max_steps": 5, "global_batch_size": 16, "micro_batch_size": 4},
            "tracking": {"kind": "none"},
            "launcher": {"kind": "torchrun", "nproc_per_node": 2},
        }
        for name, section in changed.items():
            other_kind = section.get("kind", tree[name].get("kind")) != tree[name].get("kind")
            shared = {"sequence_length", "eval_fraction", "cache_dir"}
            kept = shared | {"document_attention", "unpad"} if other_kind else tree[name]
            tree[name] = {k: v for k, v in tree[name].items() if k in kept} | section
        return from_tree(tree)

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def wordpiece(tmp_path: Path) -> Path:
    """Return a directory with a BERT tokenizer of the corpus's words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([_sentences(200)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(tmp_path / "wordpiece")
    return tmp_path / "wordpiece"
