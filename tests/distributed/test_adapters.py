"""Adapters on real ranks: trained, exported alone and merged, resumed and recovered."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.live_engine import held_and_peak
from shardwright.launchers.plan.states import states
from shardwright.train.config import load
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

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {
        "kind": "lora",
        "rank": 4,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["lm_head"],
    },
    "dora": {"kind": "dora", "rank": 2, "target_modules": "all-linear"},
    "ia3": {"kind": "ia3"},
}
EVERYWHERE = ("single", "ddp", "zero0", "zero1", "zero2", "zero3_nothing_kept", "fsdp")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(small_llama(), tmp_path / "base")


@pytest.fixture
def run_of(base: Path, tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    def freeze(adapter: str, strategy: str, /, **sections: Any) -> Path:
        tree = tiny_tree("clm")
        tree["model"] = {"kind": "pretrained", "name": str(base)}
        tree["tokenizer"] = {"kind": "pretrained", "name": str(base)}
        tree["adapter"] = ADAPTERS[adapter]
        tree["strategy"] = STRATEGIES[strategy]
        tree["launcher"]["nproc_per_node"] = world_size(strategy)
        tree["trainer"] |= {"max_steps": 6, "save_every_steps": 3, "learning_rate": 0.02}
        for name, values in sections.items():
            tree[name] |= values
        return frozen_run(tree)

    return freeze


def world_size(strategy: str) -> int:
    return 1 if strategy == "single" else 2


def check(
    run: Path, strategy: str, base: Path, ranks: RanksOf, tmp_path: Path, *, rounded: bool = False
) -> None:
    """Train, and look at all that comes of it."""
    said, *_ = ranks(world_size(strategy))(whole_run, run)
    assert "are trained" in said
    final = run / "final"
    begun, merged = (load_file(d / "model.safetensors") for d in (base, final))
    assert begun.keys() == merged.keys()
    changed = {name for name, tensor in begun.items() if not torch.equal(tensor, merged[name])}
    if not rounded:
        assert not any("norm" in name or "embed" in name for name in changed)
    assert any("down_proj" in name for name in changed)

    # What peft makes of its own files is what is merged here, and what was trained.
    ids = torch.arange(5, 25)[None]
    with_adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), final / "adapter"
    )
    whole = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        expected, found = with_adapter(ids).logits, whole(ids).logits
    torch.testing.assert_close(found, expected, atol=5e-2 if rounded else 2e-5, rtol=1e-4)
    if not rounded:
        for name, tensor in with_adapter.merge_and_unload().state_dict().items():
            torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)

    # The same out of the checkpoint alone.
    recover(Options(source=run, out=tmp_path / "out"), io.StringIO(), io.StringIO())
    assert read(tmp_path / "out") == read(final)

    # And a run that is interrupted comes to the same bits.
    again = interrupted(run, tmp_path / "resumed")
    ranks(world_size(strategy))(whole_run, again)
    assert read(again / "final") == read(final)
    assert read(again / "final" / "adapter", "adapter_model") == read(
        final / "adapter", "adapter_model"
    )
    assert curve(again)[-3:] == curve(run)[-3:]


def read(directory: Path, name: str = "model") -> bytes:
    return (directory / f"{name}.safetensors").read_bytes()


def test_lora_is_trained_exported_recovered_and_resumed(
    base: Path, run_of: Callable[..., Path], ranks: RanksOf, tmp_path: Path
) -> None:
    run = run_of("lora", "zero2")
    check(run, "zero2", base, ranks, tmp_path)
    facts = json.loads((run / "engine.json").read_text())
    assert facts["adapter"] == "lora"
    assert facts["adapter_ranks"] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EVERYWHERE)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_adapter_under_each_engine(
    adapter: str,
    strategy: str,
    base: Path,
    run_of: Callable[..., Path],
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    check(run_of(adapter, strategy), strategy, base, ranks, tmp_path)


_USED_ONCE = {"max_live_elements": 1, "max_reuse_distance_elements": 1}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_engine_learns_the_same(
    adapter: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    runs = {
        "ddp": run_of(adapter, "ddp"),
        "zero2": run_of(adapter, "zero2"),
        # Each weight is gathered for its own layer alone, beside which DoRA reads it once more.
        "zero3": run_of(adapter, "zero3_nothing_kept", strategy=_USED_ONCE),
        "fsdp": run_of(adapter, "fsdp"),
    }
    for run in runs.values():
        ranks(2)(whole_run, run)
    for run in runs.values():
        assert curve(run) == pytest.approx(curve(runs["ddp"]), rel=1e-5)
        assert curve(run, "grad_norm") == pytest.approx(curve(runs["ddp"], "grad_norm"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3_nothing_kept", "fsdp", "ddp"])
def test_in_bf16_only_what_is_trained_has_master_weights(
    strategy: str, base: Path, run_of: Callable[..., Path], ranks: RanksOf, tmp_path: Path
) -> None:
    run = run_of("lora", strategy, precision={"compute_dtype": "bf16"})
    check(run, strategy, base, ranks, tmp_path, rounded=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_pass_through_blocks_that_are_computed_again(
    strategy: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    plain = run_of("lora", strategy)
    again = run_of("lora", strategy, trainer={"checkpoint_activations_every_blocks": 1})
    for run in (plain, again):
        ranks(2)(whole_run, run)
    assert curve(again) == curve(plain)
    assert curve(again, "grad_norm") == curve(plain, "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["single", "ddp", "zero1", "zero2", "zero3_nothing_kept", "fsdp"]
)
def test_a_plan_is_what_the_live_engine_holds(
    strategy: str, run_of: Callable[..., Path], ranks: RanksOf
) -> None:
    precision = {} if strategy == "single" else {"compute_dtype": "bf16"}
    run = run_of(
        "lora",
        strategy,
        precision=precision,
        data={"sequence_length": 64},
        # Two micro-batches a step: between them the gradients are held.
        trainer={"global_batch_size": 8 * world_size(strategy), "micro_batch_size": 4},
    )
    config = load(run)
    held = ranks(world_size(strategy))(held_and_peak, run, threads_may_stay=True)
    measured = {kind: max(rank[kind] for rank in held) for kind in held[0]}
    model = planned(config)
    config = fitted(config, model)  # by which engines size their buckets
    found = states(config, facts_of(model, config)).device
    buckets = 0 if strategy == "ddp" else found.buckets
    assert found.weights == pytest.approx(measured["parameters"], rel=0.02)
    assert found.gradients + buckets == pytest.approx(measured["gradients"], rel=0.02)
    assert found.optimizer == pytest.approx(measured["optimizer"], rel=0.02)
