"""`shardwright plan`: what a run would take, found without the hardware that it is for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from shardwright.launchers import columns, messages
from shardwright.launchers.commands import measured, plan_of_run, plan_table
from shardwright.launchers.composition import settled
from shardwright.launchers.composition.compose import Job, compose, config_dir, plain, resolved
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.plan import automatic, child, hardware, scan
from shardwright.launchers.plan.automatic import ways
from shardwright.launchers.plan.candidates import (
    Asked,
    Candidate,
    candidates_of_each,
    machine_of,
    on_hardware,
    usable_bytes,
)
from shardwright.launchers.plan.deepspeed_estimates import Estimate, estimates
from shardwright.launchers.plan.hardware import GIB, Hardware
from shardwright.launchers.plan.scan import Plan, Row
from shardwright.launchers.plan.speed import as_json as pace_as_json
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import FAILED, UserError

FLAGS = ("--states-only", "--json", measured.AGAIN)


def main(arguments: Sequence[str]) -> int:
    """Print the plan that the arguments ask for."""
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return 0
    if (run_dir := plan_of_run.asked_for(arguments)) is not None:
        return plan_of_run.show(run_dir, as_json="--json" in arguments)
    flags = {argument for argument in arguments if argument in FLAGS}
    words, others = hardware.split([a for a in arguments if a not in FLAGS])
    scan.check_number([*words, *others])
    combinations = scan.combined(words)
    here = machine.detect(os.environ)
    supposed = [
        measured.chosen(each, config_dir(others), here, again=measured.AGAIN in flags)
        for each in combinations
    ]
    jobs = compose([*others, *(["-m"] if scan.has_lists(others) else [])])
    if not jobs:
        return 0  # a question that Hydra has answered
    as_json = "--json" in flags
    if "--states-only" in flags:
        if len(jobs) > 1 or len(supposed) > 1:
            raise UserError("--states-only is of one run; give one value for each setting")
        config = resolved(jobs[0], here, time.strftime("%Y%m%d-%H%M%S"))
        _states_only(config, supposed[0], as_json=as_json)
        return 0
    on = [(words, each) for words, each in zip(combinations, supposed, strict=True) if each]
    if not on:
        raise UserError(
            f"on which hardware? Add {hardware.GROUP}=NAME, such as h200x8 for a node of 8; there "
            f"are {', '.join(hardware.options())}"
        )
    return _compared(jobs, on, as_json=as_json)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright plan`, whose other flags are Hydra's own."""
    found = argparse.ArgumentParser(
        prog="shardwright plan",
        usage="%(prog)s [--states-only] [--json] [--measure] [--config-dir DIR] "
        f"[{hardware.GROUP}=NAME] [group=option] [key=value] ...\n"
        "       %(prog)s RUN_DIR [--json]",
        description="Predict what each rank of a run would hold and how fast it would be, under "
        "each strategy, on hardware that need not be here; nothing is started. Of several values "
        "(trainer.micro_batch_size=1,2 hardware=h200x8,h200x16) all combinations are compared. "
        "Of a run that exists: what it was planned to take, and what it has taken.",
        epilog=f"{hardware.GROUP}=h200x8x4 is 4 nodes of 8 devices each; there are "
        f"{', '.join(hardware.options())}, and here. Exit codes: 0 it fits, 1 it fits nowhere, "
        "2 bad input.",
    )
    found.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="settings as for `shardwright train`; strategy=... plans that one alone",
    )
    found.add_argument(
        "--states-only",
        action="store_true",
        help="the model states alone, as DeepSpeed's own estimators count them",
    )
    found.add_argument(
        measured.AGAIN,
        action="store_true",
        help=f"with {hardware.GROUP}=here: measure this machine once more",
    )
    found.add_argument("--json", action="store_true", help="print one JSON object instead")
    found.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with options of your own, as for train"
    )
    return found


# --- side by side ---------------------------------------------------------------------------------


def _compared(
    jobs: Sequence[Job], on: Sequence[tuple[tuple[str, ...], Hardware]], *, as_json: bool
) -> int:
    # Composition has added what makes Hydra take a key that an option does not list.
    written = [[word.lstrip("+") for word in job.arguments] for job in jobs]
    asked, places = [], []
    chosen: list[Chosen] = []
    for job, words_of_job, own in zip(jobs, written, scan.differing(written), strict=True):
        is_chosen = any(word.startswith(("strategy=", "strategy.")) for word in words_of_job)
        for words, supposed in on:
            tree = on_hardware(plain(job.tree), supposed)
            if from_tree(tree, job.typed).left_to_the_plan:
                chosen.append(_chosen(tree, supposed, words, own))
                continue
            strategy = job.choices["strategy"] if is_chosen else None
            asked.append(Asked(tree, supposed, strategy))
            places.append((supposed, words, own))
    found = candidates_of_each(asked) if asked else []
    plans = [Plan(*place, tuple(each)) for place, each in zip(places, found, strict=True)]
    plans += [plan for each in chosen for plan in each.plans]
    if as_json:
        auto = {"auto": [list(each.words) for each in chosen]} if chosen else {}
        print(json.dumps(_as_json(plans) | auto))
    else:
        print("\n".join(plan_table.lines(plans, messages.terminal_width())))
        for each in chosen:
            print("\n" + "\n".join(each.reason), end="\n" if each.reason else "")
    if any(row.fits for row in scan.rows(plans)):
        return 0
    print(messages.error_text(plan_table.nothing_fits(plans)), file=sys.stderr)
    return FAILED


class Chosen(NamedTuple):
    """What `auto` comes to on one hardware, beside the best of each strategy."""

    plans: list[Plan]
    words: tuple[str, ...]
    """Nothing where nothing fits."""
    reason: tuple[str, ...]


def _chosen(
    tree: dict[str, Any], supposed: Hardware, words: tuple[str, ...], own: tuple[str, ...]
) -> Chosen:
    left = from_tree(tree).left_to_the_plan
    with child.Looking() as look:
        found = ways(tree, supposed, machine_of(supposed), look)
        best = found.best_of_each()
        way = found.chosen()
        smaller = None if way is None else found.smaller_than(way)
    kept_words = [word for word in own if not word.startswith(tuple(f"{key}=" for key in left))]
    problems = [
        Candidate(name, None, problem)
        for name, problem in found.problems.items()
        if name not in {each.strategy for each in best}
    ]
    plans = []
    for each in best:
        assert each.config is not None
        settings = [*kept_words, *settings_of(left, each.config)]
        plans.append(Plan(supposed, words, tuple(settings), (each, *problems)))
        problems = []
    if way is None:
        return Chosen(plans, (), ())
    reason = tuple(settled.reasons(found, way, smaller, left, " ".join(words)))
    return Chosen(plans, settled.words(left, way), reason)


def settings_of(left: Sequence[str], config: RunConfig) -> list[str]:
    """Return what a run has of the settings of the trainer that were left to the plan. Pure."""
    blocks = config.trainer.recomputed_every_blocks
    values = {
        automatic.MICRO_BATCH: config.trainer.samples_per_pass,
        automatic.EVERY_BLOCKS: "null" if blocks is None else blocks,
    }
    return [f"{key}={value}" for key, value in values.items() if key in left]


def _as_json(plans: Sequence[Plan]) -> dict[str, Any]:
    best = next((row for row in scan.rows(plans) if row.fits), None)
    return {
        "plans": [_plan_as_json(plan) for plan in plans],
        "fastest": best
        and {
            "plan": plans.index(best.plan),
            "strategy": best.candidate.strategy,
            "overrides": plan_table.overrides(best),
        },
    }


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    supposed = plan.hardware
    return {
        "hardware": list(plan.hardware_words),
        "settings": list(plan.settings),
        "ranks": supposed.ranks,
        "usable_bytes": usable_bytes(supposed),
        "allocator_reserve_bytes": supposed.memory_bytes - usable_bytes(supposed),
        "strategies": {each.strategy: _row_as_json(Row(plan, each)) for each in plan.found},
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    peak, pace, devices = row.candidate.peak, row.candidate.pace, row.plan.hardware.devices
    if peak is None or pace is None:
        return {"problem": row.candidate.problem}
    return {
        "fits": row.fits,
        "device_bytes": peak.device,
        "host_bytes_of_node": peak.host * devices,
        "disk_bytes_of_node": peak.disk * devices,
        "by_category": peak.by_category(),
        **pace_as_json(pace),
        "overrides": plan_table.overrides(row),
    }


# --- DeepSpeed's own estimate ---------------------------------------------------------------------


def _states_only(config: RunConfig, supposed: Hardware | None, *, as_json: bool) -> None:
    launcher = config.launcher
    devices = supposed.devices if supposed else launcher.ranks_per_node
    nodes = supposed.nodes if supposed else launcher.world_size // launcher.ranks_per_node
    if not config.adapter.trains_all:
        raise UserError(
            f"--states-only shows DeepSpeed's estimate, which takes all weights to be trained, but "
            f"adapter={config.adapter.kind} trains few; leave --states-only out"
        )
    facts = child.facts_of(config)
    rows = estimates(facts.count, facts.largest_layer, devices, nodes)
    if as_json:
        found = {
            "parameters": facts.count,
            "largest_layer": facts.largest_layer,
            "devices": devices,
            "nodes": nodes,
            "estimates": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(found))
        return
    print(
        f"{facts.count:,} parameters, {facts.largest_layer:,} in the largest layer; "
        f"{nodes} x {devices} device(s)\n"
        "as DeepSpeed estimates its model states, and nothing else: no activations, no buckets\n"
    )
    print("\n".join(columns.table(_columns(rows), messages.terminal_width())))


def _columns(rows: Sequence[Estimate]) -> list[columns.Column]:
    def column(name: str, cells: Sequence[str], *, is_text: bool = False) -> columns.Column:
        return columns.Column(name, tuple(cells), is_text=is_text)

    def where(is_offloaded: bool) -> str:
        return "host" if is_offloaded else "device"

    return [
        column("stage", [str(row.stage) for row in rows]),
        column("a device, GiB", [f"{row.device_bytes / GIB:,.2f}" for row in rows]),
        column("a host, GiB", [f"{row.host_bytes / GIB:,.2f}" for row in rows]),
        column("optimizer", [where(row.offloads_optimizer) for row in rows], is_text=True),
        column(
            "parameters",
            [where(row.offloads_parameters) for row in rows],
            is_text=True,
        ),
        column(
            "divided when built",
            ["-" if row.stage == 2 else "yes" if row.zero_init else "no" for row in rows],
            is_text=True,
        ),
    ]
