"""What a command line asks of Hydra becomes the configs of its runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from shardwright.launchers.composition import engine_file, errors, quickly
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine import names
from shardwright.launchers.machine.facts import Machine
from shardwright.train import program
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.config.own import with_parts_located
from shardwright.train.config.rules import unread
from shardwright.train.data.sources.corpus import located
from shardwright.train.errors import BAD_INPUT, UserError
from shardwright.train.paths import absolute
from shardwright.train.process import garbage

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class Job:
    """One composed run, before it is checked."""

    tree: DictConfig
    choices: Mapping[str, str]
    """Option chosen of each group."""
    number: int | None
    """Place in a multirun; None in a single run."""
    arguments: tuple[str, ...] = ()
    """What asks for this run alone, but for the directories."""

    @property
    def typed(self) -> frozenset[str]:
        """The keys that the command line itself has, and no file of options or experiments."""
        return frozenset(argument.lstrip("+").partition("=")[0] for argument in self.arguments)

    @property
    def is_named_here(self) -> bool:
        """Whether its directory, or that of its sweep, has a name that nobody has asked for."""
        return self.tree.get("run_dir") is None and self.tree.get("sweep_dir") is None


def config_dir(arguments: Sequence[str]) -> Path | None:
    """Return where the user keeps options of their own; None where the arguments do not say."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # What lacks its value is told where all of it is parsed.
    parser.add_argument("--config-dir", "-cd", nargs="?")
    options, _ = parser.parse_known_args(arguments)
    return Path(options.config_dir) if options.config_dir else None


UNUSED_FLAGS = (
    *("--config-name", "--config-path", "--experimental-rerun", "--run", "--version"),
    "--shell-completion",
)
"""Those of Hydra that name another program's tree, or say what needs no saying."""


def command_line() -> argparse.ArgumentParser:
    """Return Hydra's parser, which takes all of its flags and shows those of use here."""
    found = get_args_parser()
    for action in found._actions:
        if set(action.option_strings) & set(UNUSED_FLAGS):
            action.help = argparse.SUPPRESS
        if "--version" in action.option_strings:
            action.version = f"shardwright {program.version()}"  # type: ignore[attr-defined]
    return found


def compose(arguments: Sequence[str]) -> list[Job]:
    """Return the runs that the arguments ask for; none where they ask Hydra itself for something.

    Raises UserError on whatever does not compose.
    """
    jobs: list[Job] = []
    arguments = engine_file.replaced(arguments)

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def collect(tree: DictConfig) -> None:
        settings = HydraConfig.get()
        number = settings.job.num if settings.mode == RunMode.MULTIRUN else None
        choices = {str(k): str(v) for k, v in settings.runtime.choices.items()}
        of_place = ("sweep_dir=", "run_dir=")
        own = [  # as they were written: one may hold an interpolation
            override.replace(f"{errors.ROOT_GROUP}@_global_=", "experiment=")
            for override in map(str, OmegaConf.to_container(settings.overrides.task) or ())
            if not override.startswith(of_place)
        ]
        flags = [f"--config-dir={parsed.config_dir}"] if parsed.config_dir else []
        jobs.append(Job(tree, choices, number, (*flags, *own)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_hydra_process())
        arguments = [
            re.sub(r"^(--config-(?:dir|path)=)(~.*)", _expanded, argument) for argument in arguments
        ]
        for argument in arguments:
            # Hydra's parser would take --experiment=demo for --experimental-rerun.
            if errors.is_setting_with_dashes(argument):
                raise UserError(errors.unknown_flag_message(argument))
        parsed, unknown = command_line().parse_known_intermixed_args(arguments)
        if flags := [argument for argument in unknown if argument.startswith("-")]:
            raise UserError(errors.unknown_flag_message(flags[0]))
        starts_runs = not (
            parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
        )
        # Hydra's own parser takes no flag between overrides.
        sys.argv += [argument for argument in arguments if argument not in parsed.overrides]
        sys.argv += [errors.qualify(override) for override in parsed.overrides]
        if starts_runs:
            # Hydra's sweeper writes a multirun.yaml of its own, wherever this points.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            sys.argv.append(f"hydra.sweep.dir={quoted(scratch)}")
        try:
            if starts_runs:
                written = map(errors.with_home_quoted, parsed.overrides)
                errors.check_options(list(written), group_options())
            with quickly.composing(CONF), garbage.uncollected():
                collect()
        except UserError:
            raise
        except errors.USER_CAUSED as error:
            raise UserError(errors.explain(error)) from error
        except SystemExit as end:
            if end.code not in (None, 0):
                raise SystemExit(BAD_INPUT) from None
            if starts_runs:
                raise
    return jobs


def _expanded(flag: re.Match[str]) -> str:
    return flag[1] + os.path.expanduser(flag[2])


NO_GROUPS = ("hydra", *quickly.NOT_OF_A_RUN)
"""Folders of conf/ whose files are no part of a run."""


def group_options() -> dict[str, list[str]]:
    """Return the options of each group of a run that comes with the project, by name."""
    return {
        directory.name: sorted(path.stem for path in directory.glob("*.yaml"))
        for directory in sorted(CONF.iterdir())
        if directory.is_dir() and directory.name not in NO_GROUPS
    }


def plain(tree: DictConfig) -> Any:
    """Return a composed tree as plain values, nothing left to interpolate."""
    try:
        found: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except errors.USER_CAUSED as error:
        raise UserError(errors.explain(error)) from error
    _with_the_tokenizer_of_its_run(found)
    return found


def _with_the_tokenizer_of_its_run(tree: dict[str, Any]) -> None:
    """Give a run that starts from another's weights that one's tokenizer, where none is chosen.

    One that is trained anew, as big as the model's vocabulary, has other tokens.
    """
    model, tokenizer = tree.get("model"), tree.get("tokenizer")
    if not isinstance(model, dict) or not isinstance(tokenizer, dict):
        return
    is_default = tokenizer.get("kind") == "byte_bpe" and tokenizer.get("vocab_size") is None
    if not is_default or model.get("kind") != "pretrained" or not os.path.isdir(str(model["name"])):
        return
    if (run_dir := names.run_of(Path(absolute(str(model["name"]))))) is not None:
        tree["tokenizer"] = {"kind": "pretrained", "name": str(run_dir)}


def resolved(job: Job, here: Machine, stamp: str) -> RunConfig:
    """Return a job's config, valid, with nothing left open and nothing set that nothing reads.

    Raises UserError.
    """
    config = from_tree(plain(job.tree), job.typed)
    # Of new runs alone: by the very names in it a resume finds the tokens of one that is older.
    config = with_parts_located(config.model_copy(update={"data": located(config.data)}))
    found = machine.resolve(config, here, _run_dir(config, job.number, stamp))
    if problems := list(unread.problems(config, found, typed=job.typed)):
        raise UserError("\n".join(problems))
    return found


def _run_dir(config: RunConfig, number: int | None, stamp: str) -> str:
    """Return the absolute run directory of a job; ``number`` is its place in a multirun."""
    if number is None:
        if config.sweep_dir is not None:
            raise UserError(
                f"sweep_dir={config.sweep_dir} is for several runs; add -m, or give run_dir"
            )
        if config.run_dir is not None:
            return absolute(config.run_dir)
        return str(names.free(Path(absolute(f"runs/{config.name}-{stamp}"))))
    if config.run_dir is not None:
        raise UserError(
            f"run_dir={config.run_dir} is one directory, and -m starts several runs; "
            "give sweep_dir instead"
        )
    if config.sweep_dir is not None:
        return absolute(Path(config.sweep_dir) / str(number))
    sweep_dir = names.free(Path(absolute(f"sweeps/{config.name}-{stamp}")))
    return str(sweep_dir / str(number))


@contextlib.contextmanager
def _hydra_process() -> Iterator[None]:
    """Have Hydra know the program by its name, and raise its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["shardwright"]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def quoted(text: str) -> str:
    """Return a string literal of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
