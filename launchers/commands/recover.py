"""`shardwright recover`: its command line, and the process in which it happens."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from shardwright.launchers.ranks import child
from shardwright.train.console import progress, terminal
from shardwright.train.errors import BAD_INPUT, FAILED, INTERRUPTED, UserError
from shardwright.train.model import user_modules
from shardwright.train.process.arguments import path as path_of
from shardwright.train.process.logs import quiet_libraries
from shardwright.train.program import package_environment

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def main(arguments: Sequence[str]) -> int:
    """Check the command line and become the process that recovers, without a launcher's memory."""
    parser().parse_args(arguments)
    child.replace(
        [sys.executable, "-m", "shardwright.launchers.commands.recover", *arguments],
        # Each of its threads works on a slice of its own.
        {**package_environment(os.environ), "OMP_NUM_THREADS": "1"},
    )
    return FAILED  # not reached


def recover(arguments: Sequence[str]) -> int:
    """Recover in this process; return its exit code."""
    asked = parser().parse_args(arguments)
    if not asked.dry_run:
        terminal.outlive()
    try:
        with progress.phase("importing libraries", console=sys.stderr):
            quiet_libraries()
            from shardwright.train.export.recover import Options
            from shardwright.train.export.recover import recover as run

        run(
            Options(
                source=asked.source,
                out=asked.out,
                step=asked.step,
                section=asked.section,
                dtype=asked.dtype,
                adapter=asked.adapter,
                base=asked.base,
                ema=asked.ema,
                allow_upcast=asked.allow_upcast,
                allow_nan=asked.allow_nan,
                max_shard_bytes=asked.max_shard_size,
                max_memory_bytes=asked.max_memory,
                config=asked.config,
                tokenizer=asked.tokenizer,
                trusts_code=asked.trust_remote_code,
                imports=tuple(asked.imports),
                dry_run=asked.dry_run,
            ),
            sys.stdout,
            sys.stderr,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"interrupted; {asked.out} is not written", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright recover`."""
    found = argparse.ArgumentParser(
        prog="shardwright recover",
        description="Make a Hugging Face model directory of whole weights out of a checkpoint: of "
        "Shardwright, DeepSpeed ZeRO, FSDP and other distributed checkpoints, of any number of "
        "ranks, in bounded memory.",
        epilog="Exit codes: 0, 1 failed, 2 bad input, with nothing written.",
    )
    _add_what_is_read(found)
    _add_how_it_is_written(found)
    _add_what_lies_beside(found)
    found.add_argument(
        "--dry-run", action="store_true", help="show what would be written; write nothing"
    )
    return found


def _add_what_is_read(found: argparse.ArgumentParser) -> None:
    """Add which checkpoint, and where in it the weights are; and the directory to make of it."""
    found.add_argument(
        "source",
        type=path_of,
        metavar="CHECKPOINT_OR_RUN",
        help="its format is found from its files",
    )
    found.add_argument(
        "out", type=path_of, metavar="OUT", help="a directory that does not exist yet"
    )
    found.add_argument(
        "--step",
        type=step,
        metavar="N|latest|best",
        help="which checkpoint of a run: that of a step, the newest that is whole (default), or "
        "the best by the run's checkpoint.best_metric",
    )
    found.add_argument(
        "--section",
        metavar="NAME",
        help="where in another program's files the weights are, such as trainer.model, if they "
        "hold several mappings of tensors",
    )


def _add_how_it_is_written(found: argparse.ArgumentParser) -> None:
    """Add which values are written, in which dtype, in how large files and with how much memory."""
    found.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32"
    )
    found.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with an adapter, that alone, as peft loads it; without, whole weights with "
        "the adapter added to them",
    )
    found.add_argument(
        "--base",
        type=path_of,
        metavar="DIR",
        help="where the model lies now beside whose weights the adapter was trained, of a run with "
        "model.quantization; by default where it lay",
    )
    found.add_argument("--ema", action="store_true", help="the moving average of the weights")
    found.add_argument(
        "--allow-upcast",
        action="store_true",
        help="write fp32 even where the checkpoint holds 16 bits only",
    )
    found.add_argument("--allow-nan", action="store_true", help="write NaN and infinity too")
    found.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=_bytes("5GB"),
        metavar="SIZE",
        help="largest size of a file, such as 500MB (default 5GB)",
    )
    found.add_argument(
        "--max-memory",
        type=_bytes,
        default=_bytes("512MiB"),
        metavar="SIZE",
        help="most memory to use besides what the program itself takes (default 512MiB)",
    )


def _add_what_lies_beside(found: argparse.ArgumentParser) -> None:
    """Add what a model directory has beside its weights: config, tokenizer, code."""
    found.add_argument(
        "--config",
        type=path_of,
        metavar="PATH",
        help="the model's config.json or its directory, where none lies with the checkpoint",
    )
    found.add_argument(
        "--tokenizer",
        type=path_of,
        metavar="PATH",
        help="its tokenizer's directory, where none lies with the checkpoint",
    )
    found.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; read it first",
    )
    user_modules.add_flag(found)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.lower())
    if (
        match is None
        or match[2] not in _UNITS
        or not (size := int(float(match[1]) * _UNITS[match[2]]))
    ):
        raise argparse.ArgumentTypeError(f"{text} is not a size, such as 500MB or 2GiB")
    return size


def step(text: str) -> int | str:
    """Return which checkpoint a flag asks for: a step, latest or best."""
    if text in ("latest", "best"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a step, nor latest, nor best")
    return int(text)


if __name__ == "__main__":
    sys.exit(terminal.run(lambda: recover(sys.argv[1:])))
