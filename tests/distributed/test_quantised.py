"""Adapters beside quantised weights on real ranks: trained, resumed, exported and recovered."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.live_engine import held_and_peak
from shardwright.launchers.plan.states import states
from shardwright.train.checkpoint.format.layout import read_manifest
from shardwright.train.checkpoint.read import portable
from shardwright.train.config import load
from shardwright.train.errors import UserError
from shardwright.train.export.recover import Options, recover
from shardwright.train.model.build import fitted
from shardwright.train.plan.model import facts_of, planned
from tests.distributed.curves import curve
from tests.distributed.interrupted import interrupted
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES
from tests.unit.saved_models import save, small_llama

pytestmark = pytest.mark.distributed

LORA: dict[str, Any] = {
    "kind": "lora",
    "rank": 4,
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["lm_head"],
}
IA3: dict[str, Any] = {"kind": "ia3"}
BF16 = {"compute_dtype": "bf16"}
EVERYWHERE = (
    *("single", "ddp", "zero0", "zero1", "zero2", "zero2_offload"),
    *("fsdp", "fsdp_grad_op", "fsdp_offload", "fsdp_by_size"),
)
TRAINED = (".lora_", ".ia3_", ".modules_to_save.")
KINDS = {"4bit": ["nf4 by 64"], "8bit": ["int8 by rows"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(small_llama(), tmp_path / "base")


@pytest.fixture
def run_of(base: Path, tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    def freeze(
        bits: str, strategy: str, adapter: dict[str, Any] = LORA, /, **sections: Any
    ) -> Path:
        tree = tiny_tree("clm")
        tree["model"] = {"kind": "pretrained", "name": str(base), "quantization": bits}
        tree["tokenizer"] = {"kind": "pretrained", "name": str(base)}
        tree["adapter"] = adapter
        tree["strategy"] = STRATEGIES[strategy]
        tree["launcher"]["nproc_per_node"] = world_size(strategy)
        tree["trainer"] |= {"max_steps": 6, "save_every_steps": 3, "learning_rate": 0.02}
        for name, values in sections.items():
            tree[name] |= values
        return frozen_run(tree)

    return freeze


def world_size(strategy: str) -> int:
    return 1 if strategy == "single" else 2


def check(run: Path, bits: str, strategy: str, base: Path, ranks: RanksOf, tmp_path: Path) -> None:
    """Train, and look at all that comes of it."""
    ranks(world_size(strategy))(whole_run, run)
    losses, final = curve(run), run / "final"
    assert losses[-1] < losses[0]
    facts = json.loads((run / "engine.json").read_text())
    assert (facts["packed_weights"], facts["trained_packed_weights"]) == (KINDS[bits], [])

    # Of the base there is nothing in a checkpoint but what it is called, and its hash.
    checkpoint = run / "checkpoints" / "checkpoint-6"
    manifest = read_manifest(checkpoint)
    assert manifest.base is not None
    assert manifest.base.name == str(base)
    held = portable.read(checkpoint).weights
    assert held
    assert [name for name in held if not any(part in name for part in TRAINED)] == []

    # What peft makes of the base as it was and of its own files is what is merged here.
    merged = load_file(final / "model.safetensors")
    with_adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), final / "adapter"
    )
    for name, tensor in with_adapter.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)
    begun = load_file(base / "model.safetensors")
    assert torch.equal(begun["model.norm.weight"], merged["model.norm.weight"])

    # The same out of the checkpoint and the base.
    recover(Options(source=run, out=tmp_path / "out"), io.StringIO(), io.StringIO())
    assert read(tmp_path / "out") == read(final)

    # And a run that is interrupted comes to the same bits.
    again = interrupted(run, tmp_path / "resumed")
    ranks(world_size(strategy))(whole_run, again)
    assert read(again / "final") == read(final)
    assert curve(again)[-3:] == losses[-3:]


def read(directory: Path, name: str = "model") -> bytes:
    return (directory / f"{name}.safetensors").read_bytes()


def test_lora_beside_four_bits_is_trained_exported_recovered_and_resumed(
    base: Path, run_of: Callable[..., Path], ranks: RanksOf, tmp_path: Path
) -> None:
    check(run_of("4bit", "fsdp", precision=BF16), "4bit", "fsdp", base, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("bits", KINDS)
def test_lora_beside_each_kind_under_each_engine(
    bits: str,
    strategy: str,
    precision: dict[str, Any],
    base: Path,
    run_of: Callable[..., Path],
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    run = run_of(bits, strategy, precision=precision)
    check(run, bits, strategy, base, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
@pytest.mark.parametrize("bits", KINDS)
def test_ia3_beside_each_kind(
    bits: str,
    strategy: str,
    base: Path,
    run_of: Callable[..., Path],
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    check(run_of(bits, strategy, IA3, precision=BF16), bits, strategy, base, ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bits", KINDS)
def test_each_engine_learns_the_same(
    bits: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    runs = {each: run_of(bits, each) for each in ("ddp", "zero2", "fsdp")}
    for run in runs.values():
        ranks(2)(whole_run, run)
    for run in runs.values():
        assert curve(run) == pytest.approx(curve(runs["ddp"]), rel=1e-5)
        assert curve(run, "grad_norm") == pytest.approx(curve(runs["ddp"], "grad_norm"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "zero2", "fsdp"])
def test_a_run_follows_its_base_and_refuses_another(
    strategy: str, base: Path, run_of: Callable[..., Path], ranks: RanksOf, tmp_path: Path
) -> None:
    run = run_of("4bit", strategy)
    ranks(world_size(strategy))(whole_run, run)
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    told = io.StringIO()
    with pytest.raises(UserError, match="by --base, or --adapter to take the adapter alone"):
        recover(Options(source=run, out=tmp_path / "a"), told, told)
    recover(Options(source=run, out=tmp_path / "b", base=moved), told, told)
    assert read(tmp_path / "b") == read(run / "final")
    recover(Options(source=run, out=tmp_path / "c", adapter=True), told, told)
    assert read(tmp_path / "c", "adapter_model") == read(run / "final/adapter", "adapter_model")
    with pytest.raises(UserError, match="^--adapter reads nothing of --base="):
        recover(Options(source=run, out=tmp_path / "d", adapter=True, base=moved), told, told)

    # Other weights under the old name: nothing continues beside them.
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(moved))
    shutil.copytree(moved, base)
    other.save_pretrained(base)
    with pytest.raises(UserError, match="their values have another hash"):
        recover(Options(source=run, out=tmp_path / "e"), told, told)
    again = interrupted(run, tmp_path / "resumed")
    with pytest.raises(Exception, match="their values have another hash"):
        ranks(world_size(strategy))(whole_run, again)


@pytest.mark.slow
def test_a_run_begins_with_the_checkpoint_of_another(
    run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    first = run_of("8bit", "single")
    ranks(1)(whole_run, first)
    second = run_of(
        "none",
        "single",
        model={"name": str(first / "checkpoints/checkpoint-6"), "quantization": "none"},
        trainer={"max_steps": 1},
    )
    ranks(1)(whole_run, second)
    final = load_file(second / "final/model.safetensors")
    begun = load_file(first / "final/model.safetensors")
    assert torch.equal(final["model.norm.weight"], begun["model.norm.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("bits", KINDS)
def test_blocks_that_are_computed_again_learn_the_same(
    bits: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    plain = run_of(bits, "ddp")
    again = run_of(bits, "ddp", trainer={"checkpoint_activations_every_blocks": 1})
    for run in (plain, again):
        ranks(2)(whole_run, run)
    assert curve(again) == curve(plain)
    assert curve(again, "grad_norm") == curve(plain, "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "zero0", "zero1", "zero2", "fsdp"])
def test_a_plan_is_what_the_live_engine_holds(
    bits: str, strategy: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    run = run_of(
        bits,
        strategy,
        precision=BF16,
        data={"sequence_length": 64},
        # Two micro-batches a step: between them the gradients are held.
        trainer={"global_batch_size": 8 * world_size(strategy), "micro_batch_size": 4},
    )
    config = load(run)
    held = ranks(world_size(strategy))(held_and_peak, run, threads_may_stay=True)
    measured = {kind: max(rank[kind] for rank in held) for kind in held[0]}
    model = planned(config)
    config = fitted(config, model)
    found = states(config, facts_of(model, config)).device
    buckets = 0 if strategy == "ddp" else found.buckets
    assert found.weights == pytest.approx(measured["parameters"], rel=0.02)
    assert found.gradients + buckets == pytest.approx(measured["gradients"], rel=0.02)
    assert found.optimizer == pytest.approx(measured["optimizer"], rel=0.02)
