"""Packed streams of every kind of tokenizer, beside what the tokenizer makes of each text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from shardwright.train.config import RunConfig
from shardwright.train.data import prepare
from shardwright.train.data.tokens.tokenizer import control_ids

MakeConfig = Callable[..., RunConfig]

WORDS = [
    *("pure", "reason", "of", "the", "understanding", "can", "intuit"),
    *("nothing", "and", "senses", "think", "in", "empty", "space"),
]
CHARACTERS = sorted(set("".join(WORDS)) | set("<>/_[]|0123456789ACDEKLMNPS"))


class Kind(NamedTuple):
    """A tokenizer, and what belongs around its documents."""

    tokenizer: Tokenizer
    special: dict[str, str]
    before: list[str]
    after: list[str]


def unigram(special: list[str]) -> Tokenizer:
    pieces = [*((s, 0.0) for s in special), ("▁", -4.0)]
    pieces += [(c, -8.0) for c in CHARACTERS] + [(f"▁{w}", -3.0) for w in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, special.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace("  ", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def template(tokenizer: Tokenizer, single: str) -> None:
    names = [name for name in single.split() if name != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=f"{single} $B:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )


def t5() -> Kind:
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    tokenizer = unigram(special)
    template(tokenizer, "$A </s>")
    return Kind(tokenizer, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, [], ["</s>"])


def albert() -> Kind:
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = unigram(special)
    template(tokenizer, "[CLS] $A [SEP]")
    names = {"pad": "<pad>", "cls": "[CLS]", "sep": "[SEP]", "unk": "<unk>", "mask": "[MASK]"}
    return Kind(tokenizer, names, ["[CLS]"], ["[SEP]"])


def bert() -> Kind:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    # Punctuation stays with its word, so that the model sees "[SEP]" whole.
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "mask": "[MASK]"}
    return Kind(tokenizer, names, ["[CLS]"], ["[SEP]"])


def gpt2() -> Kind:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return Kind(tokenizer, {"eos": end, "bos": end, "unk": end}, [], [end])


def begun_with_its_end() -> Kind:
    """Like OPT's: what begins a document is what ends it, too."""
    kind = gpt2()
    template(kind.tokenizer, "<|endoftext|> $A")
    return kind._replace(before=["<|endoftext|>"])


def ended_with_another() -> Kind:
    """A post-processor whose suffix is not the declared end."""
    kind = gpt2()
    kind.tokenizer.add_special_tokens(["<|sep|>", "<|bos|>"])
    template(kind.tokenizer, "<|bos|> $A <|sep|> <|sep|>")
    return kind._replace(before=["<|bos|>"], after=["<|sep|>", "<|sep|>"])


def whole_words() -> Kind:
    special = ["<unk>", "<pad>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Declared beside tokenizer.json alone: to the tokenizer itself it is a word like any other.
    tokenizer.add_tokens(["</s>"])
    return Kind(tokenizer, {"unk": "<unk>", "pad": "<pad>", "eos": "</s>"}, [], ["</s>"])


def merged_whole() -> Kind:
    """A BPE that takes a word whole where its vocabulary has it, and can merge one, too."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *CHARACTERS, "s>", *WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, [("s", ">"), ("<", "s>")], unk_token="<unk>", ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in special])
    return Kind(tokenizer, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, [], ["</s>"])


KINDS = [
    t5,
    albert,
    bert,
    gpt2,
    begun_with_its_end,
    ended_with_another,
    whole_words,
    merged_whole,
]


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which nothing is special."""
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("stored", ["nothing", "padding", "multiple", "truncation"])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_stream_is_the_documents_in_their_frame_and_nothing_else(
    make: Callable[[], Kind],
    stored: str,
    tmp_path: Path,
    make_config: MakeConfig,
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    kind = make()
    controls = [
        token.content
        for token in kind.tokenizer.get_added_tokens_decoder().values()
        if token.content != "<unk>"
    ] or ["<|endoftext|>"]
    texts = [f"pure reason {i} of the understanding can intuit" for i in range(60)]
    faked = [" ".join(["pure", *controls, "reason"]), f"of {controls[-1]}", controls[0]]
    rows = [*texts, *faked, *texts]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))

    saved = Tokenizer.from_str(kind.tokenizer.to_str())
    pad = kind.special.get("pad", kind.special.get("eos", "<|endoftext|>"))
    if stored == "padding":
        saved.enable_padding(length=32, pad_id=saved.token_to_id(pad), pad_token=pad)
    elif stored == "multiple":
        saved.enable_padding(pad_to_multiple_of=64, pad_id=saved.token_to_id(pad), pad_token=pad)
    elif stored == "truncation":
        saved.enable_truncation(3)
    directory = tmp_path / "tokenizer"
    names = {f"{role}_token": token for role, token in kind.special.items()}
    PreTrainedTokenizerFast(tokenizer_object=saved, **names).save_pretrained(directory)
    saved.save(str(directory / "tokenizer.json"))  # with what was stored, whatever became of it

    config = make_config(
        data={"paths": [str(tmp_path / "corpus.jsonl")], "eval_fraction": 0.0},
        tokenizer={"kind": "pretrained", "name": str(directory)},
        model={"vocab_size": 400},
    )
    prepared = prepare(config, run_dir)
    stream = prepared.train.sources[0].store.tokens.tolist()

    ids = kind.tokenizer.get_vocab()
    before, after = [ids[t] for t in kind.before], [ids[t] for t in kind.after]
    documents = split(stream, before, after, [plain(kind.tokenizer, text) for text in texts])
    assert len(documents) == len(rows)
    assert documents[:60] == documents[-60:] == [plain(kind.tokenizer, text) for text in texts]
    control = set(control_ids(prepared.tokenizer)) - {ids.get("<unk>"), ids.get("[UNK]")}
    for document in documents[60:-60]:
        assert document
        assert not control & set(document)
    framed = " + ".join([*kind.before, "text", *kind.after])
    assert sum(message.startswith(f"each document is {framed}") for message in caplog.messages) == 1


def split(
    stream: list[int], before: list[int], after: list[int], known: list[list[int]]
) -> list[list[int]]:
    """Cut a stream of framed documents; the first and last 60 are these."""
    documents = []
    for text in known:
        framed = [*before, *text, *after]
        assert stream[: len(framed)] == framed
        documents.append(text)
        stream = stream[len(framed) :]
    tail = [token for text in known for token in [*before, *text, *after]]
    assert stream[-len(tail) :] == tail
    stream = stream[: -len(tail)]
    while stream:
        assert stream[: len(before)] == before
        stream = stream[len(before) :]
        stop = next(i for i in range(len(stream)) if stream[i : i + len(after)] == after)
        documents.append(stream[:stop])
        stream = stream[stop + len(after) :]
    return [*documents, *known]


def test_a_masked_models_samples_keep_their_frame_and_say_what_use_makes_of_a_text(
    tmp_path: Path, make_config: MakeConfig, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shardwright.train")
    for name, frame in (("as-used", True), ("otherwise", False)):
        kind = albert()
        if not frame:
            kind.tokenizer.post_processor = processors.ByteLevel()
        names = {f"{role}_token": token for role, token in kind.special.items()}
        fast = PreTrainedTokenizerFast(tokenizer_object=kind.tokenizer, **names)
        fast.save_pretrained(tmp_path / name)
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / "a.txt").write_text(" ".join(WORDS * 60))
        config = make_config(
            mlm=True,
            data={"eval_fraction": 0.0},
            tokenizer={"kind": "pretrained", "name": str(tmp_path / name)},
        )
        (tmp_path / f"run-{name}").mkdir()
        caplog.clear()
        prepare(config, tmp_path / f"run-{name}")
        (note,) = [m for m in caplog.messages if m.startswith("each ")]
        said = "each sample is [CLS] + tokens + [SEP], and a document in it ends with [SEP]"
        assert note.startswith(said)
        assert ("in use the tokenizer itself makes text of a text" in note) == (not frame)
