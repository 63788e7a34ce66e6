"""A run goes on from a checkpoint as if nothing had happened, under its strategy or another."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from shardwright.launchers import resumes
from shardwright.train import config as run_config
from shardwright.train.checkpoint import discovery
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.read import portable
from tests.distributed.curves import curve
from tests.distributed.interrupted import SAVED, STEPS, STRATEGIES, interrupted
from tests.distributed.jobs import restored_and_saved, whole_run
from tests.distributed.optimizers import (
    COMPILED_FOR_DTENSORS,
    OPTIMIZERS,
    PURE_BF16,
    needs_torchao,
)
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


Source = Callable[..., Path]


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str, float], Path]:
    """Return the uninterrupted runs of this module, which its tests share."""
    return {}


@pytest.fixture
def uninterrupted(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    runs: dict[tuple[str, str, float], Path],
) -> Source:
    """Return a function that gives a run of six steps with a checkpoint after three.

    With dropout each rank's dice matter; only without do other ranks learn the same.
    """

    def run(name: str, dtype: str, dropout: float = 0.1) -> Path:
        if (name, dtype, dropout) not in runs:
            tree = tiny_tree("clm")
            # Odd sizes, so that partitions need padding.
            tree["model"] |= {"vocab_size": 389, "intermediate_size": 67, "dropout": dropout}
            if not dropout:  # as an earlier version computed, whose config had no word for it
                tree["model"]["fused_gelu"] = False
            tree["strategy"], tree["precision"] = STRATEGIES[name], {"compute_dtype": dtype}
            tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED}
            # And a batch that grows, also after the checkpoint.
            tree["trainer"] |= {"batch_warmup_from": 5, "batch_warmup_samples": 50}
            run_dir = frozen_run(tree)
            ranks(2)(whole_run, run_dir)
            sizes = [5, 6, 8, 10, 12, 14]
            assert consumed(run_dir) == list(itertools.accumulate(sizes))
            runs[name, dtype, dropout] = run_dir
        return runs[name, dtype, dropout]

    return run


def consumed(run_dir: Path) -> list[int]:
    """Return the samples that had been consumed after each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [line["samples"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "fp32") for name in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp")),
        # In 16 bits each of these is a class of its own.
        *((name, "bf16") for name in ("zero0", "zero1", "zero3", "fsdp")),
        *(
            pytest.param(name, dtype, marks=pytest.mark.matrix)
            for name in ("zero2_offload", "zero3_offload", "fsdp_grad_op", "fsdp_offload")
            for dtype in ("fp32", "bf16")
        ),
        *(pytest.param(name, "bf16", marks=pytest.mark.matrix) for name in ("ddp", "zero2")),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, dtype: str, uninterrupted: Source, tmp_path: Path, ranks: RanksOf
) -> None:
    source = uninterrupted(name, dtype)
    resumed = interrupted(source, tmp_path / "resumed")
    (said,) = {text for text in ranks(2)(whole_run, resumed) if text}
    assert f"resuming from checkpoint-{SAVED}" in said
    assert curve(resumed) == curve(source)
    assert consumed(resumed) == consumed(source)
    expected = load_file(source / "final/model.safetensors")
    found = load_file(resumed / "final/model.safetensors")
    for tensor_name, tensor in expected.items():
        assert torch.equal(found[tensor_name], tensor), tensor_name
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").open()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert len([s for s in steps if s == 5]) == 1, "a step is in the log twice"


def test_what_comes_by_tokens_and_epochs_keeps_its_rhythm_over_a_resume(
    tiny_tree: TreeOf, frozen_run: Freeze, tmp_path: Path, ranks: RanksOf
) -> None:
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES["zero2"]
    per_sample = tree["data"]["sequence_length"]
    tree["trainer"] |= {"max_steps": STEPS, "batch_warmup_from": 5, "batch_warmup_samples": 50}
    # After 5, 11, 19, 29, 41 and 55 samples.
    tree["trainer"] |= {"log_every_steps": None, "log_every_tokens": 12 * per_sample}
    tree["trainer"] |= {"eval_every_tokens": 20 * per_sample}
    source = frozen_run(tree)
    ranks(2)(whole_run, source)
    assert [line["step"] for line in lines_of(source, "loss")] == [1, 3, 4, 5, 6]
    assert [line["step"] for line in lines_of(source, "eval_loss")] == [4, 5, 6]
    assert [path.name for path in (source / "checkpoints").iterdir()] == [f"checkpoint-{STEPS}"]

    tree["trainer"] |= {"save_every_epochs": math.floor(29e6 / per_epoch(source)) / 1e6}
    saving = frozen_run(tree)
    ranks(2)(whole_run, saving)
    resumed = interrupted(saving, tmp_path / "resumed", step=4)
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(saving) == curve(source)
    assert curve(resumed, "eval_loss") == curve(saving, "eval_loss") == curve(source, "eval_loss")


def per_epoch(run_dir: Path) -> int:
    """Return how many training samples a run has."""
    training = json.loads((run_dir / "data.json").read_text())["training"]
    return int(training["samples_per_epoch"])


def lines_of(run_dir: Path, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [line for line in found if key in line]


def test_a_run_resumed_from_an_older_checkpoint_ends_with_the_same_bits(
    uninterrupted: Source, tmp_path: Path, ranks: RanksOf
) -> None:
    source, run_dir = uninterrupted("zero2", "fp32"), tmp_path / "run"
    shutil.copytree(source, run_dir)
    config = run_config.load(run_dir)
    chosen = resumes.check(run_dir, config, SAVED)
    resumes.write(run_dir, config, [], chosen, SAVED)
    damaged = run_dir / f"checkpoints/checkpoint-{SAVED}/rng-1.pt"
    sound = damaged.read_bytes()
    damaged.write_bytes(bytes(len(sound)))
    with pytest.raises(AssertionError, match=rf"hash .* and --step={SAVED} chose it; restore"):
        ranks(2)(whole_run, run_dir)

    damaged.write_bytes(sound)
    (said,) = {text for text in ranks(2)(whole_run, run_dir) if text}
    assert f"resuming from checkpoint-{SAVED}" in said
    assert consumed(run_dir) == consumed(source)
    assert curve(run_dir) == curve(source)
    final = "final/model.safetensors"
    assert (run_dir / final).read_bytes() == (source / final).read_bytes()
    aside = run_dir / "set-aside/resume-1"
    assert (aside / "metrics.jsonl").read_bytes() == (source / "metrics.jsonl").read_bytes()
    (kept,) = aside.glob("checkpoint-*")
    assert layout.verify(kept) == []

    # What a restart then takes is what was trained since.
    newest = discovery.newest_whole(run_dir / "checkpoints")[0]
    assert newest == run_dir / f"checkpoints/checkpoint-{STEPS}"


@pytest.mark.parametrize(
    ("optimizer", "name", "precision"),
    [
        *(("muon", "ddp", {}), ("muon", "fsdp", {}), ("adafactor", "ddp", {})),
        *(("lion", "zero2", {}), ("sgd", "fsdp", {})),
        ("schedule_free", "zero2", {}),
        *(
            pytest.param("schedule_free", name, precision, marks=pytest.mark.slow)
            for name, precision in (("ddp", {}), ("zero3", {"compute_dtype": "bf16"}), ("fsdp", {}))
        ),
        pytest.param("adamw_8bit", "zero0", {}, marks=needs_torchao),
        *(
            pytest.param("adamw_8bit", *case, marks=[needs_torchao, pytest.mark.slow])
            for case in (("ddp", {}), ("fsdp", {}), ("ddp", PURE_BF16))
        ),
    ],
)
def test_every_optimizer_goes_on_with_the_same_bits(
    optimizer: str,
    name: str,
    precision: dict[str, str],
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("mlm")
    tree["strategy"], tree["precision"] = STRATEGIES[name], precision
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED, **OPTIMIZERS[optimizer]}
    source = frozen_run(tree)
    may_stay = (optimizer, name) == COMPILED_FOR_DTENSORS
    ranks(2)(whole_run, source, threads_may_stay=may_stay)
    resumed = interrupted(source, tmp_path / "resumed")
    ranks(2)(whole_run, resumed, threads_may_stay=may_stay)
    assert curve(resumed) == curve(source)
    assert (resumed / "final/model.safetensors").read_bytes() == (
        source / "final/model.safetensors"
    ).read_bytes()


def matrix() -> list[Any]:
    """Return every ordered pair of strategies; the default suite takes one for each to go on from.

    A hybrid needs four ranks.
    """
    cases = []
    names = list(STRATEGIES)
    for i, before in enumerate(names):
        for j, after in enumerate(names):
            for k, world_size in enumerate((1, 2, 4)):
                if before == "fsdp_hybrid" or (after == "fsdp_hybrid" and world_size != 4):
                    continue
                only_at_4 = after == "fsdp_hybrid"
                sampled = (j - i) % len(names) == 4 and (only_at_4 or k == i % 3)
                marks = () if sampled else pytest.mark.matrix
                cases.append(pytest.param(before, after, world_size, marks=marks))
    return cases


@pytest.mark.parametrize(("before", "after", "world_size"), matrix())
def test_a_run_goes_on_under_another_strategy_and_world_size(
    before: str,
    after: str,
    world_size: int,
    uninterrupted: Source,
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    source = uninterrupted(before, "fp32", dropout=0.0)
    resumed = interrupted(
        source,
        tmp_path / "resumed",
        strategy=STRATEGIES[after],
        launcher__nproc_per_node=world_size,
        model__fused_gelu=True,
    )
    ranks(world_size)(whole_run, resumed)
    assert curve(resumed) == pytest.approx(curve(source), abs=1e-4)
    saved = [json.loads((run / "final/config.json").read_text()) for run in (source, resumed)]
    gelus = [config["activation_function"] for config in saved]
    assert gelus == ["gelu_new", "gelu_pytorch_tanh"]
    assert consumed(resumed) == consumed(source)

    # What the new engine holds before its first step are the bits that the old one wrote.
    untrained = interrupted(
        source,
        tmp_path / "untrained",
        strategy=STRATEGIES[after],
        launcher__nproc_per_node=world_size,
        trainer__max_steps=SAVED,
    )
    ranks(world_size)(restored_and_saved, untrained, tmp_path / "again")
    written = portable.read(source / "checkpoints" / f"checkpoint-{SAVED}")
    held = portable.read(tmp_path / "again")
    for name in held.moments:
        assert torch.equal(held.weights[name].whole(), written.weights[name].whole()), name
        assert held.scalars[name] == written.scalars[name]
        for kind, tensor in written.moments[name].items():
            assert torch.equal(held.moments[name][kind].whole(), tensor.whole()), f"{name} {kind}"
    assert held.moments.keys() == written.moments.keys()


# --- another batch ------------------------------------------------------------------------------

TOKENS, BATCH, LENGTH = 64 * 32, 8, 32


def by_tokens(tree: dict[str, Any], name: str, **trainer: Any) -> dict[str, Any]:
    """Return the tree of a run of 64 samples in 8 steps, whose rate differs at each."""
    tree["checkpoint"] = {"keep_last": 9}
    tree["strategy"] = STRATEGIES[name]
    tree["trainer"] |= {
        **{"max_steps": None, "max_tokens": TOKENS, "global_batch_size": BATCH},
        **{"micro_batch_size": 2, "save_every_steps": SAVED, "warmup_steps": 4},
        **trainer,
    }
    return tree


def rates(run_dir: Path) -> dict[int, float]:
    """Return the learning rate of each step by the samples that had been consumed before it."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    steps = [
        (0, 0.0),
        *((line["samples"], line["learning_rate"]) for line in lines if "loss" in line),
    ]
    return {before: rate for (before, _), (_, rate) in itertools.pairwise(steps)}


@pytest.mark.parametrize("name", ["ddp", "zero0", "zero2", "zero3", "fsdp"])
def test_another_batch_trains_what_was_asked_at_the_rate_of_what_was_consumed(
    name: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    source = frozen_run(by_tokens(tiny_tree("clm"), name))
    ranks(2)(whole_run, source)
    expected = rates(source)
    assert list(expected) == [0, 8, 16, 24, 32, 40, 48, 56]

    larger = interrupted(source, tmp_path / "larger", trainer__global_batch_size=16)
    (said,) = {text for text in ranks(2)(whole_run, larger) if text}
    assert ", 6 steps" in said, "24 samples in three steps, and 40 in as many again"
    found = rates(larger)
    assert list(found) == [0, 8, 16, 24, 40, 56]
    assert found == {samples: expected[samples] for samples in found}


def test_a_second_change_of_batch_counts_what_both_have_consumed(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    tree = by_tokens(tiny_tree("clm"), "ddp", global_batch_size=16, save_every_steps=1)
    source = frozen_run(by_tokens(tiny_tree("clm"), "ddp"))
    ranks(2)(whole_run, source)
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    for batch_size, keep, steps in ((8, 2, 6), (4, 4, 8)):
        for step in range(keep + 1, 9):
            shutil.rmtree(run_dir / f"checkpoints/checkpoint-{step}", ignore_errors=True)
        tree["trainer"]["global_batch_size"] = batch_size
        (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
        (said,) = {text for text in ranks(2)(whole_run, run_dir) if text}
        assert f", {steps} steps" in said
    found = rates(run_dir)
    # Two steps of 16 samples, two of 8, and what is left in steps of 4.
    assert list(found) == [0, 16, 32, 40, 48, 52, 56, 60]
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["samples"], last["tokens"]) == (64, TOKENS)
    # Of the 4 steps of 16 samples that it warms up in, three are done when the others begin.
    peak = max(rates(source).values())
    assert [found[samples] / peak for samples in (0, 16, 32)] == pytest.approx([0, 0.25, 0.5])
    assert found[40] / peak == pytest.approx(40 / 64)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_lines_of_any_length_train_the_tokens_that_were_asked_for(
    objective: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
    ranks: RanksOf,
) -> None:
    tree = by_tokens(tiny_tree(objective), "ddp")
    lines = {"line_by_line": True, "document_attention": True, "unpad": True}
    tree["data"] |= {**lines, "max_cut_fraction": 1, "eval_fraction": 0}
    source = frozen_run(tree)
    ranks(2)(whole_run, source)
    resumed = interrupted(source, tmp_path / "resumed", trainer__global_batch_size=16)
    ranks(2)(whole_run, resumed)
    for run_dir in (source, resumed):
        *_, before, last = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        assert before["tokens"] < TOKENS <= last["tokens"]
        assert last["tokens"] < last["samples"] * LENGTH, "no line is shorter than a sample"
