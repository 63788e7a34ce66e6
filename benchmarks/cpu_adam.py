"""One optimizer step in host memory: DeepSpeed's CPU Adam against torch's fused AdamW.

Both update the same flat fp32 weights, as ZeRO keeps them where the optimizer is offloaded. They
take turns, so that whatever else the machine does hits both. Threads follow OMP_NUM_THREADS. The
first use compiles DeepSpeed's kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.train_gpu import versions
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.strategy.zero.adam import deepspeed_cpu_adam

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
NOT_DECAYED_SHARE = 0.001
"""Biases and norms: a group of their own, and a thousandth of a transformer."""


def groups(parameters: int) -> list[dict[str, Any]]:
    """Return two groups of one flat tensor each, with gradients, the same at each call."""
    torch.manual_seed(0)
    few = max(1, int(parameters * NOT_DECAYED_SHARE))
    made = []
    for size, decay in ((parameters - few, 0.01), (few, 0.0)):
        weights = torch.nn.Parameter(torch.randn(size) * 0.02)
        weights.grad = torch.randn(size) * 1e-4
        made.append({"params": [weights], "weight_decay": decay})
    return made


def seconds_of(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def run(parameters: int, repeats: int) -> dict[str, Any]:
    """Return medians of both, in seconds a step, and how far their weights are apart.

    Raises UserError where DeepSpeed's kernel cannot be compiled.
    """
    optimizers: dict[str, Optimizer] = {
        "torch": AdamW(groups(parameters), fused=True, **SETTINGS),
        "deepspeed": deepspeed_cpu_adam(groups(parameters), moments_dtype="fp32", **SETTINGS),
    }
    for optimizer in optimizers.values():
        optimizer.step()  # makes the moments
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(repeats):
        # Each goes first every other time.
        for name in list(optimizers)[:: 1 if repeat % 2 else -1]:
            seconds[name].append(seconds_of(optimizers[name].step))
    mine, peer = (
        torch.cat([p.detach() for g in optimizers[name].param_groups for p in g["params"]])
        for name in ("deepspeed", "torch")
    )
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "benchmark": "cpu_adam",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"cpu": platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "parameters": parameters,
        "steps": repeats + 1,
        "seconds_per_step": medians,
        "seconds_of_each_step": seconds,
        "largest_difference_of_a_weight": float((mine - peer).abs().max()),
        "ratio": medians["torch"] / medians["deepspeed"],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_adam",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parameters", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=15, help="measured steps of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if options.parameters < 2 or options.repeats < 1:
        parser.error("--parameters is at least 2 and --repeats at least 1")
    try:
        results = run(options.parameters, options.repeats)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    for name, figure in results["seconds_per_step"].items():
        each = results["seconds_of_each_step"][name]
        spread = (max(each) - min(each)) / figure
        print(f"{name:<10} {figure * 1e3:9.2f} ms a step, spread {spread:.0%}")
    print(f"Largest difference of a weight: {results['largest_difference_of_a_weight']:.1e}")
    print(
        f"Ratio (DeepSpeed to torch) at {options.parameters:,} parameters and "
        f"{results['hardware']['threads']} threads: {results['ratio']:.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
