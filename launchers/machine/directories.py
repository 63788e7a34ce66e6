"""The directory of a run, or of a sweep: made whole, of a free name if need be, or not at all."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shardwright.launchers.machine import names
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.run_directory import choice
from shardwright.train.run_directory.choice import Choice
from shardwright.train.run_directory.names import LOGS, RUN_CONFIG


def create(
    config: RunConfig,
    run_dir: Path,
    *,
    claim: Callable[[], object] = lambda: None,
    chosen: Choice | None = None,
) -> list[Path]:
    """Make ``run_dir`` with config.yaml and logs/; return the directories made, outermost first.

    What a plan has ``chosen`` for the run is written down beside them.
    ``claim`` is called before there is a config.yaml, from which on others take it for a run's.
    Raises UserError, and leaves nothing, where that cannot be done.
    """
    made: list[Path] = []
    try:
        make_parents(run_dir, made)
        run_dir.mkdir()
        made.append(run_dir)
        (run_dir / LOGS).mkdir()
        claim()
        if chosen is not None:
            choice.note(run_dir, config, chosen)
        write_text(run_dir / RUN_CONFIG, to_yaml(config))
    except BaseException as error:
        is_mine = run_dir in made
        if is_mine:
            take_back(made)
        else:
            remove_empty(made)  # a run that has that name may lie in them
        if not isinstance(error, OSError):
            raise
        if isinstance(error, FileExistsError) and not is_mine:
            raise Taken(exists(run_dir)) from None
        raise cannot_be_made(f"run_dir={run_dir}", error) from None
    return made


class Taken(UserError):
    """Somebody else has made that very directory."""


def create_named(
    config: RunConfig,
    *,
    is_generated: bool,
    claim: Callable[[Path], object] = lambda run_dir: None,
    chosen: Choice | None = None,
) -> tuple[RunConfig, list[Path]]:
    """Make a run's directory as `create` does; return its config and the directories made.

    One that ``is_generated`` takes the next free name where another run was given it at the same
    time: making the directory is what claims it.
    """
    while True:
        run_dir = Path(str(config.run_dir))
        try:
            made = create(config, run_dir, claim=functools.partial(claim, run_dir), chosen=chosen)
            return config, made
        except Taken:
            if not is_generated:
                raise
            following = names.free(names.following(run_dir))
            config = config.model_copy(update={"run_dir": str(following)})


@contextlib.contextmanager
def claimed_sweep(configs: Sequence[RunConfig]) -> Iterator[list[RunConfig]]:
    """Claim the directory of a sweep, the common parent of runs, by making it.

    Yields the configs, in a directory of the next free name where another sweep has that one; what
    is empty at the end is removed again. Raises UserError where it cannot be made.
    """
    parent = Path(str(configs[0].run_dir)).parent
    made: list[Path] = []
    try:
        while True:
            try:
                make_parents(parent, made)
                parent.mkdir()
                made.append(parent)
                break
            except FileExistsError:
                parent = names.free(names.following(parent))
            except OSError as error:
                raise cannot_be_made(f"sweep_dir={parent}", error) from None
        yield [
            config.model_copy(update={"run_dir": str(parent / Path(str(config.run_dir)).name)})
            for config in configs
        ]
    finally:
        remove_empty(made)


def make_parents(directory: Path, made: list[Path]) -> None:
    """Make what is lacking above a directory; ``made`` gets what nobody else has made meanwhile."""
    for parent in reversed(directory.parents):
        if not parent.exists():
            with contextlib.suppress(FileExistsError):
                parent.mkdir()
                made.append(parent)


def remove_empty(made: Sequence[Path]) -> None:
    """Remove those directories that nothing lies in, the innermost, which come last, first."""
    for directory in reversed(made):
        with contextlib.suppress(OSError):
            directory.rmdir()


def cannot_be_made(what: str, error: OSError) -> UserError:
    """Return the error for a directory that is refused."""
    return UserError(
        f"{what} cannot be created: {error.strerror} ({error.filename}); give a directory that "
        "is writable"
    )


def take_back(made: list[Path]) -> None:
    """Remove a run directory that ``create`` made, and those of its parents that are empty."""
    *parents, run_dir = made
    shutil.rmtree(run_dir, ignore_errors=True)
    remove_empty(parents)


def exists(run_dir: Path) -> str:
    """Return what is said where a run's directory is taken."""
    return f"run_dir={run_dir} exists already; choose another, or remove it first"
