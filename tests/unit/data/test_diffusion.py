"""Masked diffusion: at which rate a sample is masked, what its labels weigh, and how it repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardwright.train.config import DiffusionObjective, RankLayout, RunConfig
from shardwright.train.data import prepare
from shardwright.train.data.batches.collator import (
    IGNORED,
    LABEL_WEIGHTS,
    PREDICTABLE,
    Collator,
    DiffusionMasking,
)
from shardwright.train.data.batches.loader import eval_loader, train_loader
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window
from shardwright.train.data.tokens.tokenizer import SpecialIds
from shardwright.train.loop.ahead import counted
from shardwright.train.model.documents import DocumentBounds

BOS, PAD, EOS, UNK, MASK = range(5)
IDS = SpecialIds(begin=BOS, end=EOS, pad=PAD, mask=MASK)


def masking(seed: int = 0, *, is_spread: bool = False, **objective: Any) -> DiffusionMasking:
    asked = DiffusionObjective.model_validate({"kind": "diffusion", **objective})
    return DiffusionMasking(asked, MASK, np.arange(5), seed, is_spread)


def window(length: int, seed: int = 0) -> Window:
    return Window(np.random.default_rng(seed).integers(5, 1000, size=length), None)


def test_rates_are_uniform_from_the_least_to_all() -> None:
    rates = [masking(least_masking_rate=0.2).rate(SampleKey(0, n)) for n in range(4000)]
    assert min(rates) > 0.2
    assert max(rates) <= 1.0
    shares = np.histogram(rates, bins=4, range=(0.2, 1.0))[0] / 4000
    # Four standard deviations of a share of 4,000 draws.
    assert shares == pytest.approx([0.25] * 4, abs=0.028)


def test_tokens_are_masked_at_the_samples_rate_and_by_the_mask_alone() -> None:
    sample = window(50_000)
    for number in range(5):
        key = SampleKey(0, number)
        ids, labels = masking()(sample, key)
        chosen = labels != IGNORED
        assert chosen.mean() == pytest.approx(masking().rate(key), abs=0.01)
        assert (ids[chosen] == MASK).all()
        assert (labels[chosen] == sample.tokens[chosen]).all()
        assert (ids[~chosen] == sample.tokens[~chosen]).all()


def test_special_tokens_are_never_masked_nor_counted() -> None:
    tokens = np.where(np.arange(1000) % 4, 500, EOS)
    sample = Window(tokens, None)
    ids, labels = masking(least_masking_rate=0.9)(sample, SampleKey(0, 0))
    assert (ids[tokens == EOS] == EOS).all()
    assert (labels[tokens == EOS] == IGNORED).all()
    assert masking().predictable(sample) == 750


def test_the_weighted_labels_are_as_many_as_there_could_be() -> None:
    """The sum over labels of 1 / rate estimates the tokens without bias, at every rate."""
    sample, mask = window(400), masking()
    estimates = [
        (mask(sample, key)[1] != IGNORED).sum() / mask.rate(key)
        for key in (SampleKey(0, n) for n in range(3000))
    ]
    assert np.mean(estimates) == pytest.approx(400, rel=0.02)


def test_masks_depend_on_seed_epoch_and_sample_alone() -> None:
    def drawn(seed: int, epoch: int, number: int) -> tuple[float, bytes]:
        key = SampleKey(epoch, number)
        return masking(seed).rate(key), masking(seed)(window(100), key)[0].tobytes()

    keys = [(s, e, n) for s in (0, 1) for e in range(3) for n in range(3)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert [drawn(*key) for key in keys] == [drawn(*key) for key in keys]


def test_held_out_rates_are_spread_over_any_few_samples() -> None:
    spread = masking(is_spread=True)
    for first in (0, 17, 400):
        rates = sorted(spread.rate(SampleKey(0, first + n)) for n in range(64))
        places = np.array(rates) - (np.arange(64) + 0.5) / 64
        assert np.abs(places).max() < 2 / 64


def test_a_batch_tells_what_its_labels_weigh() -> None:
    mask = masking(least_masking_rate=0.3)
    samples = [(window(8, n), SampleKey(0, n)) for n in range(3)]
    samples.append((window(8, 0), SampleKey(0, 0, counted=False)))
    batch = Collator(10, padded=False, ids=IDS, masking=mask)(samples)
    rates = [mask.rate(key) for _, key in samples]
    assert batch[LABEL_WEIGHTS].shape == batch["labels"].shape
    assert batch[LABEL_WEIGHTS][:, 0].tolist() == pytest.approx([1 / rate for rate in rates])
    assert batch[PREDICTABLE] == 24, "what only fills up is not counted"
    assert counted([batch], IGNORED) == (24, 40)


@pytest.mark.parametrize("fills", [False, True])
def test_lines_end_to_end_weigh_what_they_weigh_in_rows(fills: bool) -> None:
    mask, lengths = masking(), (3, 7, 2)
    lines = [(window(n, seed=n), SampleKey(0, n)) for n in lengths]
    rows = Collator(10, padded=True, ids=IDS, masking=mask)(lines)
    bounds = DocumentBounds("numbers", longest=10, first_position=0)
    told = Collator(10, not fills, IDS, mask, bounds=bounds, fills=fills)(lines)
    assert told[PREDICTABLE] == rows[PREDICTABLE] == sum(lengths)
    of_rows, of_told = (
        batch[LABEL_WEIGHTS][batch["labels"] != IGNORED].tolist() for batch in (rows, told)
    )
    assert of_told == of_rows
    assert of_rows


@pytest.fixture
def config(corpus: Path, make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(mlm=True, objective={"kind": "diffusion"})


Sample = tuple[tuple[int, ...], tuple[int, ...], float]


def samples_of(loader: Any) -> list[Sample]:
    return [
        (tuple(ids), tuple(labels), weights[0])
        for batch in loader
        for ids, labels, weights in zip(
            *(batch[name].tolist() for name in ("input_ids", "labels", LABEL_WEIGHTS)), strict=True
        )
    ]


def test_a_step_is_the_same_on_any_ranks_by_any_workers_and_after_a_resume(
    config: RunConfig, run_dir: Path
) -> None:
    prepared = prepare(config, run_dir)

    def trained(replicas: int = 1, workers: int = 0, done: int = 0) -> list[Sample]:
        fields = config.trainer.model_copy(update={"dataloader_workers": workers})
        of_run = config.model_copy(update={"trainer": fields})
        found: list[Sample] = []
        for rank in range(replicas):
            layout = RankLayout(replicas=replicas)
            found += samples_of(
                train_loader(
                    *(prepared, of_run),
                    rank=rank,
                    layout=layout,
                    start_sample=16 * done,
                    total_steps=3 - done,
                )
            )
        return found

    alone = trained()
    assert trained(workers=2) == alone
    assert trained(done=1) == alone[16:]
    assert sorted(trained(replicas=4)) == sorted(alone)
    assert len({weight for *_, weight in alone}) > 40, "each sample has a rate of its own"

    held_out = samples_of(eval_loader(prepared, config, rank=0, layout=RankLayout()))
    other_run = config.model_copy(update={"seed": 5})
    assert samples_of(eval_loader(prepared, other_run, rank=0, layout=RankLayout())) == held_out


def test_the_weights_are_single_precision_and_travel_with_the_batch(
    config: RunConfig, run_dir: Path
) -> None:
    loader = train_loader(
        prepare(config, run_dir), config, rank=0, layout=RankLayout(), total_steps=1
    )
    batch = next(iter(loader))
    assert batch[LABEL_WEIGHTS].dtype == torch.float32
    assert batch[LABEL_WEIGHTS].min() >= 1.0
    assert batch[PREDICTABLE] <= batch["labels"].numel() - 2 * len(batch["labels"])


def test_a_causal_model_cannot_be_switched_for_every_attention() -> None:
    """transformers (5.23) makes other masks by the config's is_causal, and leaves its modules."""
    settings: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "is_causal": False}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, num_attention_heads=1, **settings)
    model = LlamaForCausalLM(config)
    assert all(m.is_causal for m in model.modules() if hasattr(m, "is_causal"))
    ids = torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 9
    first, second = (model(input_ids=each).logits[0, 0] for each in (ids, other))
    assert not torch.equal(first, second), "its masks are bidirectional"
