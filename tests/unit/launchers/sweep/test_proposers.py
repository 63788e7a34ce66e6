"""Who proposes the points of a sweep, and what is said before any of them runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers.machine import handed_on
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.sweep import choice, directory, proposers, ray_tasks
from shardwright.launchers.sweep.conduct import MOST_LOST, Conductor
from shardwright.launchers.sweep.definition import SweepConfig, from_tree
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from shardwright.launchers.sweep.places import Grid, Outcome, Proposal, Task
from shardwright.launchers.sweep.ray_tasks import Share
from shardwright.train.errors import RESUMABLE, UserError
from shardwright.train.run_directory import pruned
from tests.unit.constants import ROOT
from tests.unit.launchers.configs import config, resolved
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.launchers.run_directories import a_run

shardwright = pytest.fixture(make_shardwright)

RATE = "trainer.learning_rate"
RANGE = "tag(log,interval(1e-5,1e-3))"
SEARCH = ("sweep.search.kind=tpe", "sweep.search.trials=4", "model=gpt2_tiny")


def searched(**more: Any) -> SweepConfig:
    tree = {"grid": {RATE: RANGE, "model": ["gpt2_tiny", "gpt2_small"]}}
    return from_tree({**tree, "search": {"kind": "tpe", "trials": 4}, **more})


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("trainer.learning_rates=interval(1,2)",),
            "unknown key trainer.learning_rates: did you mean trainer.learning_rate?",
        ),
        ((f"{RATE}=interval(2,1)",), f"{RATE}=interval(2,1): is not a range, as 2.0 is not below"),
        ((f"{RATE}=tag(log,interval(0,1))",), "is not a range on a logarithmic scale"),
        (
            (f"{RATE}={RANGE}", "sweep.objectives=[{metric:eval_los}]"),
            "sweep.objectives: eval_los is nothing that a run logs; did you mean eval_loss?",
        ),
        (
            (
                f"{RATE}=1e-4,2e-4",
                "sweep.search.kind=grid",
                "sweep.objectives=[{metric:perplexity}]",
            ),
            "sweep.objectives: perplexity is nothing that a run logs",
        ),
        ((f"{RATE}={RANGE}", "model=gpt2_tiny,gpt3"), "model=gpt3: there is no such option"),
        (
            ("trainer.max_steps=interval(5,10)",),
            "trainer.max_steps=5.0: must be a whole number (as in trainer.max_steps=5.0)",
        ),
        (("sweep.search.kind=cmaes", f"{RATE}={RANGE}"), "needs two settings at least"),
        (("sweep.search.pruner=hyperband", f"{RATE}={RANGE}"), "sweep.search.pruner"),
        (
            (f"{RATE}={RANGE}", "sweep.backend=ray", "launcher=slurm"),
            "sweep.backend=ray with launcher=slurm: Ray says where a point runs",
        ),
    ],
)
def test_bad_input_is_said_before_anything_is_made(
    shardwright: Shardwright, words: Sequence[str], message: str
) -> None:
    outcome = shardwright("sweep", *SEARCH, *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count(message) == 1  # said once, whatever the number of points
    assert not list(Path().glob("sweeps/*"))


@pytest.mark.parametrize(
    ("backend", "missing", "message"),
    [
        ("here", "optuna", "sweep.search.kind=tpe needs optuna, which is not installed; `pip "),
        ("ray", "ray", "sweep.backend=ray needs Ray, which is not installed; `pip install "),
    ],
)
def test_a_backend_that_is_not_installed_is_named_with_its_command(
    shardwright: Shardwright,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    missing: str,
    message: str,
) -> None:
    def found(name: str) -> Any:
        return None if name == missing else object()

    monkeypatch.setattr("importlib.util.find_spec", found)
    outcome = shardwright("sweep", *SEARCH, f"{RATE}={RANGE}", f"sweep.backend={backend}")
    assert outcome.code == 2
    assert message in outcome.err


def test_without_a_key_a_sweep_of_wandbs_is_written_and_said_how_to_start(
    shardwright: Shardwright,
) -> None:
    words = (
        *SEARCH,
        f"{RATE}={RANGE}",
        "sweep.backend=wandb",
        "sweep_dir=a",
        "launcher.device=cpu",
    )
    outcome = shardwright("sweep", *words)
    assert outcome.code == 2
    assert "sweep.backend=wandb needs a key of W&B, and there is none here" in outcome.err
    assert "wandb sweep --project=shardwright " in outcome.err
    text = Path("a/sweep.yaml").read_text()
    assert "method: bayes" in text
    assert "- tracking=wandb" in text


def test_a_dry_run_shows_what_is_searched_and_makes_nothing(shardwright: Shardwright) -> None:
    outcome = shardwright("sweep", *SEARCH, f"{RATE}={RANGE}", "launcher.device=cpu", "--dry-run")
    assert outcome.code == 0
    assert "search by Optuna (tpe), 4 points: minimize eval_loss" in outcome.out
    assert f"{RATE}: from 1e-05 to 0.001, log" in outcome.out
    assert not list(Path().glob("sweeps/*"))


# --- pure -----------------------------------------------------------------------------------------


def test_a_grid_has_nothing_to_search() -> None:
    assert proposers.space_of(searched(search={"kind": "none"}), {}) is None
    assert proposers.examples(None) == []


def test_what_is_wrong_with_one_end_is_said_with_that_end() -> None:
    wanted = searched()
    found = proposers.space_of(wanted, {})
    examples = proposers.examples(found)
    assert [point.number for point in examples] == [-1, -2]

    def given(point: Point) -> Any:
        if point.settings["model"] == "gpt2_small":
            raise UserError("it does not fit")
        return config()

    with pytest.raises(UserError) as error:
        proposers.check_examples(examples, given, wanted)
    assert str(error.value) == f"it does not fit (as in {RATE}=0.001 model=gpt2_small)"


def test_what_a_search_goes_through_in_words() -> None:
    wanted = searched(
        grid={RATE: RANGE, "trainer.max_steps": "int(interval(5,9))", "seed": "range(0,9,step=4)"},
        search={"kind": "random", "trials": 4, "pruner": "asha"},
    )
    found = proposers.space_of(wanted, {})
    assert found is not None
    assert proposers.described(wanted, found).splitlines() == [
        "search by Optuna (random), 4 points, pruned by asha: minimize eval_loss",
        f"  {RATE}: from 1e-05 to 0.001, log",
        "  trainer.max_steps: whole numbers from 5 to 9",
        "  seed: whole numbers from 0 to 8 in steps of 4",
    ]


@pytest.mark.parametrize(
    ("settings", "ranks", "on_gpus", "there", "expected"),
    [
        ({}, 1, False, {"CPU": 8.0}, Share(1, 0, 8)),
        ({"devices_per_point": 3}, 1, False, {"CPU": 8.0}, Share(3, 0, 2)),
        ({"max_parallel": 2}, 4, True, {"CPU": 8.0, "GPU": 16.0}, Share(0, 4, 2)),
        ({}, 4, True, {"CPU": 8.0, "GPU": 16.0}, Share(0, 4, 4)),
        ({}, None, True, {"GPU": 2.0}, Share(0, 1, 2)),
    ],
)
def test_a_points_share_of_a_cluster(
    settings: dict[str, Any],
    ranks: int | None,
    on_gpus: bool,
    there: dict[str, float],
    expected: Share,
) -> None:
    assert ray_tasks.share(from_tree(settings), ranks, on_gpus, there) == expected


def test_a_point_that_asks_for_more_than_the_cluster_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"a point asks for 4 GPUs, and the cluster of Ray has 2;"):
        ray_tasks.share(SweepConfig(), 4, True, {"GPU": 2.0})


USERS = {
    **{"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "key", "HF_HOME": "/hf", "PATH": "/bin"},
    **{"HTTPS_PROXY": "http://proxy", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/mine"},
}


def test_a_point_below_ray_has_what_one_has_that_is_started_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {
        **{"CUDA_VISIBLE_DEVICES": "0", "HOME": "/home/me", "RAY_ADDRESS": "a:1", "RANK": "0"},
        **{"SLURM_JOB_ID": "7", "SSH_TTY": "/dev/pts/0", "PWD": "/here"},
    }
    given = ray_tasks.variables_of_points({**USERS, **own})
    assert given == {
        **USERS,
        **{"PYTHONPATH": f"{ROOT}:/mine", "PYTHONSAFEPATH": "1"},
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    log = tmp_path / "log"
    print_both = "import os; print(os.environ['HF_TOKEN'], os.environ['CUDA_VISIBLE_DEVICES'])"
    ended = ray_tasks.run_point([sys.executable, "-c", print_both], str(log), str(tmp_path), given)
    assert (ended, log.read_text()) == (0, "hf_secret 3\n")


def test_what_is_written_down_for_other_nodes_holds_no_secret() -> None:
    assert handed_on.places(USERS) == {"HF_HOME": "/hf"}
    assert ray_tasks._variables().keys() == {"PYTHONPATH"}, "Ray keeps and shows these"


def test_a_hostfile_and_ray_exclude_each_other(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\n")
    wanted = resolved("deepspeed", Machine(), hostfile=str(hostfile))
    choice.check_launchers([wanted])
    with pytest.raises(UserError, match=r"sweep.backend=ray with launcher=deepspeed: Ray says"):
        choice.check_launchers([wanted], "ray")


# --- the loop -------------------------------------------------------------------------------------


class Played:
    """A place whose starts of a point end as they are told to."""

    stays = True
    outlives = False

    def __init__(self, outcomes: Iterable[Outcome]) -> None:
        self._outcomes = iter(outcomes)
        self._running: list[int] = []
        self.started: list[int] = []

    def described(self) -> str:
        return "played"

    def how_to_stop(self) -> str:
        return "by nothing"

    def take_over(self, numbers: Iterable[int]) -> set[int]:
        return set()

    def room(self) -> int:
        return 1 - len(self._running)

    def start(self, tasks: Sequence[Task]) -> list[str]:
        self._running = [task.point.number for task in tasks]
        self.started += self._running
        return ["here"] * len(tasks)

    def ended(self, timeout_seconds: float) -> list[Outcome]:
        ended = [dataclasses.replace(next(self._outcomes), number=n) for n in self._running]
        self._running = []
        return ended

    def stop(self, numbers: Iterable[int], *, at_once: bool = False) -> None: ...

    def close(self) -> None: ...


class Quiet:
    """Shows nothing."""

    def say(self, text: str) -> None: ...

    def update(self, sweep: Sweep, states: Sequence[PointState]) -> None: ...

    def close(self) -> None: ...


def conductor(
    sweep_dir: Path, place: Played, proposer: Any = None, *, state: PointState | None = None
) -> Conductor:
    """Return the loop over a sweep of one point, whose run has begun."""
    sweep = Sweep(sweep_dir, "a", 0.0, SweepConfig(), (), (Point(0, {}, ()),))
    directory.write_plan(sweep)
    run_dir = a_run(sweep.run_dir(0))
    if state is not None:
        directory.write_state(sweep_dir, state)
    found = config()

    def plan(point: Point) -> Task:
        return Task(point, run_dir, found, {}, (), True, sweep_dir / "0.log")

    return Conductor(sweep, place, proposer or Grid(), Quiet(), plan)


LOST = Outcome(0, RESUMABLE, "Ray has lost it", is_lost=True)


def test_what_its_place_has_lost_is_started_again_and_did_not_fail(tmp_path: Path) -> None:
    place = Played([LOST, LOST, Outcome(0, 1, "boom")])
    loop = conductor(tmp_path, place)
    assert loop.run() == 1
    assert place.started == [0, 0, 0]
    assert [(s.state, s.attempts, s.failures) for s in loop.states] == [("failed", 3, 1)]


def test_a_place_that_loses_a_point_every_time_is_given_up(tmp_path: Path) -> None:
    place = Played([LOST] * 99)
    loop = conductor(tmp_path, place)
    assert loop.run() == RESUMABLE
    assert len(place.started) == MOST_LOST + 1
    assert loop.states[0].state == "stopped"


class Searching:
    """A search that has proposed its only point."""

    def propose(self, count: int) -> Sequence[Proposal]:
        return ()

    def is_finished(self) -> bool:
        return True

    def tell(self, state: PointState) -> None: ...

    def prune(self, number: int) -> str | None:
        return None


class Pruning(Searching):
    """One that has judged it."""

    def prune(self, number: int) -> str | None:
        return "it lags"


def test_a_point_that_was_pruned_when_its_sweep_was_killed_is_not_resumed(tmp_path: Path) -> None:
    place = Played([])
    loop = conductor(tmp_path, place, Pruning(), state=PointState(0, "running", attempts=1))
    assert loop.run() == 0
    assert place.started == []
    assert (loop.states[0].state, loop.states[0].why) == ("pruned", "it lags")


def test_a_run_that_is_done_without_its_objective_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = conductor(tmp_path, Played([Outcome(0, 0)]), Searching())
    (tmp_path / "0/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    monkeypatch.setattr("shardwright.launchers.runs.is_done", lambda *given: "starts" in os.environ)
    monkeypatch.setattr(Played, "start", _started(monkeypatch))
    with pytest.raises(UserError) as error:
        loop.run()
    assert str(error.value) == (
        "point 0 is done, but it has not logged eval_loss, by which sweep.objectives compares; "
        "what it has logged is loss"
    )
    assert directory.state_of(tmp_path, 0).state == "done"


def _started(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = Played.start

    def start(self: Played, tasks: Sequence[Task]) -> list[str]:
        monkeypatch.setenv("starts", "1")  # from now on it is done
        return before(self, tasks)

    return start


def test_a_run_that_is_resumed_is_no_longer_pruned(tmp_path: Path) -> None:
    pruned.Pruned(3, "eval_loss", None, "it lags", 0, 0.0).write(tmp_path)
    assert str(pruned.read(tmp_path)) == "pruned at step 3"
    pruned.forget(tmp_path)
    pruned.forget(tmp_path)
    assert pruned.read(tmp_path) is None
