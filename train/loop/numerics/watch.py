"""Watches the numbers of a training: what of each micro-batch is written down, and what ends it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.train.durable import write_text
from shardwright.train.loop.numerics.hooks import Hooks
from shardwright.train.loop.numerics.records import (
    FORWARD,
    Bounds,
    Finding,
    Seen,
    Traced,
    first_bad,
    ranges,
    report,
)
from shardwright.train.run_directory import names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shardwright.train.config.debug import Debug

logger = logging.getLogger(__name__)


class Watch:
    """What one rank watches; inert in steps of which nothing was asked for."""

    def __init__(
        self, debug: Debug, run_dir: Path, rank: int, *, fingerprints_from: int | None = None
    ) -> None:
        """From step ``fingerprints_from`` on all tensors are written down, to be compared."""
        self._debug, self._folder, self._rank = debug, run_dir / names.DIAGNOSIS, rank
        self._fingerprints_from = fingerprints_from
        self._bounds = Bounds(debug.largest_magnitude, debug.smallest_magnitude)
        self._hooks: Hooks | None = None
        self._step = self._micro_batch = 0
        self.finding: Finding | None = None
        """The first that ends the run, on this rank."""

    @property
    def is_needed(self) -> bool:
        """Whether any step is to be looked into."""
        return self._debug.looks_into_modules or self._fingerprints_from is not None

    def attach(self, model: nn.Module) -> None:
        """Place the hooks, once the engine has placed its own."""
        if self.is_needed:
            self._hooks = Hooks(model, fingerprints=self._fingerprints_from is not None)

    @contextmanager
    def micro_batch(self, step: int, loss_scale: float | None = None) -> Iterator[None]:
        """Look into one forward and backward pass, the block's, if this step is to be.

        Where losses are scaled a gradient that is not finite is normal: it is written down, and
        the engine skips the step.
        """
        if step != self._step:
            self._step, self._micro_batch = step, 0
        self._micro_batch += 1
        if self._hooks is None or not self._looks_at(step):
            yield
            return
        self._hooks.begin()
        try:
            yield
        finally:
            seen = self._hooks.end()
        self._judge(seen, loss_scale)

    def saw_loss(self, loss: Tensor) -> None:
        """Take in the loss of the micro-batch that is under way."""
        if self._hooks is not None and self._looks_at(self._step):
            self._hooks.note_loss(loss)

    def _looks_at(self, step: int) -> bool:
        if self._debug.numerics == "watch" or step in self._debug.trace_batches:
            return True
        return self._fingerprints_from is not None and step >= self._fingerprints_from

    def _judge(self, seen: list[Seen], loss_scale: float | None) -> None:
        step, micro_batch, rank = self._step, self._micro_batch, self._rank
        if step in self._debug.trace_batches:
            head = f"step {step:,}, micro-batch {micro_batch} of rank {rank}\n\n"
            self._write(names.trace(step, rank, micro_batch), head + "\n".join(ranges(seen)) + "\n")
        if self._fingerprints_from is not None and step >= self._fingerprints_from:
            self._append(Traced(step, micro_batch, rank, tuple(seen)))
        if self._debug.numerics != "watch" or self.finding is not None:
            return
        assert self._hooks is not None
        finding = first_bad(
            seen, self._bounds, self._hooks.kinds, step=step, micro_batch=micro_batch, rank=rank
        )
        if finding is None:
            return
        finding = replace(finding, report=names.numerics_report(step, rank))
        self._write(finding.report, report(seen, finding, loss_scale))
        self._write(
            names.numerics_finding(step, rank), json.dumps(asdict(finding), indent=2) + "\n"
        )
        logger.warning("%s (%s)", finding.said(), self._folder / finding.report)
        if loss_scale is None or finding.phase == FORWARD:
            self.finding = finding

    def _write(self, name: str, text: str) -> None:
        """Write a file beside the run, which no full disk is to end."""
        try:
            self._folder.mkdir(exist_ok=True)
            write_text(self._folder / name, text)
        except OSError as error:
            logger.warning("%s is not written: %s", self._folder / name, error)

    def _append(self, traced: Traced) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / names.fingerprints(self._rank)).open("a") as file:
            file.write(json.dumps(traced.as_tree()) + "\n")
