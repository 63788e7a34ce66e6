"""Prepare a run's data: its tokenizer and its packed tokens, once per node, cached."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardwright.train.config import RunConfig, samples_wanted
from shardwright.train.data.arranged import arranged, share_of_cuts
from shardwright.train.data.sources.corpus import (
    Piece,
    corpus_identity,
    named_as,
    named_sets,
    place_of,
    read_corpus,
    shards_of,
    source_weights,
)
from shardwright.train.data.sources.files.skipping import Skipped, merged, told
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.source import Reading
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.process.cores import all_cores
from shardwright.train.run_directory.names import DATA_JSON, TOKENIZER_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from shardwright.train.data.batches.held_out import HeldOutSet
    from shardwright.train.data.batches.samples import Mixture, Samples
    from shardwright.train.data.tokens.cache import Entry
    from shardwright.train.data.tokens.encoding import Packing
    from shardwright.train.data.tokens.shards import Work

CACHE_FORMAT = 2
SETS = "eval_paths"
"""Of data.json: what is held out by data.eval_paths."""
log = logging.getLogger(__name__)


class Part(NamedTuple):
    """What training, or evaluation, has of the corpus."""

    documents: int
    samples: int
    """Each counted once, whatever its source's weight."""
    tokens: int
    """In samples, each counted once, document ends included."""
    tokens_left_out: int
    """In no sample: cut off lines, or too few for a last sample."""
    lines_cut: int
    """Samples that are the beginning of a longer line."""

    @property
    def share_left_out(self) -> float:
        return self.tokens_left_out / max(1, self.tokens + self.tokens_left_out)


@dataclass(frozen=True)
class Prepared:
    """Everything that a rank needs of the data."""

    tokenizer: PreTrainedTokenizerFast
    train: Mixture
    heldout: Mixture
    training: Part
    held_out: Part
    empty_files: int
    """Matched by a glob, and skipped."""
    skipped: Skipped
    """What was skipped as it could not be read, by kind, empty files too."""
    filtered: int = 0
    """Documents that data.filter has dropped."""
    duplicates: int | None = None
    """Documents left out because there was the same before; None where they are kept."""
    stages: tuple[Mixture, ...] = ()
    """What each stage trains on; () where there is one alone, which is ``train``."""
    named_sets: tuple[HeldOutSet, ...] = ()
    """The held-out documents of data.eval_paths."""
    source_names: tuple[str, ...] = ()
    """What evaluations call the sources; () where there is only one."""
    samples_of_max_tokens: int | None = None
    """Samples, in their order, that hold trainer.max_tokens; None where they are of one length."""

    @cached_property
    def samples_per_epoch(self) -> int:
        """Training samples in one epoch, weights included."""
        return len(self.train)

    @cached_property
    def eval_samples(self) -> int:
        """Held-out samples."""
        return len(self.heldout)

    @cached_property
    def held_out_sets(self) -> tuple[HeldOutSet, ...]:
        """All that is evaluated: what each source of the corpus holds out, and the user's own."""
        from shardwright.train.data.batches.held_out import sets_of

        return (*sets_of(self.heldout, self.source_names), *self.named_sets)

    @property
    def is_evaluated(self) -> bool:
        """Whether there is a held-out sample."""
        return any(len(each.samples) for each in self.held_out_sets)


def prepare(config: RunConfig, run_dir: Path) -> Prepared:
    """Return a run's tokenizer and samples, making what is not there yet.

    The first call puts the tokenizer into ``run_dir``/tokenizer/ and notes in ``run_dir``/data.json
    which tokens the run trains on. Later ones, by each rank and after each restart, open just
    those: they read no corpus and need no network, and a corpus that has changed meanwhile cannot
    slip in. Raises UserError for what is wrong with corpus, tokenizer or cache directory.
    """
    # Costs half a second, which check_corpus does not need.
    from shardwright.train.data.tokens import cache, uses
    from shardwright.train.data.tokens.tokenizer import ensure_tokenizer, load_tokenizer

    started = time.monotonic()
    parent = cache.cache_root(config.data) / "tokens"
    directory, note = run_dir / TOKENIZER_FOLDER, run_dir / DATA_JSON
    noted = _noted(note)
    name = noted["tokens"] if noted else None
    entry = cache.take(parent, name, run_dir) if name and directory.exists() else None
    if entry:
        tokenizer = load_tokenizer(config, directory)
    else:
        identity = corpus_identity(config.data, cache.cache_root(config.data))
        tokenizer = ensure_tokenizer(config, directory, identity)
        if config.data.deduplicate:  # by what they hold
            _named_entries(config, tokenizer, run_dir, parent, noted)
        entry = _packed(config, tokenizer, directory, identity, parent, name)
        uses.hold(parent, entry.path.name, run_dir)
    entries = _named_entries(config, tokenizer, run_dir, parent, noted)
    prepared = replace(
        _open(config, tokenizer, entry, noted),
        named_sets=tuple(_named_sets(config, entries)),
        skipped=_skipped(entry, *entries.values()),
    )
    _check_amounts(config, prepared)
    if noted is None:
        _check_sources(config, prepared)
        _check_loss(config, prepared)
        _tell_of_cuts(config, tokenizer, entry)
    counted, has_counted = _samples_of_max_tokens(config, run_dir, prepared)
    prepared = replace(prepared, samples_of_max_tokens=counted)
    sets = _noted_sets(config, entries)
    if noted is None or has_counted or sets != noted.get(SETS, {}):
        _note(note, entry.path.name, prepared, config, sets)
    for line in summary(prepared, by_line=config.data.line_by_line):
        log.info(line)
    log.info(
        "data %s in %.1f s",
        "prepared" if entry.built else "from cache",
        time.monotonic() - started,
    )
    return prepared


def opened(config: RunConfig, run_dir: Path) -> tuple[Prepared, Entry]:
    """Return what `prepare` has made for a run that has noted it, making nothing.

    Raises UserError where the cache does not have it any more.
    """
    from shardwright.train.data.tokens import cache
    from shardwright.train.data.tokens.tokenizer import load_tokenizer

    parent, noted = cache.cache_root(config.data) / "tokens", _noted(run_dir / DATA_JSON)
    assert noted is not None, "it has been looked for"
    name = noted["tokens"]
    entry = cache.take(parent, name)
    if entry is None:
        raise UserError(
            f"{run_dir}: the tokens that it trains on, {parent / name}, are not there or not "
            "whole; `shardwright resume` prepares them again from the corpus"
        )
    tokenizer = load_tokenizer(config, run_dir / TOKENIZER_FOLDER)
    prepared = _open(config, tokenizer, entry, noted)
    _check_amounts(config, prepared)
    return prepared, entry


def is_prepared(config: RunConfig, run_dir: Path) -> bool:
    """Return whether the cache has the tokens that a run would train on.

    A tokenizer that is trained on the corpus is trained for that, and put into ``run_dir``.
    """
    from shardwright.train.data.tokens import cache
    from shardwright.train.data.tokens.tokenizer import ensure_tokenizer

    root, directory = cache.cache_root(config.data), run_dir / TOKENIZER_FOLDER
    identity = corpus_identity(config.data, root)
    tokenizer = ensure_tokenizer(config, directory, identity)
    wanted = _wanted(config, tokenizer, directory, identity)
    return cache.find(root / "tokens", wanted.name) is not None


def prepare_excerpt(
    config: RunConfig, run_dir: Path, pieces: Iterator[Piece]
) -> tuple[Prepared, Entry]:
    """Return what a run would have if its corpus were these pieces, without documents of sets.

    `is_prepared` has put the tokenizer into ``run_dir``; the cache has to be one that is thrown
    away. What there is may be too little for a batch.
    """
    from shardwright.train.data.tokens.cache import build_once, cache_root
    from shardwright.train.data.tokens.packing import pack
    from shardwright.train.data.tokens.tokenizer import load_tokenizer

    directory = run_dir / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(config, directory)
    wanted = _wanted(config, tokenizer, directory, {})
    sources = len(source_weights(config.data))
    packing = replace(wanted.packing, unique=False)  # the pieces are, where that is asked for

    def build(target: Path) -> dict[str, Any]:
        return pack(pieces, sources, tokenizer.backend_tokenizer, packing, target, all_cores())

    entry = build_once(cache_root(config.data) / "tokens", wanted.name, build)
    return _open(config, tokenizer, entry, None), entry


def summary(prepared: Prepared, *, by_line: bool) -> Iterator[str]:
    """Yield for training and evaluation what there is, and what of it is in no sample. Pure."""
    for name, part in (("training", prepared.training), ("held out", prepared.held_out)):
        cut = f"{part.lines_cut:,} of {part.samples:,} lines cut, " if by_line else ""
        yield (
            f"{name}: {part.documents:,} documents, {part.tokens:,} tokens in {part.samples:,} "
            f"samples; {cut}{part.tokens_left_out:,} tokens ({part.share_left_out:.2%}) in none"
        )
    for each in prepared.named_sets:
        extent = each.samples.extent()
        yield (
            f"held out, {each.name}: {extent.tokens:,} tokens in {extent.samples:,} samples; "
            f"{extent.tokens_left_out:,} tokens in none"
        )
    if prepared.filtered:
        yield f"{prepared.filtered:,} documents dropped by data.filter"
    if prepared.duplicates is not None:
        kept = prepared.training.documents + prepared.held_out.documents
        share = prepared.duplicates / max(1, prepared.duplicates + kept)
        yield f"{prepared.duplicates:,} duplicates left out ({share:.2%} of the documents)"
    # Of what earlier versions have prepared only this is known.
    if prepared.empty_files and not prepared.skipped:
        yield f"{prepared.empty_files:,} empty files skipped"
    yield from told(prepared.skipped)


def prepare_part(config: RunConfig, run_dir: Path, part: int, parts: int) -> None:
    """Make the shards of a corpus that are this part's: every ``parts``-th, from that number on.

    One of several processes, on as many nodes, that share the cache and ``run_dir``, in which there
    is the tokenizer. `prepare` joins what they have made, and makes what none of them has.
    """
    from shardwright.train.data.tokens import cache, shard_workers
    from shardwright.train.data.tokens.tokenizer import ensure_tokenizer

    root = cache.cache_root(config.data)
    parent, directory = root / "tokens", run_dir / TOKENIZER_FOLDER
    identity = corpus_identity(config.data, root)
    tokenizer = ensure_tokenizer(config, directory, identity)
    wanted = _wanted(config, tokenizer, directory, identity)
    if cache.find(parent, wanted.name):
        log.info("%s is there already", parent / wanted.name)
        return
    divided = shards_of(config.data, root)
    if len(divided) < 2:
        log.info("the corpus is read from its beginning to its end, when all parts are done")
        return
    mine = {number: shard for number, shard in enumerate(divided) if number % parts == part}
    work = _work(config, tokenizer, wanted, parent)
    try:
        shard_workers.make(mine, work, all_cores())
    except OSError:
        # Whoever joins them all does not wait for a part that comes late.
        if cache.find(parent, wanted.name) is None:
            raise
    log.info("part %d of %d: its %d of %d shards are whole", part, parts, len(mine), len(divided))


class _Wanted(NamedTuple):
    """Which tokens a run trains on."""

    name: str
    """Under which the cache has them."""
    packing: Packing
    note: str
    """What surrounds a document, in words."""
    before: tuple[str, ...] = ()
    """Tokens in the cache whose documents are left out."""


def _wanted(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    identity: dict[str, Any],
) -> _Wanted:
    """Return what a corpus, a tokenizer and settings come to."""
    from shardwright.train.data.tokens.cache import fingerprint
    from shardwright.train.data.tokens.encoding import Packing
    from shardwright.train.data.tokens.tokenizer import content_hash, control_ids, document_frame
    from shardwright.train.model.vocabulary import vocabulary_size

    frame = document_frame(tokenizer, config)
    packing = Packing(
        vocabulary_size=vocabulary_size(tokenizer),
        prefix=frame.prefix,
        suffix=frame.suffix,
        control=control_ids(tokenizer),
        words=config.objective.kind == "mlm" and config.objective.whole_word,
        by_line=config.data.line_by_line,
        documents=not config.data.line_by_line
        and (
            config.data.documents_are_kept_apart
            or config.data.packing == "best_fit"
            or config.data.deduplicate
        ),
        unique=config.data.deduplicate,
    )
    # Where what is new is not asked for the name is that which runs begun before know.
    new = ("documents", "unique")
    settings = {k: v for k, v in vars(packing).items() if k not in new or v}
    before = _before(config, tokenizer, directory) if packing.unique else ()
    what = {
        "format": CACHE_FORMAT,
        "corpus": identity,
        "tokenizer": content_hash(directory),
        "packing": settings,
        **({"before": before} if before else {}),
    }
    return _Wanted(fingerprint(what), packing, frame.note, before)


def _before(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> tuple[str, ...]:
    """Return the names of the tokens of data.eval_paths, which training is to have none of."""
    from shardwright.train.data.tokens.cache import cache_root

    found = []
    for name, data in named_sets(config.data).items():
        with named_as(name):
            identity = corpus_identity(data, cache_root(data))
            alone = config.model_copy(update={"data": data})
            found.append(_wanted(alone, tokenizer, directory, identity).name)
    return tuple(found)


def _packed(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    identity: dict[str, Any],
    parent: Path,
    noted: str | None,
) -> Entry:
    """Return the cached tokens of this corpus, tokenizer and settings, packing them if need be."""
    from shardwright.train.data.tokens.cache import build_once

    wanted = _wanted(config, tokenizer, directory, identity)
    if noted not in (None, wanted.name):
        raise UserError(
            f"{directory.parent}: data={config.data.kind} has changed since this run began (or "
            "another version of Shardwright prepared it), and the tokens that it began with are "
            f"no longer in {parent}; restore the corpus or the cache (data.cache_dir), or start a "
            "new run"
        )

    log.info(wanted.note)

    work = _work(config, tokenizer, wanted, parent)
    entry = build_once(parent, wanted.name, lambda target: _built(work, target))
    # Also what somebody has left who was killed when the entry was whole.
    shutil.rmtree(work.directory, ignore_errors=True)
    return entry


def _work(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, wanted: _Wanted, parent: Path
) -> Work:
    from shardwright.train.data.tokens.cache import builder, cache_root
    from shardwright.train.data.tokens.shards import Work, directory_of

    return Work(
        config.data,
        cache_root(config.data),
        tokenizer.backend_tokenizer,
        wanted.packing,
        directory_of(parent, wanted.name),
        builder(os.getpid()),
        tuple(parent / name for name in wanted.before),
    )


def _built(work: Work, target: Path) -> dict[str, Any]:
    """Pack a corpus, a large one in shards by several processes; return what is to be kept."""
    from shardwright.train.data.tokens import shard_workers, shards
    from shardwright.train.data.tokens.packing import pack
    from shardwright.train.data.tokens.ready import pack_given

    cores = all_cores()
    sources = len(source_weights(work.data))
    divided = shards_of(work.data, work.cache_dir)
    details: dict[str, Any]
    if (given := pack_given(work.data, work.packing, target)) is not None:
        details = {**given}
    elif shards.are_worth_processes(divided, cores, work.directory):
        details = shard_workers.pack(divided, work, sources, target, cores)
    else:
        reading = Reading()
        pieces = read_corpus(work.data, work.cache_dir, reading)
        tokenizer, packing = work.tokenizer, work.packing
        counts = pack(pieces, sources, tokenizer, packing, target, cores, work.before)
        details = {**counts, **vars(reading)}
    return {**details, "vocabulary_size": work.packing.vocabulary_size}


def _open(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    entry: Entry,
    noted: Mapping[str, Any] | None,
) -> Prepared:
    """Return what an entry of the cache holds."""
    from shardwright.train.data.batches.samples import Mixture
    from shardwright.train.data.tokens.packing import store_name

    data = config.data
    weights = source_weights(data)
    samples_of = arranged(config, entry)

    def samples(held_out: bool) -> tuple[Samples, ...]:
        return tuple(samples_of(store_name(held_out, source)) for source in range(len(weights)))

    train, heldout = samples(held_out=False), samples(held_out=True)
    return Prepared(
        tokenizer,
        train=Mixture(train, weights, config.seed),
        heldout=Mixture(heldout, (1.0,) * len(weights), config.seed),
        training=_part(noted, "training", train, entry.details["documents"]),
        held_out=_part(noted, "heldout", heldout, entry.details["heldout_documents"]),
        empty_files=entry.details.get("empty_files", 0),
        filtered=entry.details.get("filtered", 0),
        duplicates=entry.details.get("duplicates"),
        source_names=source_of(data).names,
        skipped=_skipped(entry),
        stages=tuple(_stages(config, entry)),
    )


def _check_amounts(config: RunConfig, prepared: Prepared) -> None:
    """Raise UserError where there is too little for a batch, or for an evaluation."""
    data, batch = config.data, config.trainer.global_batch_size
    for number, (stage, mixture) in enumerate(zip(data.stages, prepared.stages, strict=True)):
        length = stage.sequence_length or data.tokens_per_sample
        needed = batch * data.tokens_per_sample // length
        if len(mixture) < needed:
            raise UserError(
                f"data.stages[{number}] is too small for one batch: it has {len(mixture):,} "
                f"samples of {length:,} tokens, and trainer.global_batch_size={batch} needs "
                f"{needed:,}; give more text, shorten its samples, raise its weights or lower the "
                "batch"
            )
    training, held_out = prepared.training, prepared.held_out
    counts = _counts(config, training, prepared.samples_per_epoch)
    if problem := _too_small(config, training, prepared.samples_per_epoch):
        raise UserError(problem)
    if data.eval_fraction > 0 and not prepared.eval_samples:
        raise UserError(
            f"data.eval_fraction={data.eval_fraction} holds out {held_out.documents:,} "
            f"documents with {held_out.tokens_left_out:,} tokens, too few for one sample at "
            f"data.sequence_length={data.sequence_length} ({counts}); raise data.eval_fraction, "
            "give more documents (each .txt file is one), or set it to 0 to evaluate on nothing"
        )


def _skipped(*entries: Entry) -> Skipped:
    """Return what was skipped of a corpus and of the user's own held-out documents."""
    total: Skipped = {}
    for entry in entries:
        merged(total, entry.details.get("skipped", {}))
    return total


def _stages(config: RunConfig, entry: Entry) -> Iterator[Mixture]:
    """Yield what each stage trains on; all are views of the same tokens."""
    from shardwright.train.data.batches.samples import Mixture
    from shardwright.train.data.tokens.packing import store_name

    data = config.data
    for stage in data.stages:
        weights = stage.weights or source_weights(data)
        samples_of = arranged(config, entry, stage.sequence_length or data.tokens_per_sample)
        sources = [samples_of(store_name(False, source)) for source in range(len(weights))]
        yield Mixture(sources, tuple(weights), config.seed)


def _named_entries(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    run_dir: Path,
    parent: Path,
    noted: Mapping[str, Any] | None,
) -> dict[str, Entry]:
    """Return for each set of data.eval_paths its tokens, those that the run has noted for it."""
    from shardwright.train.data.tokens import cache, uses

    known = (noted or {}).get(SETS, {})
    entries = {}
    for name, data in named_sets(config.data).items():
        of_set = known.get(name, {})
        was = of_set.get("tokens") if of_set.get("path") == place_of(data) else None
        with named_as(name):
            entry = cache.take(parent, was, run_dir) if was else None
            if entry is None:
                identity = corpus_identity(data, cache.cache_root(data))
                alone = config.model_copy(update={"data": data})
                directory = run_dir / TOKENIZER_FOLDER
                entry = _packed(alone, tokenizer, directory, identity, parent, was)
                uses.hold(parent, entry.path.name, run_dir)
        entries[name] = entry
    return entries


def _named_sets(config: RunConfig, entries: Mapping[str, Entry]) -> Iterator[HeldOutSet]:
    """Yield the sets of data.eval_paths; raise UserError where one has no sample."""
    from shardwright.train.data.batches.held_out import HeldOutSet
    from shardwright.train.data.tokens.packing import store_name

    data = config.data
    for name, entry in entries.items():
        samples = arranged(config, entry)(store_name(held_out=True, source=0))
        if not len(samples):
            raise UserError(
                f"data.eval_paths.{name}: {entry.details['heldout_documents']:,} documents with "
                f"{len(samples.store.tokens):,} tokens are too few for one sample at "
                f"data.sequence_length={data.sequence_length}; give it more text, or leave it out"
            )
        yield HeldOutSet(name, samples, is_own=False)


def _noted_sets(config: RunConfig, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return what data.json tells of the sets of data.eval_paths."""
    sets = named_sets(config.data)
    return {
        name: {
            "path": place_of(sets[name]),
            "tokens": entry.path.name,
            "documents": entry.details["heldout_documents"],
        }
        for name, entry in entries.items()
    }


def _part(
    noted: Mapping[str, Any] | None, name: str, sources: Iterable[Samples], documents: int
) -> Part:
    """Return what data.json tells of a part; count where it does not, as in runs begun before."""
    known = noted[name] if noted else {}
    if known.keys() >= set(Part._fields):
        return Part(*(known[field] for field in Part._fields))
    extents = [samples.extent() for samples in sources]
    return Part(
        documents,
        samples=sum(extent.samples for extent in extents),
        tokens=sum(extent.tokens for extent in extents),
        tokens_left_out=sum(extent.tokens_left_out for extent in extents),
        lines_cut=sum(extent.lines_cut for extent in extents),
    )


def _check_sources(config: RunConfig, prepared: Prepared) -> None:
    """Raise UserError where a source of a mixture has no sample, and say where none is held out."""
    data = config.data
    documents = prepared.training.documents + prepared.held_out.documents
    # Where there is only one, it is all of the corpus, and has no name of its own.
    for part, train, heldout in zip(
        source_of(data).parts, prepared.train.sources, prepared.heldout.sources, strict=False
    ):
        extent = train.extent()
        tokens = len(train.store.tokens) + len(heldout.store.tokens)
        if extent.samples == 0 and tokens == 0 and documents == data.max_documents:
            raise UserError(
                f"{part} would give nothing: data.max_documents={documents} are read "
                "from the paths before it; raise data.max_documents, or leave the path out"
            )
        if extent.samples == 0:
            raise UserError(
                f"{part} would give no sample: {extent.tokens_left_out:,} training "
                f"tokens are too few for one at data.sequence_length={data.sequence_length}; give "
                "it more text, join it with another path by one glob, or leave it out"
            )
        if data.eval_fraction > 0 and len(heldout) == 0:
            log.warning("no sample of %s is held out for evaluation", part)


def _check_loss(config: RunConfig, prepared: Prepared) -> None:
    """Raise UserError where cutting lines would lose more than is accepted."""
    part, data = prepared.training, config.data
    if not data.line_by_line or part.share_left_out <= data.max_cut_fraction:
        return
    longest = max(samples.extent().longest_line for samples in prepared.train.sources)
    raise UserError(
        f"data.line_by_line=true cuts {part.lines_cut:,} of {part.samples:,} lines at "
        f"data.sequence_length={data.sequence_length}: {part.share_left_out:.1%} of the tokens "
        f"would be in no sample, more than data.max_cut_fraction={data.max_cut_fraction}; raise "
        f"data.sequence_length (the longest line has {longest:,} tokens), break the lines, set "
        "data.line_by_line=false to pack them back to back, or raise data.max_cut_fraction"
    )


def _tell_of_cuts(config: RunConfig, tokenizer: PreTrainedTokenizerFast, entry: Entry) -> None:
    """Say how many training documents are in no sample as a whole, and how much is padding."""
    from shardwright.train.data.tokens.packing import store_name
    from shardwright.train.data.tokens.tokenizer import document_frame

    names = [store_name(False, source) for source in range(len(source_weights(config.data)))]
    suffix = document_frame(tokenizer, config).suffix
    if share := share_of_cuts(config, entry, names, suffix):
        log.info("data.packing=%s: %s", config.data.packing, share)


def _counts(config: RunConfig, part: Part, samples_per_epoch: int) -> str:
    return (
        f"{part.documents:,} training documents with {part.tokens + part.tokens_left_out:,} tokens "
        f"make {samples_per_epoch:,} samples at data.sequence_length={config.data.sequence_length}"
    )


def _too_small(config: RunConfig, part: Part, samples_per_epoch: int) -> str | None:
    """Return why an epoch is too small for a batch, or None where it is not. Pure."""
    if samples_per_epoch >= config.trainer.global_batch_size:
        return None
    return (
        f"data={config.data.kind} is too small for one batch: "
        f"{_counts(config, part, samples_per_epoch)}, and "
        f"trainer.global_batch_size={config.trainer.global_batch_size} needs more; give more "
        "text, shorten the samples or lower the batch"
    )


def noted_too_small(config: RunConfig, run_dir: Path) -> str | None:
    """Return what `prepare` would raise for a batch, as far as data.json tells, or None."""
    samples = noted_samples_per_epoch(run_dir)
    if samples is None:
        return None
    training = json.loads((run_dir / DATA_JSON).read_text())["training"]
    # Runs begun before noted fewer of these.
    part = Part(**{field: training.get(field, 0) for field in Part._fields})
    return _too_small(config, part, samples)


def _noted(note: Path) -> dict[str, Any] | None:
    try:
        tree: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return tree


def noted_samples_per_epoch(run_dir: Path) -> int | None:
    """Return what data.json tells of a run's epochs; None before it is there."""
    try:
        return json.loads((run_dir / DATA_JSON).read_text())["training"].get("samples_per_epoch")
    except FileNotFoundError:
        return None


def noted_samples_of_tokens(run_dir: Path, tokens: int) -> int | None:
    """Return how many samples data.json says hold so many tokens; None where it does not."""
    try:
        training = json.loads((run_dir / DATA_JSON).read_text())["training"]
    except FileNotFoundError:
        return None
    found: int | None = training.get("samples_of_tokens", {}).get(str(tokens))
    return found


def noted_samples_wanted(config: RunConfig, run_dir: Path) -> int | None:
    """Return the samples that a run trains on, as far as it has noted what that depends on.

    None where it counts in steps, too.
    """
    tokens = config.trainer.max_tokens
    counted = None if tokens is None else noted_samples_of_tokens(run_dir, tokens)
    return samples_wanted(config, noted_samples_per_epoch(run_dir), counted)


def _samples_of_max_tokens(
    config: RunConfig, run_dir: Path, prepared: Prepared
) -> tuple[int | None, bool]:
    """Return `Prepared.samples_of_max_tokens`, and whether it was counted only now."""
    from shardwright.train.data.tokens.counting import samples_of_tokens

    tokens = config.trainer.max_tokens
    if tokens is None or not config.data.samples_vary:
        return None, False
    if (noted := noted_samples_of_tokens(run_dir, tokens)) is not None:
        return noted, False
    return samples_of_tokens(prepared.train, tokens), True


def _note(
    note: Path, name: str, prepared: Prepared, config: RunConfig, sets: Mapping[str, Any]
) -> None:
    counted = {}
    if prepared.samples_of_max_tokens is not None:
        counted = {str(config.trainer.max_tokens): prepared.samples_of_max_tokens}
    tree = {
        "tokens": name,
        "tokenizer": {"tokens": len(set(prepared.tokenizer.get_vocab().values()))},
        "training": {
            **prepared.training._asdict(),
            "samples_per_epoch": prepared.samples_per_epoch,
            **({"samples_of_tokens": counted} if counted else {}),
        },
        "heldout": prepared.held_out._asdict(),
        "empty_files": prepared.empty_files,
        **({"filtered": prepared.filtered} if prepared.filtered else {}),
        **({} if prepared.duplicates is None else {"duplicates": prepared.duplicates}),
        **({SETS: sets} if sets else {}),
        "skipped": prepared.skipped,
    }
    write_text(note, json.dumps(tree) + "\n")
