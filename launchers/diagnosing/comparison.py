"""Where two runs part, told in sentences; their steps are made again if need be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shardwright.launchers.diagnosing import parting, replay
from shardwright.launchers.machine.facts import Machine
from shardwright.train import config as run_config
from shardwright.train.errors import UserError
from shardwright.train.run_directory import names


def compare(
    runs: tuple[Path, Path], here: Machine, scratch: Path | None, say: Callable[[str], object]
) -> bool:
    """Say where two runs part; return whether that could be found out."""
    configs = [run_config.load(run_dir) for run_dir in runs]
    logged = [parting.figures(run_dir) for run_dir in runs]
    if not logged[0].keys() & logged[1].keys():
        raise UserError(f"{runs[0]} and {runs[1]} have logged no step in common")
    first = parting.first_step(*logged)
    if first is None:
        common = sorted(logged[0].keys() & logged[1].keys())
        say(
            f"All figures of the {len(common)} steps that both have logged, up to {common[-1]:,}, "
            "are the same, bit for bit."
        )
        return True
    say(by_figures(first))
    if differ := parting.settings(*configs):
        rest = len(differ) - parting.MOST_SETTINGS
        more = f" and {rest} more" if rest > 0 else ""
        say(f"Settings that differ: {', '.join(differ[: parting.MOST_SETTINGS])}{more}.")
    ranks = [config.launcher.world_size for config in configs]
    if ranks[0] != ranks[1]:
        say(f"They have {ranks[0]} and {ranks[1]} ranks, which no step can be compared on.")
        return False
    return _by_modules(runs, first.step, here, scratch, say)


def by_figures(first: parting.FirstStep) -> str:
    """Return the first step in a sentence. Pure."""
    return (
        f"Of what they have logged, {first.figure} of step {first.step:,} is the first that "
        f"differs: {first.values[0]} and {first.values[1]}; {first.agreed} logged step(s) before "
        "it are the same."
    )


def _by_modules(
    runs: tuple[Path, Path],
    step: int,
    here: Machine,
    scratch: Path | None,
    say: Callable[[str], object],
) -> bool:
    begins = parting.beginning(runs, step)
    prepared = [
        replay.prepare(run_dir, step, scratch, fingerprints=True, first=begins) for run_dir in runs
    ]
    start = f"checkpoint-{begins}, where both hold the same bits" if begins else "the beginning"
    for run_dir, each in zip(runs, prepared, strict=True):
        say(f"Replaying {run_dir} from {start}, in {each.directory}.")
        if replay.run(each, here) is None:
            say(f"The replay failed; see {each.directory / names.LOGS}.")
            return False
    say(by_modules(prepared[0], prepared[1]))
    return True


def by_modules(a: replay.Prepared, b: replay.Prepared) -> str:
    """Return where two replays have parted, in sentences."""
    found = parting.first_tensor(a.directory, b.directory)
    if found is None:
        return (
            f"Made again, they are the same up to step {a.until:,}, bit for bit: what parted them "
            "does not repeat. Kernels that add up in another order each time do that "
            "(trainer.deterministic=true), or a fault of the hardware."
        )
    return found.said(a.first)
