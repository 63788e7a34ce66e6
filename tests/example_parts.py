"""Parts of a user's own: what tests name by this file's path. No test module, and no package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class SignMomentum(torch.optim.Optimizer):
    """Moves by the sign of a mean gradient, each element by itself."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["step"] = torch.tensor(0.0)
                state["step"] += 1
                state["mean"].lerp_(parameter.grad.to(parameter.dtype), 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(state["mean"].sign(), alpha=-group["lr"])


class NormedMomentum(SignMomentum):
    """Moves each tensor by its own norm, which takes the whole of it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad.to(parameter.dtype), 1 - group["beta"])
                size = parameter.norm() / (state["mean"].norm() + 1e-8)
                parameter.sub_(group["lr"] * size * state["mean"])


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the focal loss of each position."""
    log_p = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy, as it is without a function of one's own."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


class Counting(TrainerCallback):
    """Counts steps, over resumes too."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        path = Path(args.output_dir, f"counted-{args.process_index}.txt")
        path.write_text(f"{self.steps}")

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class Exported(TrainerCallback, ExportableState):
    """Counts logs, as transformers has a state exported."""

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.logs = first

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"first": self.first}, "attributes": {"logs": self.logs}}


class Failing(TrainerCallback):
    """Fails in its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise ValueError("no such luck")


class StopsAtTwo(TrainerCallback):
    """Stops the training where nothing else ends it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


class Misspelt(TrainerCallback):
    """Hopes for an event that there is not."""

    def on_steps_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise AssertionError("never called")


class Demanding(TrainerCallback):
    """Cannot be made without an argument."""

    def __init__(self, needed: int) -> None:
        self.needed = needed


def documents(count: int = 300, failing_at: int | None = None) -> Iterator[Any]:
    """Yield texts, and mappings with one."""
    print("this is no document")
    for number in range(count):
        if number == failing_at:
            raise ValueError("no more")
        text = f"Document {number} says: " + " ".join(
            f"word{number % 7} {number * k}" for k in range(40)
        )
        yield {"text": text, "number": number} if number % 2 else text
