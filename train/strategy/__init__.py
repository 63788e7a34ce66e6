"""The only place that knows the engines: config -> settings, live engine -> facts and weights.

Each module is one engine and gives the functions of `Engine`. Nothing outside this folder and
train/checkpoint/ asks which strategy it is. Importing it needs no torch, so that a dry run can
print the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.config import RunConfig
from train.strategy import fsdp, loop, replicated, zero
from train.strategy.engine import Engine

if TYPE_CHECKING:
    from train.strategy.training import Training


def engine_of(config: RunConfig) -> Engine:
    """Return the module of the engine that the config asks for."""
    engines: dict[str, Engine] = {
        "single": replicated,
        "ddp": replicated,
        "zero": zero,
        "fsdp": fsdp,
    }
    return engines[config.strategy.kind]


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """Return the engine settings that result from a resolved config. Pure."""
    return engine_of(config).settings(config, config.launcher.world_size)


def verify(trainer: Training, config: RunConfig, world_size: int) -> dict[str, Any]:
    """Compare the live engine with the config and return what was read back.

    Raises EngineMismatch naming every fact that differs, with both values.
    """
    engine = engine_of(config)
    expected = {
        **engine.expected(config, world_size),
        **loop.expected(config, world_size, trainer.schedule),
    }
    if trainer.state.global_step > 0:
        # A resumed run goes on with the loss scale that it had come to.
        del expected["initial_loss_scale"]
    live = {**engine.read_back(trainer), **loop.read_back(trainer)}
    differences = [
        f"{fact}: the config asks for {value!r}, the live engine has {live.get(fact)!r}"
        for fact, value in expected.items()
        if live.get(fact) != value
    ]
    if differences:
        raise EngineMismatch(
            f"strategy={config.strategy.kind} is not what runs; nothing was trained\n"
            + "\n".join(differences)
        )
    return live


class EngineMismatch(RuntimeError):
    """The live engine is not the one that was asked for."""
