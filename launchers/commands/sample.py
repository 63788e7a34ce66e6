"""`shardwright sample`: generate with a trained model, in one process or on ranks that share it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.train.durable import write_text
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import LOGS, RUN_CONFIG, TORCHRUN_LOG
from shardwright.train.sampling import sample


def main(arguments: Sequence[str]) -> int:
    """Become the process that samples, or start ranks that do; return the exit code."""
    options = parser().parse_args(arguments)
    sample.check_strategy(options.strategy, options.nproc_per_node)
    if options.strategy is not None:
        return _together(options, arguments)
    sample.model_directory(options.run_dir)  # says at once where there is none
    argv = [sys.executable, "-m", "shardwright.train.sampling.sample", *arguments]
    child.replace(argv, package_environment(os.environ))
    return FAILED  # not reached: this process is shardwright.train.sampling.sample now


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright sample`."""
    return sample.parser()


def _together(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Start ranks that hold the model together; return the exit code."""
    # Seconds of imports, which one process does without.
    from shardwright.launchers import messages
    from shardwright.launchers.composition.compose import compose, plain
    from shardwright.launchers.machine import facts as machine
    from shardwright.train.config import from_tree, to_yaml
    from shardwright.train.run_directory.failures import rank_failures

    here = machine.detect(os.environ)
    model_dir = sample.model_directory(options.run_dir).absolute()
    sample.check_can_be_divided(model_dir, options.strategy)
    ranks = options.nproc_per_node or max(1, here.gpus)
    trusts_code = options.trust_remote_code
    overrides = sampling_overrides(
        model_dir, options.strategy, ranks, trusts_code=trusts_code, imports=options.imports
    )
    (job,) = compose(overrides)
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="shardwright-sample-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        config = machine.resolve(from_tree(plain(job.tree)), here, str(directory))
        if problems := machine.lacking(config.launcher.device, ranks, config.precision, here):
            raise UserError("\n".join(problems))
        write_text(directory / RUN_CONFIG, to_yaml(config))
        (directory / LOGS).mkdir()
        ended = child.run(
            rank_command(
                config, directory, module="shardwright.train.sampling.sharded", arguments=arguments
            ),
            rank_environment(config, here, os.environ),
            stderr_file=directory / LOGS / TORCHRUN_LOG,
            grace_seconds=0,  # they have nothing to save
        )
        failures = rank_failures(directory)
        code = messages.exit_code(ended.code, failures, ended.stopped_by)
        if code == BAD_INPUT and failures:
            raise UserError(failures[0].message)
        if code != 0 and ended.stopped_by is not None:
            print(
                messages.failure(ended.code, failures, directory, ended.stopped_by), file=sys.stderr
            )
        elif code != 0:
            stack.pop_all()  # the message names the logs
            text = messages.failure(ended.code, failures, directory, ended.stopped_by)
            print(text, file=sys.stderr)
        return code


def sampling_overrides(
    model_dir: Path,
    strategy: str,
    ranks: int,
    *,
    trusts_code: bool = False,
    imports: Sequence[str] = (),
) -> list[str]:
    """Return the overrides of a run that loads a model under a strategy, in the model's dtype."""
    dtype = json.loads((model_dir / "config.json").read_text()).get("dtype")
    from shardwright.launchers.composition.compose import quoted

    half = "bf16_pure" if strategy.startswith("fsdp") else "bf16"
    return [
        "model=pretrained",
        f"model.name={quoted(str(model_dir))}",
        f"objective={sample.objective_of(model_dir)}",
        "tokenizer=pretrained",
        f"tokenizer.name={quoted(str(model_dir))}",
        f"model.trust_remote_code={str(trusts_code).lower()}",
        f"model.import=[{','.join(imports)}]",
        f"tokenizer.trust_remote_code={str(trusts_code).lower()}",
        f"strategy={strategy}",
        f"precision={half if dtype == 'bfloat16' else 'fp32'}",
        f"launcher.nproc_per_node={ranks}",
        "trainer.micro_batch_size=1",
        f"trainer.global_batch_size={ranks}",
        "data.sequence_length=8",
    ]
