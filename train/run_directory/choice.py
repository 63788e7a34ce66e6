"""choice.json: what a plan chose for a run, what it expected of it, and the next smaller choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import CHOICE_JSON

if TYPE_CHECKING:
    from shardwright.train.config import RunConfig


@dataclass(frozen=True)
class Choice:
    """What `auto` came to. Bytes are those of one rank."""

    words: tuple[str, ...]
    """As they are typed."""
    device_bytes: int
    host_bytes: int
    smaller: tuple[str, ...] = ()
    """What takes noticeably less; nothing where nothing does."""
    smaller_device_bytes: int = 0
    smaller_host_bytes: int = 0


def note(run_dir: Path, config: RunConfig, choice: Choice) -> None:
    """Write down what was chosen for a run."""
    found = {"settings": _settings(config), **asdict(choice)}
    write_text(run_dir / CHOICE_JSON, json.dumps(found, indent=2) + "\n")


def read(run_dir: Path, config: RunConfig) -> Choice | None:
    """Return what was chosen; None where nothing was, or the run has other settings by now."""
    try:
        found: Mapping[str, Any] = json.loads((run_dir / CHOICE_JSON).read_text(encoding="utf-8"))
        if found["settings"] != _settings(config):
            return None
        given = {name: found[name] for name in Choice.__dataclass_fields__}
        return Choice(**given | {n: tuple(given[n]) for n in ("words", "smaller")})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "strategy": config.strategy.model_dump(mode="json"),
        "micro_batch_size": trainer.micro_batch_size,
        "checkpoint_activations_every_blocks": trainer.checkpoint_activations_every_blocks,
        "ranks": config.launcher.world_size,
    }
