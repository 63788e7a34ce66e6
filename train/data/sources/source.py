"""What each kind of data gives: its texts, what pins them, and what a model card says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from shardwright.train.config.data import DataSection
from shardwright.train.data.sources.files.pieces import Text
from shardwright.train.data.sources.files.skipping import Skipped, merged
from shardwright.train.data.sources.shards import Shard

if TYPE_CHECKING:
    from shardwright.train.data.sources.stores.ids import Ids

Settings = TypeVar("Settings", bound=DataSection)


@dataclass
class Reading:
    """What was met while a corpus was read, and is no document."""

    empty_files: int = 0
    """Skipped."""
    filtered: int = 0
    """Documents that the user's own function has dropped."""
    skipped: Skipped = field(default_factory=dict)
    """What was skipped, empty files too."""

    def add(self, later: Reading) -> None:
        """Count what was met in a later part of the corpus, too."""
        self.empty_files += later.empty_files
        self.filtered += later.filtered
        merged(self.skipped, later.skipped)


class DataSet(NamedTuple):
    """What a hub calls a data set."""

    name: str | None
    """None where it lies in a directory."""
    config: str | None
    revision: str | None


@dataclass(frozen=True)
class Source(ABC, Generic[Settings]):
    """A kind of data with its section of the config.

    Texts and what pins them every kind has to give; all else has a default.
    """

    data: Settings

    # --- before a run -----------------------------------------------------------------------------

    def located(self) -> Settings:
        """Return the section with every path in it absolute, as a new run keeps it."""
        return self.data

    def misplaced(self) -> Iterator[str]:
        """Yield a message for each name that can only be a path, and leads nowhere."""
        yield from ()

    def check(self) -> None:
        """Raise UserError for what can be seen to be wrong without reading all; download nothing.

        Runs in the launcher: it imports what is heavy, if anything, when it is called.
        """

    # --- its texts --------------------------------------------------------------------------------

    @abstractmethod
    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        """Yield the documents of each of its parts, in an order that does not change.

        ``cache_dir`` keeps downloads, ``reading`` is filled in on the way. Raises UserError at what
        cannot be read.
        """

    def shards(self, cache_dir: Path) -> Sequence[Shard]:
        """Return units that are read independently, whose texts end to end are all that there are.

        None where it is read from its beginning to its end. They depend on the corpus alone, and
        not on how many processes share them.
        """
        return ()

    def read(
        self, shard: Shard, cache_dir: Path, reading: Reading
    ) -> Iterator[tuple[int, Iterable[Text]]]:
        """Yield a shard's documents, those of each part by its number, as `texts` would."""
        raise NotImplementedError("it has no shards")

    def ids(self, separator: int | None) -> Iterator[Iterable[tuple[str, Ids]]] | None:
        """Yield the documents of each of its parts as ids, each piece with the file that it is in.

        None where it has texts. ``separator`` ends a document where nothing else tells.
        """
        return None

    def stored_bytes(self) -> int:
        """Return the bytes of the files with its ids."""
        raise NotImplementedError("it has texts")

    @abstractmethod
    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        """Return, in plain values, what changes when any document does, or their order.

        The part of the fingerprint of cached tokens that only this kind knows: what all have is in
        it already.
        """

    @property
    def weights(self) -> tuple[float, ...]:
        """For each of its parts how often an epoch sees its samples."""
        return (1.0,)

    @property
    def names(self) -> tuple[str, ...]:
        """What evaluations call its parts; () where there is only one, which needs no name."""
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        """What its parts are called in messages, each with its key; () where there is only one."""
        return ()

    # --- what a model card says -------------------------------------------------------------------

    @abstractmethod
    def title(self) -> str:
        """Return what it is called, in Markdown and without a path: a card is public."""

    def details(self, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        """Yield name and value of what there is to tell of it; None is not told.

        ``provenance`` is that of the run's last start.
        """
        yield from ()

    @property
    def licence(self) -> str | None:
        """Under which its texts may be used; None says nothing of it at all."""
        return "not known"

    @property
    def citation(self) -> str | None:
        """How to cite it."""
        return None

    @property
    def languages(self) -> Sequence[str] | None:
        """By the hub's names of them, where they are known."""
        return None

    @property
    def tags(self) -> Sequence[str]:
        """By which a hub is to find a model that has learned from it."""
        return ()

    @property
    def data_set(self) -> DataSet | None:
        """What a hub calls it, where it is one of a hub's data sets."""
        return None

    def limits(self) -> str:
        """Return what a model cannot do or must not be trusted in, as it has learned from this."""
        return (
            "Its corpus was not reviewed: any prejudice, error, personal data or protected text "
            f"in {self.title()} can appear in what the model writes. It does not know languages "
            "that the corpus lacks."
        )


def code(text: str) -> str:
    """Return a text as Markdown's code, out of which it cannot break."""
    return f"`{text.replace('`', '')}`"
