"""`shardwright plan`: what a run would take, found without the hardware that it is for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers import columns, messages
from shardwright.launchers.composition.compose import command_line, compose, resolved
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.plan import child, hardware
from shardwright.launchers.plan.deepspeed_estimates import Estimate, estimates
from shardwright.launchers.plan.hardware import GIB, Hardware
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError

FLAGS = ("--states-only", "--json")


def main(arguments: Sequence[str]) -> int:
    """Print the plan that the arguments ask for."""
    flags = {argument for argument in arguments if argument in FLAGS}
    words, others = hardware.split([a for a in arguments if a not in FLAGS])
    supposed = hardware.chosen(words, _config_dir(others))
    jobs = compose(others)
    if not jobs:
        return 0  # the help, or another question that Hydra has answered
    if len(jobs) > 1:
        raise UserError("-m starts several runs, and a plan is of one; leave -m out")
    config = resolved(jobs[0], machine.detect(os.environ), time.strftime("%Y%m%d-%H%M%S"))
    _states_only(config, supposed, as_json="--json" in flags)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright plan`: Hydra's flags and ours."""
    found = command_line()
    found.add_argument(
        "--states-only",
        action="store_true",
        help="the model states alone, as DeepSpeed's own estimators count them",
    )
    found.add_argument("--json", action="store_true", help="print one JSON object instead")
    return found


def _config_dir(arguments: Sequence[str]) -> Path | None:
    options, _ = command_line().parse_known_intermixed_args(
        [argument for argument in arguments if argument.startswith(("--config-dir", "-cd"))]
    )
    return Path(options.config_dir) if options.config_dir else None


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
