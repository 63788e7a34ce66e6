"""What tells a model which tokens of its rows are of one document: position ids, and bounds.

Made where batches are made, in host memory, so that no attention has to ask a device for lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Form = Literal["slots", "bounds", "numbers"]
"""What a kernel wants: rows of documents of about one length, where each begins, or whose each
token is."""

SHORTEST_GROUP = 16
"""Documents of up to that many tokens are computed together: the padding costs less than a call."""


@dataclass(frozen=True)
class DocumentBounds:
    """Makes what the forward pass of a model takes beside the tokens."""

    form: Form
    longest: int
    """Most tokens that a document can have."""
    first_position: int = 0
    """Position id of a document's first token."""
    one_group: bool = False
    """Compute documents of all lengths together, so that shapes differ in their sizes alone: what
    is compiled then serves every batch."""

    def of(self, lengths: NDArray[np.int64], shape: tuple[int, int]) -> dict[str, Any]:
        """Return arguments of the forward pass for documents that fill rows of a batch.

        ``lengths`` are those of its documents, row after row, shape (n,); ``shape`` is that of the
        batch. Position ids begin anew with each document.
        """
        starts = np.cumsum(lengths) - lengths
        tokens = int(lengths.sum())
        assert tokens == shape[0] * shape[1]
        positions = np.arange(tokens) - np.repeat(starts, lengths) + self.first_position
        found: dict[str, Any] = {"position_ids": torch.from_numpy(positions).view(shape)}
        match self.form:
            case "bounds":
                bounds = np.append(starts, tokens).astype(np.int32)
                found |= {"document_bounds": torch.from_numpy(bounds)}
                found |= {"longest_document": self.longest}
            case "numbers":
                numbers = np.repeat(np.arange(len(lengths)), lengths)
                found |= {"document_numbers": torch.from_numpy(numbers).view(shape)}
            case "slots":
                found |= self._slots(starts, lengths)
        return found

    def _slots(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, Any]:
        """Return which token is in which slot of padded groups of documents.

        ``document_slots``: for each slot of all groups its token, shape (slots,); a slot that only
        fills up has its document's first. ``document_places``: for each token its slot, shape
        (tokens,). ``document_groups``: for each group, which of its slots are a token's, shape
        (documents, longest of them).
        """
        order = np.argsort(-lengths, kind="stable")
        places = np.empty(int(lengths.sum()), dtype=np.int64)
        slots, groups, before = [], [], 0
        for group in self._groups(lengths[order]):
            members = order[group]
            within = np.arange(lengths[members[0]])
            real = within < lengths[members, None]
            tokens = np.where(real, starts[members, None] + within, starts[members, None])
            places[tokens[real]] = before + np.flatnonzero(real)
            before += tokens.size
            slots.append(tokens.reshape(-1))
            groups.append(torch.from_numpy(real))
        return {
            "document_slots": torch.from_numpy(np.concatenate(slots)),
            "document_places": torch.from_numpy(places),
            "document_groups": tuple(groups),
        }

    def _groups(self, falling: NDArray[np.int64]) -> list[slice]:
        """Divide lengths, longest first, so that none is below half of the longest in its group."""
        if self.one_group:
            return [slice(0, len(falling))]
        found, begin = [], 0
        while begin < len(falling):
            longest = int(falling[begin])
            least = 0 if longest <= SHORTEST_GROUP else longest // 2
            end = len(falling) - int(np.searchsorted(falling[::-1], least, "right"))
            end = max(end, begin + 1)
            found.append(slice(begin, end))
            begin = end
        return found
