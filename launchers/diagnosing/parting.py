"""Where two runs part: the first step by what they logged, the first module by making it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from shardwright.launchers.diagnosing import lineage
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import RunConfig
from shardwright.train.config.tree import leaves
from shardwright.train.loop.numerics.records import Place
from shardwright.train.run_directory import history, names

FIGURES = ("samples", "tokens", "loss", "grad_norm", "learning_rate", "auxiliary_loss")
"""What a step gives that depends on nothing but its arithmetic, besides what begins so:"""
FAMILIES = ("eval_", "weight_norm", "gradient_norm", "update_norm", "gradient_zeros")
ELSEWHERE = ("run_dir", "sweep_dir", "tracking", "checkpoint", "launcher", "trainer.debug")
"""Settings that have no part in the arithmetic, or only by the number of ranks."""
MOST_SETTINGS = 6


# --- by what they have logged ---------------------------------------------------------------------


@dataclass(frozen=True)
class FirstStep:
    """The first step of which two runs have logged different figures."""

    step: int
    figure: str
    values: tuple[Any, Any]
    agreed: int
    """How many steps before it both have logged alike."""


def figures(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return what each logged step of a run has given, by step."""
    path, found = run_dir / names.METRICS, dict[int, dict[str, Any]]()
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            of_step = found.setdefault(int(entry["step"]), {})
        except (ValueError, KeyError, TypeError):
            continue
        of_step |= {k: v for k, v in entry.items() if k in FIGURES or k.startswith(FAMILIES)}
    return found


def first_step(
    a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]
) -> FirstStep | None:
    """Return the first step whose figures differ in any bit; None where none does. Pure."""
    common = sorted(a.keys() & b.keys())
    for agreed, step in enumerate(common):
        for figure, value in a[step].items():
            if figure in b[step] and b[step][figure] != value:
                return FirstStep(step, figure, (value, b[step][figure]), agreed)
    return None


def settings(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the settings in which two runs differ and that may part them. Pure."""
    old, new = leaves(a.model_dump(mode="json")), leaves(b.model_dump(mode="json"))
    differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [
        f"{key} ({old.get(key)} and {new.get(key)})"
        for key in differ
        if not any(key == each or key.startswith(f"{each}.") for each in ELSEWHERE)
    ]


def beginning(runs: Sequence[Path], step: int) -> int:
    """Return the newest step before one at which both runs have saved the same bits, or 0.

    Of a checkpoint the hashes of the engine's own files are compared, and nothing is read.
    """
    states: list[dict[int, dict[str, Any]]] = []
    least = 0
    for run_dir in runs:
        saved = dict(layout.whole_checkpoints(run_dir / names.CHECKPOINTS))
        parts = lineage.segments(history.read(run_dir))
        least = max(least, lineage.in_force(parts, step).after)
        states.append({each: _engine_files(path) for each, path in saved.items() if each < step})
    first, second = states
    same = [each for each in first.keys() & second.keys() if first[each] == second[each]]
    return max((each for each in same if each >= least), default=0)


def _engine_files(checkpoint: Path) -> dict[str, Any]:
    files = layout.read_manifest(checkpoint).files
    within = f"{names.ENGINE_FOLDER}/"
    return {name: entry for name, entry in files.items() if name.startswith(within)}


# --- by what their modules give -------------------------------------------------------------------


@dataclass(frozen=True)
class FirstTensor:
    """The first tensor that is not the same in two replays."""

    step: int
    micro_batch: int
    rank: int
    number: int
    """Among those of the micro-batch."""
    place: Place | None
    """None where one run has tensors that the other has not."""

    def said(self, first: int) -> str:
        """Return it in a sentence, of replays that began behind step ``first``."""
        where = f"on rank {self.rank}, in micro-batch {self.micro_batch} of step {self.step:,}"
        if self.place is None:
            return f"Their modules are not called alike, {where}: the models are not the same."
        place = self.place
        module = place.module if place.is_made_there else place.caller
        kind = f" ({place.kind})" if place.is_made_there and place.kind else ""
        what = place.what if place.is_made_there else f"{place.what} of {place.module}"
        text = (
            f"They part in the {place.phase} pass of {module or 'the model itself'}{kind}, "
            f"{where}: the {what} is the first tensor that is not the same, bit for bit."
        )
        if place.phase == "forward" and self.step > first + 1:
            text += (
                f" All that modules gave up to step {self.step - 1:,} is the same, gradients "
                f"included: if this module computes alike, the update of step "
                f"{self.step - 1:,} was another (rate, reduction, optimizer)."
            )
        elif place.phase == "forward" and self.number == 0:
            text += " It is the first of all: the data differ, or the weights that they began with."
        return text


def first_tensor(a: Path, b: Path) -> FirstTensor | None:
    """Return where two replays part, of all ranks the earliest; None where they do not."""
    found: list[FirstTensor] = []
    for path in (a / names.DIAGNOSIS).glob(names.fingerprints_of_all()):
        with path.open() as ours, (b / names.DIAGNOSIS / path.name).open() as theirs:
            found += _first(ours, theirs)
    return min(found, key=lambda f: (f.step, f.micro_batch, f.number, f.rank), default=None)


def _first(ours: Iterator[str], theirs: Iterator[str]) -> list[FirstTensor]:
    """Return where one rank's lines part, in a list of one; an empty one where they do not."""
    for line, other in zip(ours, theirs, strict=False):  # one may have ended before
        a, b = json.loads(line), json.loads(other)
        place = a["step"], a["micro_batch"], a["rank"]
        for number, (mine, its) in enumerate(zip_longest(a["tensors"], b["tensors"])):
            if mine is None or its is None or mine[:6] != its[:6]:
                return [FirstTensor(*place, number, None)]
            if mine[-1] != its[-1]:
                return [FirstTensor(*place, number, Place(*mine[:6]))]
    return []
