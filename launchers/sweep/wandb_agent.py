"""An agent of W&B whose trials are points of a sweep: W&B proposes, and the sweep runs them.

W&B's own agent calls a function for each of its trials. The function hands the trial over to the
loop of the sweep and waits for its end, so that there is one state, one report and one way to stop.
The trial's own run logs to W&B, by the id that the agent has put into the environment for it.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from shardwright.launchers.machine.facts import has_wandb_key
from shardwright.launchers.sweep import directory, wandb_definition
from shardwright.launchers.sweep.directory import PointState
from shardwright.launchers.sweep.places import Proposal
from shardwright.launchers.sweep.space import Space
from shardwright.train.config.tracking import wandb_mode
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError

SWEEP_YAML = "sweep.yaml"
WANDB_JSON = "wandb.json"
"""Which sweep of W&B's a sweep is: no key, and nothing else that is secret."""
LOOK_SECONDS = 0.5


class Service(Protocol):
    """What is used of the module wandb."""

    def sweep(self, sweep: dict[str, Any], entity: str | None, project: str | None) -> str: ...

    def agent(
        self,
        sweep_id: str,
        function: Callable[[], None],
        entity: str | None,
        project: str | None,
        count: int | None,
    ) -> None: ...


@dataclass(frozen=True)
class Registered:
    """A sweep at W&B."""

    id: str
    project: str | None
    entity: str | None


def written(sweep_dir: Path, definition: Mapping[str, Any]) -> Path:
    """Write the definition where `wandb sweep` takes it; return its path."""
    path = sweep_dir / SWEEP_YAML
    write_text(path, yaml.safe_dump(dict(definition), sort_keys=False, allow_unicode=True))
    return path


def check_reachable(path: Path, project: str | None, entity: str | None) -> None:
    """Raise UserError where W&B cannot be asked for points from here."""
    commands = "".join(
        f"\n  {line}" for line in wandb_definition.how_to_start(str(path), project, entity)
    )
    way_on = (
        f"the definition is in {path}; where there is a key, start it with{commands}\n"
        "sweep.search.kind=tpe without sweep.backend=wandb searches without W&B"
    )
    if wandb_mode(os.environ) in ("offline", "disabled"):
        raise UserError(
            "sweep.backend=wandb has W&B's server propose points, and WANDB_MODE keeps away from "
            f"it; {way_on}"
        )
    if not has_wandb_key(os.environ):
        raise UserError(f"sweep.backend=wandb needs a key of W&B, and there is none here; {way_on}")


def registered(
    sweep_dir: Path,
    definition: Mapping[str, Any],
    service: Service,
    project: str | None,
    entity: str | None,
) -> Registered:
    """Return the sweep at W&B that a directory belongs to, created there the first time."""
    path = sweep_dir / WANDB_JSON
    try:
        return Registered(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        pass
    found = Registered(service.sweep(dict(definition), entity, project), project, entity)
    write_text(path, json.dumps(asdict(found)) + "\n")
    return found


@dataclass
class Trial:
    """One trial that W&B's agent waits for."""

    parameters: Mapping[str, Any]
    ended: threading.Event = field(default_factory=threading.Event)
    state: PointState | None = None
    is_stopped: bool = False
    """Whether W&B wants it to end."""


class Failed(Exception):
    """A point has not come to its end, which W&B is told."""


class Agent:
    """Proposes what W&B proposes."""

    def __init__(
        self, sweep_dir: Path, space: Space, at_wandb: Registered, service: Service
    ) -> None:
        self._directory, self._space = sweep_dir, space
        self._at_wandb, self._service = at_wandb, service
        self._waiting: queue.Queue[Trial] = queue.Queue()
        self._current: tuple[int, Trial] | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def propose(self, count: int) -> Sequence[Proposal]:
        """Return the point that W&B's agent waits for, if it does; one at a time."""
        if self._thread is None:
            # It ends with this process, whatever W&B's server does.
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        if self._current is not None or count < 1:
            return []
        try:
            trial = self._waiting.get_nowait()
        except queue.Empty:
            return []
        number = len(directory.read(self._directory).points)
        self._current = (number, trial)
        settings, words = wandb_definition.settings(self._space, trial.parameters)
        return [Proposal(settings, words, number)]

    def is_finished(self) -> bool:
        """Return whether W&B has no more points. Raises UserError where its agent has failed."""
        if self._failure is not None:
            raise UserError(
                f"W&B's agent has ended: {self._failure}; run the same command again when W&B can "
                "be reached"
            )
        is_over = self._thread is not None and not self._thread.is_alive()
        return is_over and self._current is None and self._waiting.empty()

    def tell(self, state: PointState) -> None:
        """Let W&B's agent go on to its next trial."""
        if self._current is None or self._current[0] != state.number:
            return  # of an earlier start
        _, trial = self._current
        trial.state = state
        self._current = None
        trial.ended.set()

    def prune(self, number: int) -> str | None:
        """Return whether W&B wants a point to end."""
        if self._current is not None and self._current[0] == number:
            return "W&B has stopped it" if self._current[1].is_stopped else None
        return None

    def _serve(self) -> None:
        at = self._at_wandb
        try:
            self._service.agent(at.id, self._run_trial, at.entity, at.project, None)
        except BaseException as error:
            self._failure = error

    def _run_trial(self) -> None:
        """Be the function that W&B's agent calls for a trial."""
        trial = Trial(parameters_of(Path(os.environ["WANDB_SWEEP_PARAM_PATH"])))
        self._waiting.put(trial)
        while not trial.ended.is_set():
            try:
                trial.ended.wait(LOOK_SECONDS)
            except Exception:
                # W&B's agent raises it in this thread where its server wants the trial to end
                # (0.31, agents/pyagent.py). The point saves first.
                trial.is_stopped = True
        state = trial.state
        if state is not None and state.state not in ("done", "pruned"):
            raise Failed(f"point {state.number} {state.state}: {state.why}")


def parameters_of(path: Path) -> dict[str, Any]:
    """Return the parameters of a trial, of the file that W&B's agent has written for its run."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        str(name): each["value"]
        for name, each in tree.items()
        if isinstance(each, Mapping) and "value" in each
    }
