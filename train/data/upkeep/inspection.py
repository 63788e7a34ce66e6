"""What a run would train on, before there is one: `shardwright inspect`, with a directory's config.

Of the corpus an excerpt is read, which is all of a small one. What is not in the cache is prepared
where the excerpt is all of it; else a run is shown whose corpus is the excerpt.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardwright.train import config as run_config
from shardwright.train.config import RunConfig
from shardwright.train.console import progress, terminal
from shardwright.train.data.prepare import is_prepared, prepare, prepare_excerpt
from shardwright.train.data.sources.corpus import Piece, named_sets, read_corpus, source_weights
from shardwright.train.data.sources.excerpt import Seen, excerpt
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.source import Reading
from shardwright.train.data.tokens.cache import cache_root
from shardwright.train.data.upkeep.facts import COLUMNS, Wanted, facts, stores_of
from shardwright.train.data.upkeep.flags import add_own_flags, wanted
from shardwright.train.data.upkeep.report import body
from shardwright.train.data.upkeep.target import TOKENS, Run, Target, tokens_of
from shardwright.train.data.upkeep.texts import Texts, counted
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.process import signals
from shardwright.train.units import counted as counted_as
from shardwright.train.units import size

if TYPE_CHECKING:
    from shardwright.train.data.prepare import Prepared


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shardwright.train.data.upkeep.inspection")
    parser.add_argument("run_dir", type=Path, help="directory that holds a config.yaml alone")
    add_own_flags(parser)
    options = parser.parse_args(argv)
    _end_at_signals()
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[progress.LogLines(sys.stderr)]
    )
    try:
        with progress.shown_on(sys.stderr), progress.phase("inspecting the data"):
            found = inspected(options.run_dir, options.bytes, wanted(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    lines = found.pop("lines")
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        columns = terminal.columns() or COLUMNS
        print("\n".join([*head(found), *body(found, columns), *lines]))
    sys.stdout.flush()
    return 0


def _end_at_signals() -> None:
    """Let a signal end this process at once, compiled code or not: nothing is lost with it."""
    for number in signals.SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)


class _Read(NamedTuple):
    """What was read of a corpus's texts."""

    seen: Seen
    counts: list[Texts]
    """Of each source."""


def inspected(run_dir: Path, most_bytes: int, samples: Wanted) -> dict[str, Any]:
    """Return what a directory's config would train on, in plain values but for ``lines``.

    Raises UserError as a preparation would.
    """
    config = run_config.load(run_dir)
    read = _read(config, most_bytes)
    was_prepared = is_prepared(config, run_dir)
    is_whole = read is None or read.seen.is_whole
    if read is None and not was_prepared:
        _check_small(config, most_bytes)
    of_excerpt = None if is_whole else _of_excerpt(config, run_dir, most_bytes)
    if of_excerpt is None or was_prepared:
        prepared = prepare(config, run_dir)
        entry = cache_root(config.data) / TOKENS / str(tokens_of(run_dir))
        found = facts(Target(entry, Run(run_dir, config)), samples, prepared)
        found["entry"] = str(entry)
    else:
        config, prepared, entry = of_excerpt
        found = facts(Target(entry, Run(run_dir, config)), samples, prepared)
        found["entry"] = None
    found |= {"run": None, "was_prepared": was_prepared, "texts": None}
    if read is not None:
        _tell_texts(found, read, of_excerpt[2] if of_excerpt else entry)
    return found


def _read(config: RunConfig, most_bytes: int) -> _Read | None:
    """Return what an excerpt of the corpus is made of; None where it has no texts."""
    if source_of(config.data).ids(None) is not None:
        return None
    found = _Read(Seen(), [Texts() for _ in source_weights(config.data)])
    with progress.phase("reading texts", unit="byte") as shown:
        for _ in _pieces(config, most_bytes, found):
            shown.at(found.seen.text_bytes)
    return found


def _pieces(config: RunConfig, most_bytes: int, found: _Read) -> Iterator[Piece]:
    """Yield the pieces of an excerpt that a run would have, counting all that is in it."""
    data, unique = config.data, config.data.deduplicate
    root, known = cache_root(data), set[bytes]()
    if unique:  # they come before all of the corpus
        for of_set in named_sets(data).values():
            pieces = read_corpus(of_set, cache_root(of_set))
            for _ in counted(pieces, [Texts()], known, unique=True):
                pass
    pieces = excerpt(data, root, most_bytes, Reading(), found.seen)
    yield from counted(pieces, found.counts, known, unique=unique)


def _of_excerpt(
    config: RunConfig, run_dir: Path, most_bytes: int
) -> tuple[RunConfig, Prepared, Path]:
    """Return config, data and entry of a run whose corpus is the excerpt, under ``run_dir``."""
    again = _Read(Seen(), [Texts() for _ in source_weights(config.data)])
    pieces = _pieces(config, most_bytes, again)
    data = config.data.model_copy(update={"cache_dir": str(run_dir / "cache")})
    here = config.model_copy(update={"data": data})
    prepared, entry = prepare_excerpt(here, run_dir, pieces)
    return here, prepared, entry.path


def _check_small(config: RunConfig, most_bytes: int) -> None:
    """Raise UserError where tokens that others have stored are too many to copy them for this."""
    stored = source_of(config.data).stored_bytes()
    if stored > most_bytes:
        raise UserError(
            f"data={config.data.kind} has {size(stored)}, which are not in the cache, and of ids "
            f"no excerpt is taken; `shardwright prepare` with the same settings puts them there, "
            f"or raise --bytes={size(most_bytes).replace(' ', '')}"
        )


def _tell_texts(found: dict[str, Any], read: _Read, entry: Path) -> None:
    """Add what was read, and of each source how many tokens its bytes and words are.

    ``entry`` has the tokens of what was read.
    """
    found["texts"] = vars(read.seen)
    tokens = [0] * len(read.counts)
    for (_, source), store in stores_of(entry).items():
        tokens[source] += len(store.tokens)
    for source, counts, count in zip(found["sources"], read.counts, tokens, strict=True):
        source["texts"] = {
            "documents": counts.documents,
            "bytes": counts.text_bytes,
            "words": counts.words,
            "tokens": count,
            "tokens_per_byte": count / counts.text_bytes if counts.text_bytes else None,
            "tokens_per_word": count / counts.words if counts.words else None,
            "duplicates": counts.duplicates,
            "duplicate_bytes": counts.duplicate_bytes,
        }


# --- as text --------------------------------------------------------------------------------------


def head(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield which tokens are shown, and how much of the corpus they are of. Pure."""
    texts = found["texts"]
    if found["entry"] is not None:
        how = "in the cache before" if found["was_prepared"] else "prepared for this"
        yield f"all of the corpus, {how}:"
        yield f"  {found['entry']}"
    if texts is None:
        yield "  token ids that were stored by others: nothing is known of their texts"
        return
    if texts["is_whole"]:
        yield f"  {size(texts['text_bytes'])} of text, all of it read"
    else:
        yield from _read_of(texts, is_all=found["entry"] is None)
    documents = sum(source["texts"]["documents"] for source in found["sources"])
    duplicates = sum(source["texts"]["duplicates"] for source in found["sources"])
    same = sum(source["texts"]["duplicate_bytes"] for source in found["sources"])
    if duplicates:
        yield (
            f"  {counted_as(duplicates, 'duplicate')} among {counted_as(documents, 'document')} "
            f"that were read, {size(same)}"
        )


def _read_of(texts: Mapping[str, Any], *, is_all: bool) -> Iterator[str]:
    """Yield what was read of a corpus that was not read whole. Pure."""
    if is_all:
        yield "NOT all of the corpus: all that follows is of an excerpt"
    share = ""
    if texts["file_bytes"]:
        share = f" of files of {size(texts['file_bytes'])}"
    yield f"  {size(texts['text_bytes'])} of text read{share}"
    if texts["of_places"] is None:
        yield "  from its beginning on; how much more there is, is not known"
    else:
        yield f"  from the beginnings of {texts['places']:,} of its {texts['of_places']:,} places"
    if not is_all:
        yield "  tokens per byte and word and duplicates are of that, all else is of the whole"
    if texts["documents_cut"]:
        yield f"  read in part, being longer: {counted_as(texts['documents_cut'], 'document')}"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(terminal.run(main))
