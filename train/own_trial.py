"""Import what a config names of the user's own and try it, in a process of the launcher's.

So is a model's own config with what the run overrides of it.

A config on stdin, a list of what is wrong with its parts on stdout, both JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator

from shardwright.train.config import NamedModel, RunConfig, from_tree
from shardwright.train.errors import UserError


def main() -> int:
    """Say what is wrong; nothing is trained."""
    # Libraries, and the user's own modules, print to stdout as they like.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    config = from_tree(json.load(sys.stdin))
    with os.fdopen(answer_to, "w", encoding="utf-8") as out:
        json.dump(list(problems(config)), out)
    return 0


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with each part that a config names."""
    for check in _checks(config):
        try:
            check()
        except UserError as error:
            yield str(error)


def _checks(config: RunConfig) -> Iterator[Callable[[], object]]:
    from shardwright.train.loop.callbacks import own
    from shardwright.train.model.own_loss import OwnLoss
    from shardwright.train.model.pretrained import check_before_data
    from shardwright.train.model.user_modules import import_all

    yield lambda: import_all(config.model.imports)
    for text in config.trainer.callbacks:
        yield lambda text=text: own.check(text)  # type: ignore[misc]
    if config.trainer.custom_class is not None:
        yield lambda: _check_optimizer(config)
    if (loss := config.objective.loss) is not None:
        yield lambda: OwnLoss(loss).tried()
    if isinstance(model := config.model, NamedModel) and model.changes_its_config:
        yield lambda: check_before_data(model, config.objective)


def _check_optimizer(config: RunConfig) -> None:
    from shardwright.train.optimizer import custom, sharded_trial

    custom.check(config)
    sharded_trial.check(config)  # would find again what the first has found


if __name__ == "__main__":
    sys.exit(main())
