"""Callbacks of the user's own: made by each rank, and what they keep saved and restored."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from shardwright.train.config.own import CALLBACKS, same_part
from shardwright.train.errors import UserError
from shardwright.train.own_parts import load, part, said

FILE = "callbacks.json"
"""In a checkpoint: what the first rank's have kept."""
EVENTS = frozenset(name for name in vars(TrainerCallback) if name.startswith("on_"))


class OwnCallbacks:
    """Those of a config, by the texts that name them."""

    def __init__(self, texts: Sequence[str], checkpoint: Path | None = None) -> None:
        """``checkpoint`` is that from which the run is resumed. Raises UserError."""
        self.made = {text: made(text) for text in texts}
        path = None if checkpoint is None else checkpoint / FILE
        if path is not None and path.is_file():
            self._restore(json.loads(path.read_text(encoding="utf-8")))

    def name_of(self, callback: TrainerCallback) -> str | None:
        """Return the text that names a callback; None where it is not one of the user's."""
        return next((text for text, mine in self.made.items() if mine is callback), None)

    def files(self) -> dict[str, str]:
        """Return what a checkpoint holds of them, by names of files.

        A callback has a state if it is an ExportableState of transformers, or has `state_dict`.
        """
        states = {text: _state(callback) for text, callback in self.made.items()}
        kept = {text: state for text, state in states.items() if state is not None}
        if not kept:
            return {}
        for text, state in kept.items():
            try:
                json.dumps(state)
            except (TypeError, ValueError) as error:
                raise RuntimeError(
                    f"{CALLBACKS}={text}: its state cannot be saved as JSON ({error}); give "
                    "numbers, texts, lists and dicts"
                ) from error
        return {FILE: json.dumps(kept, indent=2) + "\n"}

    def _restore(self, states: dict[str, Any]) -> None:
        for text, callback in self.made.items():
            moved = [state for name, state in states.items() if same_part(name, text)]
            state = states.get(text, moved[0] if len(moved) == 1 else None)
            if state is None:
                continue
            try:
                self.made[text] = _with_state(callback, state)
            except Exception as error:  # whatever code of the user's raises
                raise part(CALLBACKS, text).wrong(
                    f"it does not take the state that it has left in the checkpoint: {said(error)}"
                ) from error


def made(text: str) -> TrainerCallback:
    """Return a new callback; raise UserError where a text names none."""
    found, named = check(text), part(CALLBACKS, text)
    try:
        callback = found()
    except Exception as error:  # whatever code of the user's raises
        raise named.wrong(f"it cannot be made: {said(error)}") from error
    if not isinstance(callback, TrainerCallback):
        raise named.wrong(
            f"it gives {type(callback).__name__}, and is to give a transformers.TrainerCallback"
        )
    return callback


def check(text: str) -> Any:
    """Return what makes a callback, without a call. Raises UserError where it cannot be one."""
    found, named = load(CALLBACKS, text), part(CALLBACKS, text)
    if inspect.isclass(found) and not issubclass(found, TrainerCallback):
        raise named.wrong("it is no subclass of transformers.TrainerCallback; make it one")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise named.wrong(
            f"it is made without arguments, but: {error}; give them defaults, or name a function "
            "that gives one"
        ) from None
    for name in sorted(name for name in dir(found) if name.startswith("on_")):
        if inspect.isclass(found) and name not in EVENTS:
            near = difflib.get_close_matches(name, EVENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(EVENTS))}"
            raise named.wrong(f"it has {name}, which is no event of a training: {hint}")
    return found


def _state(callback: TrainerCallback) -> Any:
    if isinstance(callback, ExportableState):
        return callback.state()
    state_dict = getattr(callback, "state_dict", None)
    return None if state_dict is None else state_dict()


def _with_state(callback: TrainerCallback, state: Any) -> TrainerCallback:
    """Return the callback as it was; transformers makes a new one of an exported state."""
    if isinstance(callback, ExportableState):
        found: TrainerCallback = type(callback).from_state(state)
        return found
    load_state_dict = getattr(callback, "load_state_dict", None)
    if load_state_dict is None:
        raise UserError("it has state_dict, but no load_state_dict")
    load_state_dict(state)
    return callback
