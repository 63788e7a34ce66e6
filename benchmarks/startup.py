"""How long one waits: from the command line to the first step, and for `--dry-run` to answer.

The first step is compared with that of transformers' example script, on the same text with the same
model, both from caches that an earlier run has filled. `shardwright train --dry-run` composes the
whole config, checks it and prints it; it is compared with the bare import of Hydra, which
composes nothing, and shown beside the smallest Hydra program over the same config.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks import examples
from benchmarks.report import Figures
from benchmarks.train_cpu import MODELS, OURS, PEER, Plan, make_ready, run_ours, run_peer
from benchmarks.train_cpu_report import spread
from benchmarks.train_gpu import ROOT, versions
from shardwright.launchers.composition.compose import CONF
from shardwright.launchers.machine import facts as machine
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.program import package_environment

MODEL = "kantaibert"
IMPORT, BARE, DRY_RUN = "import hydra", "a bare Hydra program", "shardwright train --dry-run"
_BARE = f"""
import hydra
@hydra.main(config_path={str(CONF)!r}, config_name="config", version_base="1.3")
def main(tree): pass
main()
"""
COMMANDS = {
    IMPORT: [sys.executable, "-c", "import hydra"],
    BARE: [sys.executable, "-c", _BARE, "hydra.run.dir=.", "hydra.output_subdir=null"],
    DRY_RUN: [sys.executable, "-m", "shardwright", "train", "--dry-run"],
}


def seconds_of(command: list[str], cwd: Path) -> Figures:
    """Run a command to its end; return its ``seconds``, or the ``error``."""
    environment = os.environ | package_environment(os.environ, packages=ROOT)
    began = time.perf_counter()
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if ended.returncode != 0:
        return {"error": f"exit code {ended.returncode}\n{ended.stderr[-1500:]}"}
    return {"seconds": seconds}


def first_step(plan: Plan) -> dict[str, Callable[[], Figures]]:
    """Return what takes each side to its first step; what both cache is there.

    Raises UserError where the data cannot be prepared.
    """
    make_ready(plan, MODEL)
    changed = ["strategy=single"]
    sides: dict[str, Callable[[], Figures]] = {
        # As its counting costs nothing that counts here, it counts each time.
        PEER: lambda: run_peer(plan, MODEL, 1, None),
        OURS: lambda: run_ours(plan, MODEL, 1, changed),
    }
    for side in sides.values():
        side()
    return sides


def in_turns(
    what: str, sides: dict[str, Callable[[], Figures]], repeats: int, name: str
) -> dict[str, Figures]:
    """Return each side's seconds, over rounds whose order reverses."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in list(sides)[:: -1 if repeat % 2 else 1]:
            runs[side].append(sides[side]())
        print(f"{what}: round {repeat + 1} of {repeats}", flush=True)
    return {side: summary(each, name) for side, each in runs.items()}


def summary(runs: list[Figures], name: str) -> Figures:
    """Return the median of one side's seconds. Pure."""
    if failed := [run["error"] for run in runs if "error" in run]:
        return {"error": failed[0]}
    seconds = [run[name] for run in runs]
    return {"seconds": median(seconds), "seconds_of_each_run": seconds, "spread": spread(seconds)}


def ratio(of_peer: Figures, of_ours: Figures) -> float | None:
    """Return the peer's seconds over ours; None where one has failed. Pure."""
    if "error" in of_peer or "error" in of_ours:
        return None
    return float(of_peer["seconds"] / of_ours["seconds"])


def run(plan: Plan | None, repeats: int, place: Path, json_file: Path | None) -> Figures:
    """Measure both; without a plan the dry run alone."""
    results: Figures = {
        "benchmark": "startup",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "CPU", "cores": machine.detect(os.environ).cores},
        "versions": versions(),
        "repeats": repeats,
    }
    commands: dict[str, Callable[[], Figures]] = {
        name: (lambda command=command: seconds_of(command, place))  # type: ignore[misc]
        for name, command in COMMANDS.items()
    }
    # Three times as many rounds as of whole starts: one takes a second or two.
    found = in_turns("dry run", commands, 3 * repeats, "seconds")
    results["dry_run"] = {"commands": found, "ratio": ratio(found[IMPORT], found[DRY_RUN])}
    ratios = [results["dry_run"]["ratio"]]
    if plan is not None:
        found = in_turns("first step", first_step(plan), repeats, "seconds_to_first_step")
        results["first_step"] = {
            "model": MODELS[MODEL].tiny if plan.is_tiny else MODEL,
            "commands": found,
            "ratio": ratio(found[PEER], found[OURS]),
        }
        ratios.append(results["first_step"]["ratio"])
    results["ratio"] = None if None in ratios else min(ratios)
    results["load_average"] = os.getloadavg()[0]
    if json_file:
        json_file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def shown(results: Figures) -> str:
    """Return the results as a table for a terminal. Pure."""
    lines = []
    for part in ("dry_run", "first_step"):
        if part not in results:
            continue
        for name, figures in results[part]["commands"].items():
            if "error" in figures:
                lines.append(f"{part:11} {name} failed:\n{figures['error']}")
                continue
            seconds = f"{figures['seconds']:6.2f} s, spread {figures['spread']:.0%}"
            lines.append(f"{part:11} {name:28} {seconds}")
        if (found := results[part]["ratio"]) is not None:
            lines.append(f"{part:11} ratio {found:.2f}")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="samples of the first step")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--dry-run-only", action="store_true", help="needs no example script")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="as train_cpu takes it")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if min(options.repeats, options.batch) < 1:
        parser.error("--repeats and --batch are at least 1")
    return options


def plan_of(options: argparse.Namespace, scratch: Path) -> Plan:
    """Return what takes both sides to their first step, and no further.

    Raises UserError where the example script is not there.
    """
    return Plan(
        models=[MODEL],
        ranks=[1],
        strategies=["ddp"],
        without=[],
        batch=options.batch,
        steps=0,
        warmup_steps=1,
        repeats=options.repeats,
        is_tiny=options.quick,
        examples=examples.find(options.examples).resolve(),
        directory=scratch,
        here=machine.detect({**os.environ, "CUDA_VISIBLE_DEVICES": ""}),
    )


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        with tempfile.TemporaryDirectory(
            prefix="shardwright-benchmark-", dir=options.directory.resolve()
        ) as place:
            scratch = Path(place)
            plan = None if options.dry_run_only else plan_of(options, scratch)
            results = run(plan, options.repeats, scratch, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(shown(results))
    return FAILED if results["ratio"] is None else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
