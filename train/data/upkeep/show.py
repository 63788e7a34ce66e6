"""What a run trains on, as it is stored and as the model sees it: `shardwright data show`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from shardwright.train.console import terminal
from shardwright.train.data.upkeep.facts import COLUMNS, facts
from shardwright.train.data.upkeep.flags import add_flags, wanted
from shardwright.train.data.upkeep.report import report
from shardwright.train.data.upkeep.target import target_of
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.process.arguments import path as path_of


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright data show`."""
    found = argparse.ArgumentParser(
        prog="shardwright data show",
        description="Show what a run trains on: documents, tokens, samples and what is held out, "
        "lengths of documents, what is cut, and the first samples as the model sees them. "
        "`shardwright inspect` does so before there is a run.",
        epilog="Exit codes: 0, 2 on bad input.",
    )
    found.add_argument(
        "path", type=path_of, metavar="RUN_DIR|CACHE_ENTRY", help="or a directory of the cache"
    )
    add_flags(found)
    return found


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        found = facts(target_of(options.path), wanted(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    columns = terminal.columns() or COLUMNS
    lines = found.pop("lines")
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join([*report(found, now=time.time(), columns=columns), *lines]))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(terminal.run(main))
