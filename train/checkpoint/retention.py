"""Which checkpoints stay: a rule over steps and metrics, and the deletion of the others."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.layout import MANIFEST
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.config import CheckpointConfig
from shardwright.train.durable import flush

logger = logging.getLogger(__name__)

Mark = Literal["last", "permanent", "best"]


@dataclass(frozen=True)
class Saved:
    """One whole checkpoint, as retention sees it."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was evaluated at its step, by name; empty where nothing was."""
    verified: bool = False
    """Whether its hashes were checked since it was written."""


def marks(saved: Sequence[Saved], rule: CheckpointConfig) -> dict[int, list[Mark]]:
    """Return for each step why it is kept; an empty list where nothing keeps it. Pure."""
    steps = sorted(s.step for s in saved)
    reasons: dict[int, list[Mark]] = {step: [] for step in steps}
    for step in steps[-rule.keep_last :]:
        reasons[step].append("last")
    if rule.keep_every_steps is not None:
        for step in steps:
            if step and step % rule.keep_every_steps == 0:
                reasons[step].append("permanent")
    for step in best(saved, rule)[: rule.keep_best]:
        reasons[step].append("best")
    return reasons


def best(saved: Sequence[Saved], rule: CheckpointConfig) -> list[int]:
    """Return the steps that were evaluated, the best first; of equal ones the earlier. Pure."""
    sign = -1 if rule.higher_is_better else 1
    measured = [
        (sign * value, s.step)
        for s in saved
        if (value := s.metrics.get(rule.best_metric)) is not None and math.isfinite(value)
    ]
    return [step for _, step in sorted(measured)]


def expendable(saved: Sequence[Saved], rule: CheckpointConfig) -> list[int]:
    """Return the steps that may go, oldest first. Pure.

    Only what is older than the newest verified one, and only as if that were the newest of all: a
    run that was resumed from an older checkpoint does not lose what it writes to what it left
    behind.
    """
    verified = [s.step for s in saved if s.verified]
    if not verified:
        return []
    reasons = marks([s for s in saved if s.step <= max(verified)], rule)
    return [step for step in reasons if not reasons[step]]


def retain(
    directory: Path,
    rule: CheckpointConfig,
    *,
    newest: int,
    wrong: Sequence[str] = (),
    among: Collection[int] | None = None,
    listing: Listing | None = None,
) -> list[int]:
    """Delete what may go, now that checkpoint-<newest> is there; return the deleted steps.

    ``wrong`` is what `layout.verify` has found in it. With any of that nothing is deleted. Before a
    run resumes from it, all of it is verified. After a save its ranks do that, each its share: what
    a rank wrote is still in its page cache, so that it costs no disk or network; it proves that
    what has the name is what was meant, and not that the disk keeps it. The others are known by
    their sizes.

    On node-local storage call it once on each node, when all of them have verified their parts, and
    with ``among``, the steps that `discovery.together` finds whole on all nodes: what only some
    hold keeps nothing, and nodes that count alike delete alike.

    ``listing`` is what the directory holds, the newest included, where the caller knows.
    """
    if wrong:
        logger.warning(
            "checkpoint-%d is damaged, so no older one is deleted: %s", newest, "; ".join(wrong)
        )
        return []
    try:
        saved = saved_in(listing or Listing(directory), verified=[newest])
    except OSError as error:
        logger.warning("older checkpoints are not deleted: %s", error)
        return []
    if among is not None:
        saved = [s for s in saved if s.step in among]
    old = expendable(saved, rule)
    return [step for step in old if _delete(directory / f"checkpoint-{step}")]


def saved_in(listing: Listing, verified: Collection[int] = ()) -> list[Saved]:
    """Return the whole checkpoints of a directory, oldest first."""
    return [
        Saved(step, manifest.metrics, verified=step in verified)
        for step in listing.named
        if isinstance(manifest := listing.found(step), layout.Manifest)
    ]


def remove_leftovers(
    directory: Path, in_flight: Collection[Path] = (), listing: Listing | None = None
) -> list[Path]:
    """Remove what killed saves and deletions have left; return what is gone.

    ``in_flight`` are the temporary directories of saves that continue, and ``listing`` is what the
    directory holds, where the caller knows. To be called where no other process saves into
    ``directory``: by a run that saves or that begins to resume.
    """
    listing = listing or Listing(directory)
    gone = []
    for old in listing.set_aside:
        final = directory / old.name.removeprefix(".").removesuffix(".old")
        if (final / MANIFEST).exists():
            gone += [old] * _remove_tree(old)
        else:  # killed between the two renames of `publish_checkpoint`
            with contextlib.suppress(OSError):
                old.rename(final)
    for temporary in listing.temporary:
        if temporary not in in_flight:
            gone += [temporary] * _remove_tree(temporary)
    steps = reversed(listing.named)
    newest = next((s for s in steps if isinstance(listing.found(s), layout.Manifest)), -1)
    for step, path in listing.named.items():
        # Only `_delete` takes manifests away, and never that of the newest.
        if step < newest and not (path / MANIFEST).exists():
            gone += [path] * _remove_tree(path)
    return gone


def _delete(checkpoint: Path) -> bool:
    """Delete a checkpoint; return whether it is gone, by whomever."""
    try:
        # Without its manifest it no longer exists, even if the deletion is cut short. Flushed, so
        # that no crash brings the manifest back and the other files not.
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        flush(checkpoint)
    except FileNotFoundError:
        return True  # another process has deleted it
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", checkpoint, error)
        return False
    return _remove_tree(checkpoint)


def _remove_tree(directory: Path) -> bool:
    """Remove a directory; return whether it is gone.

    Another process may do the same at the same time, so that files vanish under this one; and NFS
    keeps a directory as long as a file in it is open anywhere. What is left goes with a later
    `sweep`.
    """
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()
