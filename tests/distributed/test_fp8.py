"""fp8 products in the blocks, on torchao's emulation: nothing here needs a GPU, nor shows speed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardwright.train.loop.trainer import Trainer
from tests.distributed.curves import curve
from tests.distributed.jobs import trained, trained_in_emulated_fp8
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytest.importorskip("torchao", reason="precision=fp8 needs the extra torchao")
pytestmark = pytest.mark.distributed


LLAMA = {
    "kind": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    # Multiples of 16 but for the MLP, whose three layers are left out in each block.
    "intermediate_size": 72,
    "max_position_embeddings": 64,
}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]


def llama_tree(tiny_tree: TreeOf, strategy: str, recipe: str | None) -> dict[str, Any]:
    tree = tiny_tree("clm")
    tree["model"] = LLAMA
    tree["strategy"] = STRATEGIES[strategy]
    tree["precision"] = {"compute_dtype": "bf16", "fp8_recipe": recipe}
    tree["trainer"]["max_steps"] = 10
    return tree


def parameter_names(trainer: Trainer) -> list[str]:
    return [name for name, _ in trainer.model.named_parameters()]


@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [
        ("ddp", "tensorwise"),
        ("ddp", "rowwise"),
        # Not by row with high-precision gradients: torchao follows the GPU's autocast alone, so
        # that on a CPU the product of these gradients gets two dtypes.
        ("zero2", "tensorwise"),
        ("zero2", "rowwise_with_gw_hp"),
        ("fsdp", "tensorwise"),
        ("fsdp", "rowwise"),
        ("fsdp", "rowwise_with_gw_hp"),
    ],
)
def test_the_blocks_layers_multiply_in_fp8_and_the_loss_stays_near_bf16(
    strategy: str, recipe: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    bf16 = frozen_run(llama_tree(tiny_tree, strategy, None))
    names = ranks(2)(trained, bf16, parameter_names)[0]
    run_dir = frozen_run(llama_tree(tiny_tree, strategy, recipe))

    seen = ranks(2)(trained_in_emulated_fp8, run_dir)[0]

    assert seen["fp8_layers"] == [
        f"model.layers.{i}.{name}" for i in range(2) for name in ATTENTION
    ]
    assert seen["parameters"] == names
    # e4m3 keeps 4 bits of mantissa, bf16 8; roundings average out in a loss near 6.
    assert curve(run_dir) == pytest.approx(curve(bf16), abs=5e-3)
    assert curve(run_dir) != curve(bf16), "nothing ran in fp8"

    facts = json.loads((run_dir / "engine.json").read_text())
    assert facts["fp8_recipe"] == recipe
    assert (facts["fp8_layers"], facts["fp8_layers_left_out"]) == (8, 6)


def test_recomputing_blocks_changes_nothing(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    curves = []
    for every_blocks in (None, 1):
        tree = llama_tree(tiny_tree, "fsdp", "tensorwise")
        tree["trainer"] |= {"max_steps": 4, "checkpoint_activations_every_blocks": every_blocks}
        run_dir = frozen_run(tree)
        ranks(2)(trained_in_emulated_fp8, run_dir)
        curves.append((curve(run_dir), curve(run_dir, "grad_norm")))
    assert curves[0] == curves[1]
