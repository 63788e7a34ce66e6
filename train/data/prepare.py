"""Prepare a run's data: its tokenizer and its packed tokens, once per node, cached."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import RunConfig
from train.data.corpus import corpus_identity, read_corpus, source_weights
from train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from train.data.cache import Entry
    from train.data.samples import Mixture

CACHE_FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that a rank needs of the data."""

    tokenizer: PreTrainedTokenizerFast
    train: Mixture
    heldout: Mixture
    documents: int
    """Training documents."""
    tokens: int
    """Training tokens, document ends included."""
    heldout_documents: int
    heldout_tokens: int

    @cached_property
    def samples_per_epoch(self) -> int:
        """Training samples in one epoch, weights included."""
        return len(self.train)

    @cached_property
    def eval_samples(self) -> int:
        """Held-out samples."""
        return len(self.heldout)


def prepare(config: RunConfig, run_dir: Path) -> Prepared:
    """Return a run's tokenizer and samples, making what is not there yet.

    The first call puts the tokenizer into ``run_dir``/tokenizer/ and notes in ``run_dir``/data.json
    which tokens the run trains on. Later ones, by each rank and after each restart, open just
    those: they read no corpus and need no network, and a corpus that has changed meanwhile cannot
    slip in. Raises UserError for what is wrong with corpus, tokenizer or cache directory.
    """
    # Costs half a second, which check_corpus does not need.
    from train.data import cache
    from train.data.tokenizer import ensure_tokenizer, load_tokenizer

    started = time.monotonic()
    parent = cache.cache_root(config.data) / "tokens"
    directory, note = run_dir / "tokenizer", run_dir / "data.json"
    name = _noted(note)
    entry = cache.find(parent, name) if name and directory.exists() else None
    if entry:
        tokenizer = load_tokenizer(config, directory)
    else:
        identity = corpus_identity(config.data, cache.cache_root(config.data))
        tokenizer = ensure_tokenizer(config, directory, identity)
        entry = _packed(config, tokenizer, directory, identity, parent, name)
    prepared = _open(config, tokenizer, entry)
    if name is None:
        _note(note, entry.path.name, prepared)
    log.info(
        "%s documents, %s tokens, held out %s documents, %s tokens, %s in %.1f s",
        *(
            f"{count:,}"
            for count in (
                prepared.documents,
                prepared.tokens,
                prepared.heldout_documents,
                prepared.heldout_tokens,
            )
        ),
        "prepared" if entry.built else "from cache",
        time.monotonic() - started,
    )
    return prepared


def _packed(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    identity: dict[str, Any],
    parent: Path,
    noted: str | None,
) -> Entry:
    """Return the cached tokens of this corpus, tokenizer and settings, packing them if need be."""
    from train.data.cache import build_once, cache_root, fingerprint
    from train.data.packing import Packing, pack
    from train.data.tokenizer import content_hash, document_prefix, special_ids, vocabulary_size

    packing = Packing(
        vocabulary_size=vocabulary_size(tokenizer),
        prefix=document_prefix(tokenizer, config),
        end=special_ids(tokenizer, config).end,
        words=config.objective.kind == "mlm" and config.objective.whole_word,
        by_line=config.data.line_by_line,
    )
    what = {
        "format": CACHE_FORMAT,
        "corpus": identity,
        "tokenizer": content_hash(directory),
        "packing": vars(packing),
    }
    name = fingerprint(what)
    if noted not in (None, name):
        raise UserError(
            f"{directory.parent}: data={config.data.kind} has changed since this run began, and "
            f"the tokens that it began with are no longer in {parent}; restore the corpus or the "
            "cache (data.cache_dir), or start a new run"
        )

    def build(target: Path) -> dict[str, Any]:
        pieces = read_corpus(config.data, cache_root(config.data))
        sources = len(source_weights(config.data))
        return dict(pack(pieces, sources, tokenizer.backend_tokenizer, packing, target))

    return build_once(parent, name, build)


def _open(config: RunConfig, tokenizer: PreTrainedTokenizerFast, entry: Entry) -> Prepared:
    """Return what an entry of the cache holds; raise UserError where that is too little."""
    from train.data.packing import store_name
    from train.data.samples import Mixture, Samples
    from train.data.store import TokenStore

    data, causal = config.data, config.objective.kind == "clm"
    weights = source_weights(data)

    def samples(held_out: bool) -> tuple[Samples, ...]:
        names = (store_name(held_out, source) for source in range(len(weights)))
        stores = (TokenStore(entry.path, name) for name in names)
        return tuple(Samples(store, data.sequence_length, causal) for store in stores)

    prepared = Prepared(
        tokenizer,
        train=Mixture(samples(held_out=False), weights, config.seed),
        heldout=Mixture(samples(held_out=True), (1.0,) * len(weights), config.seed),
        **entry.details,
    )
    counts = (
        f"{prepared.documents:,} training documents with {prepared.tokens:,} tokens make "
        f"{prepared.samples_per_epoch:,} samples at data.sequence_length={data.sequence_length}"
    )
    if prepared.samples_per_epoch < config.trainer.global_batch_size:
        raise UserError(
            f"data={data.kind} is too small for one batch: {counts}, and "
            f"trainer.global_batch_size={config.trainer.global_batch_size} asks for more; "
            "give more text, shorten the samples or lower the batch"
        )
    if data.eval_fraction > 0 and not prepared.eval_samples:
        raise UserError(
            f"data.eval_fraction={data.eval_fraction} holds out {prepared.heldout_documents:,} "
            f"documents with {prepared.heldout_tokens:,} tokens, too few for one sample at "
            f"data.sequence_length={data.sequence_length} ({counts}); raise data.eval_fraction, "
            "give more documents (each .txt file is one), or set it to 0 to evaluate on nothing"
        )
    return prepared


def _noted(note: Path) -> str | None:
    try:
        return json.loads(note.read_text(encoding="utf-8"))["tokens"]
    except FileNotFoundError:
        return None


def noted_samples_per_epoch(run_dir: Path) -> int | None:
    """Return what data.json tells of a run's epochs; None before it is there."""
    try:
        return json.loads((run_dir / "data.json").read_text())["training"].get("samples_per_epoch")
    except FileNotFoundError:
        return None


def _note(note: Path, name: str, prepared: Prepared) -> None:
    tree = {
        "tokens": name,
        "training": {
            "documents": prepared.documents,
            "tokens": prepared.tokens,
            "samples_per_epoch": prepared.samples_per_epoch,
        },
        "heldout": {
            "documents": prepared.heldout_documents,
            "tokens": prepared.heldout_tokens,
        },
    }
    temporary = note.with_name(f".{note.name}-{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    os.replace(temporary, note)
