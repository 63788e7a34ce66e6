"""How fast a device is at what training asks of it: a block's step by dtype, and its memories."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

REPEATS = 5


@dataclass(frozen=True)
class Speeds:
    """What one device reached while all others of its node were at the same."""

    training: dict[str, float]
    """FLOP/s of a transformer block, forward and backward, by dtype as hardware calls it."""
    memory: float
    """Bytes a second that a copy reads and writes."""
    host_link: float | None = None
    """Bytes a second from page-locked host memory to the device; None on a CPU."""


def speeds(device: torch.device) -> Speeds:
    """Measure one device, for a few seconds."""
    on_gpu = device.type == "cuda"
    return Speeds(
        training={dtype: _training(device, dtype) for dtype in _dtypes(device)},
        memory=_memory(device),
        host_link=_host_link(device) if on_gpu else None,
    )


def _dtypes(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("fp32", "bf16")
    is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
    return ("fp32", "tf32", "bf16", "fp16") if is_recent else ("fp32", "fp16")


_TORCH = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def _training(device: torch.device, dtype: str) -> float:
    """Return the FLOP/s of a block's two passes: products with all that lies between them."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        return _of_a_block(device, dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _of_a_block(device: torch.device, dtype: str) -> float:
    width, length, rows = (4096, 2048, 4) if device.type == "cuda" else (512, 256, 4)
    block = torch.nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True, device=device
    ).to(_TORCH[dtype])
    inputs = torch.randn(rows, length, width, device=device).to(_TORCH[dtype]).requires_grad_()

    def step() -> None:
        block(inputs).float().mean().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) / seconds(step, device)


def _memory(device: torch.device) -> float:
    elements = (512 if device.type == "cuda" else 64) * 2**20 // 4
    source, target = (torch.zeros(elements, device=device) for _ in range(2))
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def _host_link(device: torch.device) -> float:
    source = torch.zeros(256 * 2**20 // 4, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.nbytes / seconds(lambda: target.copy_(source, non_blocking=True), device)


def seconds(do: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median time of one call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
