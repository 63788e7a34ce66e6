"""The gradient noise scale: how large a batch is worth its samples (arXiv 1812.06162, appendix A).

From the squared norms of gradients of two sizes of batch follow, without bias, the square of the
true gradient and the trace of a sample's covariance; their quotient is the "simple" noise scale, in
samples. The large batch is that of a step, the small one a part of it: under DDP what a rank adds,
else the first of the step's micro-batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from shardwright.train.config import accumulation_steps
from shardwright.train.process.doubles import device_of_sums, doubled

if TYPE_CHECKING:
    from shardwright.train.strategy.training import Training


class Estimate(NamedTuple):
    """The means over some steps."""

    gradient_square: float
    """Of the true gradient's norm; noise can make it negative."""
    variance: float
    """The trace of the covariance of one sample's gradient."""

    @property
    def scale(self) -> float | None:
        """The noise scale in samples; None where noise hides the gradient."""
        return self.variance / self.gradient_square if self.gradient_square > 0 else None


def estimated(
    small: float, large: float, small_by_batch: float, large_by_batch: float, *, parts: int
) -> Estimate:
    """Return the estimate from means over steps of squared norms, and of those times the batch.

    The small batch is the large one divided by ``parts``. Pure.
    """
    return Estimate(
        (parts * large - small) / (parts - 1), (small_by_batch - large_by_batch) / (parts - 1)
    )


class NoiseScale:
    """Adds up squared norms on the device; ranks meet for them where a step is logged."""

    def __init__(self, trainer: Training) -> None:
        strategy, layout = trainer.config.strategy, trainer.layout
        self._is_of_ranks = strategy.kind == "ddp"
        accumulated = accumulation_steps(trainer.config.trainer, layout)
        self.parts = trainer.args.world_size if self._is_of_ranks else accumulated
        """Into how many the batch of a step is divided for the small one."""
        # Under DDP each rank has a small batch of its own; elsewhere all have one together.
        self._holders = trainer.args.world_size if self._is_of_ranks else 1
        device = device_of_sums(trainer.args.device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._small = torch.zeros((), dtype=torch.float64, device=device)
        """Of this step, this rank's part."""
        self._steps = 0

    @property
    def sees_buckets(self) -> bool:
        """Whether the small batch is what a rank hands to be reduced."""
        return self._is_of_ranks

    def add_local(self, gradients: torch.Tensor) -> None:
        """Take in some of this rank's gradients, before they are averaged over the ranks."""
        self._small += _square(gradients)

    def micro_batch_ends(self, parameters: list[torch.nn.Parameter]) -> None:
        """Take in the gradients of a step's first micro-batch, once it alone has added to them.

        Each is divided by the labels of the whole step.
        """
        for parameter in parameters:
            gradient: Any = parameter.grad
            if gradient is not None:
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                self._small += _square(local) * self.parts**2

    def step_ends(self, norm: torch.Tensor | float, batch: int) -> None:
        """Take in the norm of a whole step's gradient, and its number of samples.

        A step whose gradients are not finite counts as one of nothing.
        """
        large = doubled(torch.as_tensor(norm).detach()).to(self._sums.device).square()
        small = self._small.clone()
        # What ranks share, each brings its part of.
        mine = large * self._holders / _ranks()
        found = torch.stack([small, mine, small * batch, mine * batch])
        self._sums += torch.where(large.isfinite(), found, 0.0)
        self._small.zero_()
        self._steps += 1

    def taken(self) -> Estimate | None:
        """Return the estimate over the steps since the last time, None without any. Collective."""
        if not self._steps:
            return None
        if _ranks() > 1:
            dist.all_reduce(self._sums)
        means = (self._sums / (self._steps * self._holders)).tolist()
        self._sums, self._steps = torch.zeros_like(self._sums), 0
        return estimated(*means, parts=self.parts)


def _square(values: torch.Tensor) -> torch.Tensor:
    return doubled(torch.linalg.vector_norm(values.detach(), dtype=torch.float32)).square()


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
