"""What is to be predicted on real ranks: the same for every split of a batch and after a resume."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from shardwright.train.export.recover import Options, recover
from tests.distributed.curves import curve
from tests.distributed.interrupted import SAVED, STEPS, interrupted
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed


def same_bits(run_dir: Path, other: Path) -> bool:
    found, expected = (load_file(d / "final/model.safetensors") for d in (run_dir, other))
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.slow
def test_a_rate_that_falls_is_that_of_each_step_also_after_a_resume(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    tree: dict[str, Any] = tiny_tree("mlm")
    tree["objective"] |= {"masking_rate": 0.6, "masking_rate_final": 0.1}
    tree["strategy"], tree["data"]["eval_fraction"] = STRATEGIES["zero2"], 0.0
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED}
    tree["trainer"] |= {"batch_warmup_from": 5, "batch_warmup_samples": 50}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    rates = curve(run_dir, "masking_rate")
    assert rates == pytest.approx([0.6 - 0.5 * step / STEPS for step in range(STEPS)])

    resumed = interrupted(run_dir, tmp_path / "resumed")
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(run_dir)
    assert curve(resumed, "masking_rate") == rates
    assert same_bits(resumed, run_dir)


def test_diffusion_learns_alike_however_a_batch_is_split_and_after_a_resume(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    tree: dict[str, Any] = tiny_tree("diffusion")
    tree["objective"] |= {"label_smoothing": 0.1, "z_loss": 1e-3}
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED, "eval_every_steps": SAVED}
    tree["data"] |= {"document_attention": True}

    plain: dict[str, Any] = {**tree, "launcher": {**tree["launcher"], "nproc_per_node": 1}}
    plain["objective"] = {**tree["objective"], "head_on_labels_only": False}
    plain["strategy"] = {"kind": "single"}
    plain["trainer"] = {**tree["trainer"], "fused_loss": False, "micro_batch_size": 16}
    alone = frozen_run(plain)
    ranks(1)(whole_run, alone)

    tree["strategy"] = STRATEGIES["zero2"]
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert curve(run_dir, name) == pytest.approx(curve(alone, name), rel=2e-5), name
    assert len(curve(run_dir, "eval_bits_per_byte")) == STEPS // SAVED

    resumed = interrupted(run_dir, tmp_path / "resumed")
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(run_dir)
    assert same_bits(resumed, run_dir)


T5_STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def of_spans(tiny_tree: TreeOf) -> dict[str, Any]:
    """Return a run of a small T5 that saves and evaluates halfway."""
    tree: dict[str, Any] = tiny_tree("span_corruption")
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED, "eval_every_steps": SAVED}
    return tree


def spans_alone(tree: dict[str, Any], frozen_run: Freeze, ranks: RanksOf) -> Path:
    """Train the same on one rank, in one micro-batch, with all logits at once."""
    plain: dict[str, Any] = {**tree, "launcher": {**tree["launcher"], "nproc_per_node": 1}}
    plain["strategy"] = STRATEGIES["single"]
    plain["trainer"] = {**tree["trainer"], "fused_loss": False, "micro_batch_size": 16}
    alone = frozen_run(plain)
    ranks(1)(whole_run, alone)
    return alone


def test_spans_are_learned_alike_however_a_batch_is_split_and_after_a_resume(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    tree = of_spans(tiny_tree)
    tree["objective"] |= {"label_smoothing": 0.1, "z_loss": 1e-3, "prompts": ["a<extra_id_0>b"]}
    alone = spans_alone(tree, frozen_run, ranks)

    tree["strategy"] = STRATEGIES["zero2"]
    run_dir = frozen_run(tree)
    said, *_ = ranks(2)(whole_run, run_dir)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert curve(run_dir, name) == pytest.approx(curve(alone, name), rel=2e-5), name
    assert not curve(run_dir, "eval_bits_per_byte"), "what is read of a text is no code of it"
    # A sample has 32 tokens that are read and 8 that are written.
    assert curve(run_dir, "tokens")[-1] == STEPS * 16 * (32 + 8)
    assert "a<extra_id_0>b" in said

    loaded = AutoModelForSeq2SeqLM.from_pretrained(run_dir / "final")
    assert type(loaded).__name__ == "T5ForConditionalGeneration"
    assert loaded.config.decoder_start_token_id == loaded.generation_config.pad_token_id == 1

    resumed = interrupted(run_dir, tmp_path / "resumed")
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(run_dir)
    assert same_bits(resumed, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", T5_STRATEGIES)
@pytest.mark.parametrize("every_blocks", [None, 1])
def test_spans_are_learned_alike_under_each_engine(
    strategy: str,
    every_blocks: int | None,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    tree = of_spans(tiny_tree)
    alone = spans_alone(tree, frozen_run, ranks)
    tree["strategy"] = STRATEGIES[strategy]
    tree["trainer"] |= {"checkpoint_activations_every_blocks": every_blocks}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert curve(run_dir, name) == pytest.approx(curve(alone, name), rel=2e-5), name

    resumed = interrupted(run_dir, tmp_path / "resumed")
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(run_dir)
    assert same_bits(resumed, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3_nothing_kept", "fsdp"])
def test_spans_in_bf16_are_resumed_exported_and_recovered_to_the_same_bits(
    strategy: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, tmp_path: Path
) -> None:
    tree = of_spans(tiny_tree)
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], {"compute_dtype": "bf16"}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    assert curve(run_dir)[-1] < curve(run_dir)[0]

    weights = load_file(run_dir / "final/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(run_dir / "final").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())

    recover(Options(source=run_dir, out=tmp_path / "out"), io.StringIO(), io.StringIO())
    resumed = interrupted(run_dir, tmp_path / "resumed")
    ranks(2)(whole_run, resumed)
    assert curve(resumed) == curve(run_dir)
    assert curve(resumed, "eval_loss") == curve(run_dir, "eval_loss")
    written = (run_dir / "final/model.safetensors").read_bytes()
    for other in (tmp_path / "out", resumed / "final"):
        assert (other / "model.safetensors").read_bytes() == written
