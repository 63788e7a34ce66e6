"""Whether the live engine is the one that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.strategy import loop_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    _check(engine, expected, live, "trained")
    return live


def verify_forward_only(engine: Engine, trainer: Training) -> dict[str, Any]:
    """Do the same with what makes forward passes alone."""
    expected = {
        **engine.expected_forward_only(),
        **loop_facts.expected_of_model(engine.config),
    }
    live = {
        **engine.read_back_forward_only(trainer),
        **loop_facts.read_back_of_model(trainer),
    }
    _check(engine, expected, live, "evaluated")
    return live


def _check(engine: Engine, expected: Mapping[str, Any], live: Mapping[str, Any], done: str) -> None:
    differences = [
        f"{fact}: the config requires {value!r}, the live engine has {live.get(fact)!r}"
        for fact, value in expected.items()
        if live.get(fact) != value
    ]
    if differences:
        raise EngineMismatch(
            f"strategy={engine.config.strategy.kind} is not what is running; nothing was {done}\n"
            + "\n".join(differences)
        )


class EngineMismatch(RuntimeError):
    """The live engine is not the one that was asked for."""
