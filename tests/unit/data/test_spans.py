"""Span corruption: how many tokens and spans, what is read and written, and how it repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from shardwright.train.config import RankLayout, RunConfig, SpanCorruptionObjective
from shardwright.train.config.spans import counts_of_inputs, counts_of_window
from shardwright.train.data import prepare
from shardwright.train.data.batches.collator import IGNORED
from shardwright.train.data.batches.loader import eval_loader, train_loader
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window
from shardwright.train.data.batches.spans import SpanCollator
from shardwright.train.data.tokens import sentinels
from shardwright.train.errors import UserError
from shardwright.train.loop.ahead import counted

END, START, FIRST_MARK = 2, 1, 2000


def published(inputs: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return window and targets as T5's own code finds them (compute_input_and_target_lengths)."""

    def made(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs
    while made(tokens + 1)[0] <= inputs:
        tokens += 1
    return tokens, made(tokens)[1]


def collator(inputs: int = 64, density: float = 0.15, mean: float = 3.0, seed: int = 0) -> Any:
    counts = counts_of_inputs(inputs, density, mean)
    marks = np.arange(FIRST_MARK, FIRST_MARK - counts.spans, -1)
    return SpanCollator(counts, marks, START, END, seed)


def window(collate: SpanCollator, seed: int = 0) -> Window:
    drawn = np.random.default_rng(seed)
    return Window(drawn.integers(5, 1000, size=collate.counts.window), None)


def reassembled(inputs: list[int], targets: list[int], marks: list[int]) -> list[int]:
    """Return what was there before: what is written put where its sentinel stands."""
    assert inputs.pop() == targets.pop() == END
    found: list[int] = []
    for token in inputs:
        if token not in marks:
            found.append(token)
            continue
        begin = targets.index(token) + 1
        rest = (at for at in range(begin, len(targets)) if targets[at] in marks)
        found += targets[begin : next(rest, len(targets))]
    return found


@pytest.mark.parametrize("inputs", [64, 256, 512, 1024, 4096])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 8.0), (0.25, 2.0), (0.3, 3.0)])
def test_lengths_are_those_of_the_published_algorithm(
    inputs: int, density: float, mean: float
) -> None:
    counts = counts_of_inputs(inputs, density, mean)
    assert (counts.window, counts.targets) == published(inputs, density, mean)
    assert counts.inputs == inputs


def test_a_sample_of_t5_has_568_tokens_for_512_and_114() -> None:
    assert counts_of_inputs(512, 0.15, 3.0) == (568, 85, 28)
    assert counts_of_inputs(512, 0.15, 3.0).targets == 114


@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.74])
@pytest.mark.parametrize("mean", [1.0, 1.5, 3.0, 40.0])
def test_every_row_is_full_and_nothing_is_lost(density: float, mean: float) -> None:
    if density / mean > 1 - density:
        with pytest.raises(ValidationError, match="leaves fewer tokens than there are spans"):
            SpanCorruptionObjective(
                kind="span_corruption", noise_density=density, mean_span_length=mean
            )
        return
    for inputs in range(8, 80):
        collate = collator(inputs, density, mean)
        sample = window(collate)
        read, written = collate.corrupted(sample.tokens, SampleKey(0, inputs))
        assert (len(read), len(written)) == (inputs, collate.counts.targets)
        assert read[0] == sample.tokens[0], "a window begins with what is left"
        assert written[0] == read[read >= 1000][0] == FIRST_MARK
        marks = collate.sentinels.tolist()
        assert [t for t in read.tolist() if t in marks] == marks
        assert reassembled(read.tolist(), written.tolist(), marks) == sample.tokens.tolist()


def test_counts_are_never_impossible() -> None:
    for tokens in range(2, 200):
        for density, mean in ((0.001, 1.0), (0.15, 3.0), (0.5, 1.0), (0.9, 9.0)):
            counts = counts_of_window(tokens, density, mean)
            assert 1 <= counts.spans <= min(counts.noise, tokens - counts.noise)


def test_spans_have_the_mean_length_and_vary_as_much_as_they_can() -> None:
    """Of all ways to divide 15 tokens into 5 spans, each is as likely."""
    collate = collator(64, 0.2, 3.0)
    assert collate.counts[1:] == (15, 5)
    first = [
        int(
            np.flatnonzero(collate.corrupted(window(collate).tokens, SampleKey(0, n))[1] >= 1000)[1]
        )
        - 1
        for n in range(4000)
    ]
    # A first span of n tokens leaves C(14 - n, 3) ways to divide the rest into four, of C(14, 4).
    assert np.mean(first) == pytest.approx(3, abs=0.15)
    assert np.mean(np.array(first) == 1) == pytest.approx(286 / 1001, abs=0.03)
    assert max(first) >= 9


def test_the_decoder_sees_what_it_has_to_write_one_token_later() -> None:
    collate = collator()
    keys = [SampleKey(0, 3), SampleKey(0, 4, counted=False)]
    batch = collate([(window(collate, n), key) for n, key in enumerate(keys)])
    assert batch["input_ids"].shape == (2, 64)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, collate.counts.targets)
    assert batch["decoder_input_ids"][:, 0].tolist() == [START, START]
    assert (batch["decoder_input_ids"][0, 1:] == batch["labels"][0, :-1]).all()
    assert (batch["labels"][1] == IGNORED).all(), "what only fills up is not counted"
    assert counted([batch], IGNORED) == (collate.counts.targets, 2 * (64 + collate.counts.targets))


def test_spans_are_another_draw_for_each_sample_epoch_and_seed_and_the_same_again() -> None:
    collate = collator(512)
    tokens = window(collate).tokens

    def read(seed: int, epoch: int, sample: int) -> tuple[int, ...]:
        made = collator(512, seed=seed).corrupted(tokens, SampleKey(epoch, sample))
        return tuple(made[0].tolist())

    draws = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({read(*draw) for draw in draws}) == 4
    assert read(0, 0, 0) == read(0, 0, 0)


SPANS = {"kind": "span_corruption"}
T5: dict[str, Any] = {
    **{"kind": "t5", "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 1, "intermediate_size": 16},
}


@pytest.fixture
def config(corpus: Path, make_config: Callable[..., RunConfig]) -> RunConfig:
    del corpus
    return make_config(model=T5, objective=SPANS)


def samples_of(loader: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(read), tuple(written))
        for batch in loader
        for read, written in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]


def test_a_step_is_the_same_on_any_ranks_by_any_workers_and_after_a_resume(
    config: RunConfig, run_dir: Path
) -> None:
    prepared = prepare(config, run_dir)

    def trained(replicas: int = 1, workers: int = 0, done: int = 0) -> list[Any]:
        fields = config.trainer.model_copy(update={"dataloader_workers": workers})
        of_run = config.model_copy(update={"trainer": fields})
        found: list[Any] = []
        for rank in range(replicas):
            layout = RankLayout(replicas=replicas)
            wanted: dict[str, Any] = {"start_sample": 16 * done, "total_steps": 3 - done}
            found += samples_of(train_loader(prepared, of_run, rank=rank, layout=layout, **wanted))
        return found

    alone = trained()
    assert trained(workers=2) == alone
    assert trained(done=1) == alone[16:]
    assert sorted(trained(replicas=4)) == sorted(alone)
    length = config.data.tokens_per_sample
    assert {(len(read), len(written)) for read, written in alone} == {
        (length, config.tokens_per_sample - length)
    }

    held_out = samples_of(eval_loader(prepared, config, rank=0, layout=RankLayout()))
    other_run = config.model_copy(update={"seed": 5})
    assert samples_of(eval_loader(prepared, other_run, rank=0, layout=RankLayout())) == held_out


def test_samples_follow_one_another_in_the_corpus(config: RunConfig, run_dir: Path) -> None:
    prepared = prepare(config, run_dir)
    samples = prepared.train.sources[0]
    counts = config.objective.counts(config.data.tokens_per_sample)  # type: ignore[union-attr]
    assert {len(samples[n].tokens) for n in range(len(samples))} == {counts.window}
    both = np.concatenate([samples[0].tokens, samples[1].tokens])
    assert (both == samples.store.tokens[: len(both)]).all()


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"kind": "byte_bpe"},
        {"kind": "wordpiece", "vocab_size": 400},
        {"kind": "unigram", "vocab_size": 700},
    ],
    ids=lambda tokenizer: tokenizer["kind"],
)
def test_a_trained_vocabulary_ends_with_a_hundred_sentinels(
    corpus: Path, make_config: Callable[..., RunConfig], run_dir: Path, tokenizer: dict[str, Any]
) -> None:
    del corpus
    model = T5 | {"vocab_size": tokenizer.get("vocab_size", 512)}
    config = make_config(objective=SPANS, tokenizer=tokenizer, model=model)
    words = prepare(config, run_dir).tokenizer
    last = len(words) - 1
    assert len(words) <= model["vocab_size"]
    assert sentinels.ids(words) == list(range(last, last - 100, -1))
    assert words.convert_tokens_to_ids("<extra_id_0>") == last
    ids = words("def <extra_id_0>(self):").input_ids
    assert ids.count(last) == 1
    assert ids[-1] == words.eos_token_id
    assert ids[0] != words.bos_token_id
    assert "<extra_id_0>" not in words.decode(ids, skip_special_tokens=True)
    stored = prepare(config, run_dir).train.sources[0].store.tokens
    assert not set(np.unique(stored).tolist()) & set(sentinels.ids(words))


def test_a_vocabulary_without_sentinels_is_refused(
    corpus: Path, make_config: Callable[..., RunConfig], run_dir: Path, tmp_path: Path
) -> None:
    del corpus
    words = prepare(make_config(), run_dir).tokenizer
    words.save_pretrained(tmp_path / "words")
    tokenizer = {"kind": "pretrained", "name": str(tmp_path / "words")}
    config = make_config(model=T5, objective=SPANS, tokenizer=tokenizer)
    spans = config.objective.counts(config.data.tokens_per_sample).spans  # type: ignore[union-attr]
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError) as refused:
        prepare(config, other)
    assert str(refused.value) == (
        f"tokenizer={tmp_path / 'words'} has no sentinels, and objective=span_corruption needs "
        f"{spans} for the spans of a sample of data.sequence_length="
        f"{config.data.tokens_per_sample}; add <extra_id_0> and so on to it, one for each span of "
        "a sample, or choose a T5's tokenizer or one that is trained, such as tokenizer=unigram"
    )
    words.add_special_tokens({"extra_special_tokens": ["<extra_id_0>"]})
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(UserError, match=r"has 1 sentinels \(<extra_id_0> to <extra_id_0>\)"):
        prepare(config, other)
