"""`shardwright doctor`: is this machine, or are all nodes of a launcher, fit to train?"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.launchers import messages, preflight
from shardwright.launchers.composition.compose import compose, plain
from shardwright.launchers.composition.errors import refuse_dashes
from shardwright.launchers.machine import among_ranks, directories, health, names, nccl
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.machine.health import Finding
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.errors import FAILED, UserError
from shardwright.train.paths import absolute
from shardwright.train.process import nccl_log
from shardwright.train.run_directory.failures import rank_failures
from shardwright.train.run_directory.names import LOGS, TORCHRUN_LOG

DEFAULTS = (
    *("model=gpt2_tiny", "objective=clm", "data=stdlib", "strategy=ddp", "precision=fp32"),
    *("tracking=none", "trainer.micro_batch_size=1", "data.sequence_length=8"),
)
"""A run that is never trained, on which the launcher's overrides are composed."""

RANKS_MODULE = "shardwright.train.diagnosis.doctor"
"""What the ranks run, on whose measurements `among_ranks.judge` decides."""

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
        gpu_ids = None if config is None else config.launcher.gpu_ids
        findings = health.look(directory, here, os.environ, world_size=world_size, gpu_ids=gpu_ids)
    print(text(findings), flush=True)
    if config is not None:
        print("\nranks\n", flush=True)
        with progress.phase("measuring across ranks", console=sys.stderr):
            found = measured(config, here)
        judged = list(among_ranks.judge(found.ranks))
        if config.launcher.device == "cuda" and config.launcher.world_size > 1:
            said = nccl.read(found.nccl_logs)
            judged += nccl.judge(said, config.launcher.nodes)
            if said.topology:
                print("\n".join(["topology, as NCCL sees it", *said.topology, ""]))
        print(text(judged))
        findings += judged
    return FAILED if any(finding.state == "wrong" for finding in findings) else 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright doctor`."""
    found = argparse.ArgumentParser(
        prog="shardwright doctor",
        description="Look for what stops or slows training: versions, GPUs, compilers, memory, "
        "disk, clock, names, ports. With overrides (launcher=torchrun launcher.nproc_per_node=8) "
        "it starts the ranks too, measures matrix products, collectives and every pair of nodes, "
        "and shows what NCCL found and chose.",
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


class Measured(NamedTuple):
    """What ranks have measured, each a `Measured` of train/diagnosis, and NCCL's logs of it."""

    ranks: list[dict[str, Any]]
    nccl_logs: list[str]


def measured(config: RunConfig, here: Machine, *, with_speeds: bool = False) -> Measured:
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
    ranks = json.loads(written.read_text())
    logs = [path.read_text(errors="replace") for path in sorted(directory.glob(nccl_log.FILES))]
    directories.take_back(made)
    return Measured(ranks, logs)


def asked_for(overrides: Sequence[str], here: Machine, directory: Path) -> RunConfig:
    """Return a run that is never trained, with the launcher that the overrides ask for.

    Raises UserError where that cannot be, or would wait for nodes that nobody starts.
    """
    (job,) = compose([*DEFAULTS, *overrides])
    tree = plain(job.tree)
    launcher = tree["launcher"]
    # The batch has to divide among ranks that are settled only below.
    unsettled = {name: "auto" for name in launcher if name == "nproc_per_node"}
    asked = from_tree({**tree, "launcher": {**launcher, **unsettled}}, job.typed)
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
    return machine.resolve(from_tree(tree, job.typed), here, str(directory))


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
