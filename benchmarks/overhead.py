"""What the loop itself costs a step: ours and the stock Trainer, over a loop written by hand.

A model so small that its step takes milliseconds, on one rank and on two (gloo), trained in the
three ways by turns of a few steps, in the same processes. A loop's tax is what its steps take
longer than those of the bare loop in the same round; the ratio is stock's tax over ours.
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
from statistics import median, quantiles

from benchmarks import frozen
from benchmarks.report import Figures
from benchmarks.train_gpu import ROOT, prepare, versions
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.run_directory.names import LOGS

RANKS = (1, 2)
WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    ranks: list[int]
    steps: int
    """Of one turn; the first is not counted."""
    repeats: int
    """Rounds, in which each way has a turn."""
    here: Machine


def overrides(plan: Plan, ranks: int) -> list[str]:
    """Return what composes the run on so many ranks: two samples of 32 tokens each. Pure."""
    steps = (WARMUP_ROUNDS + plan.repeats) * plan.steps
    alone = ["launcher=local", "strategy=single"]
    together = ["launcher=torchrun", f"launcher.nproc_per_node={ranks}", "strategy=ddp"]
    return [
        "model=gpt2_tiny",
        "model.num_hidden_layers=2",
        "model.hidden_size=64",
        "model.intermediate_size=256",
        "model.num_attention_heads=2",
        "objective=clm",
        "precision=fp32",
        "data.sequence_length=32",
        "data.eval_fraction=0",
        "data.max_documents=30",
        "data.document_attention=false",
        "launcher.device=cpu",
        *(alone if ranks == 1 else together),
        f"trainer.max_steps={steps}",
        "trainer.micro_batch_size=2",
        f"trainer.global_batch_size={2 * ranks}",
        "trainer.lr_scheduler=linear",
        "trainer.warmup_steps=0",
        "trainer.warmup_fraction=0",
        f"trainer.log_every_steps={steps}",
        "trainer.dataloader_workers=0",
    ]


def freeze(plan: Plan, ranks: int, run_dir: Path) -> RunConfig:
    """Create the directory of a run. Raises UserError where this machine cannot run it."""
    return frozen.freeze(overrides(plan, ranks), plan.here, run_dir)


def measure(plan: Plan, config: RunConfig, run_dir: Path) -> Figures:
    """Train in processes of their own; return the seconds of each round, or the ``error``."""
    environment = {
        **os.environ,
        **rank_environment(config, plan.here, os.environ, packages=ROOT),
        # More threads than cores would be what is measured.
        "OMP_NUM_THREADS": "1",
    }
    argv = rank_command(
        config,
        run_dir,
        module="benchmarks.timed_overhead",
        arguments=[str(WARMUP_ROUNDS), str(plan.steps)],
    )
    log = run_dir / LOGS / "benchmark.log"
    with log.open("w") as output:
        ended = subprocess.run(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if ended.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        return {"error": "\n".join([f"exit code {ended.returncode}", *tail])}
    figures: Figures = json.loads((run_dir / "figures.json").read_text())
    return figures


def summary(turns: dict[str, list[list[tuple[float, float]]]]) -> Figures:
    """Return the medians of what each way takes, what each tax is, and their ratio. Pure.

    ``turns`` are, for each way, the seconds of the steps of each turn, by the wall and of CPU time.
    A tax is the median over rounds of the difference to the bare loop of the same round. No ratio
    is given where ours costs nothing that can be measured.
    """
    wall, cpu = (
        {way: [_milliseconds(turn, kind) for turn in found] for way, found in turns.items()}
        for kind in (0, 1)
    )
    tax, cpu_tax = _taxes(wall), _taxes(cpu)
    return {
        "ms_per_step": {way: median(each) for way, each in wall.items()},
        "ms_per_step_of_each_round": wall,
        "tax_ms": tax,
        "quartiles_of_tax_ms": {way: _quartiles(wall, way) for way in tax},
        "cpu_tax_ms": cpu_tax,
        "cpu_ratio": _ratio(cpu_tax),
        "ratio": _ratio(tax),
    }


def _milliseconds(turn: list[tuple[float, float]], kind: int) -> float:
    # The first step of a turn finds caches in which the other loops have been.
    return 1e3 * median(step[kind] for step in turn[1:] or turn)


def _longer(rounds: dict[str, list[float]], way: str) -> list[float]:
    return [a - b for a, b in zip(rounds[way], rounds["bare"], strict=True)]


def _taxes(rounds: dict[str, list[float]]) -> dict[str, float]:
    return {way: median(_longer(rounds, way)) for way in ("stock", "ours")}


def _quartiles(rounds: dict[str, list[float]], way: str) -> list[float]:
    longer = _longer(rounds, way)
    return [longer[0]] * 2 if len(longer) < 2 else quantiles(longer, n=4)[::2]


def _ratio(tax: dict[str, float]) -> float | None:
    return tax["stock"] / tax["ours"] if tax["ours"] > 0 else None


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten after each number of ranks."""
    results: Figures = {
        "benchmark": "overhead",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "CPU", "cores": plan.here.cores},
        "versions": versions(),
        "steps": plan.steps,
        "repeats": plan.repeats,
        "ranks": {},
        "ratio": None,
    }
    for ranks in plan.ranks:
        with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-") as scratch:
            run_dir = Path(scratch) / "run"
            config = freeze(plan, ranks, run_dir)
            prepare(run_dir)
            found = measure(plan, config, run_dir)
        figures = found if "error" in found else summary(found)
        figures["load_average"] = os.getloadavg()[0]
        results["ranks"][str(ranks)] = figures
        ratios = [each.get("ratio") for each in results["ranks"].values()]
        # The worst, as one trains on one of them.
        results["ratio"] = None if None in ratios else min(ratios)
        if json_file:
            json_file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def shown(results: Figures) -> str:
    """Return the results as a table for a terminal. Pure."""
    lines = ["ranks  way    ms/step  tax ms  (quartiles)     CPU tax ms  ratio"]
    for ranks, figures in results["ranks"].items():
        if "error" in figures:
            lines.append(f"{ranks:5}  failed:\n{figures['error']}")
            continue
        lines.append(f"{ranks:5}  bare   {figures['ms_per_step']['bare']:7.2f}")
        for way in ("stock", "ours"):
            low, high = figures["quartiles_of_tax_ms"][way]
            ratio = f"{figures['ratio']:5.2f}" if way == "ours" and figures["ratio"] else ""
            lines.append(
                f"       {way:5}  {figures['ms_per_step'][way]:7.2f}  {figures['tax_ms'][way]:6.2f}"
                f"  ({low:.2f} to {high:.2f})  {figures['cpu_tax_ms'][way]:6.2f}  {ratio}".rstrip()
            )
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=list(RANKS))
    parser.add_argument("--steps", type=int, default=10, help="of one turn")
    parser.add_argument("--repeats", type=int, default=40, help="rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if options.steps < 2 or options.repeats < 1:
        parser.error("--steps is at least 2 and --repeats at least 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    plan = Plan(
        ranks=options.ranks,
        steps=options.steps,
        repeats=options.repeats,
        here=machine.detect(os.environ),
    )
    try:
        results = run(plan, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(shown(results))
    return FAILED if any("error" in figures for figures in results["ranks"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
