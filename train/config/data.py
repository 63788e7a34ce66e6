"""The section "data": where documents come from, and how long samples are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shardwright.train.config.section import (
    Floats,
    Fraction,
    NonNegativeFloat,
    PositiveInt,
    Section,
    Strings,
    unresolved,
)
from shardwright.train.own_parts import part

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What metrics can be called by."""
_ENDINGS = re.compile(
    r"(\.(txt|jsonl?|[ct]sv|parquet|arrow|feather|tar|ds|npy|bin|gz|bz2|xz|zst|zip))+$",
    re.IGNORECASE,
)

DEFAULT_SEQUENCE_LENGTH = 512
"""Tokens in one sample where nobody says, and the model has at least as many positions."""


class Stage(Section):
    """A part of the training with samples of its own."""

    tokens: PositiveInt | None = None
    """Tokens after which the next stage begins; null, of the last one alone: to the run's end."""
    weights: Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)] | None = None
    """As data.weights, and 0 leaves a path out; null: those."""
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens in one sample; null is data.sequence_length. A step has as many tokens either way."""


class DataSection(Section):
    """What every corpus has."""

    sequence_length: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """Tokens in one sample; auto is 512, or the model's positions where it has fewer."""
    line_by_line: bool = False
    """One line is one (padded, cut) sample, instead of documents packed back to back."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents share samples: concatenate lays them back to back and cuts where a sample ends,
    best_fit cuts those alone that are longer than a sample, and leaves some padding."""
    document_attention: bool | Literal["auto"] = "auto"
    """A token sees its own document only, in samples of several; auto: with mlm, and with clm where
    the kernel of a GPU makes it free."""
    unpad: bool | Literal["auto"] = "auto"
    """Lines are laid end to end instead of being padded, with the same loss; auto: where there are
    lines, and the model can be told where they end."""
    max_cut_fraction: Fraction = 0.05
    """Most of the training tokens that cutting long lines may lose; more is an error."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents held out, chosen by a hash of their text; 0 holds out none."""
    eval_paths: dict[str, str] = Field(default_factory=dict)
    """Held-out documents of your own: a name for each path (file, directory or glob), which is read
    whole. Every evaluation tells the loss of each as eval_loss/NAME."""
    deduplicate: bool = False
    """Of documents with the same text keep the first alone, over all sources and files."""
    filter: str | None = None
    """Your own function, as file.py:FUNCTION or package.module:FUNCTION: of a document's text it
    returns True, False to drop it, or its new text; null keeps all."""
    max_documents: PositiveInt | None = None
    """Read only this many documents, the first ones; null reads all."""
    cache_dir: str | None = None
    """Where packed tokens are cached; null is shardwright/ in the user's cache directory."""

    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """What training goes through in order, each with tokens, weights and sequence_length; [] is one
    stage for all of it."""

    @model_validator(mode="after")
    def _stages_follow_one_another(self) -> DataSection:
        sources = len(getattr(self, "paths", [""]))
        for number, stage in enumerate(self.stages):
            name, is_last = f"stages[{number}]", number == len(self.stages) - 1
            if (stage.tokens is None) != is_last:
                raise ValueError(
                    f"{name} is the last one, and has tokens={stage.tokens}; leave that out: it "
                    "lasts until the run ends"
                    if is_last
                    else f"{name} has no tokens, but is followed by another; say after how many it "
                    "ends"
                )
            if stage.weights is not None and len(stage.weights) != sources:
                raise ValueError(
                    f"{name}.weights has {len(stage.weights)} values and the corpus has {sources} "
                    "parts; give one weight for each of data.paths, or none at all"
                )
            if stage.weights is not None and not any(stage.weights):
                raise ValueError(
                    f"{name}.weights leaves nothing to train on; make one of them more than 0"
                )
        return self

    @model_validator(mode="after")
    def _sets_have_names(self) -> DataSection:
        _check_names("eval_paths", self.eval_paths)
        return self

    @property
    def longest_sample(self) -> int:
        """Tokens in the longest sample of any stage."""
        own = self.tokens_per_sample
        return max([own, *(stage.sequence_length or own for stage in self.stages)])

    @property
    def samples_vary(self) -> bool:
        """Whether samples differ in how many tokens they hold."""
        return self.line_by_line or self.packing == "best_fit"

    @property
    def is_evaluated(self) -> bool:
        """Whether there are held-out documents, of the corpus or of the user's own."""
        return self.eval_fraction > 0 or bool(self.eval_paths)

    @property
    def tokens_per_sample(self) -> int:
        """``sequence_length``, once the launcher has resolved it."""
        if self.sequence_length == "auto":
            raise unresolved("data.sequence_length")
        return self.sequence_length

    @property
    def documents_are_kept_apart(self) -> bool:
        """``document_attention``, once the launcher has resolved it."""
        if self.document_attention == "auto":
            raise unresolved("data.document_attention", "true or false")
        return self.document_attention

    @property
    def is_unpadded(self) -> bool:
        """``unpad``, once the launcher has resolved it."""
        if self.unpad == "auto":
            raise unresolved("data.unpad", "true or false")
        return self.unpad

    @property
    def has_text(self) -> bool:
        """Whether there is text, of which tokens are still to be made."""
        return True

    @property
    def has_bounds(self) -> bool:
        """Whether the model is told where documents, or lines, begin and end within its rows."""
        if self.line_by_line:
            return self.is_unpadded
        return self.documents_are_kept_apart


def _check_weights(weights: Floats | None, paths: Strings) -> None:
    if weights is not None and len(weights) != len(paths):
        raise ValueError(
            f"weights has {len(weights)} values and paths has {len(paths)}; "
            "give one weight for each path, or none at all"
        )


class StdlibData(DataSection):
    """The Python sources of the interpreter's own standard library."""

    kind: Literal["stdlib"]


class TextData(DataSection):
    """Local files: .txt, .jsonl, .json, .csv, .tsv (these also as .gz, .bz2, .xz, .zst), .parquet,
    .arrow, .feather; of texts also .zip and .tar."""

    kind: Literal["text"]
    paths: Annotated[Strings, Field(min_length=1)]
    """Files, directories or globs; ``**`` descends, as a directory does. Or their addresses."""
    weights: Floats | None = None
    """For each path, how often an epoch sees its samples (0.5: half of them); null: once."""
    names: Strings | None = None
    """For each path, what evaluations call it; null: its own name, without what it ends in."""
    text_field: str = "text"
    """Column that holds the text, or the path to it: meta.body, messages.0.content."""
    on_bad_document: Literal["auto", "skip", "error"] = "auto"
    """What cannot be read (a broken line, an empty file, a file that ends early, a document that is
    too long) is skipped and counted, or is an error; auto: an error in a file that is named
    outright, skipped in what a glob or a directory matched."""
    max_document_bytes: PositiveInt | None = None
    """Longest document, in bytes of UTF-8; a longer one is bad. null: any length."""

    @model_validator(mode="after")
    def _one_name_for_each_path(self) -> TextData:
        if self.names is not None:
            if len(self.names) != len(self.paths):
                raise ValueError(
                    f"names has {len(self.names)} values and paths has {len(self.paths)}; give one "
                    "name for each path, or none at all"
                )
            _check_names("names", self.names)
            if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
                raise ValueError(
                    f"names has {twice[0]} twice; evaluations tell paths apart by their names, so "
                    "give each its own, or join the paths by one glob"
                )
        _check_taken(self.names_of_paths, self.eval_paths)
        return self

    @property
    def names_of_paths(self) -> tuple[str, ...]:
        """What evaluations call each path; () where there is only one, and no name was given."""
        if self.names is not None:
            return self.names
        return _distinct(self.paths) if len(self.paths) > 1 else ()

    @model_validator(mode="after")
    def _one_weight_for_each_path(self) -> TextData:
        _check_weights(self.weights, self.paths)
        return self


class HubData(DataSection):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    name: Annotated[str, Field(min_length=1)]
    """Its name on the hub, or a directory that `save_to_disk` wrote."""
    config: str | None = None
    """Which of its configurations; null is its default."""
    split: str = "train"
    """Split to read; data.eval_fraction of it is held out."""
    eval_split: str | None = None
    """Another split, such as validation, which is held out whole: every evaluation tells its loss
    as eval_loss/SPLIT. null: none."""
    streaming: bool = True
    """Read over the network while tokenising, instead of downloading the data set first."""
    text_field: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Branch, tag or commit; null is the main branch."""

    @property
    def is_evaluated(self) -> bool:
        return super().is_evaluated or self.eval_split is not None

    @model_validator(mode="after")
    def _another_split_is_held_out(self) -> HubData:
        if self.eval_split is None:
            return self
        if self.eval_split == self.split:
            raise ValueError(
                f"eval_split={self.eval_split} is the split that is trained on; give another, or "
                "leave it out and hold out a part of it with eval_fraction"
            )
        _check_names("eval_split", [self.eval_split])
        if self.eval_split in self.eval_paths:
            raise ValueError(
                f"eval_paths has the name {self.eval_split}, by which evaluations call "
                "eval_split; call the set otherwise"
            )
        return self


class KantData(DataSection):
    """Books by URL as plain text, without Project Gutenberg's frame.

    A document is a paragraph, its lines joined; under ``line_by_line`` it is a line as printed.
    """

    kind: Literal["kant"]
    urls: Annotated[Strings, Field(min_length=1)]
    """Addresses of plain text; each is downloaded once and cached."""


class PythonData(DataSection):
    """A function of your own that yields documents, read once and tokenised as any corpus is."""

    kind: Literal["python"]
    source: Annotated[str, Field(min_length=1)]
    """Your own function or class, as file.py:NAME or package.module:NAME: called with options, it
    gives what yields texts, or mappings with the key text_field, each time the same ones."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What it is called with, by name."""
    version: str = ""
    """Change this when what it reads has changed: that a file is another one is seen of its own
    code alone."""
    text_field: str = "text"
    """Key of a mapping that holds the text."""

    @model_validator(mode="after")
    def _names_a_source(self) -> PythonData:
        part("source", self.source)
        return self


class TokensData(DataSection):
    """Token ids that other programs have stored: .bin with Megatron's .idx or raw, .npy, .ds of
    datatrove, and lists in .parquet, .arrow, .feather."""

    kind: Literal["tokens"]
    paths: Annotated[Strings, Field(min_length=1)]
    """Files, directories or globs."""
    weights: Floats | None = None
    """For each path, how often an epoch sees its samples (0.5: half of them); null: once."""
    dtype: Literal["auto", "uint8", "uint16", "uint32", "int32", "int64"] = "auto"
    """Numbers of a file that does not say it itself: a .bin without .idx, a .ds without .index."""
    ids_field: str = "input_ids"
    """Column of tables that holds the ids."""

    @property
    def names_of_paths(self) -> tuple[str, ...]:
        """What evaluations call each path; () where there is only one."""
        return _distinct(self.paths) if len(self.paths) > 1 else ()

    @property
    def has_text(self) -> bool:
        return False

    @model_validator(mode="after")
    def _fits_tokens(self) -> TokensData:
        _check_weights(self.weights, self.paths)
        if self.line_by_line:
            raise ValueError(
                "line_by_line=true needs text, and data=tokens has none; set it to false"
            )
        _check_taken(self.names_of_paths, self.eval_paths)
        if self.filter is not None:
            raise ValueError(
                f"filter={self.filter} reads text, and data=tokens has none; set it to null"
            )
        if self.deduplicate:
            raise ValueError(
                "deduplicate=true compares texts, and data=tokens has none; set it to false"
            )
        return self


DataConfig = Annotated[
    StdlibData | TextData | TokensData | HubData | KantData | PythonData,
    Field(discriminator="kind"),
]


def _check_names(field: str, names: Iterable[str]) -> None:
    """Raise ValueError where metrics cannot be called by a name."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{field} has the name {name!r}, by which metrics are called; write it of letters, "
                "digits, '.', '_' and '-', the first a letter or a digit"
            )


def _check_taken(names: Iterable[str], sets: Iterable[str]) -> None:
    if taken := sorted({*names} & {*sets}):
        raise ValueError(
            f"eval_paths has the name {taken[0]}, by which evaluations call one of paths; call "
            "the set otherwise, or the path by names"
        )


def _distinct(paths: Sequence[str]) -> tuple[str, ...]:
    """Return a name for each path, of the last part of it that is no pattern. Pure."""
    names: list[str] = []
    for path in paths:
        parts = [part for part in path.split("/") if part and not set(part) & set("*?[")]
        stem = _ENDINGS.sub("", parts[-1]) if parts else ""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "source"
        number = 2
        found = name
        while found in names:
            found, number = f"{name}-{number}", number + 1
        names.append(found)
    return tuple(names)
