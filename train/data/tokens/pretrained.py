"""Tokenizers that others have made: from the hub, a directory, or a rank file of tiktoken's."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shardwright.train.config import PretrainedTokenizer
from shardwright.train.data.tokens import rank_file
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE_TIMEOUT_SECONDS = 20.0
TOKENIZER_CONFIG = "tokenizer_config.json"


def pretrained(settings: PretrainedTokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer by its name. Raises UserError where there is none, or not a fast one."""
    from transformers import AutoTokenizer

    from shardwright.train.checkpoint.format import damage

    if rank_file.is_rank_file(settings):
        return rank_file.of_rank_file(settings)
    local = Path(settings.name).is_dir()
    vocabulary = _unconverted(Path(settings.name)) if local else None
    if vocabulary is not None and not _is_installed(library := _library_of(vocabulary)):
        raise UserError(
            f"tokenizer.name={settings.name} holds {vocabulary.name} and no tokenizer.json, which "
            f"transformers makes of it where {library} is installed: `pip install {library}`, or "
            "run AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) on a machine that has it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.name,
            revision=settings.revision or "main",
            trust_remote_code=settings.trust_remote_code,
            local_files_only=local or not _hub_has(settings),
        )
    except Exception as error:  # of tokenizers, which raises nothing else, or of the model's code
        if local and (problem := next(damage.problems(Path(settings.name)), None)):
            raise UserError(f"tokenizer.name={settings.name}: {problem}") from None
        if vocabulary is not None:
            raise UserError(
                f"tokenizer.name={settings.name} holds {vocabulary.name} and no tokenizer.json, "
                f"and transformers cannot tell which tokenizer it is; name its class in "
                f"{Path(settings.name, TOKENIZER_CONFIG)}, such as "
                '{"tokenizer_class": "T5Tokenizer"}, or give a directory with tokenizer.json'
            ) from None
        reason = damage.in_one_line(error)
        raise UserError(
            f"tokenizer.name={settings.name}: cannot load it ({reason}); correct the name. Without "
            "a network give a directory that holds tokenizer.json, or download the tokenizer where "
            "there is one and copy that machine's HF_HOME directory here"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer.name={settings.name}: {type(tokenizer).__name__} is not a fast tokenizer "
            "(there is no tokenizer.json); choose one that is"
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def _unconverted(directory: Path) -> Path | None:
    """Return the vocabulary of a directory that holds nothing else of a tokenizer, if it has one.

    transformers makes a tokenizer of it where the library that reads it is installed.
    """
    others = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
    if any((directory / name).is_file() for name in others):
        return None
    return next((path for path in sorted(directory.glob("*.model")) if path.is_file()), None)


def _library_of(vocabulary: Path) -> str:
    """Return which library reads a vocabulary, by its first line."""
    with vocabulary.open("rb") as stream:
        line = stream.readline(1000)
    # tiktoken's have a token in base64 and its rank on each line; SentencePiece's are binary.
    return "tiktoken" if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", line) else "sentencepiece"


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _hub_has(settings: PretrainedTokenizer) -> bool:
    """Whether the hub answers; asked first, as loading tries again for a minute."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(
            settings.name, revision=settings.revision, timeout=PROBE_TIMEOUT_SECONDS
        )
    except Exception:  # the HTTP client's errors share no base class
        return False
    return True
