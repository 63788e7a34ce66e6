"""Whether the live engine is the one that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.strategy import loop_facts

if TYPE_CHECKING:
    from shardwright.train.strategy.engine import Engine
    from shardwright.train.strategy.training import Training


def verify(engine: Engine, trainer: Training) -> dict[str, Any]:
    """Compare the live engine of a training with its config and return what was read back.

    Raises EngineMismatch naming every fact that differs, with both values.
    """
    expected = {
        **engine.expected(),
        **loop_facts.expected(engine.config, engine.layout, trainer.schedule),
    }
    if trainer.state.global_step > 0:
        # A resumed run keeps the loss scale that it had reached.
        del expected["initial_loss_scale"]
    live = {**engine.read_back(trainer), **loop_facts.read_back(trainer)}
    differences = [
        f"{fact}: the config requires {value!r}, the live engine has {live.get(fact)!r}"
        for fact, value in expected.items()
        if live.get(fact) != value
    ]
    if differences:
        raise EngineMismatch(
            f"strategy={engine.config.strategy.kind} is not what is running; nothing was trained\n"
            + "\n".join(differences)
        )
    return live


class EngineMismatch(RuntimeError):
    """The live engine is not the one that was asked for."""
