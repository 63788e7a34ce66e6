"""Where sums in float64 are kept: beside what is added up, or in host memory for an Apple GPU."""

from __future__ import annotations

import torch


def device_of_sums(device: torch.device) -> torch.device:
    """Return where a tensor in float64 can lie: on the device, but for MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def doubled(values: torch.Tensor) -> torch.Tensor:
    """Return values in float64, where that can lie; of an Apple GPU the host waits for them."""
    # Moved first: torch would cast on the device that they come from.
    return values.to(device_of_sums(values.device)).double()
