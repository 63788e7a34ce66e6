"""Shell completion below a subcommand, which Hydra's own does not know of."""

from __future__ import annotations

import os
from collections.abc import Sequence

from launchers.commands import checkpoints, push, recover
from launchers.composition.compose import compose
from launchers.composition.errors import qualify

TRAIN_FLAGS = (
    "--cfg",
    "--config-dir",
    "--dry-run",
    "--help",
    "--hydra-help",
    "--info",
    "--multirun",
    "--package",
    "--resolve",
)

FLAGS = {
    "cancel": ("--now", "--help"),
    "checkpoints": checkpoints.FLAGS,
    "logs": ("--rank", "--follow", "--help"),
    "push": push.FLAGS,
    "recover": recover.FLAGS,
    "status": ("--help",),
}


def main(arguments: Sequence[str], commands: Sequence[str]) -> int:
    """Answer Hydra's shell functions, or install them; ``commands`` are ours."""
    if any(argument.startswith("query=") for argument in arguments):
        candidates = complete(os.environ.get("COMP_LINE", ""), commands)
        if isinstance(candidates, list):
            print("\n".join(candidates))
            return 0
        os.environ["COMP_LINE"] = candidates
    compose(arguments)
    return 0


def complete(line: str, commands: Sequence[str]) -> list[str] | str:
    """Return the candidates for a command line, or the line to put to Hydra.

    Hydra's shell functions call ``shardwright -sc query=<shell>`` with the line in COMP_LINE, take
    all behind the program's name for overrides, and cannot parse a subcommand or a flag of ours
    among them.
    """
    program, *words = line.split()
    if not line.endswith(" ") and not words:
        return []
    last = "" if line.endswith(" ") else words.pop()
    if not words:
        return [command for command in commands if command.startswith(last)]
    if (flags := FLAGS.get(words[0])) is not None:
        return [flag for flag in flags if flag.startswith(last)] * last.startswith("-")
    if words[0] != "train":
        return []
    if last.startswith("-"):
        return [flag for flag in TRAIN_FLAGS if flag.startswith(last)]
    overrides = [qualify(word) for word in words[1:] if word != "--dry-run"]
    return " ".join([program, *overrides, last])
