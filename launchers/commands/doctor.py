"""`shardwright doctor`: is this machine, or are all nodes of a launcher, fit to train?"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers import messages, preflight
from shardwright.launchers.composition.compose import compose, plain
from shardwright.launchers.composition.errors import refuse_dashes
from shardwright.launchers.machine import directories, health, names
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.machine.health import CLOCK_SKEW_SECONDS, Finding
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.errors import FAILED, UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory.failures import rank_failures
from shardwright.train.run_directory.names import LOGS, TORCHRUN_LOG

SLOW_SHARE = 0.85
"""A node below this share of the median holds up all others noticeably."""

DEFAULTS = (
    *("model=gpt2_tiny", "objective=clm", "data=stdlib", "strategy=ddp", "precision=fp32"),
    *("tracking=none", "trainer.micro_batch_size=1", "data.sequence_length=8"),
)
"""A run that is never trained, on which the launcher's overrides are composed."""

RANKS_MODULE = "shardwright.train.diagnosis.doctor"
"""What the ranks run, on whose measurements `judge_ranks` decides."""

_MARKS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


def main(arguments: Sequence[str]) -> int:
    """Say what is wrong with this machine and, with overrides, with a launcher's ranks."""
    refuse_dashes(arguments)
    options = parser().parse_args(arguments)
    directory = Path(absolute(options.directory))
    here = machine.detect(os.environ)
    config = None
    if options.overrides:
        # Where all nodes see it, as a run directory. What cannot be is said before a minute's look.
        place = names.free(directory / time.strftime("doctor-%Y%m%d-%H%M%S"))
        config = asked_for(options.overrides, here, place)
        preflight.check_place(config)
        preflight.check_machine(config, here)
    print(f"{platform.node()}\n", flush=True)
    with progress.phase("checking this machine", console=sys.stderr):
        world_size = 1 if config is None else config.launcher.world_size
        findings = health.look(directory, here, os.environ, world_size=world_size)
    print(text(findings), flush=True)
    if config is not None:
        print("\nranks\n", flush=True)
        with progress.phase("measuring across ranks", console=sys.stderr):
            among_ranks = list(judge_ranks(measured(config, here)))
        print(text(among_ranks))
        findings += among_ranks
    return FAILED if any(finding.state == "wrong" for finding in findings) else 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright doctor`."""
    found = argparse.ArgumentParser(
        prog="shardwright doctor",
        description="Look for what stops or slows training: versions, GPUs, compilers, memory, "
        "disk, clock, names, ports. With overrides (launcher=torchrun launcher.nproc_per_node=8) "
        "it starts the ranks too and measures matrix products and collectives across them.",
        epilog="Exit codes: 0, 1 where something is wrong, 2 on bad input.",
    )
    found.add_argument(
        "--directory",
        default="runs",
        metavar="DIR",
        help="where runs go; its disk is tested (default: runs)",
    )
    found.add_argument("overrides", nargs="*", metavar="key=value")
    return found


def measured(
    config: RunConfig, here: Machine, *, with_speeds: bool = False
) -> list[dict[str, Any]]:
    """Start the ranks of a config and return what each has measured.

    Raises UserError, which names the logs, where they do not come to an end.
    """
    config, made = directories.create_named(config, is_generated=True)
    directory = Path(str(config.run_dir))
    written = directory / "doctor.json"
    argv = rank_command(
        config,
        directory,
        module=RANKS_MODULE,
        arguments=[str(written), *(["speeds"] if with_speeds else [])],
        machine=here,
    )
    environment = rank_environment(config, here, os.environ)
    for name, content in launcher_of(config).files(environment, here).items():
        write_text(directory / name, content)
    ended = child.run(
        argv,
        environment,
        stderr_file=directory / LOGS / TORCHRUN_LOG,
        grace_seconds=0.0,  # there is nothing to save
    )
    if ended.code != 0 and ended.stopped_by is not None:
        directories.take_back(made)
        raise SystemExit(128 + ended.stopped_by)
    if ended.code != 0:
        failures = rank_failures(directory)
        raise UserError(messages.failure(ended.code, failures, directory, ended.stopped_by))
    found: list[dict[str, Any]] = json.loads(written.read_text())
    directories.take_back(made)
    return found


def asked_for(overrides: Sequence[str], here: Machine, directory: Path) -> RunConfig:
    """Return a run that is never trained, with the launcher that the overrides ask for.

    Raises UserError where that cannot be, or would wait for nodes that nobody starts.
    """
    (job,) = compose([*DEFAULTS, *overrides])
    tree = plain(job.tree)
    launcher = tree["launcher"]
    # The batch has to divide among ranks that are settled only below.
    unsettled = {name: "auto" for name in launcher if name == "nproc_per_node"}
    asked = from_tree({**tree, "launcher": {**launcher, **unsettled}})
    kind, nodes = asked.launcher.kind, asked.launcher.nodes
    if launcher_of(asked).joins and nodes > 1:
        raise UserError(
            f"launcher={kind} launcher.nodes={nodes} starts only the ranks of this node, and "
            "nothing would start those of the others; measure across nodes with launcher=slurm, "
            "or with launcher=deepspeed and a hostfile"
        )
    machine.resolve_launcher(launcher, asked, here)
    ranks = launcher.get("nproc_per_node", 1)
    # No step is made, but a config has a batch that divides.
    constant = {"batch_warmup_from": None, "batch_warmup_samples": 0}
    tree["trainer"] |= {"global_batch_size": ranks * launcher.get("nodes", 1), **constant}
    return machine.resolve(from_tree(tree), here, str(directory))


def text(findings: Sequence[Finding]) -> str:
    """Return the findings as a table, each remedy below its finding. Pure."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.state]:<6}{finding.topic:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<{width + 8}}-> {finding.remedy}")
    wrong = sum(finding.state == "wrong" for finding in findings)
    notes = sum(finding.state == "note" for finding in findings)
    ending = f"{wrong} wrong, {notes} worth a look" if wrong or notes else "nothing is wrong"
    return "\n".join([*lines, "", ending])


def judge_ranks(measured: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge what the ranks measured, each a `Measured`; name the slowest node. Pure."""
    nodes: dict[str, list[Mapping[str, Any]]] = {}
    for rank in measured:
        nodes.setdefault(rank["host"], []).append(rank)
    devices = ", ".join(dict.fromkeys(rank["device"] for rank in measured))
    yield Finding("ranks", "ok", f"{len(measured)} on {len(nodes)} node(s), {devices}")

    rates = {h: statistics.median(r["matmul_flops"] for r in ranks) for h, ranks in nodes.items()}
    yield from _compared("matrix product", rates, 1e9, "GFLOP/s a rank")

    for name, key in (("all-reduce", "all_reduce"), ("all-gather", "all_gather")):
        values = [rank[f"{key}_bytes_per_second"] for rank in measured]
        if None not in values:
            slowest = min(values)
            yield Finding(name, "ok", f"right, {slowest / 1e9:.2f} GB/s through each rank's link")
    latencies = [rank["small_all_reduce_seconds"] for rank in measured]
    if None not in latencies:
        yield Finding("latency", "ok", f"{1e6 * max(latencies):,.0f} us for an empty all-reduce")

    links = {
        f"{rank['host']} to {rank['next_node']}": rank["link_bytes_per_second"]
        for rank in measured
        if rank["next_node"] is not None
    }
    if links:
        yield from _compared("link", links, 1e9, "GB/s")

    clocks = [rank["clock"] for rank in measured]
    skew = max(clocks) - min(clocks)
    if skew > CLOCK_SKEW_SECONDS:
        last = max(measured, key=lambda rank: rank["clock"])["host"]
        first = min(measured, key=lambda rank: rank["clock"])["host"]
        yield Finding(
            "clocks",
            "note",
            f"{last} is {skew:.1f} s ahead of {first}: times in their logs do not agree",
            "let chrony or ntpd set the clocks of all nodes",
        )
    elif len(nodes) > 1:
        yield Finding("clocks", "ok", f"all nodes agree within {skew:.2f} s")


def _compared(topic: str, rates: Mapping[str, float], unit: float, name: str) -> Iterator[Finding]:
    """Compare nodes, or links between them, with their median."""
    middle = statistics.median(rates.values())
    slowest = min(rates, key=lambda key: rates[key])
    shown = f"{rates[slowest] / unit:,.1f} {name}"
    if len(rates) == 1:
        yield Finding(topic, "ok", shown)
    elif rates[slowest] < SLOW_SHARE * middle:
        yield Finding(
            topic,
            "note",
            f"{slowest} is the slowest with {shown}, {rates[slowest] / middle:.0%} of the median: "
            "it holds up all the others",
            f"see what else runs there, or leave it out (launcher=slurm: --exclude={slowest})"
            if " to " not in slowest
            else "look at the cable, the switch and the interface that is used",
        )
    else:
        yield Finding(topic, "ok", f"{shown} on {slowest}, the slowest of {len(rates)}")
