"""What becomes of a document that cannot be read: it is an error, or is skipped and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from shardwright.train.data.sources.files.errors import (
    FILES,
    BadDocument,
    Unreachable,
    file_is_bad,
)
from shardwright.train.data.sources.files.pieces import Text
from shardwright.train.errors import UserError

PLACES = 3
"""That many are shown of a kind, the first ones."""
Skipped = MutableMapping[str, dict[str, Any]]
"""For each kind of what was skipped its ``count`` and the first ``places``, in plain values."""


class Skipping:
    """Counts what is skipped where that is wanted, and else raises it."""

    def __init__(self, skipped: Skipped | None = None) -> None:
        self.skipped = skipped
        self.count = 0
        self.files = 0
        self.first: BadDocument | None = None

    @property
    def skips(self) -> bool:
        return self.skipped is not None

    def meet(self, error: BadDocument) -> None:
        """Count what cannot be read; raise it where nothing may be skipped."""
        if self.skipped is None:
            raise error from None
        self.count += 1
        self.files += error.kind == FILES
        self.first = self.first or error.with_traceback(None)  # which would hold the file
        # Of a row its kind says why.
        why = error.after.partition(";")[0] if error.kind == FILES else ""
        note(self.skipped, error.kind, error.place, why)

    def meet_file(self, error: UserError, file: object) -> None:
        """Count a file behind whose error nothing of it is read; raise where that may not be."""
        if not isinstance(error, BadDocument | Unreachable):
            error = file_is_bad("", file, f": {error}") if self.skips else error
        if not isinstance(error, BadDocument):
            raise error from None
        self.meet(error)


def note(skipped: Skipped, kind: str, place: object, why: str = "") -> None:
    """Count something that was skipped, and keep its place if it is among the first of its kind."""
    found = skipped.setdefault(kind, {"count": 0, "places": []})
    found["count"] += 1
    if len(found["places"]) < PLACES:
        found["places"].append(f"{place}{why}")


def merged(skipped: Skipped, later: Skipped) -> None:
    """Add to the counts those of what comes later."""
    for kind, more in later.items():
        found = skipped.setdefault(kind, {"count": 0, "places": []})
        found["count"] += more["count"]
        found["places"] = [*found["places"], *more["places"]][:PLACES]


def told(skipped: Skipped) -> Iterator[str]:
    """Yield a line for each kind of what was skipped, with the first places. Pure."""
    for kind, found in sorted(skipped.items()):
        count, places = found["count"], found["places"]
        more = ", ..." if count > len(places) else ""
        yield f"{count:,} {kind} skipped: {', '.join(places)}{more}"


def no_longer_than(
    most_bytes: int | None, documents: Iterable[Text], where: object, bad: Skipping
) -> Iterator[Text]:
    """Leave out documents of more bytes than that, as UTF-8; memory is bounded by as many."""
    if most_bytes is None:
        yield from documents
        return
    waiting: list[Text] = []
    size, number = 0, 0
    for piece in documents:
        if piece.begins:
            waiting, size = [], 0
            number += 1
        before = size
        size += len(piece.text.encode())
        if size <= most_bytes:
            waiting.append(piece)
        elif before <= most_bytes:
            waiting = []
            bad.meet(
                BadDocument(
                    "documents over data.max_document_bytes",
                    "data.paths: ",
                    f"{where}, document {number}",
                    f" has more than data.max_document_bytes={most_bytes}; raise it, or set "
                    "data.on_bad_document=skip",
                )
            )
        if piece.ends and size <= most_bytes:
            yield from waiting
