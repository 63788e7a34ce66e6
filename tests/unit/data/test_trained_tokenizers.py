"""WordPiece and unigram trained on a corpus, and the fields that all trained tokenizers have."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shardwright.train.config import RunConfig
from shardwright.train.data.sources.corpus import Piece
from shardwright.train.data.tokens.encoding import Encoder, Packing
from shardwright.train.data.tokens.tokenizer import control_ids, document_frame, ensure_tokenizer
from shardwright.train.data.tokens.training import LONGEST_IN_WORDPIECE, train
from shardwright.train.errors import UserError

MakeConfig = Callable[..., RunConfig]
KINDS = ("wordpiece", "unigram")
ALL = ("byte_bpe", *KINDS)
MASKS = {"wordpiece": "[MASK]", "unigram": "<mask>", "byte_bpe": "<mask>"}


def tokenizer_of(
    make_config: MakeConfig, run_dir: Path, kind: str, *, mlm: bool = True, **settings: Any
) -> PreTrainedTokenizerFast:
    config = make_config(mlm=mlm, tokenizer={"kind": kind, **settings})
    place = run_dir / f"{kind}-{len(list(run_dir.iterdir()))}"
    place.mkdir()
    return ensure_tokenizer(config, place / "tokenizer", {"corpus": "of the test"})


def trained(
    make_config: MakeConfig, texts: list[str], kind: str, size: int, **settings: Any
) -> tuple[Tokenizer, Counter[str]]:
    counts: Counter[str] = Counter()
    config = make_config(mlm=True, tokenizer={"kind": kind, **settings})
    assert config.tokenizer.kind != "pretrained"
    return train(config.tokenizer, texts, size, counts), counts


# Each process has hash maps with a seed of its own, in Python and in Rust.
TRAIN = """
import hashlib, sys
from collections import Counter
from shardwright.train.config import UnigramTokenizer, WordPieceTokenizer
from shardwright.train.data.tokens.training import train
texts = open(sys.argv[1], encoding="utf-8").read().split("\\n\\n")
for kind in (WordPieceTokenizer, UnigramTokenizer):
    name = {"WordPieceTokenizer": "wordpiece", "UnigramTokenizer": "unigram"}[kind.__name__]
    made = train(kind(kind=name), texts, 600, Counter())
    print(hashlib.sha256(made.to_str().encode()).hexdigest())
"""


def test_the_same_texts_give_the_same_tokenizer_in_any_process(tmp_path: Path) -> None:
    draw = random.Random(0)
    # Many words that are as frequent as each other, so that ties decide.
    words = ["".join(draw.choices("abcdefghijklmnopqrst", k=6)) for _ in range(400)]
    texts = [" ".join(draw.sample(words, len(words))) + "." for _ in range(6)]
    (tmp_path / "texts").write_text("\n\n".join(texts), encoding="utf-8")
    found = set()
    for seed, threads, parallel in (("1", "1", "false"), ("2", "2", "true"), ("3", "7", "true")):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, tmp_path / "texts"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **environment, "TOKENIZERS_PARALLELISM": parallel},
        )
        found.add(done.stdout)
    assert len(found) == 1
    assert len(next(iter(found)).split()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first_and_the_vocabulary_is_as_large_as_asked_for(
    corpus: Path, make_config: MakeConfig, run_dir: Path, kind: str
) -> None:
    tokenizer = tokenizer_of(make_config, run_dir, kind, vocab_size=320)
    assert [tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id] == [0, 1, 2]
    assert [tokenizer.unk_token_id, tokenizer.mask_token_id] == [3, 4]
    # The corpus has few words: after all of them there is no more to learn.
    size = len(tokenizer.get_vocab())
    assert size <= 320
    assert set(tokenizer.get_vocab().values()) == set(range(size))


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_models_tokenizer_frames_a_prompt(
    corpus: Path, make_config: MakeConfig, run_dir: Path, kind: str
) -> None:
    tokenizer = tokenizer_of(make_config, run_dir, kind)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(f"the {MASKS[kind]} in the air").input_ids)
    first, last = tokenizer.cls_token, tokenizer.sep_token
    the, within, air = ("the", "in", "air") if kind == "wordpiece" else ("▁the", "▁in", "▁air")
    assert tokens == [first, the, MASKS[kind], within, the, air, last]
    pair = tokenizer("air", "the")
    assert list(pair) == ["input_ids", "attention_mask"]
    assert pair.input_ids.count(tokenizer.sep_token_id) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_models_tokenizer_adds_nothing_to_a_prompt(
    corpus: Path, make_config: MakeConfig, run_dir: Path, kind: str
) -> None:
    tokenizer = tokenizer_of(make_config, run_dir, kind, mlm=False)
    ids = tokenizer("the light dove").input_ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "the light dove"
    config = make_config(tokenizer={"kind": kind})
    assert document_frame(tokenizer, config)[:2] == ((), (2,))
    assert tokenizer.padding_side == "left"


def test_a_unigram_loses_no_text(corpus: Path, make_config: MakeConfig, run_dir: Path) -> None:
    tokenizer = tokenizer_of(make_config, run_dir, "unigram", mlm=False)
    text = "Thoughts  without\n\tcontent, 漢字 \U0001f600 žluť x\x00 are  empty."
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "gpt2"])
def test_a_saved_tokenizer_loads_beside_every_kind_of_model(
    corpus: Path, make_config: MakeConfig, run_dir: Path, kind: str, model_type: str
) -> None:
    mlm = model_type != "gpt2"
    tokenizer = tokenizer_of(make_config, run_dir, kind, mlm=mlm)
    directory = next(run_dir.iterdir()) / "tokenizer"
    # AutoTokenizer prefers the class that fits the model beside it.
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(directory)
    text = f"Pure  reason's {MASKS[kind]}\n\tUNDERSTANDING é 12."
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.mask_token == MASKS[kind]
    assert loaded.decode(loaded("the air").input_ids) == tokenizer.decode(
        tokenizer("the air").input_ids
    )


@pytest.mark.parametrize("kind", KINDS)
def test_whole_words_begin_where_they_do(
    corpus: Path, make_config: MakeConfig, run_dir: Path, kind: str
) -> None:
    tokenizer = tokenizer_of(make_config, run_dir, kind)
    packing = Packing(len(tokenizer), (), (2,), control_ids(tokenizer), words=True, by_line=False)
    text = "Resistance unimagined, the [SEP]</s> dove."
    encoder = Encoder.of_corpus(tokenizer.backend_tokenizer, packing)
    made = encoder.encode([Piece(text, True, False, 0, False)])[False, 0]
    tokens = tokenizer.convert_ids_to_tokens(made.ids.tolist())
    assert not set(made.ids.tolist()) & set(control_ids(tokenizer)) - {tokenizer.unk_token_id}
    begins = [not t.startswith("##") if kind == "wordpiece" else t.startswith("▁") for t in tokens]
    assert made.word_starts.astype(bool).tolist() == begins
    assert np.sum(begins) < len(tokens)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("settings", "text", "same_as"),
    [
        ({"lowercase": True, "strip_accents": False}, "PURE Reason É", "pure reason é"),
        ({"lowercase": False, "strip_accents": True}, "Pure réason", "Pure reason"),
        (
            {"lowercase": False, "strip_accents": True, "normalizer": "nfc"},
            "Pure re\u0301ason \u1100\u1161",
            "Pure reason \uac00",
        ),
        ({"normalizer": "nfc", "strip_accents": False}, "re\u0301ason", "réason"),
        ({"normalizer": "nfd", "strip_accents": False}, "réason", "re\u0301ason"),
        ({"normalizer": "nfkc", "strip_accents": False}, "ﬁnal ①", "final 1"),
        ({"normalizer": "nfkd", "strip_accents": False}, "ﬁnal é", "final e\u0301"),
    ],
)
def test_text_is_normalized_as_asked_for(
    make_config: MakeConfig,
    kind: str,
    settings: dict[str, Any],
    text: str,
    same_as: str,
    sentences: Callable[..., str],
) -> None:
    texts = [sentences(60), text, same_as, text + " " + same_as]
    made, _ = trained(make_config, texts, kind, 400, **settings)
    assert made.encode(text).ids == made.encode(same_as).ids
    other = {**dict.fromkeys(settings, False), "normalizer": "none"}
    as_it_is, _ = trained(make_config, texts, kind, 400, **{"lowercase": False, **other})
    assert as_it_is.encode(text).ids != as_it_is.encode(same_as).ids


@pytest.mark.parametrize("kind", ALL)
def test_digits_are_words_of_their_own_where_that_is_asked_for(
    make_config: MakeConfig, kind: str
) -> None:
    texts = ["in 1990 and 1990 or 1990, 1990 " * 20]
    apart, _ = trained(make_config, texts, kind, 300, split_digits=True)
    tokens = [token.strip("Ġ▁#") for token in apart.encode("in 1990").tokens]
    assert [token for token in tokens if token][-4:] == list("1990")
    whole, _ = trained(make_config, texts, kind, 300)
    assert len(whole.encode("in 1990").tokens) < len(apart.encode("in 1990").tokens)


@pytest.mark.parametrize(
    ("kind", "words", "text", "expected"),
    [
        ("byte_bpe", "gpt2", "a1234 ..", ["a", "1234", "Ġ.."]),
        ("byte_bpe", "cl100k", "a1234 ..", ["a", "123", "4", "Ġ.."]),
        ("byte_bpe", "o200k", "aB/\n 1234", ["a", "B", "/Ċ", "Ġ", "123", "4"]),
        ("wordpiece", "bert", "a-b 漢字", ["a", "-", "b", "漢", "字"]),
        ("wordpiece", "whitespace", "a-b 漢字", ["a-b", "漢字"]),
        ("unigram", "metaspace", "a-b  c", ["▁a-b", "▁", "▁c"]),
        ("unigram", "metaspace_punctuation", "a-b c", ["▁a", "-", "b", "▁c"]),
    ],
)
def test_words_are_set_apart_as_asked_for(
    make_config: MakeConfig, kind: str, words: str, text: str, expected: list[str]
) -> None:
    made, _ = trained(make_config, [f"{text} "] * 9, kind, 400, pre_tokenizer=words)
    normal = made.normalizer.normalize_str(text) if made.normalizer else text
    assert [word for word, _ in made.pre_tokenizer.pre_tokenize_str(normal)] == expected


@pytest.mark.parametrize(("kind", "words"), [("wordpiece", "gpt2"), ("unigram", "bert")])
def test_words_of_another_algorithm_are_refused(
    make_config: MakeConfig, kind: str, words: str
) -> None:
    with pytest.raises(UserError, match=rf"tokenizer\.pre_tokenizer={words}"):
        make_config(tokenizer={"kind": kind, "pre_tokenizer": words})
    with pytest.raises(UserError, match=r"tokenizer\.character_coverage"):
        make_config(tokenizer={"kind": "wordpiece", "character_coverage": 0.9})


def test_the_most_frequent_characters_have_tokens(make_config: MakeConfig) -> None:
    texts = ["aab aab aab d c", "x" * (LONGEST_IN_WORDPIECE + 1)]
    made, counts = trained(make_config, texts, "wordpiece", 40, alphabet_size=3)
    # Of two that are as frequent it is the first, and a word that is too long counts for nothing.
    assert {token for token in made.get_vocab() if len(token) == 1} == {"a", "b", "c"}
    assert counts["unknown"] == 1
    assert made.encode("dab aab").tokens == ["[UNK]", "aab"]


def test_a_vocabulary_without_room_for_the_characters_is_refused(make_config: MakeConfig) -> None:
    letters = " ".join("abcdefghijklmnopqrstuvwxyz" + "zyxwvutsrqponmlkjihgfedcba")
    with pytest.raises(UserError, match=r"no room for 26 characters, .* tokenizer\.alphabet_size="):
        trained(make_config, [letters], "wordpiece", 20)
    with pytest.raises(UserError, match=r"unigram with 261 tokens: SentencePiece does not train"):
        trained(make_config, [letters], "unigram", 261)
