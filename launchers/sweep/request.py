"""What a command line asks of `shardwright sweep`: a definition, words for all points, a place."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from shardwright.launchers.composition import errors
from shardwright.launchers.composition.compose import CONF
from shardwright.launchers.sweep import definition, directory, grid
from shardwright.launchers.sweep.definition import PREFIX, SweepConfig
from shardwright.launchers.sweep.grid import Groups
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute

SWEEP_DIR = "sweep_dir"
CONFIG_DIR = "--config-dir="


@dataclass(frozen=True)
class Request:
    """What is asked for, before it is known whether it can be run."""

    config: SweepConfig
    arguments: tuple[str, ...]
    """The words that all points have in common, flags included."""
    sweep_dir: Path | None
    """None takes the sweep of these very words that was begun before, or a new directory."""
    dry_run: bool = False
    retry_failed: bool = False


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright sweep`."""
    found = argparse.ArgumentParser(
        prog="shardwright sweep",
        usage="%(prog)s [SWEEP_DIR] [--dry-run] [--retry-failed] [--config-dir DIR] "
        "[sweep=NAME] [sweep.key=value] [group=option,option] [key=value,value] ...",
        description="Run each combination of values, several at a time, each as an ordinary run. "
        "The same command, or the directory alone, continues a sweep that was stopped or killed: "
        "it skips what is done, resumes what was cut, tries again what failed and takes up points "
        "that are new.",
        epilog="Examples: shardwright sweep model=gpt2_tiny trainer.learning_rate=1e-4,3e-4 "
        "strategy=zero2,fsdp sweep.seeds=3; shardwright sweep sweep=learning_rates "
        "model=gpt2_small; shardwright sweep sweeps/a. Exit codes: 0 all points are done, 1 some "
        "failed, 2 bad input, 75 stopped and meant to be continued.",
    )
    found.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="settings as for `shardwright train`; those with several values (a,b, range(), "
        "choice(), glob()) are varied. sweep=NAME is a sweep of conf/sweep/, sweep.key one of its "
        "own settings, sweep_dir=DIR its directory",
    )
    found.add_argument(
        "--dry-run", action="store_true", help="show the points as a table, and start nothing"
    )
    found.add_argument(
        "--retry-failed",
        action="store_true",
        help="try failed points again that have used up sweep.max_retries",
    )
    found.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with options of your own, as for train"
    )
    return found


def of(arguments: Sequence[str], groups: Groups) -> Request:
    """Read a command line. Raises UserError on what is wrong with it."""
    errors.refuse_dashes(arguments)
    options, unknown = parser().parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(errors.unknown_flag_message(unknown[0]))
    given = [errors.with_home_quoted(w) for w in options.words]
    bare = [w for w in given if "=" not in w and not w.startswith("~")]
    own = [w for w in given if w not in bare and _is_own(w)]
    of_runs = [w for w in given if w not in (*bare, *own)]
    if placed := [w for w in of_runs if _key(w) == "run_dir"]:
        raise UserError(
            f"{placed[0]} is one directory, and a sweep has one for each point; give sweep_dir "
            "instead"
        )
    directories = [*bare, *(str(_value(w)) for w in own if _key(w) == SWEEP_DIR)]
    if len(directories) > 1:
        raise UserError(f"{' and '.join(directories)}: a sweep has one directory; give one of them")
    sweep_dir = Path(absolute(directories[0])) if directories else None
    if bare and not (sweep_dir and sweep_dir.is_dir()):
        raise UserError(errors.unreadable(bare[0], groups))
    flags, base = _config_dir(options.config_dir), dict[str, Any]()
    if bare:
        assert sweep_dir is not None, "given"
        plan = directory.read(sweep_dir)
        base = plan.definition.model_dump(mode="json")
        flags = flags or tuple(a for a in plan.arguments if a.startswith(CONFIG_DIR))
    tree = combined(base, own, of_runs, groups, folders(flags))
    config = definition.from_tree(tree)
    return Request(
        config, (*flags, *config.overrides), sweep_dir, options.dry_run, options.retry_failed
    )


def _config_dir(given: str | None) -> tuple[str, ...]:
    if given is None:
        return ()
    if not Path(absolute(given)).is_dir():
        raise UserError(f"--config-dir {given} is not a directory; give one that exists")
    return (f"{CONFIG_DIR}{absolute(given)}",)


def folders(flags: Sequence[str]) -> list[Path]:
    """Return where named sweeps lie, the user's own first. Pure."""
    own = [Path(f.removeprefix(CONFIG_DIR)) for f in flags if f.startswith(CONFIG_DIR)]
    return [folder / PREFIX for folder in (*own, CONF)]


def _key(text: str) -> str:
    return text.lstrip("+").partition("=")[0]


def _value(text: str) -> Any:
    return grid.value_of("value", text.partition("=")[2])


def _is_own(text: str) -> bool:
    return _key(text) in (PREFIX, SWEEP_DIR) or _key(text).startswith(f"{PREFIX}.")


def combined(
    base: Mapping[str, Any],
    own: Sequence[str],
    of_runs: Sequence[str],
    groups: Groups,
    places: Sequence[Path],
) -> dict[str, Any]:
    """Return a definition's tree: what is there, a named sweep, its own settings, words for runs.

    Each goes before those ahead of it; a key is either varied or the same for all.
    """
    tree = dict(base)
    for text in own:
        if _key(text) == PREFIX:
            tree |= {"name": str(_value(text)), **named(str(_value(text)), places)}
    for text in own:
        if _key(text) not in (PREFIX, SWEEP_DIR):
            _set(tree, _key(text).removeprefix(f"{PREFIX}."), _value(text))
    axes, common = dict(tree.get("grid") or {}), list(tree.get("overrides") or ())
    for text in of_runs:
        key = text.partition("=")[0]
        common = [word for word in common if word.partition("=")[0] != key]
        axes.pop(key, None)
        if grid.is_axis(text, groups):
            axes[key] = text.partition("=")[2]
        else:
            common.append(text)
    return {**tree, "grid": axes, "overrides": common}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Give a dotted key of a sweep's own settings its value."""
    section, _, rest = key.partition(".")
    if not rest:
        tree[section] = value
        return
    if section == "grid":
        raise UserError(
            f"{PREFIX}.{key}={value}: what varies is written as it is for a run, {rest}=A,B"
        )
    inner = tree.get(section)
    tree[section] = dict(inner) if isinstance(inner, Mapping) else {}
    _set(tree[section], rest, value)


def named(name: str, places: Sequence[Path]) -> dict[str, Any]:
    """Return what a sweep of a name is. Raises UserError, with near names, where there is none."""
    for folder in places:
        path = folder / f"{name}.yaml"
        if path.is_file() and path.parent == folder:
            try:
                tree = OmegaConf.to_container(OmegaConf.load(path))
            except errors.USER_CAUSED as error:
                raise UserError(errors.explain(error)) from error
            if not isinstance(tree, dict):
                raise UserError(f"{path} is not a mapping of a sweep's settings")
            return {str(key): value for key, value in tree.items()}
    there_are = sorted({path.stem for folder in places for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, there_are, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{PREFIX}={name}: there is no such sweep; {hint}there are {', '.join(there_are)}, and "
        f"those of --config-dir DIR in DIR/{PREFIX}/"
    )
