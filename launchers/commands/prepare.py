"""`shardwright prepare`: put what runs would train on into the cache, before any of them starts."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers import messages, preflight
from shardwright.launchers.composition.compose import command_line, compose, resolved
from shardwright.launchers.hosts import preparing as hosts
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import prepare_command
from shardwright.launchers.registry import launcher_of
from shardwright.launchers.slurm import preparing
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.console import terminal
from shardwright.train.data.tokens.cache import cache_root
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE
from shardwright.train.program import package_environment
from shardwright.train.run_directory import owner
from shardwright.train.run_directory.names import DATA_JSON, LOGS, RUN_CONFIG
from shardwright.train.units import size


def main(arguments: Sequence[str]) -> int:
    """Prepare the data of all runs that the arguments ask for; return the first bad exit code."""
    dry_run = "--dry-run" in arguments
    jobs = compose([argument for argument in arguments if argument != "--dry-run"])
    here = machine.detect(os.environ)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    configs = [resolved(job, here, stamp) for job in jobs]
    terminal.outlive()
    for config in configs:
        is_job = config.launcher.is_job
        over_hosts = bool(launcher_of(config).hosts())
        if dry_run:
            print(_settings(config))
            if is_job:
                print(preparing.show(config))
        preflight.check_data(config)
        if is_job:
            preflight.check_job(config)
        if over_hosts:
            preflight.check_hosts(config)
            print(hosts.show(config) if dry_run else "", end="\n" if dry_run else "")
    worst = 0
    for job, config in [] if dry_run else list(zip(jobs, configs, strict=True)):
        if config.launcher.is_job:
            code = preparing.handed_over(config, is_generated=job.is_named_here)
        else:
            code = _prepared(config, is_generated=job.is_named_here)
        if code == RESUMABLE or code > 128:
            return code
        worst = worst or code
    return worst


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright prepare`: Hydra's flags and ours."""
    found = command_line()
    found.add_argument(
        "--dry-run", action="store_true", help="show what would be prepared, and check it"
    )
    return found


def _settings(config: RunConfig) -> str:
    """Return the parts of a config that tokens depend on, as YAML."""
    tree = {name: getattr(config, name) for name in ("objective", "data", "tokenizer")}
    lines = to_yaml(config).splitlines()
    shown, inside = [], False
    for line in lines:
        if not line.startswith(" "):
            inside = line.partition(":")[0] in tree
        if inside:
            shown.append(line)
    return "\n".join([f"# into {cache_root(config.data)}", *shown])


def _prepared(config: RunConfig, *, is_generated: bool) -> int:
    """Prepare the data of one run, here or on the hosts of its launcher; return the exit code."""
    if launcher_of(config).hosts():
        ended = hosts.over_hosts(config, is_generated=is_generated)
    else:
        ended = _prepared_here(config)
    if ended.noted is not None:
        root, width = cache_root(config.data), messages.terminal_width()
        print("\n".join(described(ended.noted, root, width)))
    elif ended.code == RESUMABLE:
        print(f"\nstopped by {ended.stopped_by or 'a signal'}: {KEPT}", file=sys.stderr)
    elif ended.code != BAD_INPUT:
        print(f"preparing the data failed: {KEPT}", file=sys.stderr)
    return ended.code


def _prepared_here(config: RunConfig) -> hosts.Outcome:
    """Prepare the data of one run in a directory that does not stay."""
    with tempfile.TemporaryDirectory(prefix="shardwright-prepare-") as scratch:
        run_dir = Path(scratch)
        (run_dir / LOGS).mkdir()
        config = config.model_copy(update={"run_dir": scratch})
        (run_dir / RUN_CONFIG).write_text(to_yaml(config), encoding="utf-8")
        ended = child.run(
            prepare_command(run_dir),
            {**package_environment(os.environ), **owner.inherited(None)},
            grace_seconds=config.launcher.grace_seconds,
            at_ctrl_c="stopping the preparation of the data",
        )
        if ended.code == 0:
            noted = json.loads((run_dir / DATA_JSON).read_text(encoding="utf-8"))
            return hosts.Outcome(0, noted)
    if ended.stopped_by is not None or ended.code == RESUMABLE:
        by = child.asked_by(ended.stopped_by) if ended.stopped_by is not None else None
        return hosts.Outcome(RESUMABLE, stopped_by=by)
    return hosts.Outcome(BAD_INPUT if ended.code == BAD_INPUT else FAILED)


KEPT = (
    "a tokenizer that is whole is kept, and of a large corpus the shards that are; the same "
    "command makes the rest"
)


def described(noted: Mapping[str, Any], root: Path, width: int | None = None) -> list[str]:
    """Return as lines what there is; ``noted`` is what data.json of a run says of it."""
    path = root / "tokens" / noted["tokens"]
    bytes_ = sum(file.stat().st_size for file in path.iterdir())
    rows = {"tokens": f"{path} ({size(bytes_)})"}
    for name, part in (("training", noted["training"]), ("held out", noted["heldout"])):
        tokens = part["tokens"] + part["tokens_left_out"]
        rows[name] = (
            f"{part['documents']:,} documents, {tokens:,} tokens, {part['samples']:,} samples"
        )
    rows["tokenizer"] = f"{noted['tokenizer']['tokens']:,} tokens"
    return list(messages.aligned(rows, 12, width))
