"""Measure what this machine can, and write the table: python -m benchmarks, or make bench.

Each benchmark is a command of its own, whose JSON goes to benchmarks/results/; those of a GPU are
run where there is one. The whole is bounded: what would not fit any more is not begun, and what
takes longer than it may is ended, with what it has written until then kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import table
from benchmarks.train_gpu import run_within, uses_gpu
from shardwright.launchers.machine import facts as machine


@dataclass(frozen=True)
class Benchmark:
    """One command, and how long it takes on two cores with nothing else to do."""

    name: str
    arguments: tuple[str, ...]
    minutes: float
    needs_gpu: bool = False
    takes_examples: bool = False


OFF = (
    "kantaibert:objective.head_on_labels_only=false",
    "kantaibert:data.unpad=false",
    "gpt2_small:model.fused_gelu=false",
    "gpt2_small:trainer.fused_loss=false",
)
"""What is measured on and off; what this version does not have has no row."""
BENCHMARKS = (
    Benchmark("collectives", (), 1),
    Benchmark("cpu_adam", (), 0.5),
    Benchmark("startup", ("--repeats", "5"), 3, takes_examples=True),
    Benchmark("overhead", (), 3),
    Benchmark("recover", ("--repeats", "2"), 2.5),
    Benchmark("prepare", ("--repeats", "1"), 1),
    Benchmark("save", ("--strategy", "zero2", "ddp", "--saves", "3", "--steps-between", "2"), 3),
    Benchmark(
        "train_cpu",
        ("--batch", "8", "--steps", "2", "--repeats", "5", "--without", *OFF),
        16,
        takes_examples=True,
    ),
    Benchmark("train_gpu", (), 12, needs_gpu=True),
    Benchmark("offload_gpu", ("--repeats", "1", "--steps", "10"), 8, needs_gpu=True),
)
TINY = {
    "cpu_adam": ("--parameters", "100000", "--repeats", "3"),
    "startup": ("--repeats", "1", "--quick"),
    "overhead": ("--repeats", "1"),
    "recover": ("--repeats", "1", "--model", "gpt2_tiny", "--kind", "fsdp"),
    "prepare": ("--repeats", "1", "--quick", "--processes", "1"),
    "save": ("--model", "gpt2_tiny", "--strategy", "ddp", "--saves", "1", "--steps-between", "1"),
    "train_cpu": ("--quick", "--repeats", "1", "--batch", "4", "--steps", "1"),
}
"""What tries each out in seconds, and says nothing of speed."""


def command(
    benchmark: Benchmark, file: Path, examples: Path | None, *, is_tiny: bool = False
) -> list[str]:
    """Return what measures one of them. Pure."""
    arguments = TINY.get(benchmark.name, ()) if is_tiny else benchmark.arguments
    words = [sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments]
    if benchmark.takes_examples and examples is not None:
        words += ["--examples", str(examples)]
    return [*words, "--json", str(file)]


def why_not(benchmark: Benchmark, *, has_gpu: bool, left_minutes: float) -> str | None:
    """Return why a benchmark is not run here and now. Pure but for what is installed."""
    if importlib.util.find_spec(f"benchmarks.{benchmark.name}") is None:
        return "there is no such benchmark in this checkout"
    if benchmark.needs_gpu and not has_gpu:
        return "there is no GPU"
    if benchmark.minutes > left_minutes:
        return f"it takes {benchmark.minutes:g} minutes, and {left_minutes:.0f} are left"
    return None


def processor() -> str:
    """Return what the CPU calls itself."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def measure(
    benchmark: Benchmark, folder: Path, examples: Path | None, minutes: float, *, is_tiny: bool
) -> str:
    """Run one and return in words what came of it."""
    is_of_gpu = benchmark.needs_gpu
    file = folder / f"{benchmark.name}-{'gpu' if is_of_gpu else 'cpu'}.json"
    fresh, log = file.with_suffix(".new"), folder / f"{benchmark.name}.log"
    words = command(benchmark, fresh, examples, is_tiny=is_tiny)
    load = os.getloadavg()[0]
    problem = run_within(words, dict(os.environ), log, minutes * 60)
    if not fresh.exists():
        tail = log.read_text(errors="replace").strip().splitlines()[-3:]
        return "\n  ".join([f"failed ({problem})", *tail])
    figures = json.loads(fresh.read_text())
    figures["machine"] = {"cpu": processor(), "load_average": load}
    fresh.unlink()
    file.write_text(json.dumps(figures, indent=2) + "\n")
    if problem is None:
        log.unlink()
    ratio = figures.get("ratio")
    said = f"ratio {ratio:.2f}" if ratio else "no ratio"
    return said if problem is None else f"{said}, not whole ({problem})"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of them, at most")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="as train_cpu takes it")
    parser.add_argument("--results", type=Path, metavar="DIR", default=table.RESULTS)
    parser.add_argument("--quick", action="store_true", help="tries all out; writes no table")
    parser.add_argument("--table", action="store_true", help="write the table, and measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.table:
        table.write()
        return 0
    # So that whoever ends this ends what it has started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    has_gpu = uses_gpu(machine.detect(os.environ))
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in options.only]
    options.results.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    wanted = sum(b.minutes for b in chosen if has_gpu or not b.needs_gpu)
    print(f"about {wanted:.0f} minutes on two idle cores, {options.minutes:g} at most", flush=True)
    for benchmark in chosen:
        left = (ends - time.monotonic()) / 60
        fits = left if not options.quick else math.inf
        problem = why_not(benchmark, has_gpu=has_gpu, left_minutes=fits)
        if problem is not None:
            print(f"{benchmark.name}: not measured, {problem}", flush=True)
            continue
        print(f"{benchmark.name}: about {benchmark.minutes:g} minutes", flush=True)
        said = measure(benchmark, options.results, options.examples, left, is_tiny=options.quick)
        print(f"{benchmark.name}: {said}", flush=True)
    if not options.quick and options.results == table.RESULTS:
        table.write()
        print(f"\n{table.TABLE.read_text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
