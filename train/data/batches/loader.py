"""Data loaders of one rank, for training and for evaluation."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shardwright.train.config import (
    DiffusionObjective,
    MaskedFields,
    MlmObjective,
    RankLayout,
    RunConfig,
    Schedule,
    SpanCorruptionObjective,
    accumulation_steps,
    batch_sizes,
)
from shardwright.train.data.batches.collator import (
    Collator,
    CollatorOfStages,
    DiffusionMasking,
    Ids,
    Masking,
)
from shardwright.train.data.batches.held_out import HeldOutSet, portions
from shardwright.train.data.batches.sampler import EvalBatches, SampleKey, TrainBatches
from shardwright.train.data.batches.samples import Mixture, Window
from shardwright.train.data.batches.spans import SpanCollator
from shardwright.train.data.batches.stages import stages_of
from shardwright.train.data.prepare import Prepared
from shardwright.train.data.tokens import sentinels
from shardwright.train.data.tokens.tokenizer import special_ids
from shardwright.train.model.documents import DocumentBounds
from shardwright.train.process import signals

EVALUATION_SEED = 2**32
"""Masks held-out samples: no run's own, so that runs of any seed are measured by the same masks."""

Batches = DataLoader[tuple[Window, SampleKey]]


def train_loader(
    prepared: Prepared,
    config: RunConfig,
    *,
    rank: int,
    layout: RankLayout,
    start_sample: int = 0,
    total_steps: int,
    bounds: DocumentBounds | None = None,
    schedule: Schedule | None = None,
) -> Batches:
    """Return the micro-batches of one rank, from the ``start_sample``-th sample of the run on.

    It has ``total_steps`` x accumulation steps of them and runs through as many epochs as it takes.
    ``bounds`` tell the model of documents, where it is to be told. ``schedule`` says how much of
    the run each step has before it; without one, all are masked as its first.
    """
    trainer = config.trainer
    batches = TrainBatches(
        seed=config.seed,
        samples_per_epoch=prepared.samples_per_epoch,
        data_parallel_rank=layout.data_parallel_rank(rank),
        data_parallel_size=layout.data_parallel_size,
        batches=batch_sizes(trainer),
        accumulation_steps=accumulation_steps(trainer, layout),
        steps=total_steps,
        start_sample=start_sample,
        stages=stages_of(config.data, [len(mixture) for mixture in prepared.stages]),
        progress_after=schedule.progress_after if schedule and _follows_the_run(config) else None,
    )
    dataset = _MixtureDataset(prepared.stages or (prepared.train,))
    collate = collator(prepared, config, config.seed, bounds)
    if batches.stages is None:
        return _loader(config, dataset, batches, collate)
    assert isinstance(collate, Collator), "others have no stages, as checked in RunConfig"
    lengths = batches.stages.lengths
    of_stages = tuple(replace(collate, sequence_length=length) for length in lengths)
    return _loader(config, dataset, batches, CollatorOfStages(of_stages))


def _follows_the_run(config: RunConfig) -> bool:
    """Whether samples are masked by how much of the run is done. Pure."""
    objective = config.objective
    return isinstance(objective, MlmObjective) and objective.masking_rate_final is not None


def eval_loader(
    prepared: Prepared,
    config: RunConfig,
    *,
    rank: int,
    layout: RankLayout,
    bounds: DocumentBounds | None = None,
) -> Batches:
    """Return one rank's part of the held-out samples (of the first ``eval_max_samples``).

    All ranks get as many batches of as many samples, each of one set; what fills up the last of a
    set has labels of -100.
    """
    trainer = config.trainer
    batches = EvalBatches(
        portions(prepared.held_out_sets, trainer.eval_max_samples),
        data_parallel_rank=layout.data_parallel_rank(rank),
        data_parallel_size=layout.data_parallel_size,
        micro_batch_size=trainer.eval_samples_per_pass,
    )
    dataset = HeldOutDataset(prepared.held_out_sets)
    if isinstance(config.objective, MlmObjective):
        config = config.model_copy(update={"objective": config.objective.as_evaluated()})
    collate = collator(prepared, config, EVALUATION_SEED, bounds)
    return _loader(config, dataset, batches, collate)


class HeldOutDataset(Dataset[tuple[Window, SampleKey]]):
    """The held-out sets as torch wants them; the sampler's keys are its indices."""

    def __init__(self, sets: Sequence[HeldOutSet]) -> None:
        self.sets = sets

    def __getitem__(self, key: Any) -> tuple[Window, SampleKey]:
        within = self.sets[key.held_out_set]
        return within.samples[key.sample - within.first], key


class _MixtureDataset(Dataset[tuple[Window, SampleKey]]):
    """The mixture of each stage as torch wants it; the sampler's keys are its indices."""

    def __init__(self, stages: Sequence[Mixture]) -> None:
        self.stages = stages

    def __getitem__(self, key: Any) -> tuple[Window, SampleKey]:
        return self.stages[key.stage].get(key.epoch, key.sample), key


def _loader(
    config: RunConfig,
    dataset: Dataset[tuple[Window, SampleKey]],
    batches: TrainBatches | EvalBatches,
    collate: Collator | CollatorOfStages | SpanCollator,
) -> Batches:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers(config),
        worker_init_fn=_obey_the_rank_alone,
        pin_memory=torch.cuda.is_available(),
        # Its own, as a loader draws a seed for its workers: dropout must not depend on that.
        generator=torch.Generator(),
    )


def workers(config: RunConfig) -> int:
    """Return how many processes assemble a rank's batches. Pure."""
    asked = config.trainer.dataloader_workers
    if asked == "auto":
        return 2 if config.launcher.device == "cuda" else 0
    return asked


def _obey_the_rank_alone(worker: int) -> None:
    """Let only the rank itself end a worker: it needs its batches until it has stopped.

    torchrun and schedulers signal whole process groups, in which the workers are.
    """
    del worker
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.HANDLED)

    def wait() -> None:
        while signal.sigwaitinfo(signals.SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def collator(
    prepared: Prepared, config: RunConfig, mask_seed: int, bounds: DocumentBounds | None = None
) -> Collator | SpanCollator:
    """Return what makes this run's batches; ``mask_seed`` in [0, 2^64) fixes what is masked."""
    ids = special_ids(prepared.tokenizer, config)
    masking = None
    objective = config.objective
    if isinstance(objective, SpanCorruptionObjective):
        counts = objective.counts(config.data.tokens_per_sample)
        marks = np.array(sentinels.ids(prepared.tokenizer)[: counts.spans], dtype=np.int64)
        return SpanCollator(counts, marks, ids.pad, ids.end, mask_seed)
    if isinstance(objective, MaskedFields):
        assert ids.mask is not None, "special_ids demands one"
        special = np.array(sorted(prepared.tokenizer.all_special_ids), dtype=np.int64)
        masking = _masking(objective, prepared, ids.mask, special, mask_seed)
    return Collator(
        config.data.tokens_per_sample,
        config.data.line_by_line,
        ids,
        masking,
        _width_multiple(config),
        bounds,
        fills=config.data.packing == "best_fit",
    )


def _masking(
    objective: MaskedFields, prepared: Prepared, mask: int, special: Ids, seed: int
) -> Masking | DiffusionMasking:
    if isinstance(objective, DiffusionObjective):
        is_spread = seed == EVALUATION_SEED
        return DiffusionMasking(objective, mask, special, seed, is_spread)
    assert isinstance(objective, MlmObjective)
    # Not a range: ids may have holes.
    every = np.array(sorted(set(prepared.tokenizer.get_vocab().values())), dtype=np.int64)
    return Masking(objective, mask, special, np.setdiff1d(every, special), seed)


def _width_multiple(config: RunConfig) -> int:
    """Return of what the length of padded rows is to be a multiple. Pure."""
    if config.precision.token_multiple > 1:
        return config.data.tokens_per_sample  # of which a micro-batch has that many, as checked
    return 8 if config.launcher.device == "cuda" else 1
