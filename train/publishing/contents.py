"""What of a model directory is uploaded, once it is found whole and without secrets."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from shardwright.train.errors import UserError
from shardwright.train.process.logs import quiet_libraries
from shardwright.train.run_directory.names import ADAPTER_FOLDER

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
README = "README.md"

# What belongs to a model, by name. All else is left out and named: a directory of weights may well
# have an optimizer's state, a log or a key beside them.
_FILES = {
    README,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "processor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
}
_ENDINGS = (".svg", ".png", ".jpg", ".model")  # pictures of the card, sentencepiece's vocabulary

_SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key of AWS": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
}
_PLACEHOLDERS = ("[More Information Needed]", 'model="PATH', "TODO", "YOUR_")


@dataclass(frozen=True)
class Chosen:
    """What of a directory is uploaded."""

    files: list[Path]
    left_out: dict[str, str]
    """Why, by name."""


def choose(directory: Path) -> Chosen:
    """Return the files of a directory that make the model, and why the others do not.

    Raises UserError where a file that the index names is missing, or there are no weights.
    """
    found = sorted(directory.iterdir())
    weights = _weights(directory, {path.name for path in found})
    wanted = weights | _code(directory) | _FILES
    files, left_out = [], {}
    for path in found:
        name = path.name
        if name == ADAPTER_FOLDER:
            left_out[name] = f"for a repository of its own: `hf upload NAME {path}`"
        elif not path.is_file():
            left_out[name] = "no file"
        elif name in wanted or (name.endswith(_ENDINGS) and not name.startswith(".")):
            files.append(path)
        elif name.endswith(".safetensors"):
            left_out[name] = f"{INDEX if INDEX in weights else WEIGHTS} does not name it"
        else:
            left_out[name] = "not part of a model"
    return Chosen(files, left_out)


def _weights(directory: Path, names: set[str]) -> set[str]:
    """Return the names of the weights' files, the index among them, out of all names."""
    if INDEX in names:
        try:
            place = json.loads((directory / INDEX).read_bytes())["weight_map"].values()
            wanted = {str(name) for name in place}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory / INDEX} cannot be read ({error}); {_MAKE}") from None
        if WEIGHTS in names - wanted:
            raise UserError(
                f"{directory} has both {WEIGHTS} and {INDEX}, which names other files: "
                "`from_pretrained` would load the former; delete the one that is not wanted"
            )
        if missing := sorted(wanted - names):
            raise UserError(
                f"{directory}: {INDEX} names {missing[0]}"
                + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
                + f", which is missing; {_MAKE}"
            )
        return wanted | {INDEX}
    if WEIGHTS not in names:
        raise UserError(f"{directory} has no weights: neither {WEIGHTS} nor {INDEX}; {_MAKE}")
    return {WEIGHTS}


_MAKE = "`shardwright recover CHECKPOINT OUT` makes a complete directory"


def _code(directory: Path) -> set[str]:
    """Return the Python files that config.json says the model is made of, and what they import."""
    from shardwright.train.model import remote_code

    try:
        tree = json.loads((directory / "config.json").read_bytes())
        return set(remote_code.beside(directory, tree))
    except (ValueError, AttributeError):
        return set()


def check(directory: Path, chosen: Chosen, *, trusts_code: bool = False) -> None:
    """Raise UserError unless card and weights are what a hub and `from_pretrained` take."""
    if directory.name.startswith(".") and directory.name.endswith((".tmp", ".old")):
        raise UserError(
            f"{directory} is left from an interrupted write; give the directory without the dot, "
            "or make it again"
        )
    names = {path.name for path in chosen.files}
    if README not in names:
        raise UserError(
            f"{directory / README} is missing: without a card nobody knows what the model is "
            "for; write one, or give the directory that the run or `shardwright recover` has "
            "made"
        )
    for path in chosen.files:
        if not path.name.endswith((".safetensors", *_ENDINGS)):
            _check_secrets(path)
    check_card((directory / README).read_text(encoding="utf-8", errors="replace"))
    _check_loads(directory, trusts_code=trusts_code)


def _check_secrets(path: Path) -> None:
    content = path.read_bytes()
    for what, pattern in _SECRETS.items():
        if pattern.search(content):
            raise UserError(
                f"{path} holds what looks like {what}: it would be uploaded too; remove it, and "
                "revoke it if others have seen the file"
            )


def check_card(readme: str) -> None:
    """Raise UserError where the hub's own library cannot read a card's header."""
    from huggingface_hub import ModelCard

    where = f"{README}: its header, between two lines of ---,"
    if not re.match(r"---[ \t]*\r?\n.*?\n---[ \t]*\r?\n", readme, re.DOTALL):
        raise UserError(f"{where} is missing; a hub reads from it what the model is for")
    try:
        data = ModelCard(readme).data
    except Exception as error:  # whatever its YAML parser or its checks raise
        text = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read ({text}); correct it") from None
    for name in ("pipeline_tag", "license", "library_name"):
        if not isinstance(data.get(name, ""), str):
            raise UserError(f"{where} has {name}: {data.get(name)}, which is not text; correct it")


def card_warnings(readme: str) -> list[str]:
    """Return what a reader of the card would miss. Pure."""
    from shardwright.train.export.card_text import MODEL_PLACEHOLDER

    found = [text for text in _PLACEHOLDERS if text in readme.replace(MODEL_PLACEHOLDER, "")]
    problems = [f"still has the placeholder {text!r}; fill it in" for text in found]
    header = readme.split("\n---", 1)[0]
    if not re.search(r"^license:", header, re.MULTILINE):
        problems.append("names no license: add `license:` to its header, or nobody may use it")
    return problems


def _check_loads(directory: Path, *, trusts_code: bool) -> None:
    """Let `from_pretrained` find every weight, on the meta device. Raises UserError."""
    quiet_libraries()
    import transformers

    from shardwright.train.model.directory import check_loads
    from shardwright.train.model.remote_code import AUTO_CLASSES
    from shardwright.train.sampling.sample import check_code, objective_of

    check_code(directory, trusts_code=trusts_code)
    try:
        auto = getattr(transformers, AUTO_CLASSES[objective_of(directory)])
        check_loads(directory, auto, trusts_code=trusts_code)
    except Exception as error:  # transformers, safetensors and torch raise what they like
        text = " ".join(str(error).split())
        raise UserError(f"`from_pretrained` does not load it: {text}; {_MAKE}") from None
