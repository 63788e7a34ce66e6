"""The checkpoint to take: the newest that is whole, on all nodes together, or the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.checkpoint.retention import best, saved_in
from shardwright.train.config import CheckpointConfig

Gather = Callable[[Any], Sequence[Any]]
"""From a rank's value to the values of all ranks, in one order on all of them. Collective."""


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not to be used."""

    step: int
    problems: list[str]

    def __str__(self) -> str:
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        what = "cannot be used" if self.problems[0] == layout.NOT_FINITE else "is not whole"
        return f"checkpoint-{self.step} {what}: {self.problems[0]}{more}"


@dataclass(frozen=True)
class Part:
    """What lies on one disk of a checkpoint: all of it, or what one node keeps."""

    save_id: str
    index: int
    count: int
    problem: str | None = None


def parts_in(listing: Listing) -> dict[int, Part]:
    """Return what lies in a directory of checkpoints, by step; sizes are checked, hashes not."""
    parts = {}
    for step in listing.named:
        found = listing.found(step)
        if isinstance(found, layout.NotWhole):
            parts[step] = Part("", 0, 1, problem=str(found))
        else:
            parts[step] = Part(found.save_id, found.part, found.parts)
    return parts


def together(seen: Sequence[dict[int, Part]]) -> tuple[list[int], list[PassedOver]]:
    """Return the steps that are whole on all nodes together, and the others, oldest first. Pure.

    ``seen`` holds what `parts_in` finds on each disk: on the one that all share, or on node-local
    storage on each node's own, where a step is whole if all parts of one save are there.
    """
    whole, passed_over = [], []
    for step in sorted({step for parts in seen for step in parts}):
        parts = [parts[step] for parts in seen if step in parts]
        problems = list(dict.fromkeys(part.problem for part in parts if part.problem))
        if not problems:
            if len(parts) < len(seen):
                problems = [f"{len(seen) - len(parts)} of {len(seen)} nodes' disks do not hold it"]
            elif len({(part.save_id, part.count) for part in parts}) > 1:
                problems = ["its parts on the nodes' disks come from different saves"]
            elif missing := set(range(parts[0].count)) - {part.index for part in parts}:
                problems = [
                    f"{len(missing)} of its {parts[0].count} parts are on disks of nodes that "
                    "are not taking part"
                ]
        if problems:
            passed_over.append(PassedOver(step, problems))
        else:
            whole.append(step)
    return whole, passed_over


def none_whole(run_dir: Path, passed_over: Sequence[PassedOver]) -> str:
    """Say that a run has checkpoints and none to be resumed from, the newest first. Pure."""
    return (
        f"{run_dir} has checkpoints, but none to resume from "
        f"({'; '.join(map(str, passed_over))}); {remedy(passed_over)}, or start a new run"
    )


def remedy(passed_over: Sequence[PassedOver]) -> str:
    """Return how one of these is made whole, the newest of those where that is easiest. Pure."""
    for found in passed_over:
        if names := layout.to_remove(found.problems):
            return f"remove {names} from checkpoint-{found.step}, which no save has put there"
    return "restore one of them from a copy"


def newest_whole(
    directory: Path,
    *,
    gather: Gather = lambda value: [value],
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], object] = lambda read_bytes: None,
) -> tuple[Path | None, list[PassedOver]]:
    """Return the newest whole checkpoint, or None, and those newer that are not, newest first.

    With several ranks it is collective and returns the same on all: ``share`` is this rank's place
    among those that read one disk (rank and world size; on node-local storage local rank and ranks
    of the node), of which the first looks for checkpoints and each reads its share of the files.
    Sizes are checked first, so that of most of what a crash leaves no hash is read. ``advance`` is
    called as by `layout.verify`.
    """
    seen = gather(parts_in(Listing(directory)) if share[0] == 0 else None)
    whole, passed_over = together([parts for parts in seen if parts is not None])
    chosen, damaged = _first_sound(directory, whole[::-1], gather, share, advance)
    newer = [p for p in passed_over if chosen is None or p.step > (layout.step_of(chosen) or 0)]
    return chosen, sorted([*newer, *damaged], key=lambda p: p.step, reverse=True)


def best_whole(
    directory: Path,
    rule: CheckpointConfig,
    *,
    gather: Gather = lambda value: [value],
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], object] = lambda read_bytes: None,
) -> tuple[Path | None, list[PassedOver]]:
    """Return the whole checkpoint that was evaluated best, or None, and better ones, if damaged.

    Collective, as `newest_whole` is, on a file system that all ranks share.
    """
    order = gather(best(saved_in(Listing(directory)), rule) if share[0] == 0 else None)[0]
    return _first_sound(directory, order, gather, share, advance)


def _first_sound(
    directory: Path,
    steps: Sequence[int],
    gather: Gather,
    share: tuple[int, int],
    advance: Callable[[int], object],
) -> tuple[Path | None, list[PassedOver]]:
    """Return the first of some checkpoints that can be used, and those before it.

    Every hash of it is right, and its weights are finite: where its manifest does not say so, they
    are looked at.
    """
    damaged: list[PassedOver] = []
    for step in steps:
        path = directory / f"checkpoint-{step}"
        found = gather(layout.verify(path, share=share, advance=advance))
        if not any(found):
            found = gather(_not_finite(path, share))
        problems = list(dict.fromkeys(problem for part in found for problem in part))
        if not problems:
            return path, damaged
        damaged.append(PassedOver(step, problems))
    return None, damaged


def _not_finite(checkpoint: Path, share: tuple[int, int]) -> list[str]:
    """Return what is wrong with this rank's share of the weights of a whole checkpoint."""
    if layout.read_manifest(checkpoint).finite is not None:
        return []
    from shardwright.train.checkpoint.format.lazy import Unreadable, has_only_finite
    from shardwright.train.checkpoint.read import portable

    try:
        weights = portable.read(checkpoint).weights
        index, count = share
        mine = sorted(weights)[index::count]
        is_finite = all(has_only_finite(weights[name]) for name in mine)
    except (Unreadable, OSError):
        return []  # whoever reads it says why
    return [] if is_finite else [layout.NOT_FINITE]
