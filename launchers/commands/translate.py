"""`shardwright translate`: what another program's config or command line is here, as overrides."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from shardwright.launchers.translating import source
from shardwright.launchers.translating.translation import Translation, table, width_of
from shardwright.train import program
from shardwright.train.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Print the overrides of a file or of a command line, and what became of each key."""
    words = list(arguments)
    line: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, line = words[:at], words[at + 1 :]
    options = parser().parse_args(words)
    if (options.file is None) == (not line):
        raise UserError(
            "give one thing to translate: a file, `shardwright translate ds_config.json`, or a "
            "command line behind two dashes, `shardwright translate -- torchrun run_clm.py ...`"
        )
    found = source.of_line(line) if line else source.of_file(options.file, options.ranks)
    if options.json:
        print(json.dumps(_as_json(found), indent=2, default=str))
        return 0
    for text in table(found.entries, width_of(sys.stderr)):
        print(text, file=sys.stderr)
    if refused := len(found.refused):
        print(f"{refused} of {len(found.entries)} refused, not in the command:", file=sys.stderr)
    print(program.command("train", *found.words()))
    return 0


def _as_json(found: Translation) -> dict[str, object]:
    return {
        "command": program.command("train", *found.words()),
        "overrides": found.words(),
        "keys": [
            {"key": e.key, "value": e.value, "becomes": e.outcome, "text": e.text}
            for e in found.entries
        ],
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright translate`."""
    found = argparse.ArgumentParser(
        prog="shardwright translate",
        usage="shardwright translate [--json] [--ranks N] FILE | -- COMMAND LINE",
        description="Print the `shardwright train` of a DeepSpeed config, of accelerate's config "
        "file, or of a command line of run_clm.py or run_mlm.py, with or without torchrun, "
        "accelerate launch or deepspeed in front; on stderr, what became of each key.",
    )
    found.add_argument(
        "file", nargs="?", metavar="FILE", help="ds_config.json or accelerate's YAML"
    )
    found.add_argument("--json", action="store_true", help="all of it as JSON, on stdout")
    found.add_argument(
        "--ranks",
        type=_positive,
        metavar="N",
        help="ranks of the run, where a DeepSpeed config has accumulation steps and no batch size",
    )
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of ranks")
    return int(text)
