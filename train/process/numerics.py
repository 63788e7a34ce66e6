"""How this process computes: TF32 in the products of fp32 or not."""

from __future__ import annotations

import warnings

import torch


def set_tf32(allowed: bool) -> None:
    """Let products of fp32 on a GPU run in TF32, or not, by every name that torch has for it.

    transformers (5.23, enable_tf32) sets the newest name alone. The older ones then contradict it,
    and torch (2.9 to 2.13, aten/Context.cpp) raises where they are read: its compiler does so
    (2.13 inductor/select_algorithm.py, create_precompile_key; earlier in compile_fx.py, too).
    """
    with warnings.catch_warnings():
        # That they are older, which some versions say.
        warnings.filterwarnings("ignore", message=".*TF32")
        torch.backends.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
