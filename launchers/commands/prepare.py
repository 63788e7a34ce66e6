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
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import prepare_command
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
        if dry_run:
            print(_settings(config))
            print(preparing.show(config) if is_job else "", end="\n" if is_job else "")
        preflight.check_data(config)
        if is_job:
            preflight.check_job(config)
    worst = 0
    for job, config in [] if dry_run else list(zip(jobs, configs, strict=True)):
        if config.launcher.is_job:
            code = preparing.handed_over(config, is_generated=job.is_named_here)
        else:
            code = _prepared(config)
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


def _prepared(config: RunConfig) -> int:
    """Prepare the data of one run in a directory that does not stay; return the exit code."""
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
            print("\n".join(described(noted, cache_root(config.data), messages.terminal_width())))
            return 0
    if ended.stopped_by is not None or ended.code == RESUMABLE:
        by = child.asked_by(ended.stopped_by) if ended.stopped_by is not None else "a signal"
        print(f"\nstopped by {by}: {KEPT}", file=sys.stderr)
        return RESUMABLE
    if ended.code != BAD_INPUT:
        print(f"preparing the data failed: {KEPT}", file=sys.stderr)
        return FAILED
    return BAD_INPUT


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
