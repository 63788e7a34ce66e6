"""Rank files of tiktoken's, tokens in base64 with their ranks, as a BPE of tokenizers'."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardwright.train.config import PretrainedTokenizer
from shardwright.train.config.tokenizer import TIKTOKEN
from shardwright.train.data.tokens.spelling import Spelling, byte_level_words
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


class Encoding(NamedTuple):
    """What a rank file does not say of itself."""

    words: str
    """The rules by which text is split."""
    ranks: int
    """Highest rank of the published file, plus one."""
    special: Mapping[str, int]
    """Ids of special tokens beside the ranks of the published file."""


# As tiktoken 0.14 has them, in tiktoken_ext/openai_public.py.
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
ENCODINGS = {
    "r50k_base": Encoding("gpt2", 50256, {END: 50256}),
    "p50k_base": Encoding("gpt2", 50281, {END: 50256}),
    "cl100k_base": Encoding("cl100k", 100256, {END: 100257, **_FIM, "<|endofprompt|>": 100276}),
    "o200k_base": Encoding("o200k", 199998, {END: 199999, "<|endofprompt|>": 200018}),
}


def is_rank_file(settings: PretrainedTokenizer) -> bool:
    """Whether a tokenizer is named by a rank file. Pure."""
    return settings.name.endswith(TIKTOKEN)


def problems(settings: PretrainedTokenizer) -> Iterator[str]:
    """Yield why a rank file cannot be used, as far as its name and its presence tell."""
    path = Path(settings.name)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        yield f"tokenizer.name={settings.name} {what}; give the path of a rank file of tiktoken's"
    elif (settings.encoding or path.name.removesuffix(TIKTOKEN)) not in ENCODINGS:
        yield (
            f"tokenizer.name={settings.name}: a rank file does not say how text is split into "
            "words, and its name is that of no encoding; set tokenizer.encoding to one of "
            f"{', '.join(ENCODINGS)}"
        )


def of_rank_file(settings: PretrainedTokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a rank file, with tiktoken's ids. Raises UserError."""
    from tokenizers import AddedToken, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    if found := list(problems(settings)):
        raise UserError(found[0])
    path = Path(settings.name)
    encoding = ENCODINGS[settings.encoding or path.name.removesuffix(TIKTOKEN)]
    ranks = _ranks(path)
    special = special_tokens(encoding, ranks)
    vocabulary = {_spelt(token): rank for token, rank in ranks.items()}
    merges = [(_spelt(first), _spelt(second)) for first, second in merges_of(ranks)]
    # In the vocabulary as well: an added token gets the id after the last one otherwise.
    model = models.BPE(vocab={**vocabulary, **special}, merges=merges, ignore_merges=True)
    words = byte_level_words(encoding.words)
    backend = Spelling(None, words, decoders.ByteLevel()).around(model)
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def special_tokens(encoding: Encoding, ranks: Mapping[bytes, int]) -> Mapping[str, int]:
    """Return the special tokens beside ranks; of a file of somebody's own its end alone. Pure."""
    beyond = max(ranks.values()) + 1
    return encoding.special if beyond == encoding.ranks else {END: beyond}


def merges_of(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pairs that make each token, in the order in which they are merged. Pure.

    tiktoken merges whatever two neighbours make the token of the lowest rank, however it is
    divided: so each division of a token into two others is a pair.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        divided = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in divided if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _ranks(path: Path) -> dict[bytes, int]:
    """Return the ranks of a file by token. Raises UserError where a line is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"tokenizer.name={path}: line {number} is not a token in base64 and its rank, as "
                "a rank file of tiktoken's has; give the file as it was published"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks):
        what = f"has no token for the byte {missing[0]}" if missing else "has one rank twice"
        raise UserError(f"tokenizer.name={path} {what}; give the file as it was published")
    return ranks


def _spelt(token: bytes) -> str:
    """Return bytes as byte-level tokenizers write them, each as a character that is seen. Pure."""
    return "".join(_CHARACTERS[byte] for byte in token)


_SEEN = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
_OTHERS = [byte for byte in range(256) if byte not in _SEEN]
_CHARACTERS = [chr(b) if b in _SEEN else chr(256 + _OTHERS.index(b)) for b in range(256)]
"""GPT-2's: bytes that are no sign in Latin-1 come after it, in their order."""
