"""A search as a sweep of W&B's, and the agent whose trials are points. W&B's server is played."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps import utils as wandb_utils

from shardwright.launchers.sweep import directory, space, wandb_agent, wandb_definition
from shardwright.launchers.sweep.definition import SweepConfig, from_tree
from shardwright.launchers.sweep.directory import PointState, Sweep
from shardwright.launchers.sweep.wandb_agent import Agent, Registered
from shardwright.train.errors import UserError

RATE = "trainer.learning_rate"
SPACE = space.space(
    {
        RATE: "tag(log,interval(1e-5,1e-3))",
        "trainer.max_steps": "int(interval(10,20))",
        "trainer.warmup_fraction": "range(0.1,0.35,step=0.1)",
        "trainer.global_batch_size": "tag(log,int(interval(1,64)))",
        "trainer.weight_decay": "interval(0,0.1)",
        "model": "gpt2_tiny,gpt2_small",
        "trainer.gradient_clipping": "null,1.0",
        "data.name": ["a b", "c"],
    },
    {},
)
STEPPED = {name: SPACE[name] for name in ("model", "trainer.warmup_fraction")}
PROGRAM = ["python", "-m", "shardwright"]


def config(kind: str = "tpe", /, **more: Any) -> SweepConfig:
    search = {"kind": kind, "trials": 7, **more.pop("search", {})}
    return from_tree({"name": "rates", "search": search, "backend": "wandb", **more})


def test_the_definition_says_the_same_in_wandbs_words() -> None:
    wanted = config(search={"pruner": "asha", "pruner_min_steps": 3}, limit=5)
    found = wandb_definition.definition(wanted, SPACE, ["model=gpt2_tiny"], PROGRAM)
    assert found == {
        "name": "rates",
        "method": "bayes",
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": {
            RATE: {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3},
            "trainer.max_steps": {"distribution": "int_uniform", "min": 10, "max": 20},
            "trainer.warmup_fraction": {"values": [0.1, 0.2, 0.3]},
            "trainer.global_batch_size": {
                "distribution": "q_log_uniform_values",
                "min": 1,
                "max": 64,
                "q": 1,
            },
            "trainer.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.1},
            "model": {"values": ["gpt2_tiny", "gpt2_small"]},
            "trainer.gradient_clipping": {"values": ["null", 1.0]},
            "data.name": {"values": ["a b", "c"]},
        },
        "program": "shardwright",
        "command": [
            *("${env}", "python", "-m", "shardwright", "train", "model=gpt2_tiny"),
            *("tracking=wandb", "${args_no_hyphens}"),
        ],
        "run_cap": 5,
        "early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 4},
    }


def test_seeds_are_a_parameter_of_a_grid() -> None:
    grid = config("none", seeds=2, search={"trials": None})
    found = wandb_definition.definition(grid, STEPPED, [], PROGRAM)
    assert (found["method"], found["parameters"]["seed"]) == ("grid", {"values": [0, 1]})
    assert "run_cap" not in found


@pytest.mark.parametrize(
    ("wanted", "found", "message"),
    [
        (config("cmaes"), SPACE, "sweep.backend=wandb has no cmaes: W&B searches by grid, random"),
        (config("grid"), SPACE, f"a grid has no range without steps, such as that of {RATE}"),
        (
            config(objectives=[{"metric": "eval_loss"}, {"metric": "loss"}]),
            STEPPED,
            "W&B compares by one metric, and sweep.objectives are eval_loss, loss",
        ),
        (config(search={"pruner": "median"}), STEPPED, "prunes by sweep.search.pruner=asha alone"),
        (config(exclude=[{"model": "gpt2_tiny"}]), STEPPED, "W&B cannot leave combinations out"),
        (
            config(max_parallel=2),
            STEPPED,
            "sweep.max_parallel=2, but an agent of W&B runs one point at a time",
        ),
    ],
)
def test_what_wandb_cannot_do_is_said(
    wanted: SweepConfig, found: space.Space, message: str
) -> None:
    with pytest.raises(UserError) as error:
        wandb_definition.definition(wanted, found, [], PROGRAM)
    assert message in str(error.value)


def test_another_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"tracking=none, but with sweep.backend=wandb points are"):
        wandb_definition.definition(config(), STEPPED, ["tracking=none"], PROGRAM)
    assert wandb_definition.tracked(["tracking=wandb"]) == ["tracking=wandb"]


def test_wandbs_own_code_makes_our_command_line_of_the_definition(tmp_path: Path) -> None:
    found = wandb_definition.definition(config(), SPACE, ["model=gpt2_tiny"], PROGRAM)
    read = wandb_utils.load_sweep_config(str(wandb_agent.written(tmp_path, found)))
    assert read == found
    given = {RATE: 3e-4, "trainer.max_steps": 12, "data.name": "a b"}
    arguments = wandb_utils.create_sweep_command_args(
        {"args": {k: {"value": v} for k, v in given.items()}}
    )
    entry, proposed = wandb_utils.make_launch_sweep_entrypoint(arguments, [*found["command"]])
    assert entry == ["${env}", *PROGRAM, "train", "model=gpt2_tiny", "tracking=wandb"]
    settings, words = wandb_definition.settings(SPACE, given)
    assert tuple(proposed) == words == (f"{RATE}=0.0003", "trainer.max_steps=12", "data.name=a b")
    assert settings == given


SCHEMA_OF_WANDB = """
import sys, yaml
from sweeps.config import schema_violations_from_proposed_config as violations
found = violations(yaml.safe_load(sys.stdin))
assert violations({"method": "annealing", "parameters": {}}), "it finds nothing"
print(found)
"""


def test_wandbs_schema_finds_nothing_wrong_with_the_definition() -> None:
    # wandb itself has no schema, its server and the package sweeps do. That one needs an older
    # numpy than this project's, so an environment of its own: SHARDWRIGHT_WANDB_SWEEPS is its
    # interpreter, made by `python -m venv E && E/bin/pip install sweeps`.
    python = os.environ.get("SHARDWRIGHT_WANDB_SWEEPS")
    if python is None:
        pytest.skip("no interpreter with W&B's package sweeps")
    pruned = config(search={"pruner": "asha"}, limit=5)
    for wanted, found in ((pruned, SPACE), (config("none", seeds=2), STEPPED)):
        text = yaml.safe_dump(wandb_definition.definition(wanted, found, [], PROGRAM))
        said = subprocess.run(
            [python, "-c", SCHEMA_OF_WANDB], input=text, text=True, capture_output=True, check=True
        )
        assert said.stdout == "[]\n"


# --- the agent ------------------------------------------------------------------------------------


class PlayedServer:
    """Stands in for W&B's server: it hands out trials, and hears which of them run."""

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        self.trials = trials
        self.stop: str | None = None
        """A run that it wants to end."""

    def register(self, *given: Any, **named: Any) -> dict[str, str]:
        return {"id": "agent"}

    def heartbeat(
        self, api: Any, agent: str, metrics: Any, running: dict[str, bool]
    ) -> list[dict[str, Any]]:
        if self.stop in running:
            return [{"type": "stop", "run_id": self.stop}]
        if running:
            return []
        if not self.trials:
            return [{"type": "exit"}]
        parameters = self.trials.pop(0)
        values = {name: {"value": value} for name, value in parameters.items()}
        return [{"type": "run", "run_id": f"run{len(self.trials)}", "args": values}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PlayedServer]:
    """W&B's own agent, with a server that is played and nothing that leaves this machine."""
    played = PlayedServer([{RATE: 1e-4, "model": "gpt2_tiny"}, {RATE: 2e-4, "model": "gpt2_small"}])
    monkeypatch.setattr("wandb.apis.public.sweeps._register_agent", played.register)
    monkeypatch.setattr("wandb.apis.public.sweeps._agent_heartbeat", played.heartbeat)
    monkeypatch.setattr("wandb.agents.pyagent.Agent.HEARTBEAT_SLEEP_SECONDS", 0.01)
    monkeypatch.setattr("wandb.sdk.wandb_login._login", lambda **given: None)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    monkeypatch.setattr(wandb, "finish", lambda exit_code=None: None)
    for name in ("WANDB_DIR", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield played
    os.environ.pop("WANDB_SWEEP_ID", None)


def agent_of(tmp_path: Path) -> Agent:
    found = {RATE: SPACE[RATE], "model": SPACE["model"]}
    directory.write_plan(Sweep(tmp_path, "rates", 0.0, config(), ()))
    return Agent(tmp_path, found, Registered("abc", "p", "e"), wandb)


def proposed(agent: Agent, waits: threading.Event) -> Any:
    while not (found := agent.propose(1)):
        assert not agent.is_finished()
        waits.wait(0.01)
    return found[0]


def planned(tmp_path: Path, proposal: Any) -> int:
    sweep = directory.read(tmp_path)
    point = directory.Point(len(sweep.points), proposal.settings, proposal.overrides)
    directory.write_plan(
        Sweep(tmp_path, "rates", 0.0, sweep.definition, (), (*sweep.points, point))
    )
    return point.number


def test_trials_of_wandbs_agent_are_points(tmp_path: Path, server: PlayedServer) -> None:
    agent, waits = agent_of(tmp_path), threading.Event()
    first = proposed(agent, waits)
    assert first.overrides == (f"{RATE}=0.0001", "model=gpt2_tiny")
    # What the run of the point finds in its environment, as W&B's own programs do.
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_SWEEP_ID"]) == ("run1", "abc")
    assert agent.propose(1) == []
    number = planned(tmp_path, first)
    agent.tell(PointState(number + 5, "done"))  # another's
    assert agent.prune(number) is None
    assert agent.propose(1) == []
    agent.tell(PointState(number, "done"))
    second = proposed(agent, waits)
    assert second.settings == {RATE: 2e-4, "model": "gpt2_small"}
    number = planned(tmp_path, second)
    server.stop = "run0"
    while not agent.prune(number):
        waits.wait(0.01)
    assert agent.prune(number) == "W&B has stopped it"
    agent.tell(PointState(number, "pruned"))
    while not agent.is_finished():
        waits.wait(0.01)
    assert agent.propose(1) == []


def test_wandb_is_told_that_a_point_has_failed(
    tmp_path: Path, server: PlayedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, waits = agent_of(tmp_path), threading.Event()
    del server.trials[0]
    number = planned(tmp_path, proposed(agent, waits))
    agent.tell(PointState(number, "failed", why="out of memory"))
    while not agent.is_finished():
        waits.wait(0.01)
    assert f"point {number} failed: out of memory" in capsys.readouterr().err


def test_an_agent_that_fails_ends_the_sweep_with_its_reason(
    tmp_path: Path, server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*given: Any, **named: Any) -> None:
        raise ConnectionError("api.wandb.ai cannot be reached")

    monkeypatch.setattr("wandb.apis.public.sweeps._register_agent", unreachable)
    agent = agent_of(tmp_path)
    agent.propose(1)
    assert agent._thread is not None
    agent._thread.join()
    with pytest.raises(UserError, match=r"W&B's agent has ended: api.wandb.ai cannot be reached;"):
        agent.is_finished()


def test_a_sweep_is_created_at_wandb_once(tmp_path: Path) -> None:
    created: list[Any] = []

    class Played:
        """Stands in for wandb's functions that call its server."""

        def sweep(self, sweep: dict[str, Any], entity: str | None, project: str | None) -> str:
            created.append((sweep["name"], entity, project))
            return "abc"

        def agent(self, *given: Any) -> None:
            raise AssertionError("not reached")

    definition = wandb_definition.definition(config(), STEPPED, [], PROGRAM)
    for _ in range(2):
        found = wandb_agent.registered(tmp_path, definition, Played(), "p", None)
        assert found == Registered("abc", "p", None)
    assert created == [("rates", None, "p")]


def test_the_functions_that_are_called_are_wandbs() -> None:
    def named(function: Callable[..., Any], count: int) -> list[str]:
        return list(inspect.signature(function).parameters)[:count]

    assert named(wandb.sweep, 3) == ["sweep", "entity", "project"]
    assert named(wandb.agent, 5) == ["sweep_id", "function", "entity", "project", "count"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WANDB_MODE": "offline"}, "WANDB_MODE keeps away from it; the definition is in "),
        ({}, "sweep.backend=wandb needs a key of W&B, and there is none here; the definition is"),
    ],
)
def test_without_a_key_it_is_said_where_the_definition_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    message: str,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        wandb_agent.check_reachable(tmp_path / "sweep.yaml", "p", None)
    assert message in str(error.value)
    assert f"\n  wandb sweep --project=p {tmp_path}/sweep.yaml\n  wandb agent ID" in str(
        error.value
    )


def test_no_key_reaches_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    wandb_agent.check_reachable(tmp_path, None, None)
    definition = wandb_definition.definition(config(), STEPPED, [], [sys.executable])
    wandb_agent.written(tmp_path, definition)

    class Played:
        def sweep(self, sweep: Any, entity: Any, project: Any) -> str:
            return "abc"

        def agent(self, *given: Any) -> None: ...

    wandb_agent.registered(tmp_path, definition, Played(), None, None)
    for path in tmp_path.rglob("*"):
        assert "0123456789abcdef" not in path.read_text()
