"""What there is of a run's data, in plain values: counts, lengths, what is cut, first samples."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardwright.train.data.tokens import uses
from shardwright.train.data.upkeep.target import Run, Target, index_of

if TYPE_CHECKING:
    from shardwright.train.data.prepare import Prepared
    from shardwright.train.data.tokens.store import TokenStore
    from shardwright.train.data.upkeep.lengths import Between
    from shardwright.train.data.upkeep.rows import Rows

    Stores = Mapping[tuple[str, int], TokenStore]
    """By part and source."""

COLUMNS = 80
"""Where there is no terminal."""
PARTS = {"training": "train", "held_out": "heldout"}
"""What a part is called here, and in the names of stores."""
MICRO_BATCHES = 64
"""Whose positions are counted: the first ones."""
LONGEST = 5
"""Documents that are named as the longest."""
BEGINNING_TOKENS = 24
"""Of a document that is named."""
_EXTRAS = ("empty_files", "duplicates", "duplicate_tokens", "filtered")


class Wanted(NamedTuple):
    """Which samples are shown."""

    samples: int
    held_out: bool = False
    """Those of the first evaluation, and not of training."""
    columns: int = COLUMNS


def facts(target: Target, wanted: Wanted, prepared: Prepared | None = None) -> dict[str, Any]:
    """Return all that is shown, in plain values but for ``lines``: the samples as text.

    ``prepared`` is what the target's run has, where that is open already.
    """
    from shardwright.train.process.logs import quiet_libraries

    quiet_libraries()
    index, run = index_of(target.entry), target.run
    details = index["details"]
    if run is not None:
        prepared = prepared or _opened(run)
    found: dict[str, Any] = {
        "entry": str(target.entry),
        "run": str(run.directory) if run else None,
        "bytes": sum(index["files"].values()),
        "used_at": uses.last_use(target.entry.parent, target.entry.name),
        "training": _part(details, "", prepared and prepared.training),
        "held_out": _part(details, "heldout_", prepared and prepared.held_out),
        **{k: v for k, v in details.items() if k in _EXTRAS},
    }
    stores = stores_of(target.entry)
    for (part, _), store in stores.items():
        if store.text_bytes:
            found[part]["bytes"] = found[part].get("bytes", 0) + store.text_bytes
    for part in PARTS:
        if count := found[part].get("bytes"):
            found[part]["tokens_per_byte"] = found[part]["tokens"] / count
    if run is None or prepared is None:
        found["sources"] = _sources(stores, None, None, None)
        found["lengths"] = _lengths(stores, None, of_lines=False)
        return found | {"samples": [], "lines": []}
    found["training"]["samples_per_epoch"] = prepared.samples_per_epoch
    return found | _of_run(target.entry, run, prepared, wanted, stores)


def _of_run(
    entry: Path, run: Run, prepared: Prepared, wanted: Wanted, stores: Stores
) -> dict[str, Any]:
    """Return what only a run tells of its tokens."""
    from shardwright.train.data.sources.registry import source_of
    from shardwright.train.data.tokens.tokenizer import document_frame
    from shardwright.train.data.upkeep.lengths import Between
    from shardwright.train.data.upkeep.rows import Rows

    frame = document_frame(prepared.tokenizer, run.config)
    between = Between(frame.suffix, frame.prefix)
    data = run.config.data
    names = list(source_of(data).parts) or None
    found: dict[str, Any] = {
        "sources": _sources(stores, prepared, names, between),
        "lengths": _lengths(stores, between, of_lines=data.line_by_line),
        "longest": _longest(stores, prepared, names, between),
        "cut": _cut(run, entry, stores, frame.suffix),
        "stages": [
            {
                "tokens": stage.tokens,
                "sequence_length": stage.sequence_length or data.tokens_per_sample,
                "samples_per_epoch": len(mixture),
                "weights": list(mixture.weights),
            }
            for stage, mixture in zip(data.stages, prepared.stages, strict=True)
        ],
        "held_out_sets": [
            {
                "name": each.name,
                "documents": None if (d := each.samples.store.text_sizes) is None else len(d),
                "tokens": each.tokens,
                "bytes": each.text_bytes,
                "samples": len(each.samples),
            }
            for each in prepared.named_sets
        ],
        "positions": None,
        "samples": [],
        "lines": [],
    }
    if len(prepared.train):
        rows = Rows(run.config, prepared, between)
        found["positions"] = vars(rows.positions(MICRO_BATCHES))
    shown = len(prepared.train) and not wanted.held_out
    if shown or (wanted.held_out and prepared.is_evaluated):
        rows = Rows(run.config, prepared, between, wanted.held_out)
        if wanted.held_out:
            names = [str(each.name or "held out") for each in prepared.held_out_sets]
        found["samples"], found["lines"] = _samples(rows, names, wanted)
    return found


def _opened(run: Run) -> Prepared:
    from shardwright.train.data.prepare import opened

    return opened(run.config, run.directory)[0]


def _part(details: dict[str, Any], prefix: str, part: Any) -> dict[str, Any]:
    """Return the counts of training, or of what is held out."""
    found = {"documents": details.get(f"{prefix}documents"), "tokens": details[f"{prefix}tokens"]}
    if part is not None:
        found |= {k: v for k, v in part._asdict().items() if k not in ("documents", "tokens")}
        found["tokens_in_samples"] = part.tokens
    return found


def stores_of(entry: Path) -> dict[tuple[str, int], TokenStore]:
    """Return the stores of an entry, by part and source."""
    from shardwright.train.data.tokens.packing import store_name
    from shardwright.train.data.tokens.store import TokenStore

    present = {path.stem for path in entry.iterdir()}
    found = {}
    for part in PARTS:
        source = 0
        while (name := store_name(part == "held_out", source)) in present:
            found[part, source] = TokenStore(entry, name)
            source += 1
    return found


def _sources(
    stores: Stores, prepared: Prepared | None, names: list[str] | None, between: Between | None
) -> list[dict[str, Any]]:
    from shardwright.train.data.upkeep.lengths import lengths_of

    found: list[dict[str, Any]] = []
    for (part, source), store in stores.items():
        if source == len(found):
            found.append({"name": names[source] if names else None})
        # A line is no document where there are several in one.
        lengths = None if store.line_ends is not None else lengths_of([store], between)
        counts = {"documents": lengths and lengths.documents, "tokens": len(store.tokens)}
        if prepared is not None:
            mixture = prepared.train if part == "training" else prepared.heldout
            counts["samples"] = len(mixture.sources[source])
            found[source]["weight"] = prepared.train.weights[source]
            of_all = max(1, sum(prepared.train.quotas))
            found[source]["share_of_epoch"] = prepared.train.quotas[source] / of_all
        found[source][part] = counts
    return found


def _lengths(stores: Stores, between: Between | None, *, of_lines: bool) -> dict[str, Any] | None:
    from shardwright.train.data.upkeep.lengths import histogram, lengths_of

    lengths = lengths_of(stores.values(), between)
    if lengths is None or not lengths.documents:
        return None
    return {
        "of": "lines" if of_lines else "documents",
        "count": lengths.documents,
        "mean": lengths.tokens / lengths.documents,
        "shortest": lengths.shortest,
        "longest": lengths.longest,
        "counts": [[2**k, 2 ** (k + 1) - 1, n] for k, n in sorted(lengths.by_power.items())],
        "histogram": list(histogram(lengths)),
    }


def _longest(
    stores: Stores, prepared: Prepared, names: list[str] | None, between: Between
) -> list[dict[str, Any]]:
    """Return the longest documents, or lines, the longest first."""
    from shardwright.train.data.upkeep.lengths import longest_of
    from shardwright.train.data.upkeep.shown_samples import Decoder

    decoder, found = Decoder(prepared.tokenizer), []
    for (part, source), one in longest_of(stores, between, LONGEST):
        start = one.start + len(between.prefix)
        stop = min(start + BEGINNING_TOKENS, one.start + one.tokens - len(between.suffix))
        ids = stores[part, source].tokens[start:stop].tolist()
        found.append(
            {
                "part": part,
                "source": source,
                "source_name": names[source] if names else None,
                "number": one.number,
                "tokens": one.tokens,
                "begins_with": decoder.part(ids, None),
            }
        )
    return found


def _cut(run: Run, entry: Path, stores: Stores, suffix: tuple[int, ...]) -> dict[str, Any] | None:
    """Return how many training documents the edges of samples cut; None where they are lines."""
    from shardwright.train.data.arranged import share_of_cuts
    from shardwright.train.data.tokens.cache import Entry

    names = [store.name for (part, _), store in stores.items() if part == "training"]
    share = share_of_cuts(run.config, Entry(entry, {}, built=False), names, suffix)
    return None if share is None else vars(share)


def _samples(
    rows: Rows, names: list[str] | None, wanted: Wanted
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the first samples in plain values, and as lines."""
    from shardwright.train.data.tokens.tokenizer import special_ids
    from shardwright.train.data.upkeep.shown_samples import Decoder, described, tree

    decoder, config = Decoder(rows.prepared.tokenizer), rows.config
    mask = special_ids(rows.prepared.tokenizer, config).mask
    trees, lines = [], []
    for row in rows.first(wanted.samples):
        name = names[row.source] if names else None
        trees.append(tree(row, decoder, mask, name))
        lines += ["", *described(row, decoder, mask, name, wanted.columns)]
    if trees and config.objective.is_masked:
        legend = "«mask: dove» is a masked «dove»"
        if config.objective.kind == "mlm":
            legend += (
                ", «kept: dove» one left as it is, «cat: dove» one that another token replaces"
            )
        legend += "."
        lines = ["", *textwrap.wrap(legend, min(wanted.columns, 80)), *lines]
    return trees, lines
