"""What a run trains on: counts, lengths of documents, and samples as the model sees them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.console import terminal
from shardwright.train.data.tokens import uses
from shardwright.train.data.upkeep.target import Run, Target, index_of, target_of
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.process.arguments import path as path_of
from shardwright.train.units import duration, size

if TYPE_CHECKING:
    from shardwright.train.data.prepare import Prepared
    from shardwright.train.data.tokens.store import TokenStore
    from shardwright.train.data.upkeep.lengths import Between

COLUMNS = 80
PARTS = {"training": "train", "held_out": "heldout"}
"""What a part is called here, and in the names of stores."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright data show`."""
    found = argparse.ArgumentParser(
        prog="shardwright data show",
        description="Show what a run trains on: documents, tokens, samples and what is held out, "
        "lengths of documents, and the first samples as the model sees them.",
        epilog="Exit codes: 0, 2 on bad input.",
    )
    found.add_argument(
        "path", type=path_of, metavar="RUN_DIR|CACHE_ENTRY", help="or a directory of the cache"
    )
    found.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="the first N samples (default 3)"
    )
    found.add_argument("--json", action="store_true", help="print one JSON object instead")
    return found


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        target = target_of(options.path)
        found = facts(target, options.samples)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if options.json:
        found.pop("lines")
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join([*report(found, now=time.time()), *found["lines"]]))
    sys.stdout.flush()
    return 0


def facts(target: Target, samples: int) -> dict[str, Any]:
    """Return all that is shown, in plain values but for ``lines``: the samples as text."""
    from shardwright.train.process.logs import quiet_libraries

    quiet_libraries()
    index = index_of(target.entry)
    between, prepared, names = None, None, None
    if target.run is not None:
        prepared, between = _opened(target.run)
        names = _source_names(target.run)
    found: dict[str, Any] = {
        "entry": str(target.entry),
        "run": str(target.run.directory) if target.run else None,
        "bytes": sum(index["files"].values()),
        "used_at": uses.last_use(target.entry.parent, target.entry.name),
        "training": _part(index["details"], "", prepared and prepared.training),
        "held_out": _part(index["details"], "heldout_", prepared and prepared.held_out),
        **{k: v for k, v in index["details"].items() if k in _EXTRAS},
    }
    for (part, _), store in _stores(target.entry).items():
        if store.text_bytes:
            found[part]["bytes"] = found[part].get("bytes", 0) + store.text_bytes
    for part in PARTS:
        if count := found[part].get("bytes"):
            found[part]["tokens_per_byte"] = found[part]["tokens"] / count
    if prepared is not None:
        found["training"]["samples_per_epoch"] = prepared.samples_per_epoch
    lines = bool(target.run and target.run.config.data.line_by_line)
    found["sources"] = _sources(target, prepared, names, between)
    found["lengths"] = _lengths(_stores(target.entry), between, of_lines=lines)
    found |= {"samples": [], "lines": []}
    if target.run is not None and prepared is not None:
        found["samples"], found["lines"] = _samples(target.run, prepared, between, names, samples)
    return found


_EXTRAS = ("empty_files", "duplicates", "duplicate_tokens", "filtered")


def _opened(run: Run) -> tuple[Prepared, Between]:
    from shardwright.train.data.prepare import opened
    from shardwright.train.data.tokens.tokenizer import document_frame
    from shardwright.train.data.upkeep.lengths import Between

    prepared, _ = opened(run.config, run.directory)
    frame = document_frame(prepared.tokenizer, run.config)
    return prepared, Between(frame.suffix, frame.prefix)


def _source_names(run: Run) -> list[str] | None:
    from shardwright.train.data.sources.registry import source_of

    return list(source_of(run.config.data).parts) or None


def _part(details: dict[str, Any], prefix: str, part: Any) -> dict[str, Any]:
    """Return the counts of training, or of what is held out."""
    found = {"documents": details.get(f"{prefix}documents"), "tokens": details[f"{prefix}tokens"]}
    if part is not None:
        found |= {k: v for k, v in part._asdict().items() if k not in ("documents", "tokens")}
        found["tokens_in_samples"] = part.tokens
    return found


def _stores(entry: Path) -> dict[tuple[str, int], TokenStore]:
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
    target: Target, prepared: Prepared | None, names: list[str] | None, between: Between | None
) -> list[dict[str, Any]]:
    from shardwright.train.data.upkeep.lengths import lengths_of

    found: list[dict[str, Any]] = []
    for (part, source), store in _stores(target.entry).items():
        if source == len(found):
            found.append({"name": names[source] if names else None})
        # A line is no document where there are several in one.
        lengths = None if store.line_ends is not None else lengths_of([store], between)
        counts = {"documents": lengths and lengths.documents, "tokens": len(store.tokens)}
        if prepared is not None:
            mixture = prepared.train if part == "training" else prepared.heldout
            counts["samples"] = len(mixture.sources[source])
            found[source]["weight"] = prepared.train.weights[source]
        found[source][part] = counts
    return found


def _lengths(
    stores: dict[tuple[str, int], TokenStore], between: Between | None, *, of_lines: bool
) -> dict[str, Any] | None:
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


def _samples(
    run: Run,
    prepared: Prepared,
    between: Between | None,
    names: list[str] | None,
    count: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the first samples of a run in plain values, and as lines."""
    from shardwright.train.data.tokens.tokenizer import special_ids
    from shardwright.train.data.upkeep.rows import first_rows
    from shardwright.train.data.upkeep.shown_samples import Decoder, described, tree

    decoder = Decoder(prepared.tokenizer)
    mask = special_ids(prepared.tokenizer, run.config).mask
    trees, lines = [], []
    for row in first_rows(run.config, prepared, between, count):
        name = names[row.source] if names else None
        trees.append(tree(row, decoder, mask, name))
        lines += ["", *described(row, decoder, mask, name, COLUMNS)]
    if trees and run.config.objective.kind == "mlm":
        lines.insert(0, "")
        lines.insert(1, "«mask: dove» is a masked «dove», «kept: dove» one left as it is,")
        lines.insert(2, "«cat: dove» one that another token replaces.")
    return trees, lines


# --- as text --------------------------------------------------------------------------------------


def report(found: dict[str, Any], *, now: float) -> Iterator[str]:
    """Yield the lines above the samples. Pure."""
    yield found["run"] or found["entry"]
    if found["run"]:
        yield f"  tokens in {found['entry']}"
    used = found["used_at"]
    yield f"  {size(found['bytes'])}" + (
        "" if used is None else f", last opened {duration(now - used)} ago"
    )
    yield ""
    yield from _table(found)
    for name, text in _EXTRA_LINES.items():
        if found.get(name):
            yield f"  {found[name]:,} {text}"
    if len(found["sources"]) > 1:
        yield ""
        yield from _by_source(found["sources"])
    yield ""
    if (lengths := found["lengths"]) is None:
        yield "It is not kept where documents end, and no run is known whose tokenizer tells it."
    else:
        yield (
            f"{lengths['count']:,} {lengths['of']} of {lengths['shortest']:,} to "
            f"{lengths['longest']:,} tokens, {lengths['mean']:,.1f} on average:"
        )
        yield from lengths["histogram"]
    if found["run"] is None:
        yield ""
        yield "No run is known that uses it: give a run directory to see samples."


_EXTRA_LINES = {
    "empty_files": "empty files skipped",
    "duplicates": "documents left out as duplicates",
    "duplicate_tokens": "tokens of those",
    "filtered": "documents dropped by data.filter",
}
_ROWS = {
    "documents": "documents",
    "bytes": "bytes",
    "tokens": "tokens",
    "tokens_per_byte": "tokens per byte",
    "samples": "samples",
    "samples_per_epoch": "samples in an epoch",
    "tokens_in_samples": "tokens in samples",
    "tokens_left_out": "tokens in none",
    "lines_cut": "lines cut",
}


def _table(found: dict[str, Any]) -> Iterator[str]:
    yield f"  {'':<20}{'training':>20}{'held out':>20}"
    for key, name in _ROWS.items():
        cells = [found[part].get(key) for part in PARTS]
        if any(cells) or (key != "lines_cut" and None not in cells):
            yield f"  {name:<20}{_number(cells[0]):>20}{_number(cells[1]):>20}"


def _by_source(sources: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"  {'source':<30}{'documents':>14}{'tokens':>17}{'held out':>15}"
    for number, source in enumerate(sources):
        name = source["name"] or str(number)
        name = name if len(name) <= 29 else f"…{name[-28:]}"
        training, held_out = source["training"], source["held_out"]
        yield (
            f"  {name:<30}{_number(training['documents']):>14}{_number(training['tokens']):>17}"
            f"{_number(held_out['tokens']):>15}"
        )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(terminal.run(main))
