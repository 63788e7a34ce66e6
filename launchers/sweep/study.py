"""A search by Optuna: which points it proposes and which it prunes, in a study that outlives kills.

The study is a journal in the sweep's directory, of which each line is written whole. What Optuna
decides is decided on a copy in memory and written down as one line: a trial with all that it tries,
or an evaluation with the judgement on it. So whatever a kill leaves is a study from which the same
decisions follow. That is more than Optuna's own `ask` gives (5.0 writes a trial parameter by
parameter, and a rung of successive halving before it is known what comes of it).

What is proposed is a function of the search's seed, the number of the trial and what was told
before: Optuna keeps no state of its random numbers, and a sampler with the seed alone would begin
again with the first proposals after each start.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.launchers.sweep import space as spaces
from shardwright.launchers.sweep.definition import Search, SweepConfig
from shardwright.launchers.sweep.space import Choices, Dimension, Scalar, Space
from shardwright.train.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage, InMemoryStorage
    from optuna.trial import FrozenTrial

STUDY = "sweep"
METRICS = "metrics"
"""In the study: what its values are called."""
POINT = "point"
"""In a trial: the number of the point that tries it."""
LEFT_OUT = "left out"
"""In a trial that was never run: why."""
JUDGED = "judged at step "
"""In a trial, with the step: what was decided at that evaluation."""
MOST_LEFT_OUT = 50
"""Proposals in a row that may be excluded, or known from before, until there are no more."""
PIP = "pip install 'shardwright[sweep]'"


@dataclass(frozen=True)
class Proposal:
    """What a search tries next."""

    trial: int
    settings: Mapping[str, Scalar]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """A trial is to be pruned."""

    step: int
    value: float
    reason: str


def problems(config: SweepConfig, space: Space) -> list[str]:
    """Return what of a search contradicts what else is said, a message each. Pure."""
    search, found = config.search, []
    kind = f"sweep.search.kind={search.kind}"
    choices = [name for name, each in space.items() if isinstance(each, Choices)]
    endless = [name for name, each in space.items() if each.values() is None]
    several = [each.metric for each in config.objectives]
    if not space:
        found.append(
            f"{kind} has nothing to search: give a setting several values, such as "
            "trainer.learning_rate='tag(log, interval(1e-5, 1e-3))'"
        )
    if search.kind == "grid" and endless:
        found.append(
            f"{kind} tries each value, and {endless[0]} has a range without steps; give it "
            "range(START, STOP, step=STEP), int(interval(LOW, HIGH)) or a list, or use another kind"
        )
    if search.kind == "cmaes" and choices:
        found.append(
            f"{kind} adapts to numbers, and {choices[0]} is a choice between names or values, "
            "which Optuna would draw at random; give a range, or use sweep.search.kind=tpe"
        )
    if search.kind == "cmaes" and len(space) == 1 and not choices:
        found.append(
            f"{kind} needs two settings at least, and there is {next(iter(space))} alone; use "
            "sweep.search.kind=tpe"
        )
    if len(several) > 1 and search.kind == "cmaes":
        found.append(
            f"{kind} has one objective, and sweep.objectives are {', '.join(several)}; use "
            "sweep.search.kind=tpe or nsga2"
        )
    return [*found, *_pruner_problems(config), *_other_problems(config)]


def _pruner_problems(config: SweepConfig) -> list[str]:
    search, metrics = config.search, [each.metric for each in config.objectives]
    pruner, found = f"sweep.search.pruner={search.pruner}", []
    if search.pruner != "none" and len(metrics) > 1:
        found.append(
            f"{pruner} compares points by one value, and sweep.objectives are "
            f"{', '.join(metrics)}: Optuna prunes by a single objective alone; leave one, or set "
            "sweep.search.pruner=none"
        )
    elif search.pruner != "none" and not metrics[0].startswith("eval_"):
        found.append(
            f"{pruner} compares points at their evaluations, and sweep.objectives is {metrics[0]}, "
            "which evaluations do not tell; use eval_loss, or set sweep.search.pruner=none"
        )
    if search.pruner == "none" and search.pruner_min_steps is not None:
        found.append(
            f"sweep.search.pruner_min_steps={search.pruner_min_steps} is read where "
            "sweep.search.pruner is asha or median; set that, or leave it out"
        )
    if search.pruner != "asha" and search.pruner_reduction_factor is not None:
        found.append(
            f"sweep.search.pruner_reduction_factor={search.pruner_reduction_factor} is read where "
            "sweep.search.pruner=asha; set that, or leave it out"
        )
    if search.pruner != "median" and search.pruner_startup_trials is not None:
        found.append(
            f"sweep.search.pruner_startup_trials={search.pruner_startup_trials} is read where "
            "sweep.search.pruner=median; set that, or leave it out"
        )
    return found


def _other_problems(config: SweepConfig) -> list[str]:
    search, found = config.search, []
    if search.kind != "tpe" and search.startup_trials is not None:
        found.append(
            f"sweep.search.startup_trials={search.startup_trials} is read where "
            "sweep.search.kind=tpe; set that, or leave it out"
        )
    if config.seeds is not None:
        found.append(
            f"sweep.seeds={config.seeds} repeats combinations that are settled from the start, and "
            f"sweep.search.kind={search.kind} proposes each by what came of the others; leave "
            "sweep.seeds out, and repeat the best point when the search is over"
        )
    return found


def distribution(dimension: Dimension) -> BaseDistribution:
    """Return what Optuna calls a range or a choice. Pure."""
    from optuna import distributions

    if isinstance(dimension, Choices):
        return distributions.CategoricalDistribution(dimension.choices)
    low, high, step = dimension.low, dimension.high, dimension.step
    if dimension.is_integer:
        return distributions.IntDistribution(
            int(low), int(high), log=dimension.is_log, step=int(step or 1)
        )
    return distributions.FloatDistribution(low, high, log=dimension.is_log, step=step)


def seed_of(seed: int, trial: int) -> int:
    """Return the seed of one trial's proposal: another for each, the same after a resume. Pure."""
    import numpy

    return int(numpy.random.SeedSequence([seed, trial]).generate_state(1)[0])


def sampler(search: Search, space: Space, trial: int) -> BaseSampler:
    """Return what proposes a trial of a number, and no other."""
    from optuna import samplers

    seed = seed_of(search.seed, trial)
    match search.kind:
        case "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=search.startup_trials or 10)
        case "random":
            return samplers.RandomSampler(seed=seed)
        case "cmaes":
            return samplers.CmaEsSampler(seed=seed)
        case "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        case _:
            # The order of a grid is drawn once for all of it.
            grid = {name: each.values() or [] for name, each in space.items()}
            return samplers.GridSampler(grid, seed=search.seed)


def pruner(search: Search, first_step: int) -> BasePruner:
    """Return the rule by which evaluations are judged, the first of which was at a step."""
    from optuna import pruners

    if search.pruner == "median":
        startup = 5 if search.pruner_startup_trials is None else search.pruner_startup_trials
        return pruners.MedianPruner(
            n_startup_trials=startup, n_warmup_steps=search.pruner_min_steps or 0
        )
    # Not "auto": that prunes nothing before a whole trial is done, and is estimated at each start.
    return pruners.SuccessiveHalvingPruner(
        min_resource=search.pruner_min_steps or first_step,
        reduction_factor=search.pruner_reduction_factor or 4,
    )


class Study:
    """The study of a sweep, for its owner: no other process writes to the journal."""

    def __init__(self, journal: Path, config: SweepConfig, space: Space) -> None:
        check_installed(config.search.kind)
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._search, self._space = config.search, space
        self._distributions = {name: distribution(each) for name, each in space.items()}
        repair(journal)
        self._storage = JournalStorage(JournalFileBackend(str(journal)))
        self._directions = [each.direction for each in config.objectives]
        if STUDY not in optuna.get_all_study_names(self._storage):
            # "load_if_exists" would add a line at each start.
            optuna.create_study(
                storage=self._storage, study_name=STUDY, directions=self._directions
            )
        self._study = optuna.load_study(
            study_name=STUDY,
            storage=self._storage,
            # Of the study on disk nothing is asked for. GridSampler's end of a trial would call
            # Study.stop, which raises outside of optimize (5.0, study.py).
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=optuna.pruners.NopPruner(),
        )
        self._check_same(journal, config)
        for trial in self.trials:
            self._apply_judgements(trial)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials as they are now, those left out included."""
        return self._study.get_trials()

    @property
    def combinations(self) -> int | None:
        """How many points a grid has; None where the search has no end of its own."""
        return spaces.combinations(self._space) if self._search.kind == "grid" else None

    def trial_of(self, point: int) -> FrozenTrial | None:
        """Return the newest trial that a point tries."""
        found = [trial for trial in self.trials if trial.user_attrs.get(POINT) == point]
        return found[-1] if found else None

    def propose(
        self, point: int, is_excluded: Callable[[Mapping[str, Scalar]], bool]
    ) -> Proposal | None:
        """Return what a new point tries; None where there is nothing new to try.

        The same as before where a kill has come between this and the plan of the sweep.
        """
        from optuna.trial import TrialState, create_trial

        if (before := self.trial_of(point)) is not None:
            return self._proposal(before)
        for _ in range(MOST_LEFT_OUT):
            if self._are_all_proposed():
                return None
            drawn = self._drawn()
            why = self._why_left_out(drawn, is_excluded)
            self._study.add_trial(
                create_trial(
                    state=TrialState.FAIL if why else TrialState.RUNNING,
                    params=drawn.params,
                    distributions=drawn.distributions,
                    system_attrs=drawn.system_attrs,
                    user_attrs={LEFT_OUT: why} if why else {POINT: point},
                )
            )
            if not why:
                return self._proposal(self.trials[-1])
        return None

    def judge(
        self, point: int, evaluations: Sequence[tuple[int, float]], last_step: int | None = None
    ) -> Judgement | None:
        """Take in the evaluations of a point; return whether it is to be pruned, and why.

        What was decided stays decided. An evaluation at the last step of a run is compared with
        others' and prunes nothing.
        """
        trial = self.trial_of(point)
        if trial is None or self._search.pruner == "none":
            return None
        if not trial.state.is_finished():
            for step, value in sorted(evaluations):
                if self._pruning(trial):
                    break
                if step not in trial.intermediate_values:
                    is_last = last_step is not None and step >= last_step
                    self._take_in(trial, step, value, is_last=is_last)
                    trial = self._study.trials[trial.number]
        return self._pruning(trial)

    def tell(self, point: int, values: Sequence[float] | None, *, is_pruned: bool = False) -> None:
        """Say what has come of a point: values, or that it was pruned, or has failed for good.

        A point that is known to be over is left as it is, unless one that had failed has values.
        """
        from optuna.trial import TrialState, create_trial

        trial = self.trial_of(point)
        if trial is None:
            return
        is_complete = (
            not is_pruned
            and values is not None
            and len(values) == len(self._directions)
            and not any(map(math.isnan, values))
        )
        if not trial.state.is_finished():
            state = TrialState.PRUNED if is_pruned else None
            state = state or (TrialState.COMPLETE if is_complete else TrialState.FAIL)
            self._study.tell(trial.number, values if is_complete else None, state)
        elif is_complete and trial.state == TrialState.FAIL:
            self._study.add_trial(  # what has ended stays as it is
                create_trial(
                    values=list(values or ()),
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={POINT: point},
                )
            )

    def _check_same(self, journal: Path, config: SweepConfig) -> None:
        from optuna.distributions import check_distribution_compatibility

        way_on = f"give another sweep_dir, as {journal} belongs to the search as it was"
        before = [direction.name.lower() for direction in self._study.directions]
        if before != self._directions:
            raise UserError(
                f"sweep.objectives: the search was begun with {', '.join(before)} and is now to "
                f"{', '.join(self._directions)}; {way_on}"
            )
        metrics = [each.metric for each in config.objectives]
        known = self._study.user_attrs.get(METRICS)
        if known is None:
            self._study.set_user_attr(METRICS, metrics)
        elif known != metrics:
            raise UserError(
                f"sweep.objectives: the search was begun for {', '.join(known)} and is now for "
                f"{', '.join(metrics)}; {way_on}"
            )
        for trial in self.trials[-1:]:
            if trial.distributions.keys() != self._distributions.keys():
                raise UserError(
                    f"the search was begun over {', '.join(trial.distributions)} and is now over "
                    f"{', '.join(self._distributions)}; {way_on}"
                )
            for name, each in self._distributions.items():
                try:
                    check_distribution_compatibility(trial.distributions[name], each)
                except ValueError:
                    raise UserError(
                        f"{name}: the search was begun with {_shown(trial.distributions[name])} "
                        f"and is now with {_shown(each)}, which Optuna cannot compare; {way_on}"
                    ) from None

    def _copy(self) -> tuple[optuna.Study, InMemoryStorage]:
        """Return the study as it is, in memory: the same trials under the same numbers."""
        import optuna

        storage = optuna.storages.InMemoryStorage()
        optuna.copy_study(from_study_name=STUDY, from_storage=self._storage, to_storage=storage)
        return optuna.load_study(study_name=STUDY, storage=storage), storage

    def _drawn(self) -> FrozenTrial:
        copy, _ = self._copy()
        copy.sampler = sampler(self._search, self._space, len(copy.trials))
        number = copy.ask(self._distributions).number
        return copy.trials[number]

    def is_exhausted(self, points: int) -> bool:
        """Return whether there is nothing new to try, and what was proposed is in the plan.

        ``points`` is how many that has.
        """
        planned = (trial.user_attrs.get(POINT, -1) < points for trial in self.trials)
        return self._are_all_proposed() and all(planned)

    def _are_all_proposed(self) -> bool:
        count = spaces.combinations(self._space)
        known = {tuple(trial.params.items()) for trial in self.trials}
        return count is not None and len(known) >= count

    def _why_left_out(
        self, drawn: FrozenTrial, is_excluded: Callable[[Mapping[str, Scalar]], bool]
    ) -> str | None:
        if is_excluded(drawn.params):
            return "sweep.exclude"
        same = [t.number for t in self.trials if t.params == drawn.params and POINT in t.user_attrs]
        return f"the same as trial {same[0]}" if same else None

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        settings = {name: trial.params[name] for name in self._space}
        return Proposal(trial.number, settings, spaces.overrides(self._space, settings))

    def _take_in(self, trial: FrozenTrial, step: int, value: float, *, is_last: bool) -> None:
        copy, storage = self._copy()
        reported = (s for each in copy.trials for s in each.intermediate_values)
        first_step = min([step, *reported])
        copied = _id(storage, trial.number)
        storage.set_trial_intermediate_value(copied, step, value)
        is_worse = pruner(self._search, first_step).prune(copy, storage.get_trial(copied))
        new = {
            key: each
            for key, each in storage.get_trial(copied).system_attrs.items()
            if key not in trial.system_attrs
        }
        # One line for all of it: what follows from it is applied again where a kill comes between.
        note = {"value": value, "prunes": bool(is_worse) and not is_last, "attributes": new}
        mine = _id(self._storage, trial.number)
        self._storage.set_trial_user_attr(mine, f"{JUDGED}{step}", note)
        self._apply_judgements(self._study.trials[trial.number])

    def _apply_judgements(self, trial: FrozenTrial) -> None:
        if trial.state.is_finished():
            return
        mine = _id(self._storage, trial.number)
        for step, note in _judgements(trial).items():
            for key, value in note["attributes"].items():
                if key not in trial.system_attrs:
                    self._storage.set_trial_system_attr(mine, key, value)
            if step not in trial.intermediate_values:
                self._storage.set_trial_intermediate_value(mine, step, note["value"])

    def _pruning(self, trial: FrozenTrial) -> Judgement | None:
        for step, note in _judgements(trial).items():
            if note["prunes"]:
                return Judgement(step, note["value"], _reason(self._search, step, note["value"]))
        return None


def repair(journal: Path) -> None:
    """Remove what a kill may have left of a journal: a line that is not whole, and its lock.

    For the owner of the sweep alone. After a line that was cut short Optuna appends to it, and no
    longer reads what follows; for a lock that nobody holds it waits 30 s (5.0, journal/_file.py).
    """
    with suppress(FileNotFoundError):
        journal.with_name(f"{journal.name}.lock").unlink()
    with suppress(FileNotFoundError), journal.open("r+b") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


def check_installed(kind: str) -> None:
    """Raise UserError where what a search needs is not installed."""
    needed = ["optuna", *(["cmaes"] if kind == "cmaes" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"sweep.search.kind={kind} needs {' and '.join(missing)}, which is not installed; "
            f"`{PIP}` does it"
        )


def _id(storage: BaseStorage, trial: int) -> int:
    return storage.get_trial_id_from_study_id_trial_number(
        storage.get_study_id_from_name(STUDY), trial
    )


def _reason(search: Search, step: int, value: float) -> str:
    if math.isnan(value):
        return f"the evaluation at step {step:,} is not a number"
    factor = search.pruner_reduction_factor or 4
    rule = (
        f"is not in the best {1 / factor:.0%} of those that came that far"
        if search.pruner == "asha"
        else "is worse than the median of the others there"
    )
    return f"{value:.6g} at step {step:,} {rule} ({search.pruner})"


def _shown(found: BaseDistribution) -> str:
    if choices := getattr(found, "choices", None):
        return ", ".join(map(str, choices))
    kind = type(found).__name__.removesuffix("Distribution").lower()
    ends = f"{kind} from {found._asdict()['low']:g} to {found._asdict()['high']:g}"
    return ends + (", log" if found._asdict()["log"] else "")


def _judgements(trial: FrozenTrial) -> dict[int, dict[str, Any]]:
    found = {
        int(key.removeprefix(JUDGED)): note
        for key, note in trial.user_attrs.items()
        if key.startswith(JUDGED)
    }
    return dict(sorted(found.items()))
