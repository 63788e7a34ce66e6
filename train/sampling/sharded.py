"""One of the ranks that sample together, with the arguments DIRECTORY ARGUMENTS.

DIRECTORY holds the config.yaml that says how the model is divided, ARGUMENTS are those of
`shardwright sample`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from shardwright.train.config import PretrainedModel, load
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.process import inherited

if TYPE_CHECKING:
    from shardwright.train.strategy.engine import Engine

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run one rank; return 0, 1 where it failed, or 2 on bad input."""
    from shardwright.train.process import exhausted, logs
    from shardwright.train.process.rank import rank_from_environment
    from shardwright.train.run_directory.failures import note_failure
    from shardwright.train.sampling import sample
    from shardwright.train.strategy import engine_of
    from shardwright.train.strategy.group import join

    directory = Path(argv[0])
    options = sample.parser().parse_args(argv[1:])
    rank = rank_from_environment()
    inherited.forget_engine(os.environ)
    config = load(directory)
    terminal = logs.open_rank_log(directory, rank)
    try:
        with join(config, rank):
            engine = engine_of(config, rank.world_size)
            generate(engine, options, terminal if rank.index == 0 else io.StringIO())
    except Exception as error:
        logger.exception("rank %d failed", rank.index)
        why = exhausted.explained(error, remedies=("more ranks (--nproc-per-node)",))
        note_failure(directory, rank.index, error, why)
        return BAD_INPUT if isinstance(error, UserError) else FAILED
    return 0


def generate(engine: Engine, options: argparse.Namespace, out: TextIO) -> None:
    """Divide the model among the ranks and let it answer the prompts. Collective."""
    import torch
    from transformers import AutoTokenizer

    from shardwright.train.model import build as models
    from shardwright.train.model.user_modules import import_for
    from shardwright.train.sampling import sample

    config = engine.config
    assert isinstance(config.model, PretrainedModel)
    model_dir = Path(config.model.name)
    import_for(model_dir, config.model.imports)
    sample.check_code(model_dir, trusts_code=options.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(
        model_dir, trust_remote_code=options.trust_remote_code
    )
    sample.check_prompts(options.prompt, tokenizer, config.objective.kind)
    model = engine.serve(*models.build(config, tokenizer))
    model.config.use_cache = True  # switched off for training
    device = torch.device(config.launcher.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    sample.show(
        model_dir,
        options.prompt,
        out,
        new_tokens=options.new_tokens,
        top=options.top,
        steps=options.steps,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
        sharded=(model, device),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
