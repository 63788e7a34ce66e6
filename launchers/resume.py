"""`shardwright resume`: a run goes on in its directory, with settings changed where they may be."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from launchers import launch, machine, preflight, processes, report, submit
from launchers.compose import CONF, compose
from launchers.compose_errors import is_free_form
from launchers.dry_run import show
from train import config as run_config
from train import history, terminal
from train.checkpoint import layout
from train.config import (
    DEFAULT_MICRO_BATCH_SIZE,
    RunConfig,
    from_tree,
    unknown_key_message,
)
from train.errors import UserError

# What may not change, and what hangs on it. The longest prefix counts; None allows.
_FIXED: dict[str, str | None] = {
    "model": "the weights of the checkpoint have its shape",
    "tokenizer": "the model has learned its tokens",
    "data": "the position in the data would mean another place",
    "data.cache_dir": None,
    "objective": "the model has learned by it",
    "objective.prompts": None,
    "seed": "the order of the data hangs on it",
    "run_dir": "the run goes on in its own directory",
    "sweep_dir": "the run goes on in its own directory",
    "trainer.optimizer": "the optimizer's state in the checkpoint is that of another",
}


def main(arguments: Sequence[str]) -> int:
    """Go on from the newest whole checkpoint, or with --dry-run show how; return the exit code."""
    dry_run = "--dry-run" in arguments
    match [argument for argument in arguments if argument != "--dry-run"]:
        case [path, *overrides] if "=" not in path and not path.startswith("-"):
            run_dir = Path(os.path.abspath(path))
        case _:
            raise UserError(
                "resume needs the run's directory first: shardwright resume RUN_DIR [key=value]"
            )
    before = run_config.load(run_dir)
    submit.check_no_job(run_dir)
    groups = {name for name in RunConfig.model_fields if (CONF / name).is_dir()}
    options: dict[str, Any] = {}
    if picked := chosen(overrides, groups):
        (job,) = compose(picked)
        for group in (choice.partition("=")[0] for choice in picked):
            options[group] = OmegaConf.to_container(job.tree[group], resolve=True)
    here = machine.detect(os.environ)
    after = with_wandb_mode(changed(before, overrides, options), overrides, here.wandb_mode)
    limit = largest_micro_batch(before, overrides)
    config = machine.resolve(after, here, str(run_dir), limit)
    if dry_run:
        show([config], here)
    preflight.check_machine(config, here)
    if dry_run:
        return 0

    choices = dict(choice.split("=", 1) for choice in picked)
    terminal.outlive()
    with launch.claimed(run_dir) as claim:
        newest = write(run_dir, config, overrides)
        where = newest.name if newest else "the beginning: there is no checkpoint yet"
        if config.launcher.kind != "slurm":
            with terminal.kept_in(launch.run_log(run_dir)):
                environment = processes.rank_environment(config, here, os.environ)
                print(report.header(config, choices, here, environment, report.terminal_width()))
                print(f"  {'goes on':<10}from {where}", flush=True)
                print(report.ignored(os.environ), end="", flush=True)
                print(report.other_nodes(config), end="", flush=True)
                if not (run_dir / "data.json").exists():  # stopped while they were being prepared
                    prepared = launch.prepare(config, claim)
                    if prepared != 0:
                        return prepared
                return launch.run_ranks(config, here, claim)
    # Its job owns the run from here on.
    print(f"goes on from {where}")
    try:
        return submit.again(config, choices, here)
    except UserError:
        take_back(run_dir)
        raise


# --- which settings may change ------------------------------------------------------------------


def changed(
    before: RunConfig, overrides: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> RunConfig:
    """Return a run's config with overrides on top. Pure.

    ``options`` are the trees of the groups for which the overrides choose an option. Raises
    UserError where an override does not parse, asks for what is unknown or may not change.
    """
    tree: dict[str, Any] = before.model_dump(mode="json", by_alias=True)
    # Left to itself it is what it was where the ranks still divide the batch so, else smaller.
    tree["trainer"]["micro_batch_size"] = "auto"
    tree |= options
    for key, value in _parsed(overrides):
        if key in options:
            continue
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
    if problems := list(refused(before, after)):
        raise UserError("\n".join(problems))
    return after


def with_wandb_mode(config: RunConfig, overrides: Sequence[str], mode: str | None) -> RunConfig:
    """Return a config with the mode that the environment asks W&B for today, unless an override
    says another: the run's own may be what `auto` came to where it began. Pure."""
    if config.tracking.kind != "wandb" or mode is None:
        return config
    if any(key == "tracking.mode" for key, _ in _parsed(overrides)):
        return config
    tree = config.model_dump(mode="json", by_alias=True)
    tree["tracking"]["mode"] = mode
    return from_tree(tree)


def largest_micro_batch(before: RunConfig, overrides: Sequence[str]) -> int:
    """Return the bound on a micro-batch that is resolved anew: what has fitted so far. Pure."""
    if any(key == "trainer.micro_batch_size" for key, _ in _parsed(overrides)):
        return DEFAULT_MICRO_BATCH_SIZE
    return before.trainer.samples_per_pass


def chosen(overrides: Sequence[str], groups: set[str]) -> list[str]:
    """Return the overrides that choose an option of a group, as `strategy=zero3` does. Pure."""
    return [f"{key}={value}" for key, value in _parsed(overrides) if key in groups]


def refused(before: RunConfig, after: RunConfig) -> Iterator[str]:
    """Yield a message for each setting that differs and may not. Pure."""
    old, new = _leaves(before.model_dump(mode="json")), _leaves(after.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        prefixes = [p for p in _FIXED if key == p or key.startswith(f"{p}.")]
        reason = _FIXED[max(prefixes, key=len)] if prefixes else None
        if reason is not None:
            yield (
                f"{key}={new.get(key)} was {old.get(key)}, and a run that goes on keeps it: "
                f"{reason}; leave it out, or start a new run with `shardwright train`"
            )


def _parsed(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException:
            raise UserError(
                f"{text} does not parse as key=value; for example strategy=zero3 or "
                "trainer.max_steps=2000"
            ) from None
        is_new = override.is_add() and not is_free_form(override.key_or_group)
        if override.is_delete() or is_new or override.is_sweep_override():
            raise UserError(f"{text}: a run that goes on takes key=value only")
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


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


# --- how it is written down ---------------------------------------------------------------------


def write(run_dir: Path, config: RunConfig, overrides: Sequence[str]) -> Path | None:
    """Write resumes/<n>.yaml and a line of history.jsonl; return the checkpoint to go on from.

    Notes of how ranks failed before are put aside in logs/.
    """
    folder = run_dir / run_config.RESUMES
    folder.mkdir(exist_ok=True)
    number = 1 + max((int(p.stem) for p in folder.glob("*.yaml") if p.stem.isdecimal()), default=0)
    path = folder / f"{number}.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(run_config.to_yaml(config), encoding="utf-8")
    temporary.rename(path)
    whole = layout.whole_checkpoints(run_dir / "checkpoints")
    newest = whole[-1][1] if whole else None
    entry = {
        "time": time.time(),
        "config": f"{run_config.RESUMES}/{path.name}",
        "overrides": list(overrides),
        "checkpoint": newest.name if newest else None,
        "world_size": config.launcher.world_size,
    }
    history.append(run_dir, entry)
    logs = run_dir / "logs"
    aside = logs / f"before-resume-{number}"
    for old in [*logs.glob("rank-*.error.json"), *logs.glob("torchrun*.log")]:
        aside.mkdir(exist_ok=True)
        os.rename(old, aside / old.name)
    return newest


def take_back(run_dir: Path) -> None:
    """Undo `write` where the run was not started after all; what failed before stays aside."""
    folder = run_dir / run_config.RESUMES
    newest = max((p for p in folder.glob("*.yaml")), key=lambda p: int(p.stem))
    path = run_dir / history.FILE
    kept = path.read_text().splitlines(keepends=True)[:-1]
    path.write_text("".join(kept))
    newest.unlink()
