"""Samples to a batch of tensors: next-token labels for clm, else masked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardwright.train.config import DiffusionObjective, MlmObjective
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window
from shardwright.train.data.tokens.tokenizer import SpecialIds
from shardwright.train.model.documents import DocumentBounds

IGNORED = -100
"""Label of a position that is not predicted."""

PADDING = "padding"
"""In a batch, how many of its positions are padding, where no mask says it."""

LABEL_WEIGHTS = "label_weights"
"""In a batch, by what the loss of each label is multiplied, where labels have weights."""
PREDICTABLE = "predictable_tokens"
"""In a batch whose labels have weights, of how many of its tokens there could be labels."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Masking:
    """What mlm needs to know of objective and tokenizer."""

    objective: MlmObjective
    mask: int
    special: Ids
    """Ids that are never masked and never put in, shape (s,)."""
    ordinary: Ids
    """All other ids, shape (v,)."""
    seed: int

    def __call__(self, window: Window, key: SampleKey) -> tuple[Ids, Ids]:
        """Return a sample's tokens with some masked, and labels for those alone.

        Of the tokens the step's rate is chosen in expectation (a short one may have none), each
        on its own or, with ``whole_word``, all of a word together. A pure function of the window,
        the seed, the epoch, the sample's index and how much of the run was done before its step.
        """
        draws = draws_of(self.seed, key)
        tokens = window.tokens
        # A word that the window's edge cuts counts as one from the edge on.
        units = np.arange(len(tokens)) if window.word_starts is None else _words(window.word_starts)
        rate = self.objective.masking_rate_at(key.progress)
        chosen = draws.random(len(tokens))[units] < rate
        chosen &= ~np.isin(tokens, self.special)
        fate = draws.random(len(tokens))
        others = self.ordinary[draws.integers(len(self.ordinary), size=len(tokens))]

        masked_below = self.objective.mask_token_share
        random_below = masked_below + self.objective.random_token_share
        ids = np.where(chosen & (fate < random_below), others, tokens)
        ids = np.where(chosen & (fate < masked_below), self.mask, ids)
        return ids, np.where(chosen, tokens, IGNORED)


GOLDEN = (5.0**0.5 - 1) / 2
"""Its multiples modulo 1 are spread over [0, 1) as evenly as those of any number (Weyl)."""


@dataclass(frozen=True)
class DiffusionMasking:
    """What masked diffusion needs to know of objective and tokenizer."""

    objective: DiffusionObjective
    mask: int
    special: Ids
    """Ids that are never masked, shape (s,)."""
    seed: int
    is_spread: bool = False
    """Whether the rates of consecutive samples are spread evenly instead of drawn, for a mean over
    a few samples that depends less on chance."""

    def rate(self, key: SampleKey) -> float:
        """Return the share of its tokens that a sample has masked, in expectation."""
        return self._drawn(key)[0]

    def predictable(self, window: Window) -> int:
        """Return how many of a sample's tokens could be masked."""
        return int((~np.isin(window.tokens, self.special)).sum())

    def __call__(self, window: Window, key: SampleKey) -> tuple[Ids, Ids]:
        """Return a sample's tokens with some masked, and labels for those alone.

        Each is masked on its own, at the sample's rate. A pure function of the window, the seed,
        the epoch and the sample's index.
        """
        rate, draws = self._drawn(key)
        chosen = draws.random(len(window.tokens)) < rate
        chosen &= ~np.isin(window.tokens, self.special)
        ids = np.where(chosen, self.mask, window.tokens)
        return ids, np.where(chosen, window.tokens, IGNORED)

    def _drawn(self, key: SampleKey) -> tuple[float, np.random.Generator]:
        draws = draws_of(self.seed, key)
        place = draws.random()
        if self.is_spread:
            place = key.sample * GOLDEN % 1.0
        return self.objective.masking_rate_of(place), draws


def draws_of(seed: int, key: SampleKey) -> np.random.Generator:
    """Return the random numbers of an occurrence of a sample."""
    counter = [0, key.stage, key.epoch, key.sample]
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=counter))


@dataclass(frozen=True)
class Collator:
    """Makes ``input_ids`` and ``labels`` (int64, shape (batch, sequence_length)) of samples.

    Labels are aligned with the logits: ``labels[:, t]`` is what position t predicts. Where samples
    vary in length they are padded to the longest of them, and an ``attention_mask`` of the same
    shape comes along. With ``bounds`` they are laid end to end instead, shape (1, tokens), and the
    batch tells where each ends; of packed samples, where the documents in them do. Positions then
    begin anew with each document, and in each sample.
    """

    sequence_length: int
    padded: bool
    ids: SpecialIds
    masking: Masking | DiffusionMasking | None
    """None for clm."""
    width_multiple: int = 1
    """Of which the length of padded rows is one, but for that of the longest sample there can be.

    ``sequence_length`` itself gives each batch that length.
    """
    bounds: DocumentBounds | None = None
    """Tells the model of documents, or of lines; None where it is not told."""
    fills: bool = False
    """What samples leave free of ``sequence_length`` is padding. Where documents are told apart it
    is one of its own; a causal model needs no mask, as nothing sees what comes after it. How much
    it is then stands under `PADDING`."""

    def __call__(self, samples: list[tuple[Window, SampleKey]]) -> dict[str, Any]:
        batch: dict[str, Any]
        rows = [self._row(window, key) for window, key in samples]
        if self.bounds is not None:
            batch = self._told(rows, [window for window, _ in samples], self.bounds)
            room = [self.sequence_length if self.fills else len(ids) for ids, _ in rows]
            return batch | self._weights(samples, np.array(room), tuple(batch["labels"].shape))
        shape = (len(rows), self._width([len(ids) for ids, _ in rows]))
        input_ids = np.full(shape, self.ids.pad)
        labels = np.full(shape, IGNORED)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, (ids, targets) in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = targets
            attention_mask[row, : len(ids)] = 1
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
        }
        if self.padded or (self.fills and self.masking is not None):
            batch["attention_mask"] = torch.from_numpy(attention_mask)
        elif self.fills:
            batch[PADDING] = int(attention_mask.size - attention_mask.sum())
        return batch | self._weights(samples, np.full(len(rows), shape[1]), shape)

    def _weights(
        self, samples: list[tuple[Window, SampleKey]], lengths: Ids, shape: tuple[int, int]
    ) -> dict[str, Any]:
        """Return what the labels of a batch count for, where that is not 1 of each.

        ``lengths`` are how many positions each sample has in a batch of that shape.
        """
        masking = self.masking
        if not isinstance(masking, DiffusionMasking):
            return {}
        each = np.array([1.0 / masking.rate(key) for _, key in samples], dtype=np.float32)
        weights = np.repeat(each, lengths)
        predictable = sum(masking.predictable(w) for w, key in samples if key.counted)
        return {
            LABEL_WEIGHTS: torch.from_numpy(weights).view(shape),
            PREDICTABLE: predictable,
        }

    def _told(
        self, rows: list[tuple[Ids, Ids]], windows: list[Window], bounds: DocumentBounds
    ) -> dict[str, Any]:
        """Return rows and where the documents in them begin and end, of lines without padding."""
        free = [self.sequence_length - len(ids) if self.fills else 0 for ids, _ in rows]
        rows = [
            (
                np.pad(ids, (0, room), constant_values=self.ids.pad),
                np.pad(targets, (0, room), constant_values=IGNORED),
            )
            for (ids, targets), room in zip(rows, free, strict=True)
        ]
        input_ids, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        if not len(input_ids):  # lines of nothing but their end, which is predicted from nothing
            input_ids, labels = np.array([self.ids.pad]), np.array([IGNORED])
        shape = (1, len(input_ids)) if self.padded else (len(rows), self.sequence_length)
        lengths = [
            self._documents(len(ids) - room, window, room)
            for (ids, _), window, room in zip(rows, windows, free, strict=True)
        ]
        of_documents = np.concatenate(lengths)
        if not len(of_documents):
            of_documents = np.array([len(input_ids)])
        return {
            "input_ids": torch.from_numpy(input_ids).view(shape),
            "labels": torch.from_numpy(labels).view(shape),
            **bounds.of(of_documents, shape),
            **({PADDING: sum(free)} if self.fills else {}),
        }

    def _documents(self, length: int, window: Window, padding: int) -> Ids:
        """Return the lengths of the documents that are in a row of ``length`` tokens and padding.

        The frame of a masked sample is of its first document and its last.
        """
        ends = window.document_ends
        inside = np.empty(0, dtype=np.int64) if ends is None else ends
        if self.masking is not None:
            inside = inside + 1
        inside = inside[inside < length]
        found = np.append(np.diff(inside, prepend=0, append=length), padding)
        return found[found > 0]

    def _row(self, window: Window, key: SampleKey) -> tuple[Ids, Ids]:
        """Return what of a sample the model sees, and what it is to predict there."""
        if self.masking is None:
            ids, targets = window.tokens[:-1], window.tokens[1:]
            if window.not_predicted is not None and len(window.not_predicted):
                targets = targets.copy()
                targets[window.not_predicted - 1] = IGNORED
        else:
            ids, targets = self.masking(window, key)
            ids = np.concatenate(([self.ids.begin], ids, [self.ids.end]))
            targets = np.concatenate(([IGNORED], targets, [IGNORED]))
        return ids, targets if key.counted else np.full(len(ids), IGNORED)

    def _width(self, lengths: list[int]) -> int:
        if not self.padded:
            return self.sequence_length
        wanted = -(-max(1, *lengths) // self.width_multiple) * self.width_multiple
        return min(wanted, self.sequence_length)


@dataclass(frozen=True)
class CollatorOfStages:
    """Makes batches of a run's stages; the samples of a batch are all of one."""

    collators: tuple[Collator, ...]

    def __call__(self, samples: list[tuple[Window, SampleKey]]) -> dict[str, Any]:
        _, key = samples[0]
        return self.collators[key.stage](samples)


def _words(word_starts: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return for each token the number of its word, counted from 0."""
    numbers = np.cumsum(word_starts, dtype=np.int64)
    return numbers - numbers[0]
