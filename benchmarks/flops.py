"""The two halves of MFU, as runs count them, and a peak by a device's name alone."""

from __future__ import annotations

from shardwright.train.config import devices
from shardwright.train.model.flops import matmul_parameters, training_flops_per_token

__all__ = ["matmul_parameters", "peak_bf16_flops", "training_flops_per_token"]


def peak_bf16_flops(device_name: str) -> float | None:
    """Return a device's dense bf16 peak in FLOP/s by its CUDA name; None where it is not known."""
    return devices.peak_flops(device_name, "bf16")
