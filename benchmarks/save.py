"""Time that a save costs the training: written while it stands still, against in the background.

For each strategy one run of several ranks trains stretches of the same number of steps, in turns
without a save, with a synchronous and with an asynchronous one. A save costs (time with K saves -
time without) / K, a background write that slows the steps after it included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import frozen
from benchmarks.report import Figures
from benchmarks.train_gpu import ROOT, prepare, uses_gpu, versions
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.run_directory.names import LOGS

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
OBJECTIVES = {"kantaibert": "mlm", "roberta_tiny": "mlm", "gpt2_small": "clm", "gpt2_tiny": "clm"}
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    model: str
    strategies: list[str]
    ranks: int
    saves: int
    """Of each kind."""
    steps_between: int
    directory: Path
    """Where the checkpoints are written."""
    here: Machine


def overrides(plan: Plan, strategy: str) -> list[str]:
    """Return what composes the run of one strategy. Pure."""
    on_gpu = uses_gpu(plan.here)
    steps = WARMUP_STEPS + 3 * plan.saves * plan.steps_between
    return [
        f"model={plan.model}",
        f"objective={OBJECTIVES[plan.model]}",
        f"strategy={strategy}",
        "launcher=torchrun",
        f"launcher.nproc_per_node={plan.ranks}",
        f"precision={'bf16' if on_gpu else 'fp32'}",
        f"data.sequence_length={512 if on_gpu else 64}",
        "data.eval_fraction=0",
        *([] if on_gpu else ["data.max_documents=30"]),
        f"trainer.max_steps={steps}",
        f"trainer.micro_batch_size={16 if on_gpu else 1}",
        f"trainer.global_batch_size={(16 if on_gpu else 1) * plan.ranks}",
        f"trainer.log_every_steps={steps}",
        "checkpoint.on_save_error=stop",
    ]


def freeze(plan: Plan, strategy: str, run_dir: Path) -> RunConfig:
    """Create the directory of a run. Raises UserError where this machine cannot run it."""
    return frozen.freeze(overrides(plan, strategy), plan.here, run_dir)


def measure(plan: Plan, config: RunConfig, run_dir: Path) -> Figures:
    """Train in processes of their own; return the figures, or the ``error``."""
    environment = {
        **os.environ,
        **rank_environment(config, plan.here, os.environ, packages=ROOT),
    }
    numbers = (WARMUP_STEPS, plan.saves, plan.steps_between)
    argv = rank_command(
        config, run_dir, module="benchmarks.timed_saves", arguments=[str(n) for n in numbers]
    )
    log = run_dir / LOGS / "benchmark.log"
    with log.open("w") as output:
        ended = subprocess.run(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if ended.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        return {"error": "\n".join([f"exit code {ended.returncode}", *tail])}
    figures: Figures = json.loads((run_dir / "figures.json").read_text())
    return figures


def summary(figures: Figures) -> Figures:
    """Return what a save costs, and sync / async. Pure.

    The median over rounds of (stretch with a save - stretch without), as neighbours in time share
    what else the machine does; never less than the time for which the training stood still.
    """
    if "error" in figures:
        return {**figures, "ratio": None}
    stretches, stalls = figures["seconds"], figures["stall_seconds"]
    longer = {
        way: [a - b for a, b in zip(stretches[way], stretches["none"], strict=True)]
        for way in ("sync", "async")
    }
    costs = {way: max(median(each), median(stalls[way])) for way, each in longer.items()}
    return {
        "seconds_of_stretches": stretches,
        "seconds_longer": longer,
        "seconds_per_save": costs,
        "stall_seconds": {way: median(each) for way, each in stalls.items()},
        "checkpoint_bytes": figures["checkpoint_bytes"],
        "ratio": costs["sync"] / costs["async"],
    }


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten after each strategy."""
    results: Figures = {
        "benchmark": "save",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "unknown", "cores": plan.here.cores},
        "versions": versions(),
        "model": plan.model,
        "ranks": plan.ranks,
        "saves": plan.saves,
        "steps_between": plan.steps_between,
        "strategies": {},
        "ratio": None,
    }
    for strategy in plan.strategies:
        with tempfile.TemporaryDirectory(
            prefix="shardwright-benchmark-", dir=plan.directory
        ) as scratch:
            run_dir = Path(scratch) / "run"
            config = freeze(plan, strategy, run_dir)
            if not results["strategies"]:
                prepare(run_dir)
            figures = measure(plan, config, run_dir)
        results["hardware"]["device"] = figures.get("device", "unknown")
        results["strategies"][strategy] = {**summary(figures), "load_average": os.getloadavg()[0]}
        ratios = [each["ratio"] for each in results["strategies"].values()]
        # The worst of all, as one knows one's strategy and not their mean.
        results["ratio"] = None if None in ratios else min(ratios)
        if json_file:
            json_file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def shown(results: Figures) -> str:
    """Return the results as a table for a terminal. Pure."""
    lines = ["strategy  sync s/save  async s/save  ratio  stall sync  stall async  checkpoint"]
    for strategy, figures in results["strategies"].items():
        if "error" in figures:
            lines.append(f"{strategy:8}  failed:\n{figures['error']}")
            continue
        costs, stalls = figures["seconds_per_save"], figures["stall_seconds"]
        lines.append(
            f"{strategy:8}  {costs['sync']:11.3f}  {costs['async']:12.3f}  "
            f"{figures['ratio']:5.2f}  {stalls['sync']:10.3f}  {stalls['async']:11.3f}  "
            f"{figures['checkpoint_bytes'] / 2**20:,.0f} MiB"
        )
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    on_gpu = uses_gpu(machine.detect(os.environ))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.save",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=OBJECTIVES, default="kantaibert")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5, metavar="K", help="of each kind")
    parser.add_argument("--steps-between", type=int, default=50 if on_gpu else 4)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if min(options.ranks, options.saves, options.steps_between) < 1:
        parser.error("--ranks, --saves and --steps-between are at least 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    plan = Plan(
        model=options.model,
        strategies=options.strategy,
        ranks=options.ranks,
        saves=options.saves,
        steps_between=options.steps_between,
        directory=options.directory.resolve(),
        here=machine.detect(os.environ),
    )
    try:
        results = run(plan, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(shown(results))
    return FAILED if any("error" in f for f in results["strategies"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
