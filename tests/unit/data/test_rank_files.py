"""Rank files of tiktoken's: the same ids as tiktoken's, and what is said of files that are not."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from tiktoken_ext import openai_public

from shardwright.launchers.machine import names
from shardwright.train.config import PretrainedTokenizer, RunConfig
from shardwright.train.data.tokens.fast import HOSTILE
from shardwright.train.data.tokens.rank_file import ENCODINGS, END, of_rank_file, special_tokens
from shardwright.train.data.tokens.tokenizer import ensure_tokenizer, special_ids
from shardwright.train.data.tokens.training import train_byte_bpe
from shardwright.train.errors import UserError

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Return tokens of a BPE that was trained on this very file and on what is hostile."""
    text = Path(__file__).read_text(encoding="utf-8")
    trained = train_byte_bpe([text, *HOSTILE] * 2, 900, 2, SPECIAL)
    tokens = sorted(trained.get_vocab().items(), key=lambda item: item[1])[len(SPECIAL) :]
    shown = {character: byte for byte, character in _characters().items()}
    return {bytes(shown[c] for c in token): rank for rank, (token, _) in enumerate(tokens)}


def _characters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


def written(directory: Path, ranks: dict[bytes, int], name: str) -> PretrainedTokenizer:
    path = directory / f"{name}.tiktoken"
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return PretrainedTokenizer(kind="pretrained", name=str(path))


def pattern_of(encoding: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the pattern that tiktoken itself has for an encoding."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    return str(getattr(openai_public, encoding)()["pat_str"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_ids_are_those_of_tiktoken(
    encoding: str, ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = of_rank_file(written(tmp_path, ranks, encoding))
    pattern = pattern_of(encoding, monkeypatch)
    theirs = tiktoken.Encoding(
        "of the test",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={END: len(ranks)},
    )
    text = Path(__file__).read_text(encoding="utf-8")
    for each in (text, *HOSTILE):
        assert made(each).input_ids == theirs.encode(each, disallowed_special=())
    assert made(f"a{END}b").input_ids == theirs.encode(f"a{END}b", allowed_special="all")
    assert made.eos_token_id == theirs.eot_token == len(ranks)
    assert made.decode(made(text).input_ids) == text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_published_file_has_the_published_special_tokens(
    encoding: str, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs = getattr(openai_public, encoding)()["special_tokens"]
    whole = {**ranks, b"the last of all": ENCODINGS[encoding].ranks - 1}
    assert special_tokens(ENCODINGS[encoding], whole) == theirs


def test_ids_keep_their_gaps(ranks: dict[bytes, int], tmp_path: Path) -> None:
    sparse = {**ranks, b"the last of all": ENCODINGS["cl100k_base"].ranks - 1}
    made = of_rank_file(written(tmp_path, sparse, "cl100k_base"))
    assert made.convert_tokens_to_ids(END) == 100257
    assert made(f"{END}<|endofprompt|>").input_ids == [100257, 100276]
    made.save_pretrained(tmp_path / "saved")
    again = type(made).from_pretrained(tmp_path / "saved")
    assert again(f"a b{END}").input_ids == made(f"a b{END}").input_ids


def test_a_run_has_it_by_its_path(
    ranks: dict[bytes, int],
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = written(tmp_path, ranks, "own")
    given = settings.model_dump() | {"encoding": "cl100k_base"}
    config = make_config(tokenizer=given, model={"vocab_size": 1000})
    tokenizer = ensure_tokenizer(config, run_dir / "tokenizer", {})
    assert special_ids(tokenizer, config).end == len(ranks)
    monkeypatch.chdir(tmp_path)
    assert names.tokenizer("own.tiktoken") == str(tmp_path / "own.tiktoken")
    masked = make_config(mlm=True, tokenizer=given, model={"vocab_size": 1000})
    with pytest.raises(UserError, match="own.tiktoken: it has no mask token, which objective=mlm"):
        ensure_tokenizer(masked, run_dir / "other", {})


def test_what_a_file_lacks_is_said(
    ranks: dict[bytes, int], tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    own = written(tmp_path, ranks, "own")
    with pytest.raises(UserError, match=r"own\.tiktoken: a rank file does not say .* r50k_base"):
        of_rank_file(own)
    Path(own.name).write_bytes(b"IQ== 0\nno token\n")
    named = own.model_copy(update={"encoding": "cl100k_base"})
    with pytest.raises(UserError, match=r"own\.tiktoken: line 2 is not a token in base64"):
        of_rank_file(named)
    Path(own.name).write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"own\.tiktoken has no token for the byte 0"):
        of_rank_file(named)
    Path(own.name).unlink()
    with pytest.raises(UserError, match=r"own\.tiktoken does not exist; give the path of a rank f"):
        of_rank_file(named)
    with pytest.raises(UserError, match=r"encoding=cl100k_base is of a rank file of tiktoken's,"):
        make_config(tokenizer={"kind": "pretrained", "name": "gpt2", "encoding": "cl100k_base"})
