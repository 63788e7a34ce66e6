"""`shardwright plan`: what a run would take, found without the hardware that it is for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers import columns, messages
from shardwright.launchers.composition.compose import Job, command_line, compose, plain, resolved
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.plan import child, hardware
from shardwright.launchers.plan.candidates import (
    Candidate,
    candidates,
    nodes_needed,
    on_hardware,
    usable_bytes,
)
from shardwright.launchers.plan.deepspeed_estimates import Estimate, estimates
from shardwright.launchers.plan.hardware import GIB, Hardware
from shardwright.train.config import RunConfig
from shardwright.train.errors import FAILED, UserError
from shardwright.train.units import counted

FLAGS = ("--states-only", "--json")


def main(arguments: Sequence[str]) -> int:
    """Print the plan that the arguments ask for."""
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return 0
    flags = {argument for argument in arguments if argument in FLAGS}
    words, others = hardware.split([a for a in arguments if a not in FLAGS])
    supposed = hardware.chosen(words, _config_dir(others))
    jobs = compose(others)
    if not jobs:
        return 0  # a question that Hydra has answered
    if len(jobs) > 1:
        raise UserError("-m starts several runs, and a plan is of one; leave -m out")
    as_json = "--json" in flags
    if "--states-only" in flags:
        config = resolved(jobs[0], machine.detect(os.environ), time.strftime("%Y%m%d-%H%M%S"))
        _states_only(config, supposed, as_json=as_json)
        return 0
    if supposed is None:
        raise UserError(
            f"on which hardware? Add {hardware.GROUP}=NAME, such as h200x8 for a node of 8; there "
            f"are {', '.join(hardware.options())}"
        )
    return _compared(jobs[0], supposed, as_json=as_json)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright plan`, whose other flags are Hydra's own."""
    found = argparse.ArgumentParser(
        prog="shardwright plan",
        usage="%(prog)s [--states-only] [--json] [--config-dir DIR] "
        f"[{hardware.GROUP}=NAME] [group=option] [key=value] ...",
        description="Predict what each rank of a run would hold, under each strategy, on hardware "
        "that need not be here; nothing is started.",
        epilog=f"{hardware.GROUP}=h200x8x4 is 4 nodes of 8 devices each; there are "
        f"{', '.join(hardware.options())}. Exit codes: 0 it fits, 1 it fits nowhere, 2 bad input.",
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
    found.add_argument("--json", action="store_true", help="print one JSON object instead")
    found.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with options of your own, as for train"
    )
    return found


def _config_dir(arguments: Sequence[str]) -> Path | None:
    options, _ = command_line().parse_known_intermixed_args(
        [argument for argument in arguments if argument.startswith(("--config-dir", "-cd"))]
    )
    return Path(options.config_dir) if options.config_dir else None


# --- strategies side by side ----------------------------------------------------------------------


def _compared(job: Job, supposed: Hardware, *, as_json: bool) -> int:
    tree = on_hardware(plain(job.tree), supposed)
    is_chosen = any(word.startswith(("strategy=", "strategy.")) for word in job.arguments)
    found = candidates(tree, supposed, job.choices["strategy"] if is_chosen else None)
    fitting = [each for each in found if each.fits(supposed)]
    if as_json:
        print(json.dumps(_as_json(found, supposed)))
    else:
        print("\n".join(_lines(found, supposed, messages.terminal_width())))
    if fitting:
        return 0
    print(messages.error_text(_nothing_fits(found, supposed)), file=sys.stderr)
    return FAILED


def _as_json(found: Sequence[Candidate], supposed: Hardware) -> dict[str, Any]:
    return {
        "ranks": supposed.ranks,
        "usable_bytes": usable_bytes(supposed),
        "strategies": {
            each.strategy: {"problem": each.problem}
            if each.peak is None
            else {
                "fits": each.fits(supposed),
                "device_bytes": each.peak.device,
                "host_bytes_of_node": each.peak.host * supposed.devices,
                "disk_bytes_of_node": each.peak.disk * supposed.devices,
                "by_category": each.peak.by_category(),
                "overrides": _overrides(each, supposed),
            }
            for each in found
        },
    }


def _lines(found: Sequence[Candidate], supposed: Hardware, width: int | None) -> Iterator[str]:
    config = next(each.config for each in found if each.config is not None)
    yield (
        f"{supposed.nodes} x {supposed.devices} ranks of {usable_bytes(supposed) / GIB:,.1f} GiB "
        f"usable, {supposed.host_memory_gib:,.0f} GiB a host"
    )
    yield (
        f"{counted(config.trainer.samples_per_pass, 'sample')} of "
        f"{config.data.tokens_per_sample:,} tokens a micro-batch; GiB:\n"
    )
    yield from columns.table(_of_candidates([e for e in found if e.peak], supposed), width)
    for problem in dict.fromkeys(each.problem for each in found if each.config is None):
        names = ", ".join(each.strategy for each in found if each.problem == problem)
        yield "\n" + textwrap.fill(f"not {names}: {problem}", (width or 100) - 1)
    if fitting := [each for each in found if each.fits(supposed)]:
        yield "\nthe first that fits, least divided:"
        yield f"  {' '.join(_overrides(fitting[0], supposed))}"


def _of_candidates(found: Sequence[Candidate], supposed: Hardware) -> list[columns.Column]:
    peaks = [each.peak for each in found if each.peak is not None]

    def sizes(name: str, sizes: Sequence[int], rank: int | None = None) -> columns.Column:
        cells = tuple(f"{size / GIB:,.1f}" if size else columns.NOTHING for size in sizes)
        return columns.Column(name, cells, rank=rank)

    return [
        columns.Column("strategy", tuple(each.strategy for each in found), is_text=True),
        columns.Column(
            "fits", tuple("yes" if e.fits(supposed) else "no" for e in found), is_text=True
        ),
        sizes("a device", [p.device for p in peaks]),
        sizes("weights", [p.states.device.weights for p in peaks], 3),
        sizes("optimizer", [p.states.device.optimizer for p in peaks], 3),
        sizes("gradients", [p.states.device.gradients + p.reducing for p in peaks], 2),
        sizes("activations", [p.activations + p.working for p in peaks]),
        sizes(
            "buffers",
            [p.states.device.buckets + p.states.device.kept_whole + p.gathered for p in peaks],
            1,
        ),
        sizes("a host", [p.host * supposed.devices for p in peaks]),
        sizes("disk", [p.disk * supposed.devices for p in peaks]),
    ]


def _overrides(candidate: Candidate, supposed: Hardware) -> list[str]:
    """Return what is to be added to a run's command line. Pure."""
    assert candidate.config is not None
    nodes = ["launcher.head_address=HOST", f"launcher.nodes={supposed.nodes}"]
    return [
        f"strategy={candidate.strategy}",
        f"trainer.micro_batch_size={candidate.config.trainer.micro_batch_size}",
        f"launcher.device={supposed.device}",
        f"launcher.nproc_per_node={supposed.devices}",
        *(nodes if supposed.nodes > 1 else []),
    ]


def _nothing_fits(found: Sequence[Candidate], supposed: Hardware) -> str:
    """Say what would be needed. Pure."""
    least = min(
        (each for each in found if each.peak is not None),
        key=lambda each: each.peak.device if each.peak is not None else 0,
    )
    assert least.peak is not None
    assert least.config is not None
    text = (
        f"nothing fits: the least of a device, strategy={least.strategy}, is "
        f"{least.peak.device / GIB:,.1f} GiB of {usable_bytes(supposed) / GIB:,.1f}, with "
        f"{least.peak.host * supposed.devices / GIB:,.1f} GiB of a host's "
        f"{supposed.host_memory_gib:,.0f}"
    )
    enough = {
        each.strategy: nodes
        for each in found
        if (nodes := nodes_needed(each, supposed)) is not None
    }
    if enough:
        name = min(enough, key=lambda strategy: enough[strategy])
        text += f"; strategy={name} fits {enough[name]} such node(s)"
    smaller = []
    if least.config.trainer.samples_per_pass > 1:
        smaller.append("trainer.micro_batch_size=1")
    if least.config.trainer.checkpoint_activations_every_blocks is None:
        smaller.append("trainer.checkpoint_activations_every_blocks=1")
    return text + (f"; less takes {' with '.join(smaller)}" if smaller else "")


# --- DeepSpeed's own estimate ---------------------------------------------------------------------


def _states_only(config: RunConfig, supposed: Hardware | None, *, as_json: bool) -> None:
    launcher = config.launcher
    devices = supposed.devices if supposed else launcher.ranks_per_node
    nodes = supposed.nodes if supposed else launcher.world_size // launcher.ranks_per_node
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
