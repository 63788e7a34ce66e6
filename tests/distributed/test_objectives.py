"""What is to be predicted on real ranks: the same for every split of a batch and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
