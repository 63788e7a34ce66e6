"""No step whose loss or gradient norm is not finite reaches the weights, and no weights a save."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Numbers(NamedTuple):
    """What was seen of one step, by one rank."""

    step: int
    loss: float
    norm: float

    @property
    def not_finite(self) -> list[int]:
        """How many of loss and norm are not."""
        return [int(not math.isfinite(self.loss)), int(not math.isfinite(self.norm))]


class Travelling:
    """The numbers of a step on their way from the device to the host."""

    def __init__(self, step: int, numbers: Tensor, into: Tensor | None) -> None:
        self._step, self._numbers, self._arrived = step, numbers, None
        if into is not None:
            self._numbers = into.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrived(self) -> Numbers:
        if self._arrived is not None:
            self._arrived.synchronize()
        return Numbers(self._step, *self._numbers.tolist())


class Judge(Protocol):
    """What may close the gate in a step whose numbers are finite."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor | None:
        """Return on the device whether to close it, from this rank's loss; None: it never does."""

    def conclude(self, step: int) -> None:
        """Take a step as done."""


class Gate:
    """Judges each step on the device; nothing waits there for its verdict.

    It lets the optimizer step or not, and travels to the host with the next numbers that the ranks
    add up anyway: those of a later step's labels. A loss of one rank that is not finite reaches
    the others through its gradients (`poisoned`).
    """

    def __init__(self, device: torch.device, spikes: Judge | None = None) -> None:
        """``spikes`` may close the gate in a step that is finite, too."""
        self._spikes = spikes
        self.is_closed = torch.zeros((), device=device)
        """1 where this step must not reach the weights, else 0, as torch's optimizers take it."""
        self._loss = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        self._concluded: deque[Travelling] = deque(maxlen=2)
        self._on_host: Tensor | None = None
        """Where the numbers of two steps arrive, in memory into which a GPU copies by itself."""
        if device.type == "cuda":
            self._on_host = torch.zeros(2, 2, pin_memory=True)

    def guard(
        self, optimizer: torch.optim.Optimizer, device: torch.device | str | None = None
    ) -> None:
        """Have an optimizer leave the weights alone in a step that `judge` has found bad.

        ``device`` is where it works, unless its parameters say so.
        """
        # There, be that host memory: torch would copy it there without waiting for it (2.13
        # optim/adam.py, _fused_adam).
        self.is_closed = self.is_closed.to(device or optimizer.param_groups[0]["params"][0].device)
        if getattr(optimizer, "_step_supports_amp_scaling", False) or hasattr(
            optimizer, "found_inf"
        ):
            # torch's fused kernels read it on the device; it is how GradScaler skips their steps.
            optimizer.found_inf = self.is_closed  # type: ignore[attr-defined]
            return
        step = optimizer.step

        def guarded(*arguments: Any, **options: Any) -> Any:
            # The arithmetic of Adafactor and of 8-bit AdamW has no such switch: the host decides.
            return None if self.is_closed else step(*arguments, **options)

        optimizer.step = guarded  # type: ignore[method-assign]

    def guard_scaled(self, prepared: Any, scaler: torch.amp.GradScaler) -> None:
        """Have accelerate's wrapper leave out what torch's loss scaler would let through.

        The host decides: of the scaler's own verdict the scale would shrink.
        """
        step = prepared.step

        def guarded(*arguments: Any, **options: Any) -> Any:
            if not self.is_closed:
                return step(*arguments, **options)
            prepared._opt_called = True  # as the scheduler's own wrapper notes
            return scaler.update()

        guarded._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        prepared.step = guarded

    def begin(self) -> None:
        """Forget the step before."""
        self._loss.zero_()

    def add_loss(self, loss: Tensor) -> None:
        """Take in this rank's loss of one micro-batch."""
        self._loss += loss.detach()

    def judge(self, norm: Tensor | float, *, is_bad: Tensor | bool | None = None) -> None:
        """Take in the norm of the reduced gradients, before the optimizer steps.

        ``is_bad`` is given where losses are scaled: there a norm that is not finite is normal, and
        the engine skips the step.
        """
        norm = torch.as_tensor(norm, dtype=torch.float32).detach()
        spikes = self._spikes.judge(self._loss, norm) if self._spikes is not None else None
        if is_bad is not None:
            norm = torch.where(torch.as_tensor(is_bad, device=norm.device), norm, 0.0)
        self._norm.copy_(norm)
        is_closed = ~norm.isfinite()
        self.is_closed.copy_(is_closed if spikes is None else is_closed.to(spikes.device) | spikes)

    def conclude(self, step: int) -> None:
        """Take this step as done; have its numbers travel to the host."""
        numbers = torch.stack([self._loss, self._norm])
        # By turns, as a copy may still be on its way into one of them.
        into = self._on_host[step % 2] if self._on_host is not None else None
        self._concluded.append(Travelling(step, numbers, into))
        if self._spikes is not None:
            self._spikes.conclude(step)

    def newest_known(self) -> Numbers | None:
        """Return the numbers of the newest step that can be had while the device has work left.

        On a GPU that is the step before the one just launched.
        """
        is_ahead = self._on_host is not None
        if len(self._concluded) <= is_ahead:
            return None
        return self._concluded[-1 - is_ahead].arrived()

    def last(self) -> list[Numbers]:
        """Return the numbers of the last two steps, oldest first; waits for the device."""
        return [numbers.arrived() for numbers in self._concluded]


def poisoned(loss: Tensor) -> Tensor:
    """Return a loss as it is, whose gradients are NaN where it is not finite.

    An infinite loss can have finite gradients, and one rank's gradients are the only thing that all
    ranks learn of before they step.
    """
    if loss.requires_grad:
        factor = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        loss.register_hook(lambda gradient: gradient * factor)
    return loss


def are_sound(tensors: Iterable[Tensor], device: torch.device, largest_allowed: float) -> Tensor:
    """Return on ``device`` whether every element is a number of at most that magnitude.

    Keeps nothing of the tensors' size.
    """
    largest = [
        # The largest magnitude is NaN or infinite if any is, and takes no copy of the tensor.
        torch.linalg.vector_norm(tensor.detach().flatten(), math.inf).float().to(device)
        for tensor in tensors
        if tensor.numel()
    ]
    if not largest:
        return torch.tensor(True, device=device)
    return (torch.stack(largest) <= largest_allowed).all()  # which NaN is not
