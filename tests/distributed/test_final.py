"""final/ holds whole fp32 weights, whatever trained them, and `from_pretrained` finds them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from shardwright.train.export.card import Card
from shardwright.train.export.final import export
from shardwright.train.loop.trainer import Trainer
from tests.distributed.jobs import trained, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

Pools = RanksOf
Tensors = dict[str, torch.Tensor]

NAMES = ("ddp", "zero0", "zero1", "zero2", "zero2_round_robin", "zero3", "fsdp")


@pytest.fixture
def run_of(tiny_tree: TreeOf, frozen_run: Freeze) -> Callable[..., Path]:
    """Return a function that freezes three steps with a learning rate that moves the weights."""

    def freeze(
        strategy: dict[str, Any], objective: str, dtype: str = "fp32", world_size: int = 2
    ) -> Path:
        tree = tiny_tree(objective)
        tree["strategy"] = strategy
        tree["precision"] = {"compute_dtype": dtype}
        tree["launcher"]["nproc_per_node"] = world_size
        # Keys' biases have no gradient but rounding errors, which Adam would scale up to whole
        # steps of either sign; beside this epsilon they stay what they are.
        tree["trainer"] |= {"max_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
        return frozen_run(tree)

    return freeze


@pytest.fixture(scope="module")
def known() -> dict[str, Tensors]:
    """Return what `one_rank_weights` has trained already, by objective."""
    return {}


@pytest.fixture
def one_rank_weights(
    run_of: Callable[..., Path], ranks: Pools, known: dict[str, Tensors]
) -> Callable[[str], Tensors]:
    """Return a function from an objective to the weights that one rank alone ends with in fp32."""

    def weights(objective: str) -> Tensors:
        if objective not in known:
            run_dir = run_of({"kind": "single"}, objective, world_size=1)
            ranks(1)(trained, run_dir, export_and_infer)
            known[objective] = safetensors_of(run_dir / "final")
        return known[objective]

    return weights


def export_and_infer(trainer: Trainer) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """Write final/; return a batch of this rank and what the live engine makes of it."""
    export(trainer, lambda: Card(""))
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    del batch["labels"]
    trainer.model_wrapped.eval()
    with torch.no_grad():
        logits = trainer.model_wrapped(**batch).logits.float()
    return {name: tensor.numpy() for name, tensor in batch.items()}, logits.numpy()


def safetensors_of(final: Path) -> Tensors:
    return {k: v for f in sorted(final.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("strategy", NAMES)
def test_fp32_runs_end_in_the_same_weights_under_every_strategy(
    strategy: str,
    run_of: Callable[..., Path],
    ranks: Pools,
    one_rank_weights: Callable[[str], Tensors],
) -> None:
    run_dir = run_of(STRATEGIES[strategy], "clm")
    seen = ranks(2)(trained, run_dir, export_and_infer)

    weights = safetensors_of(run_dir / "final")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    torch.testing.assert_close(weights, one_rank_weights("clm"), rtol=0, atol=1e-5)

    loaded: Any = AutoModelForCausalLM.from_pretrained(run_dir / "final", output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.config.architectures == [type(model).__name__]
    assert_tied_weights_are_there_once(model, weights)
    for batch, logits in seen:
        torch.testing.assert_close(infer(model, batch), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", NAMES)
def test_bf16_runs_end_in_their_fp32_master_weights(
    strategy: str,
    run_of: Callable[..., Path],
    ranks: Pools,
    one_rank_weights: Callable[[str], Tensors],
) -> None:
    run_dir = run_of(STRATEGIES[strategy], "mlm", "bf16")
    seen = ranks(2)(trained, run_dir, export_and_infer)

    weights = safetensors_of(run_dir / "final")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for name, tensor in weights.items():
        rounded = tensor.bfloat16().float()
        assert not torch.equal(tensor, rounded), f"{name} is no more than bf16, written as fp32"
    # Three steps move a weight by up to 0.02.
    torch.testing.assert_close(weights, one_rank_weights("mlm"), rtol=0, atol=6e-3)

    model = AutoModelForMaskedLM.from_pretrained(run_dir / "final")
    assert_tied_weights_are_there_once(model, weights)
    for batch, logits in seen:
        torch.testing.assert_close(infer(model, batch), logits, rtol=0, atol=2e-2)


def assert_tied_weights_are_there_once(model: PreTrainedModel, weights: Tensors) -> None:
    assert set(weights) == {name for name, _ in model.named_parameters()}
    head = model.get_output_embeddings()
    assert head is not None
    assert head.weight is model.get_input_embeddings().weight


def infer(model: PreTrainedModel, batch: dict[str, NDArray[Any]]) -> NDArray[Any]:
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits.numpy()


def test_run_that_holds_nothing_out_ends_with_a_model_too(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: Pools,
) -> None:
    tree = tiny_tree("clm")
    tree["data"]["eval_fraction"] = 0.0
    tree["trainer"]["max_steps"] = 2
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) & {"loss", "eval_loss"} for line in lines] == [{"loss"}, {"loss"}]
    assert "held-out" not in (run_dir / "final" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(run_dir / "final")


MAX_SHARD_BYTES = 20_000


def export_twice(trainer: Trainer) -> None:
    """Leave final/ in small shards, and whole/ beside it in one file."""
    final = export(trainer, lambda: Card(""))
    if trainer.is_world_process_zero():
        final.rename(final.with_name("whole"))
    export(trainer, lambda: Card(""), max_shard_bytes=MAX_SHARD_BYTES)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp"])
def test_small_shards_load_to_the_same_model(
    strategy: str, run_of: Callable[..., Path], ranks: Pools
) -> None:
    run_dir = run_of(STRATEGIES[strategy], "mlm")
    ranks(2)(trained, run_dir, export_twice)

    final = run_dir / "final"
    files = sorted(final.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((final / "model.safetensors.index.json").read_text())
    place: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            place |= dict.fromkeys(shard.keys(), file.name)
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= MAX_SHARD_BYTES or len(sizes) == 1
    assert index["weight_map"] == place
    tensors = safetensors_of(final)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())

    sharded = AutoModelForMaskedLM.from_pretrained(final).state_dict()
    whole = AutoModelForMaskedLM.from_pretrained(run_dir / "whole").state_dict()
    torch.testing.assert_close(sharded, whole, rtol=0, atol=0)
    torch.testing.assert_close(tensors, safetensors_of(run_dir / "whole"), rtol=0, atol=0)


POISONED = "transformer.h.1.mlp.c_fc.weight"


def export_with_a_nan(trainer: Trainer) -> str:
    """Return the message of an export that must not succeed."""
    parameter = trainer.model.get_parameter(POISONED)
    if trainer.config.strategy.kind == "zero":
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        master = safe_get_full_fp32_param(parameter).clone()
        master[3, 5] = float("nan")
        safe_set_full_fp32_param(parameter, master)
    else:
        local = getattr(parameter, "to_local", lambda: parameter)()
        with torch.no_grad():
            local[3, 5] = float("nan")
    with pytest.raises(FloatingPointError) as caught:
        export(trainer, lambda: Card(""))
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp"])
def test_weights_that_are_not_finite_are_named_and_not_written(
    strategy: str, run_of: Callable[..., Path], ranks: Pools
) -> None:
    run_dir = run_of(STRATEGIES[strategy], "clm")
    messages = ranks(2)(trained, run_dir, export_with_a_nan)
    text = f"{POISONED} holds NaN or infinity; final/ is not written, the checkpoints remain"
    assert messages == [text] * 2
    assert not [path for path in run_dir.iterdir() if "final" in path.name]
