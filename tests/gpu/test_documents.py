"""By a GPU's kernels a document is what it is where attention is written down; by a CPU's, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device

from shardwright.train.config import documents, load
from shardwright.train.model.document_attention import PREFIX
from tests.distributed.curves import curve
from tests.distributed.jobs import whole_run
from tests.distributed.pool import Ranks
from tests.documents import LENGTHS, SHAPE, bounds, model_of, outcome, tokens
from tests.fixtures import Freeze, TreeOf

ON_GPU = [
    pytest.param("cuda", "varlen", marks=pytest.mark.gpu),
    pytest.param("cuda", "sdpa", marks=pytest.mark.gpu),
]


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def in_16_bits(kind: str, device: torch.device, kernel: documents.Kernel) -> Outcome:
    """Return logits and gradients of a model of bf16."""
    model: Any = model_of(kind)
    model.to(device, torch.bfloat16)
    model.config._attn_implementation = PREFIX + kernel
    form = {"varlen": "bounds", "sdpa": "slots", "eager": "numbers"}[kernel]
    told = bounds(kind, form).of(np.array(LENGTHS), SHAPE)
    arguments = send_to_device(told, device)
    ids = tokens().to(device)
    return outcome(model, lambda: model(ids, **arguments).logits.flatten(0, 1).float())


@pytest.mark.parametrize(("device", "kernel"), [*ON_GPU, ("cpu", "sdpa")])
@pytest.mark.parametrize("kind", ["roberta", "modernbert", "gpt2", "llama"])
def test_kernels_agree_in_16_bits(kind: str, device: str, kernel: documents.Kernel) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine shows no GPU")
    logits, gradients = in_16_bits(kind, torch.device(device), kernel)
    expected, of_each = in_16_bits(kind, torch.device(device), "eager")
    # bf16 has 8 bits of mantissa, and three blocks add up their rounding.
    assert (logits - expected).norm() < 0.03 * expected.norm()
    # That of a key's bias is 0 but for rounding.
    least = 0.01 * max(float(gradient.norm()) for gradient in of_each.values())
    for parameter, gradient in of_each.items():
        assert (gradients[parameter] - gradient).norm() < 0.1 * gradient.norm() + least, parameter


@pytest.mark.parametrize("by_line", [False, True])
@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        pytest.param("cuda", "varlen", marks=pytest.mark.gpu),
        pytest.param("cpu", "sdpa", marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
def test_a_run_learns_what_it_learns_on_a_cpu_where_attention_is_written_down(
    device: str,
    kernel: documents.Kernel,
    by_line: bool,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    rank_on: Callable[[str], Ranks],
    skip_where_lacking: Callable[..., None],
) -> None:
    curves = []
    for where, dtype, attention in ((device, "bf16", "auto"), ("cpu", "fp32", "eager")):
        tree = tiny_tree("mlm")
        tree["strategy"] = {"kind": "single"}
        tree["launcher"] |= {"device": where, "nproc_per_node": 1}
        tree["precision"] = {"compute_dtype": dtype}
        tree["model"]["attention"] = attention
        lines = {"line_by_line": by_line, "unpad": by_line, "max_cut_fraction": 1}
        tree["data"] |= {**lines, "document_attention": True}
        run_dir = frozen_run(tree)
        skip_where_lacking(where, load(run_dir).precision)
        rank_on(where)(whole_run, run_dir)
        curves.append(curve(run_dir))
        facts = json.loads((run_dir / "engine.json").read_text())
        assert facts["attention"] == (kernel if attention == "auto" else attention)
        assert facts["seen_of_other_documents"] == 0
    # bf16 has 8 bits of mantissa: one part in 256 of a loss of about 6, averaged over its labels.
    assert curves[0] == pytest.approx(curves[1], abs=5e-3)
