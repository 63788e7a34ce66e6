"""Time that a save costs the training: written while it stands still, against in the background.

For each strategy the same steps are trained without saves, with synchronous and with asynchronous
ones, in turns, each time in processes of their own. A save costs (time with K saves - time without)
/ K, a background write that slows the steps after it included.
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

from omegaconf import OmegaConf

from benchmarks.report import Figures
from benchmarks.train_gpu import ROOT, prepare, uses_gpu, versions
from launchers import commands, machine, preflight
from launchers.__main__ import compose
from launchers.machine import Machine
from train.config import RunConfig, from_tree
from train.errors import BAD_INPUT, FAILED, UserError

VARIANTS = {"none": None, "sync": False, "async": True}
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
OBJECTIVES = {"kantaibert": "mlm", "roberta_tiny": "mlm", "gpt2_small": "clm", "gpt2_tiny": "clm"}


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    model: str
    strategies: list[str]
    ranks: int
    saves: int
    steps_between: int
    repeats: int
    directory: Path
    """Where the checkpoints are written."""
    here: Machine

    @property
    def steps(self) -> int:
        """Steps of a run: the last save too is followed by as many as the others, less one."""
        return (self.saves + 1) * self.steps_between - 1


WARMUP_STEPS = 1


def overrides(plan: Plan, strategy: str, variant: str) -> list[str]:
    """Return what composes the run of one variant. Pure."""
    in_background = VARIANTS[variant]
    long = uses_gpu(plan.here)
    return [
        f"model={plan.model}",
        f"objective={OBJECTIVES[plan.model]}",
        f"strategy={strategy}",
        "launcher=torchrun",
        f"launcher.nproc_per_node={plan.ranks}",
        f"precision={'bf16' if long else 'fp32'}",
        f"data.sequence_length={512 if long else 64}",
        "data.eval_fraction=0",
        *([] if long else ["data.max_documents=30"]),
        f"trainer.max_steps={plan.steps}",
        f"trainer.micro_batch_size={16 if long else 1}",
        f"trainer.global_batch_size={(16 if long else 1) * plan.ranks}",
        f"trainer.log_every_steps={plan.steps}",
        f"trainer.save_every_steps={'null' if in_background is None else plan.steps_between}",
        f"checkpoint.async={str(bool(in_background)).lower()}",
        "checkpoint.on_save_error=stop",
    ]


def freeze(plan: Plan, strategy: str, variant: str, run_dir: Path) -> RunConfig:
    """Compose a run and create its directory, as `shardwright train` does.

    Raises UserError where this machine cannot run it.
    """
    (job,) = compose(overrides(plan, strategy, variant))
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    config = machine.resolve(from_tree(tree), plan.here, str(run_dir))
    preflight.check(config, plan.here)
    preflight.create(config, run_dir)
    return config


def measure(plan: Plan, config: RunConfig, run_dir: Path) -> Figures:
    """Train in processes of their own; return the figures, or the ``error``."""
    environment = {
        **os.environ,
        **commands.rank_environment(config, plan.here, os.environ, packages=ROOT),
    }
    arguments = [str(WARMUP_STEPS)]
    argv = commands.rank_command(
        config, run_dir, module="benchmarks.timed_saves", arguments=arguments
    )
    log = run_dir / "logs" / "benchmark.log"
    with log.open("w") as output:
        ended = subprocess.run(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if ended.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        return {"error": "\n".join([f"exit code {ended.returncode}", *tail])}
    figures: Figures = json.loads((run_dir / "figures.json").read_text())
    return figures


def summary(runs: dict[str, list[Figures]], saves: int) -> Figures:
    """Return medians of the runs of one strategy: what a save costs, and sync / async. Pure.

    A cost that drowns in noise can come out at zero or below; there is no ratio then.
    """
    if failed := [run["error"] for each in runs.values() for run in each if "error" in run]:
        return {"error": failed[0], "ratio": None}
    seconds = {name: median(run["seconds"] for run in each) for name, each in runs.items()}
    costs = {name: (seconds[name] - seconds["none"]) / saves for name in ("sync", "async")}
    return {
        "seconds": seconds,
        "seconds_of_each_run": {n: [run["seconds"] for run in each] for n, each in runs.items()},
        "seconds_per_save": costs,
        "stall_seconds": {
            name: median(stall for run in runs[name] for stall in run["stalls_seconds"])
            for name in costs
        },
        "checkpoint_bytes": runs["sync"][0]["checkpoint_bytes"],
        "ratio": costs["sync"] / costs["async"] if min(costs.values()) > 0 else None,
    }


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten after each strategy."""
    results: Figures = {
        "benchmark": "save",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "unknown", "cores": plan.here.cores},
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "model": plan.model,
        "ranks": plan.ranks,
        "saves": plan.saves,
        "steps_between": plan.steps_between,
        "repeats": plan.repeats,
        "strategies": {},
        "ratio": None,
    }
    is_prepared = False
    for strategy in plan.strategies:
        runs: dict[str, list[Figures]] = {variant: [] for variant in VARIANTS}
        for repeat in range(plan.repeats):
            # Who comes first alternates, as a disk may still be busy with what came before.
            for variant in list(VARIANTS)[:: -1 if repeat % 2 else 1]:
                with tempfile.TemporaryDirectory(
                    prefix="shardwright-benchmark-", dir=plan.directory
                ) as scratch:
                    run_dir = Path(scratch) / "run"
                    config = freeze(plan, strategy, variant, run_dir)
                    if not is_prepared:
                        prepare(run_dir)
                        is_prepared = True
                    figures = measure(plan, config, run_dir)
                runs[variant].append(figures)
                shown = f"{figures['seconds']:.2f} s" if "seconds" in figures else figures["error"]
                print(f"{strategy} {repeat + 1}/{plan.repeats} {variant}: {shown}", flush=True)
                results["hardware"]["device"] = figures.get("device", "unknown")
        results["strategies"][strategy] = summary(runs, plan.saves)
        ratios = [figures["ratio"] for figures in results["strategies"].values()]
        # The worst of all, as one knows its strategy and not their mean.
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
        ratio = f"{figures['ratio']:5.2f}" if figures["ratio"] else "  n/a"
        lines.append(
            f"{strategy:8}  {costs['sync']:11.3f}  {costs['async']:12.3f}  {ratio}  "
            f"{stalls['sync']:10.3f}  {stalls['async']:11.3f}  "
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
    parser.add_argument("--saves", type=int, default=3, metavar="K")
    parser.add_argument("--steps-between", type=int, default=50 if on_gpu else 4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if min(options.ranks, options.saves, options.repeats) < 1 or options.steps_between < 2:
        parser.error("--ranks, --saves and --repeats are at least 1, --steps-between at least 2")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    plan = Plan(
        model=options.model,
        strategies=options.strategy,
        ranks=options.ranks,
        saves=options.saves,
        steps_between=options.steps_between,
        repeats=options.repeats,
        directory=options.directory.resolve(),
        here=machine.detect(os.environ),
    )
    try:
        results = run(plan, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"\n{shown(results)}")
    return FAILED if any("error" in f for f in results["strategies"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
