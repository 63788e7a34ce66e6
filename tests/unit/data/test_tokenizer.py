"""Tokenizers: what a trained one is like, how it is saved, and which ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shardwright.train.config import RunConfig
from shardwright.train.data.sources.corpus import is_held_out
from shardwright.train.data.tokens import pretrained as tokens_pretrained
from shardwright.train.data.tokens.tokenizer import (
    document_frame,
    ensure_tokenizer,
    remove_leftovers,
    special_ids,
)
from shardwright.train.data.tokens.training import LONGEST_WORD, train_byte_bpe, with_short_words
from shardwright.train.errors import UserError
from shardwright.train.model.vocabulary import vocabulary_size

MakeConfig = Callable[..., RunConfig]
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def tokenizer_of(config: RunConfig, run_dir: Path) -> PreTrainedTokenizerFast:
    return ensure_tokenizer(config, run_dir / "tokenizer", {"corpus": "of the test"})


def pretrained(directory: Path, **special: str) -> Path:
    """Save a tokenizer of words with these special tokens."""
    words = ["<unk>", "reason", *special.values()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.save_pretrained(directory)
    return directory


def test_what_a_kill_left_of_a_copy_goes(tmp_path: Path) -> None:
    for name in (".tokenizer-0123", "tokenizer", ".other-0123"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-0123", "tokenizer"]


def test_special_tokens_come_first_then_all_bytes(sentences: Callable[..., str]) -> None:
    tokenizer = train_byte_bpe([sentences(50)], 400, 2, SPECIAL)
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL)
    assert {tokenizer.id_to_token(i) for i in range(5, 261)} == set(
        pre_tokenizers.ByteLevel.alphabet()
    )
    assert tokenizer.get_vocab_size() == 400
    everything = "žluťoučký 漢字 \U0001f600 \x00\t\n"
    assert tokenizer.decode(tokenizer.encode(everything).ids) == everything


def test_training_is_deterministic(sentences: Callable[..., str]) -> None:
    texts = [sentences(40, seed=i) for i in range(10)]
    trained = {train_byte_bpe(texts, 350, 2, SPECIAL).to_str() for _ in range(4)}
    assert len(trained) == 1


def test_long_words_are_cut_for_training_and_others_are_not() -> None:
    ordinary = f"{'a' * 900} {'漢' * 900}  {'1' * 900}"
    long = f"pure {'漢字' * 5000}, reason{' ' * 2500}1"
    counts: Counter[str] = Counter()
    cut = list(with_short_words([ordinary, long], counts))
    assert counts == {"cut": 2}
    assert cut[0] == ordinary
    assert "".join(cut[1:]) == long
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lengths = [b - a for text in cut for _, (a, b) in words.pre_tokenize_str(text)]
    assert max(lengths) == LONGEST_WORD
    assert {w for text in cut for w, _ in words.pre_tokenize_str(text)} >= {
        *("pure", ",", "Ġreason", "Ġ1")
    }


def test_text_without_spaces_is_said_to_be_cut_and_the_tokenizer_takes_it_whole(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("purereason" * 1000)
    data = {"paths": [str(tmp_path / "a.txt")], "eval_fraction": 0.0}
    tokenizer = tokenizer_of(make_config(data=data, model={"vocab_size": 300}), run_dir)
    assert [m for m in caplog.messages if "1 words cut that are longer than 1,000 char" in m]
    assert str(tokenizer.decode(tokenizer("purereason" * 2000).input_ids)) == "purereason" * 2000
    caplog.clear()
    (tmp_path / "a.txt").write_text("pure reason " * 1000)
    other = tmp_path / "other"
    other.mkdir()
    ensure_tokenizer(make_config(data=data), other / "tokenizer", {"corpus": "another"})
    assert not [m for m in caplog.messages if "words cut" in m]


def test_a_masked_models_tokenizer_frames_a_prompt(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    tokenizer = tokenizer_of(make_config(mlm=True, model={"vocab_size": 600}), run_dir)
    ids = tokenizer(" light <mask> in").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "Ġlight", "<mask>", "Ġin", "</s>"]
    assert tokenizer.mask_token_id == 4
    assert tokenizer.model_max_length == 128
    assert list(tokenizer("pure")) == ["input_ids", "attention_mask"]


def test_a_causal_models_tokenizer_adds_nothing_to_a_prompt(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    tokenizer = tokenizer_of(make_config(), run_dir)
    prompt = "pure reason "
    ids = tokenizer(prompt).input_ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("mlm", "model_type"),
    [
        (True, "bert"),
        (True, "roberta"),
        (True, "modernbert"),
        (False, "gpt2"),
        (False, "llama"),
    ],
)
def test_a_saved_tokenizer_loads_beside_every_kind_of_model(
    corpus: Path, make_config: MakeConfig, run_dir: Path, mlm: bool, model_type: str
) -> None:
    tokenizer = tokenizer_of(make_config(mlm=mlm), run_dir)
    # AutoTokenizer prefers the class that fits the model beside it.
    (run_dir / "tokenizer" / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    text = "Pure  reason's <mask>\n\tunderstanding é."
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.mask_token == "<mask>"
    assert loaded.padding_side == tokenizer.padding_side


def test_held_out_documents_do_not_train_the_tokenizer(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    letters = "abcdefghij"
    rows = [f"mark{letters[i // 10]}{letters[i % 10]} " * 20 for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    data = {"paths": [str(tmp_path / "a.jsonl")], "eval_fraction": 0.5}
    config = make_config(data=data, model={"vocab_size": 2000})
    vocabulary = tokenizer_of(config, run_dir).get_vocab()
    learned = [row for row in rows if f"Ġ{row.split()[0]}" in vocabulary]
    assert learned == [row for row in rows if not is_held_out(row, 0.5)]


def test_only_the_first_bytes_train_the_tokenizer(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    (tmp_path / "a.txt").write_text("reason " * 1000 + "experience " * 1000)
    config = make_config(
        data={"paths": [str(tmp_path / "a.txt")], "eval_fraction": 0.0},
        tokenizer={"max_training_bytes": 5000},
    )
    vocabulary = tokenizer_of(config, run_dir).get_vocab()
    assert "Ġreason" in vocabulary
    assert not [token for token in vocabulary if token.startswith("Ġe")]


def test_vocab_size_null_is_the_models(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config(model={"vocab_size": 300, "pad_vocab_to_multiple": 128})
    assert vocabulary_size(tokenizer_of(config, run_dir)) == 300


def test_a_models_vocabulary_without_room_for_bytes_is_refused(
    corpus: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    with pytest.raises(UserError, match=r"takes model\.vocab_size=200, but 256 bytes.* need 261"):
        tokenizer_of(make_config(model={"vocab_size": 200}), run_dir)


def test_one_special_token_twice_is_refused(make_config: MakeConfig) -> None:
    special = ["<s>", "<pad>", "<s>", "<unk>", "<mask>"]
    with pytest.raises(UserError, match=r"tokenizer.*special_tokens=.* has one token twice"):
        make_config(tokenizer={"special_tokens": special})


def test_a_local_pretrained_tokenizer_is_taken_as_it_is(
    wordpiece: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    config = make_config(mlm=True, tokenizer={"kind": "pretrained", "name": str(wordpiece)})
    tokenizer = tokenizer_of(config, run_dir)
    ids = special_ids(tokenizer, config)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
    assert tokens == ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert document_frame(tokenizer, config)[:2] == ((), (tokenizer.sep_token_id,))
    assert (run_dir / "tokenizer" / "tokenizer.json").exists()


def test_documents_begin_with_what_a_pretrained_tokenizer_puts_before_a_prompt(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    from tokenizers import processors

    directory = pretrained(tmp_path / "bos", bos_token="<bos>", eos_token="<eos>")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = make_config(tokenizer={"kind": "pretrained", "name": str(directory)})
    loaded = tokenizer_of(config, run_dir)
    assert document_frame(loaded, config) == (
        (bos,),
        (loaded.eos_token_id,),
        "each document is <bos> + text + <eos> (the tokenizer itself puts nothing after a text)",
    )


def test_a_tokenizer_without_mask_token_is_refused_for_mlm(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    directory = pretrained(tmp_path / "no-mask", eos_token="<eos>")
    config = make_config(mlm=True, tokenizer={"kind": "pretrained", "name": str(directory)})
    with pytest.raises(
        UserError, match=r"no-mask: it has no mask token, which objective=mlm needs; choose"
    ):
        tokenizer_of(config, run_dir)
    assert not (run_dir / "tokenizer").exists()


def test_a_tokenizer_without_an_end_is_refused(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    directory = pretrained(tmp_path / "no-end")
    config = make_config(tokenizer={"kind": "pretrained", "name": str(directory)})
    with pytest.raises(UserError, match=r"no-end: it has neither an EOS nor a SEP token"):
        tokenizer_of(config, run_dir)


@pytest.mark.parametrize("alone", [True, False])
def test_where_to_name_the_end_is_said_and_helps(
    alone: bool, tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    directory = pretrained(tmp_path / "no-end")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|pad|>", "<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    beside = directory / "tokenizer_config.json"
    if alone:
        beside.unlink()
    config = make_config(tokenizer={"kind": "pretrained", "name": str(directory)})
    with pytest.raises(UserError) as told:
        tokenizer_of(config, run_dir)
    verb = "write into" if alone else "add to"
    assert (
        f"; {verb} {beside} which of its tokens does (its special tokens are <unk>, <|pad|>, "
        '<|endoftext|>), as {"eos_token": "<|endoftext|>"}, or choose another tokenizer'
    ) in str(told.value)
    said = {} if alone else json.loads(beside.read_text())
    beside.write_text(json.dumps({**said, "eos_token": "<|endoftext|>"}))
    fast = tokenizer_of(config, run_dir)
    assert special_ids(fast, config).end == fast.convert_tokens_to_ids("<|endoftext|>")


@pytest.mark.parametrize(
    ("name", "content", "library"),
    [
        ("spiece.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_a_vocabulary_alone_says_which_library_it_needs(
    name: str,
    content: bytes,
    library: str,
    tmp_path: Path,
    make_config: MakeConfig,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / name).write_bytes(content)
    config = make_config(tokenizer={"kind": "pretrained", "name": str(tmp_path / "t5")})
    monkeypatch.setattr(tokens_pretrained, "_is_installed", lambda _: False)
    with pytest.raises(UserError) as told:
        tokenizer_of(config, run_dir)
    assert str(told.value) == (
        f"tokenizer.name={tmp_path / 't5'} holds {name} and no tokenizer.json, which transformers "
        f"makes of it where {library} is installed: `pip install {library}`, or run "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) on a machine that has it"
    )
    # Where it is installed, transformers may still not know whose vocabulary it is.
    monkeypatch.setattr(tokens_pretrained, "_is_installed", lambda _: True)
    if (name, library) == ("tokenizer.model", "sentencepiece"):
        assert tokenizer_of(config, run_dir).get_vocab()["<unk>"] == 0
        return
    with pytest.raises(UserError, match=r"name its class in .*t5/tokenizer_config\.json, such as"):
        tokenizer_of(config, run_dir)
    assert not (run_dir / "tokenizer").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tmp_path: Path, wordpiece: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    size = len(AutoTokenizer.from_pretrained(wordpiece))
    config = make_config(
        mlm=True,
        tokenizer={"kind": "pretrained", "name": str(wordpiece)},
        model={"vocab_size": 20, "pad_vocab_to_multiple": 8},
    )
    with pytest.raises(
        UserError,
        match=rf"has ids up to {size - 1}, but model\.vocab_size=20 gives the embedding 24 rows; "
        rf"set model\.vocab_size={size}",
    ):
        tokenizer_of(config, run_dir)


def test_a_slow_tokenizer_is_refused(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "config.json").write_text('{"model_type": "canine"}')
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    config = make_config(tokenizer={"kind": "pretrained", "name": str(slow)})
    with pytest.raises(UserError, match="slow: CanineTokenizer is not a fast tokenizer"):
        tokenizer_of(config, run_dir)


def test_a_tokenizer_that_cannot_be_found_says_what_to_do(
    make_config: MakeConfig, run_dir: Path
) -> None:
    name = "no-such-owner-here/no-such-tokenizer-here"
    config = make_config(tokenizer={"kind": "pretrained", "name": name})
    with pytest.raises(
        UserError,
        match=rf"tokenizer\.name={name}: cannot load it \(.+\); correct the name\. Without a "
        "network give a directory",
    ):
        tokenizer_of(config, run_dir)


def test_a_directory_without_a_tokenizer_is_refused(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = make_config(tokenizer={"kind": "pretrained", "name": str(tmp_path / "empty")})
    with pytest.raises(UserError, match=r"tokenizer\.name=.*empty: cannot load it"):
        tokenizer_of(config, run_dir)


def test_training_a_tokenizer_imports_no_torch() -> None:
    code = (
        "import sys; from transformers import PreTrainedTokenizerFast; "
        "from shardwright.train.data.tokens.training import train_byte_bpe; "
        f"train_byte_bpe(['text'], 261, 2, {SPECIAL}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
