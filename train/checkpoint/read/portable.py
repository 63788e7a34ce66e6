"""One way to read a checkpoint, whichever program wrote it: by parameter name, in slices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from shardwright.train.checkpoint.format.layout import TRAINER_STATE
from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable
from shardwright.train.checkpoint.read import dcp
from shardwright.train.checkpoint.read.average import Averages
from shardwright.train.checkpoint.read.names import unwrapped
from shardwright.train.checkpoint.read.registry import READERS
from shardwright.train.run_directory.names import ENGINE_FOLDER

LATEST = ("latest", "latest_universal")
"""DeepSpeed's files that name the folder of the newest checkpoint beside them."""


def read(checkpoint: Path, section: str | None = None) -> PortableState:
    """Return the state in a checkpoint directory, an engine's folder or a file of weights.

    Reads no tensor yet. What it is, the files say and nothing else; only ``section`` says which of
    several mappings in them holds the weights. Raises Unreadable naming what was looked for.
    """
    state = _plainly_named(_read(checkpoint, section))
    if not state.ema and (averages := _averages(checkpoint, state)):
        state = replace(state, ema=averages)
    if state.step is not None:
        return state
    return replace(state, step=_step(checkpoint, state))


def _averages(checkpoint: Path, state: PortableState) -> Averages | None:
    """Return the average that this program keeps beside the weights, None where there is none."""
    for place in (checkpoint / ENGINE_FOLDER, checkpoint):
        if found := Averages(place, lambda name: state.weights[name].shape):
            return found
    return None


def _read(checkpoint: Path, section: str | None) -> PortableState:
    if not (checkpoint.is_file() or checkpoint.is_dir()):
        raise Unreadable(f"{checkpoint} does not exist")
    for place in _folders(checkpoint):
        for reader in READERS:
            if reader.is_an_engines and (found := reader.find(place)) is not None:
                return reader.state(found, section)
        if place not in (checkpoint / ENGINE_FOLDER, checkpoint):
            raise Unreadable(
                f"{place}, which {checkpoint} names as its newest, holds neither "
                f"DeepSpeed's *_model_states.pt nor {dcp.METADATA}"
            )
    for reader in READERS:
        if not reader.is_an_engines and (found := reader.find(checkpoint)) is not None:
            return reader.state(found, section)
    raise Unreadable(_nothing(checkpoint))


def _folders(checkpoint: Path) -> list[Path]:
    """Return the folders in which an engine's files may lie, the likeliest first."""
    if not checkpoint.is_dir():
        return []
    places = (*_named_folders(checkpoint), checkpoint / ENGINE_FOLDER, checkpoint)
    return [place for place in places if place.is_dir()]


def _named_folders(checkpoint: Path) -> list[Path]:
    """Return the folders that a file called latest names, or the only one of a step.

    Raises Unreadable where one is named that is not there, or where there are several and no name.
    """
    found = []
    for file in (checkpoint / name for name in LATEST):
        if not file.is_file():
            continue
        name = file.read_bytes()[:4096].decode(errors="replace").strip()
        folder = checkpoint / name
        if not name or not folder.is_dir():
            raise Unreadable(f"{file} names the folder {name!r}, which is missing")
        if not folder.resolve().is_relative_to(checkpoint.resolve()):
            raise Unreadable(f"{file} names the folder {name}, which is not in {checkpoint}")
        found.append(folder)
    steps = [path for path in sorted(checkpoint.glob("global_step*")) if path.is_dir()]
    if not found and len(steps) > 1:
        raise Unreadable(
            f"{checkpoint} holds {', '.join(path.name for path in steps[:4])}, and no file "
            "latest that names one of them; give the folder to read"
        )
    return found or steps


def _nothing(checkpoint: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in checkpoint.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"{checkpoint} holds no checkpoint. Looked for: "
        f"{', '.join(reader.looked_for for reader in READERS)}. Found: "
        f"{', '.join(names[:8]) or 'nothing'}{more}"
    )


def _step(checkpoint: Path, state: PortableState) -> int | None:
    """Return the step that transformers notes, or that of the optimizer."""
    try:
        step = json.loads((checkpoint / TRAINER_STATE).read_bytes())["global_step"]
        if type(step) is int:
            return step
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    steps = [int(of["step"]) for of in state.scalars.values() if "step" in of]
    return max(steps, default=None)


_Value = TypeVar("_Value")


def _plainly_named(state: PortableState) -> PortableState:
    plain = unwrapped([*state.weights, *state.buffers])

    def named(values: Mapping[str, _Value]) -> dict[str, _Value]:
        names = plain if values.keys() <= plain.keys() else unwrapped(values)
        return {names[name]: value for name, value in values.items()}

    return replace(
        state,
        weights=named(state.weights),
        moments=named(state.moments),
        scalars=named(state.scalars),
        buffers=named(state.buffers),
        ema=named(state.ema),
    )
