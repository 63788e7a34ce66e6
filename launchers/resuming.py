"""Continue a run in its directory, with other settings where they may be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from shardwright.launchers import launch, messages, preflight, resumes
from shardwright.launchers.composition import engine_file
from shardwright.launchers.composition.compose import CONF, compose, group_options
from shardwright.launchers.composition.errors import (
    ROOT_GROUP,
    is_free_form,
    unreadable,
    with_home_quoted,
)
from shardwright.launchers.dry_run import show
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.launchers.slurm import submit
from shardwright.train import config as run_config
from shardwright.train.checkpoint import retention
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import (
    DEFAULT_MICRO_BATCH_SIZE,
    OPTIMIZERS,
    PrecisionConfig,
    Progress,
    RunConfig,
    TrainerConfig,
    from_tree,
    schedule_of,
    total_steps,
    unknown_key_message,
)
from shardwright.train.config.optimizers import FALLING
from shardwright.train.config.own import FIELDS, same_part, with_parts_located
from shardwright.train.config.rules import unread
from shardwright.train.config.tree import leaves
from shardwright.train.console import terminal
from shardwright.train.data.prepare import noted_samples_wanted
from shardwright.train.data.sources.corpus import with_sets_located
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory import own_code, set_aside
from shardwright.train.run_directory.names import (
    CHECKPOINTS,
    DATA_JSON,
    METRICS,
    ROLLBACKS,
    RUN_CONFIG,
    SET_ASIDE,
)

# What may not change, and what hangs on it. The longest prefix counts; None allows.
_FIXED: dict[str, str | None] = {
    "model": "the weights of the checkpoint have its shape",
    "adapter": "the weights of the checkpoint have its shape",
    "adapter.export": None,
    "tokenizer": "the model has learned its tokens",
    "data": "the position in the data would mean another sample",
    "data.cache_dir": None,
    "data.eval_paths": None,
    "data.eval_split": None,
    "data.names": None,
    "data.document_attention": "the model has learned from what a token sees by it",
    "data.unpad": None,
    "objective": "the model was trained with it",
    "objective.prompts": None,
    "objective.label_smoothing": None,
    "objective.z_loss": None,
    "objective.loss": None,
    "objective.neftune_noise_alpha": None,
    "seed": "the order of the data depends on it",
    "run_dir": "the run is resumed in its own directory",
    "sweep_dir": "the run is resumed in its own directory",
    "trainer.optimizer": "the optimizer's state in the checkpoint is that of another",
    "trainer.custom_class": "the optimizer's state in the checkpoint is that of another",
}


@dataclass(frozen=True)
class Kept:
    """What of a run's settings may not change."""

    fixed: Mapping[str, str | None]
    by: str
    remedy: str


_BY_A_RESUME = Kept(
    _FIXED, "a resumed run", "leave it out, or start a new run with `shardwright train`"
)


@dataclass(frozen=True)
class Asked:
    """Which run is to be resumed, and how."""

    run_dir: Path
    overrides: Sequence[str] = ()
    step: int | None = None
    """That of the checkpoint; None is the newest whole one."""
    config_dir: str | None = None
    """A folder with options of the user's own."""
    dry_run: bool = False


def resume(place: Asked) -> int:
    """Resume from a whole checkpoint, or show how; return the exit code. Raises UserError."""
    run_dir, step = asked(Path(absolute(place.run_dir)), place.step)
    refuse_a_second_run(place.overrides)
    overrides = engine_file.replaced([*map(with_home_quoted, place.overrides)])
    before = run_config.load(run_dir)
    submit.check_no_job(run_dir)
    config_dir = place.config_dir and os.path.expanduser(place.config_dir)
    choices, trees = options_chosen(overrides, config_dir)
    here = machine.detect(os.environ)
    after = with_wandb_mode(changed(before, overrides, trees), overrides, here.wandb_mode)
    after = with_parts_located(after.model_copy(update={"data": with_sets_located(after.data)}))
    limit = largest_micro_batch(before, overrides)
    config = machine.resolve(after, here, str(run_dir), limit)
    check_read(before, after, config)
    if place.dry_run:
        show([config], here)
    preflight.check_machine(config, here)
    if place.dry_run:
        checkpoint = resumes.check(run_dir, config, step)
        print(_start(before, config, checkpoint, is_chosen=step is not None))
        return 0
    return _resumed(Resumption(before, config, choices, step, overrides), here)


class Resumption(NamedTuple):
    """A run that is resumed: what it was, and what it will be."""

    before: RunConfig
    after: RunConfig
    choices: Mapping[str, str]
    """Options that were chosen anew."""
    step: int | None
    overrides: Sequence[str]


def _resumed(of: Resumption, here: Machine) -> int:
    config, run_dir = of.after, Path(str(of.after.run_dir))
    terminal.outlive()
    with launch.claimed(run_dir) as claim:
        # As the ranks do: it may bring back a checkpoint.
        retention.remove_leftovers(run_dir / CHECKPOINTS)
        checkpoint = resumes.check(run_dir, config, of.step)
        start = _start(of.before, config, checkpoint, is_chosen=of.step is not None)
        number = resumes.write(run_dir, config, of.overrides, checkpoint, of.step)
        if (queue := launcher_of(config).queue) is None:
            with terminal.kept_in(launch.run_log(run_dir)):
                environment = rank_environment(config, here, os.environ)
                width = messages.terminal_width()
                print(messages.header(config, of.choices, here, environment, width))
                print(start, flush=True)
                print(messages.ignored(os.environ, width), end="", flush=True)
                print(launcher_of(config).other_nodes(), end="", flush=True)
                code = 0
                if not (run_dir / DATA_JSON).exists():  # stopped while they were being prepared
                    code = launch.prepare(config, claim)
                code = code or launch.run_ranks(config, here, claim)
                if code == BAD_INPUT and resumes.take_back_unstarted(run_dir):
                    print(resumes.TAKEN_BACK, file=sys.stderr)
                return code
    # Its job owns the run from here on.
    print(start)
    try:
        return queue.again(config, of.choices, here)
    except UserError:
        resumes.take_back(run_dir, number)
        raise


def asked(place: Path, step: int | None) -> tuple[Path, int | None]:
    """Return the run that is meant, and the step of the checkpoint to resume it from.

    That is None where nobody has chosen one. ``place`` is the run's directory or one of its
    checkpoints. Raises UserError where a checkpoint is of no run, or not of this one any more.
    """
    own = layout.step_of(place)
    if own is None or (place / RUN_CONFIG).is_file():
        return place, step
    if place.parent.parent.name == SET_ASIDE:
        run_dir = place.parent.parent.parent
        raise UserError(
            f"{place} was set aside by an earlier resume; to resume from it, move it back to "
            f"{run_dir / CHECKPOINTS}, and with it what {place.parent} holds of {METRICS} and "
            f"{ROLLBACKS}"
        )
    run_dir = place.parent.parent
    if place.parent.name != CHECKPOINTS or not (run_dir / RUN_CONFIG).is_file():
        raise UserError(
            f"{place} lies in no run: {run_dir} has no {RUN_CONFIG} whose run it could continue; "
            "give a run directory. A new run begins from its weights with model=pretrained "
            f"model.name={place}"
        )
    if step not in (None, own):
        raise UserError(
            f"{place} is the checkpoint of step {own}, and --step={step} asks for another; leave "
            f"one of them out, or give {run_dir} --step {step}"
        )
    return run_dir, own


def refuse_a_second_run(overrides: Sequence[str]) -> None:
    """Raise UserError where a directory stands among the settings to change."""
    for word in overrides:
        if "=" not in word and os.path.isdir(os.path.expanduser(word)):
            raise UserError(
                f"{word}: resume continues one run, from a checkpoint of its own; give either the "
                "run's directory, with --step N, or the path of its checkpoint. A new run begins "
                "from the weights of another with model=pretrained"
            )


def options_chosen(
    overrides: Sequence[str], config_dir: str | None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the option that the overrides choose of each group, and its tree."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir} is not a directory; give one that exists")
    groups = {name for name in RunConfig.model_fields if (CONF / name).is_dir()}
    picked = chosen(overrides, groups)
    if not picked:
        return {}, {}
    (job,) = compose([*([] if config_dir is None else ["--config-dir", config_dir]), *picked])
    choices = dict(choice.split("=", 1) for choice in picked)
    trees = {group: OmegaConf.to_container(job.tree[group], resolve=True) for group in choices}
    return choices, trees


# --- from where, and at which rate --------------------------------------------------------------


def _start(before: RunConfig, after: RunConfig, checkpoint: Path | None, *, is_chosen: bool) -> str:
    """Return from where a run is resumed, and that its learning rate rises again where it does.

    What a resume from a checkpoint that ``is_chosen`` is about to set aside is named.
    """
    where = checkpoint.name if checkpoint else "the beginning: there is no checkpoint yet"
    rows = {"resumes": f"from {where}"}
    own = own_code.changes(own_code.noted(Path(str(after.run_dir))), own_code.of(after))
    if changed := "; ".join(own):
        rows["own code"] = changed
    if checkpoint is not None:
        run_dir = checkpoint.parent.parent
        newer = set_aside.newer(run_dir, layout.step_of(checkpoint) or 0) if is_chosen else []
        if names := [path.name for path in newer]:
            aside = set_aside.folder(run_dir, 1 + (resumes.newest_number(run_dir) or 0))
            rows["set aside"] = f"{', '.join(names)}, in {aside}, for you to delete or bring back"
        risen = rise(
            before.trainer,
            after.trainer,
            noted_samples_wanted(before, run_dir),
            noted_samples_wanted(after, run_dir),
            layout.read_manifest(checkpoint).progress(),
        )
        if risen is not None:
            rows["rate"] = risen
    return "\n".join(messages.aligned(rows, 10, messages.terminal_width()))


def rise(
    before: TrainerConfig,
    after: TrainerConfig,
    wanted_before: int | None,
    wanted_after: int | None,
    at: Progress,
) -> str | None:
    """Return that a schedule which falls to 0 is higher again than it had come to, or None. Pure.

    A longer run stretches its schedule: one that falls then is where it was earlier.
    ``wanted_before`` and ``wanted_after`` are what `samples_wanted` returns.
    """
    lengths = ((before, wanted_before), (after, wanted_after))
    unknown = any(trainer.max_steps is None and wanted is None for trainer, wanted in lengths)
    if after.lr_scheduler not in FALLING or not at.scheduled_steps or unknown:
        return None
    old, new = (schedule_of(trainer, wanted, at) for trainer, wanted in lengths)
    step = at.scheduled_steps
    had, has = old(step - 1) * before.learning_rate, new(step) * after.learning_rate
    if new(step) <= old(step) * (1 + 1e-9) or has <= had or not had:
        return None
    settings = ["trainer.lr_scheduler=constant", f"trainer.learning_rate={had:.6g}"]
    settings += [
        f"trainer.{name}={old(step - 1) * getattr(after, name):.6g}"
        for name in type(after).model_fields
        if name.endswith("_learning_rate") and getattr(after, name) is not None
    ]
    if after.warmup_steps:
        settings.append("trainer.warmup_steps=0")
    if after.warmup_fraction:
        settings.append("trainer.warmup_fraction=0")
    end = total_steps(after, wanted_after, at)
    return (
        f"rises again, from {had:.3g} at step {at.step:,} to {has:.3g} at step {at.step + 1:,}: "
        f"the {after.lr_scheduler} schedule now ends at step {end:,}. To stay at the rate that "
        f"it has reached, add {' '.join(settings)}"
    )


# --- which settings may change ------------------------------------------------------------------


def changed(
    before: RunConfig,
    overrides: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    kept: Kept | None = None,
) -> RunConfig:
    """Return a run's config with overrides on top. Pure.

    ``options`` are the trees of the groups for which the overrides choose an option, ``kept`` what
    may not change; None is what a resume keeps. Raises UserError where an override does not parse,
    asks for what is unknown or may not change.
    """
    tree: dict[str, Any] = before.model_dump(mode="json", by_alias=True)
    # Left to itself it is what it was where the ranks still divide the batch so, else smaller.
    tree["trainer"]["micro_batch_size"] = None
    tree |= options
    for key, value in _parsed(overrides):
        if key in options:
            continue
        if key == ROOT_GROUP:
            raise UserError(
                f"{key}={value} is a file of settings for a new run; give those of them that are "
                f"to change, as key=value, or begin with `shardwright train {key}={value}`"
            )
        *path, leaf = key.split(".")
        section = tree
        for name in path:
            if name not in section and is_free_form(key):
                section[name] = {}
            inner = section.get(name)
            if not isinstance(inner, dict):
                raise UserError(unknown_key_message(key))
            section = inner
        section[leaf] = value
    if open_keys := list(_missing(tree)):
        raise UserError(f"{open_keys[0]} is not set; give it with {open_keys[0]}=VALUE")
    after = from_tree(tree)
    if left := after.left_to_the_plan:
        raise UserError(
            f"{left[0]}=auto: what is planned is chosen once, before a run begins, and a resumed "
            f"run keeps what it has; give a value, such as one that `shardwright plan` shows, or "
            "leave it out"
        )
    if problems := list(refused(before, after, kept or _BY_A_RESUME)):
        raise UserError("\n".join(problems))
    return after


def check_read(before: RunConfig, after: RunConfig, settled: RunConfig) -> None:
    """Raise UserError where a setting is new and nothing reads it. Pure.

    What the run has had may have been begun when nothing was said of it.
    """
    old, new = (leaves(each.model_dump(mode="json", by_alias=True)) for each in (before, after))
    kept = {key for key, value in new.items() if key in old and old[key] == value}
    if problems := list(unread.problems(after, settled, kept)):
        raise UserError("\n".join(problems))


def with_wandb_mode(config: RunConfig, overrides: Sequence[str], mode: str | None) -> RunConfig:
    """Return a config with the mode that the environment asks W&B for today, unless an override
    says another: the run's own may be what `auto` came to where it began. Pure."""
    if mode is None or any(key == "tracking.mode" for key, _ in _parsed(overrides)):
        return config
    return config.model_copy(update={"tracking": config.tracking.in_mode(mode)})


def largest_micro_batch(before: RunConfig, overrides: Sequence[str]) -> int:
    """Return the bound on a micro-batch that is resolved anew: what has fitted so far. Pure."""
    if any(key == "trainer.micro_batch_size" for key, _ in _parsed(overrides)):
        return DEFAULT_MICRO_BATCH_SIZE
    return before.trainer.samples_per_pass


def chosen(overrides: Sequence[str], groups: set[str]) -> list[str]:
    """Return the overrides that choose an option of a group, as `strategy=zero3` does. Pure."""
    return [f"{key}={value}" for key, value in _parsed(overrides) if key in groups]


def refused(before: RunConfig, after: RunConfig, kept: Kept) -> Iterator[str]:
    """Yield a message for each setting that differs and may not. Pure."""
    yield from _of_another_meaning(before.trainer, after.trainer, kept)
    yield from _of_the_loss_scale(before.precision, after.precision, kept)
    old, new = leaves(before.model_dump(mode="json")), leaves(after.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key) or (
            key in FIELDS and same_part(old.get(key), new.get(key))
        ):
            continue
        prefixes = [p for p in kept.fixed if key == p or key.startswith(f"{p}.")]
        reason = kept.fixed[max(prefixes, key=len)] if prefixes else None
        if reason is not None:
            yield _changes(key, old.get(key), new.get(key), reason, kept)


def _of_another_meaning(before: TrainerConfig, after: TrainerConfig, kept: Kept) -> Iterator[str]:
    """Yield a message for each field by which the optimizer's state would mean another thing."""
    if "trainer.optimizer" not in kept.fixed or after.optimizer != before.optimizer:
        return  # nothing takes the state over
    for field in OPTIMIZERS[before.optimizer].of_the_state:
        old, new = getattr(before, field.name), getattr(after, field.name)
        if field.meaning(old) != field.meaning(new):
            yield _changes(f"trainer.{field.name}", old, new, field.reason, kept)


def _of_the_loss_scale(
    before: PrecisionConfig, after: PrecisionConfig, kept: Kept
) -> Iterator[str]:
    """Yield why the factor on the loss cannot begin anew, where a resume is to."""
    old, new = before.initial_loss_scale, after.initial_loss_scale
    scales = before.computes_in.scales_losses and after.computes_in.scales_losses
    if "trainer.optimizer" in kept.fixed and scales and old != new:
        reason = "it goes on with the factor that it had come to"
        yield _changes("precision.initial_loss_scale", old, new, reason, kept)


def _changes(key: str, old: Any, new: Any, reason: str, kept: Kept) -> str:
    return f"{key}={new} was {old}, and {kept.by} keeps it: {reason}; {kept.remedy}"


def _parsed(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException:
            raise UserError(unreadable(text, group_options())) from None
        is_new = override.is_add() and not is_free_form(override.key_or_group)
        if override.is_delete() or is_new or override.is_sweep_override():
            raise UserError(f"{text}: a resumed run takes key=value only")
        value = override.value()
        # Nothing behind "=" is an empty text to Hydra; a quoted string is an object of its own.
        yield override.key_or_group, value if isinstance(value, list | dict) else _plain(value)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _missing(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if value == "???":
            yield prefix + key
        elif isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
