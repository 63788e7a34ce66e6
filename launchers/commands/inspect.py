"""`shardwright inspect`: what a run would train on, before anything is."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import compose, resolved
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.ranks import child
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.data.upkeep.flags import add_own_flags
from shardwright.train.errors import UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import RUN_CONFIG


def main(arguments: Sequence[str]) -> int:
    """Show the data of the run that the arguments ask for."""
    if {"-h", "--help"} & set(arguments):
        parser().parse_args(["--help"])
    own = argparse.ArgumentParser(prog="shardwright inspect", allow_abbrev=False, add_help=False)
    add_own_flags(own)
    flags, others = own.parse_known_args(arguments)
    jobs = compose(others)
    if not jobs:
        return 0  # a question that Hydra has answered
    if len(jobs) > 1:
        raise UserError("-m starts several runs, and the data of one are shown; leave -m out")
    config = resolved(jobs[0], machine.detect(os.environ), time.strftime("%Y%m%d-%H%M%S"))
    preflight.check_data(config)
    passed = [f"--bytes={flags.bytes}", f"--samples={flags.samples}"]
    passed += ["--held-out"] if flags.held_out else []
    passed += ["--json"] if flags.json else []
    return _inspected(config, passed)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright inspect`, whose other flags are Hydra's own."""
    found = argparse.ArgumentParser(
        prog="shardwright inspect",
        usage="%(prog)s [--bytes SIZE] [--samples N] [--held-out] [--json]\n"
        "           [--config-dir DIR] [group=option] [key=value] ...",
        description="Show what a run would train on, before anything is: documents, tokens per "
        "byte and per word of each source, duplicates, what is cut or padded, the longest "
        "documents, and its first samples as the model will see them.",
        epilog="What is in the cache is shown as it is; a small corpus is prepared, of a larger "
        "one an excerpt is read, and how much that is stands first. Exit codes: 0, 2 on bad input.",
    )
    found.add_argument(
        "words", nargs="*", metavar="key=value", help="settings as for `shardwright train`"
    )
    add_own_flags(found)
    found.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with options of your own, as for train"
    )
    return found


def _inspected(config: RunConfig, flags: Sequence[str]) -> int:
    """Have a process with the libraries look at it, in a directory that does not stay."""
    with tempfile.TemporaryDirectory(prefix="shardwright-inspect-") as scratch:
        config = config.model_copy(update={"run_dir": scratch})
        (Path(scratch) / RUN_CONFIG).write_text(to_yaml(config), encoding="utf-8")
        ended = child.run(
            [sys.executable, "-m", "shardwright.train.data.upkeep.inspection", scratch, *flags],
            package_environment(os.environ),
            at_ctrl_c="stopping",
        )
    if ended.stopped_by is not None:
        return 128 + ended.stopped_by
    return ended.code if ended.code >= 0 else 128 - ended.code
