"""The study of a search: proposals, prunings, and that a kill at any moment changes neither."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from shardwright.launchers.sweep import space, study
from shardwright.launchers.sweep.definition import SweepConfig, from_tree
from shardwright.launchers.sweep.study import Judgement, Study
from shardwright.train.errors import UserError

RATE = "trainer.learning_rate"
BLOCKS = "model.num_layers"
GRID = {
    RATE: "tag(log,interval(1e-5,1e-1))",
    BLOCKS: "int(interval(1,8))",
    "strategy": "ddp,zero2",
    "trainer.warmup_fraction": "range(0.1,0.5,step=0.1)",
}
SPACE = space.space(GRID, {"strategy": ["ddp", "zero2"]})
NUMBERS = {name: SPACE[name] for name in (RATE, BLOCKS)}
STEPPED = {name: SPACE[name] for name in ("strategy", "trainer.warmup_fraction")}
TWO = [{"metric": "eval_loss"}, {"metric": "tokens_per_second", "direction": "maximize"}]


def definition(kind: str = "tpe", **search: Any) -> SweepConfig:
    objectives = search.pop("objectives", [{"metric": "eval_loss"}])
    wanted = {"kind": kind, "trials": 12, **search}
    return from_tree({"search": wanted, "objectives": objectives, **search.pop("more", {})})


def nothing_excluded(settings: Mapping[str, Any]) -> bool:
    return False


def loss(settings: Mapping[str, Any]) -> float:
    rate = math.log10(settings[RATE]) + 3 if RATE in settings else 0.0
    return rate**2 + settings.get("trainer.warmup_fraction", 0) + settings.get(BLOCKS, 0) / 10


class Killed(BaseException):
    """Stands for SIGKILL: what was written stays, and no code of the study runs after it."""


def searched(
    journal: Path, config: SweepConfig, found: space.Space, points: int, *, killed: bool = False
) -> list[Any]:
    """Return what a search proposes and prunes, one point at a time.

    Where it is ``killed``, before each line that is written for the first time: the study is then
    opened anew and asked the same again.
    """
    lines, survived = itertools.count(), set[int]()
    before = JournalFileBackend.append_logs

    def append(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        number = next(lines)
        if killed and number not in survived:
            survived.add(number)
            raise Killed
        before(self, logs)

    def asked(what: Callable[..., Any], *given: Any, **named: Any) -> Any:
        nonlocal lines
        while True:
            written = len(journal.read_text().splitlines()) if journal.exists() else 0
            lines = itertools.count(written)
            try:
                return what(Study(journal, config, found), *given, **named)
            except Killed:
                continue

    said: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", append)
        for number in range(points):
            proposal = asked(Study.propose, number, nothing_excluded)
            said.append(proposal)
            value = loss(proposal.settings)
            evaluations = [(step, value + 10 / step) for step in (10, 20, 40, 80)]
            pruned = None
            for seen in range(1, 5):
                pruned = asked(Study.judge, number, evaluations[:seen], 80)
                if pruned:
                    break
            said.append(pruned)
            values = [value] * len(config.objectives)
            asked(Study.tell, number, values, is_pruned=bool(pruned))
    trials = Study(journal, config, found).trials
    return [*said, *((t.number, t.state.name, t.values, t.params) for t in trials)]


@pytest.mark.parametrize(
    ("kind", "found", "search", "points"),
    [
        ("tpe", SPACE, {"startup_trials": 3}, 6),
        ("tpe", SPACE, {"startup_trials": 3, "pruner": "asha"}, 6),
        ("random", SPACE, {"pruner": "median", "pruner_startup_trials": 2}, 6),
        ("grid", STEPPED, {"pruner": "asha", "pruner_reduction_factor": 2}, 4),
        ("cmaes", NUMBERS, {}, 7),
        ("nsga2", SPACE, {"objectives": TWO}, 4),
        ("tpe", SPACE, {"startup_trials": 2, "objectives": TWO}, 4),
    ],
)
def test_killed_before_any_line_a_search_ends_as_one_that_was_left_alone(
    tmp_path: Path, kind: str, found: space.Space, search: dict[str, Any], points: int
) -> None:
    config = definition(kind, **search)
    alone = searched(tmp_path / "alone", config, found, points)
    assert searched(tmp_path / "killed", config, found, points, killed=True) == alone
    if search.get("pruner"):
        assert any(isinstance(each, Judgement) for each in alone)


def test_each_trial_has_a_seed_of_its_own(tmp_path: Path) -> None:
    proposals = [
        Study(tmp_path / "journal", definition("random"), SPACE).propose(n, nothing_excluded)
        for n in range(3)
    ]
    assert len({each.overrides for each in proposals if each}) == 3
    assert study.seed_of(0, 1) != study.seed_of(1, 0) != study.seed_of(0, 0)


def test_a_sampler_of_optuna_begins_again_with_its_first_proposal() -> None:
    # The reason for `seed_of`: nothing of a sampler's random numbers is in a study (Optuna 5.0).
    drawn = [RandomSampler(seed=0), RandomSampler(seed=0)]
    asked = [optuna.create_study(sampler=each).ask().suggest_float("x", 0, 1) for each in drawn]
    assert asked[0] == asked[1]


def test_the_end_of_a_trial_under_optunas_grid_sampler_raises_outside_of_optimize() -> None:
    # The reason why the study on disk has no sampler of its own (Optuna 5.0).
    alone = optuna.create_study(sampler=GridSampler({"x": [1]}, seed=0))
    trial = alone.ask({"x": optuna.distributions.CategoricalDistribution([1])})
    with pytest.raises(RuntimeError, match=r"Study.stop"):
        alone.tell(trial, 1.0)


def test_a_line_that_a_kill_has_cut_short_is_removed_and_so_is_the_lock(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    config = definition("random")
    first = Study(journal, config, SPACE).propose(0, nothing_excluded)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"study_')
    (tmp_path / "journal.lock").symlink_to(journal)
    study.repair(journal)
    assert journal.read_bytes() == whole
    assert not (tmp_path / "journal.lock").is_symlink()
    assert Study(journal, config, SPACE).propose(0, nothing_excluded) == first


def test_optuna_does_not_read_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    # The reason for `repair` (Optuna 5.0).
    journal = tmp_path / "journal"
    alone = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(journal))))
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"study_')
    with pytest.raises(AttributeError):
        alone.ask()
    alone_again = optuna.load_study(
        study_name=None, storage=JournalStorage(JournalFileBackend(str(journal)))
    )
    with pytest.raises(ValueError, match="Expecting|delimiter"):
        alone_again.ask()


def test_what_is_excluded_or_known_is_not_run_and_a_grid_comes_to_its_end(tmp_path: Path) -> None:
    found = Study(tmp_path / "journal", definition("grid", trials=None), STEPPED)
    proposed: list[Any] = []
    while proposal := found.propose(
        len(proposed), lambda settings: settings["strategy"] == "zero2"
    ):
        proposed.append(proposal)
        found.tell(len(proposed) - 1, [1.0])
    assert sorted(each.settings["trainer.warmup_fraction"] for each in proposed) == [
        *(0.1, 0.2, 0.3, 0.4)
    ]
    left_out = [trial for trial in found.trials if study.LEFT_OUT in trial.user_attrs]
    assert {trial.state for trial in left_out} == {TrialState.FAIL}
    assert {trial.user_attrs[study.LEFT_OUT] for trial in left_out} == {"sweep.exclude"}


def test_a_search_over_few_values_does_not_run_one_twice(tmp_path: Path) -> None:
    found = Study(tmp_path / "journal", definition("random"), {"strategy": SPACE["strategy"]})
    proposed = [found.propose(n, nothing_excluded) for n in range(3)]
    assert {each.overrides for each in proposed if each} == {
        ("strategy=ddp",),
        ("strategy=zero2",),
    }
    assert proposed[2] is None


def test_an_evaluation_at_the_last_step_prunes_nothing(tmp_path: Path) -> None:
    found = Study(tmp_path / "journal", definition("random", pruner="asha"), SPACE)
    for number, value in enumerate((1.0, 2.0, 3.0)):
        found.propose(number, nothing_excluded)
        last = found.judge(number, [(10, value)], 10)
        assert last is None
    found.propose(3, nothing_excluded)
    found.propose(4, nothing_excluded)
    assert found.judge(3, [(10, 4.0)], 20) == Judgement(
        10, 4.0, "4 at step 10 is not in the best 25% of those that came that far (asha)"
    )
    not_a_number = found.judge(4, [(10, math.nan)], 20)
    assert not_a_number is not None
    assert not_a_number.reason == "the evaluation at step 10 is not a number"


def test_a_point_that_failed_and_is_done_after_all_counts(tmp_path: Path) -> None:
    found = Study(tmp_path / "journal", definition("random"), SPACE)
    found.propose(0, nothing_excluded)
    found.tell(0, None)
    assert [trial.state for trial in found.trials] == [TrialState.FAIL]
    found.tell(0, [math.nan])
    found.tell(0, [1.5])
    found.tell(0, [2.5])  # is known to be done
    assert [trial.state for trial in found.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert found.trials[1].value == 1.5
    assert found.trials[1].params == found.trials[0].params
    assert found.propose(0, nothing_excluded) is not None
    assert len(found.trials) == 2


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (
            definition("tpe", objectives=[{"metric": "eval_loss", "direction": "maximize"}]),
            SPACE,
            "sweep.objectives: the search was begun with minimize and is now to maximize",
        ),
        (
            definition("tpe", objectives=[{"metric": "loss"}]),
            SPACE,
            "sweep.objectives: the search was begun for eval_loss and is now for loss",
        ),
        (
            definition(),
            NUMBERS,
            f"the search was begun over {', '.join(SPACE)} and is now over {RATE}, {BLOCKS}",
        ),
        (
            definition(),
            {**SPACE, "strategy": space.Choices(("ddp", "fsdp"), ("ddp", "fsdp"))},
            "strategy: the search was begun with ddp, zero2 and is now with ddp, fsdp",
        ),
        (
            definition(),
            {**SPACE, RATE: space.Range(1e-5, 1e-1)},
            f"{RATE}: the search was begun with float from 1e-05 to 0.1, log and is now with float "
            "from 1e-05 to 0.1, which Optuna cannot compare; give another sweep_dir",
        ),
    ],
)
def test_another_search_in_the_same_directory_is_refused(
    tmp_path: Path, config: SweepConfig, found: space.Space, message: str
) -> None:
    Study(tmp_path / "journal", definition(), SPACE).propose(0, nothing_excluded)
    with pytest.raises(UserError) as error:
        Study(tmp_path / "journal", config, found)
    assert message in str(error.value)


def test_the_bounds_of_a_range_may_change(tmp_path: Path) -> None:
    Study(tmp_path / "journal", definition(), SPACE).propose(0, nothing_excluded)
    wider = {**SPACE, RATE: space.Range(1e-6, 1.0, is_log=True)}
    assert Study(tmp_path / "journal", definition(), wider).propose(1, nothing_excluded)


@pytest.mark.parametrize(
    ("config", "found", "message"),
    [
        (definition("grid"), SPACE, f"tries each value, and {RATE} has a range without steps"),
        (definition("cmaes"), SPACE, "adapts to numbers, and strategy is a choice"),
        (definition("cmaes"), {RATE: SPACE[RATE]}, "needs two settings at least, and there is"),
        (
            definition("cmaes", objectives=TWO),
            NUMBERS,
            "has one objective, and sweep.objectives are eval_loss, tokens_per_second",
        ),
        (definition(), {}, "sweep.search.kind=tpe has nothing to search"),
        (
            definition(pruner="asha", objectives=TWO),
            SPACE,
            "sweep.search.pruner=asha compares points by one value, and sweep.objectives are "
            "eval_loss, tokens_per_second: Optuna prunes by a single objective alone",
        ),
        (
            definition(pruner="median", objectives=[{"metric": "loss"}]),
            SPACE,
            "compares points at their evaluations, and sweep.objectives is loss",
        ),
        (definition(pruner_min_steps=5), SPACE, "sweep.search.pruner_min_steps=5 is read where"),
        (
            definition(pruner="median", pruner_reduction_factor=3),
            SPACE,
            "sweep.search.pruner_reduction_factor=3 is read where sweep.search.pruner=asha",
        ),
        (
            definition(pruner="asha", pruner_startup_trials=3),
            SPACE,
            "sweep.search.pruner_startup_trials=3 is read where sweep.search.pruner=median",
        ),
        (
            definition("random", startup_trials=3),
            SPACE,
            "sweep.search.startup_trials=3 is read where sweep.search.kind=tpe",
        ),
        (
            from_tree({"search": {"kind": "tpe", "trials": 3}, "seeds": 3}),
            SPACE,
            "sweep.seeds=3 repeats combinations that are settled from the start",
        ),
    ],
)
def test_what_contradicts_itself_in_a_search(
    config: SweepConfig, found: space.Space, message: str
) -> None:
    (problem,) = study.problems(config, found)
    assert message in problem


def test_a_search_in_order_has_no_problem() -> None:
    assert study.problems(definition(pruner="asha"), SPACE) == []
    assert study.problems(definition("grid", trials=None), STEPPED) == []
    assert study.problems(definition("nsga2", objectives=TWO), SPACE) == []
    assert isinstance(study.sampler(definition().search, SPACE, 0), TPESampler)


def test_without_optuna_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        study.check_installed("cmaes")
    assert str(error.value) == (
        "sweep.search.kind=cmaes needs optuna and cmaes, which is not installed; "
        "`pip install 'shardwright[sweep]'` does it"
    )
