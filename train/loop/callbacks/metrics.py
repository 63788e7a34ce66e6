"""metrics.jsonl: one line for each logged step, losses unrounded."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch
from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.loop import stragglers
from shardwright.train.loop.noise_scale import Estimate
from shardwright.train.process.memory import peak_resident_bytes
from shardwright.train.run_directory import rollbacks
from shardwright.train.run_directory.names import HEARTBEATS, METRICS, rank_beat
from shardwright.train.units import counted, duration

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer
    from shardwright.train.model.flops import Cost

logger = logging.getLogger(__name__)

# What the Trainer logs that is written down as it is; its own summary of the whole run is left out.
_KEPT = ("loss", "grad_norm", "learning_rate", "stopped_early", "spike")
_KEPT_BEGINNINGS = ("eval_", "spike_")


class Speed(NamedTuple):
    """What the timed steps of a start took: without its first, evaluations and saves left out."""

    steps: int
    seconds: float
    tokens: int


class Metrics(TrainerCallback):
    """Adds throughput and memory to what the Trainer logs, and writes it down."""

    def __init__(
        self,
        trainer: Trainer,
        cost: Cost | None = None,
        console: TextIO | None = None,
        *,
        sent_bytes: float = 0.0,
    ) -> None:
        """``cost`` makes MFU of the speed, where it is known.

        ``sent_bytes`` is what a rank sends in the collectives of one step, 0 where it sends none.
        """
        self.trainer, self._cost, self._console = trainer, cost, console
        self._sent_bytes = sent_bytes
        self._stragglers = stragglers.Watch(self._host_of)
        self._training_seconds = 0.0
        self._timed_steps = 0
        """Those of the training seconds."""
        self._is_warm = False
        self._began_at = 0.0
        self._whole_seconds = 0.0
        self._whole_tokens = 0
        self._whole_steps = 0
        self.peak_bytes, self.reserved_bytes = 0, 0
        """Of the rank with most, of what has been logged; on a CPU nothing is reserved."""
        self._resumed_at = 0.0
        self._tokens_logged = 0
        self._tokens_before_step = 0
        self._profiled_steps = 0
        self._logged_step = 0

    # Evaluation and saves are left out of the throughput: the clock runs from the end of one
    # interruption to the beginning of the next. So is the first step of each start, in which a
    # model is compiled, libraries choose their kernels and memory is first taken, and so are steps
    # that a profile makes slower, which are counted apart.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens_logged = self._tokens_before_step = self.trainer.tokens_seen
        self._logged_step = self.trainer._globalstep_last_logged
        self._began_at = self._resumed_at = time.monotonic()
        if state.is_world_process_zero:
            for each in rollbacks.untold(self.trainer.run_dir):
                self.write(each.metrics())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if not self._is_warm:
            self._is_warm = True
            self._tokens_logged = self.trainer.tokens_seen
        elif self.trainer.profiler.disturbs(state.global_step):
            self._profiled_steps += 1
            self._tokens_logged += self.trainer.tokens_seen - self._tokens_before_step
        else:
            self._training_seconds += now - self._resumed_at
            self._timed_steps += 1
            self._whole_steps += 1
        self._tokens_before_step = self.trainer.tokens_seen
        self._resumed_at = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resumed_at = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resumed_at = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        taken = {
            key: value
            for key, value in logs.items()
            if key in _KEPT or (key.startswith(_KEPT_BEGINNINGS) and not _is_speed(key))
        }
        if not taken:
            return
        trainer = self.trainer
        if "loss" in taken:
            if tokens := self._count():
                seconds = max(self._training_seconds, 1e-9)
                taken["tokens_per_second"] = tokens / seconds
                if self._sent_bytes:
                    sent = self._sent_bytes * self._timed_steps
                    taken["sent_bytes_per_second"] = sent / seconds
                if self._cost is not None:
                    taken["mfu"] = self._cost.mfu(taken["tokens_per_second"])
            if self._profiled_steps:
                taken["profiled_steps"] = self._profiled_steps
                self._profiled_steps = 0
            memory = self._memory()
            taken |= memory
            self.peak_bytes = memory["peak_memory_bytes"]
            reserved = memory.get("reserved_memory_bytes", 0)
            self.reserved_bytes = max(self.reserved_bytes, reserved)
            if (rate := trainer.masking_rate) is not None:
                taken["masking_rate"] = rate
            if trainer.auxiliary_loss is not None:
                total = trainer.accelerator.reduce(trainer.auxiliary_loss, "sum").item()
                taken["auxiliary_loss"] = total / max(state.global_step - self._logged_step, 1)
                trainer.auxiliary_loss = torch.zeros_like(trainer.auxiliary_loss)
            if trainer.noise_scale is not None:
                taken |= _of_noise(trainer.noise_scale.taken())
            if (times := trainer.step_times.of_ranks) is not None:
                taken.update(stragglers.metrics(times))
                self._say(self._stragglers.look(times))
            self._logged_step = state.global_step
            self._training_seconds = 0.0
            self._timed_steps = 0
        if state.is_world_process_zero:
            # Trackers are called after this one and read the same dictionary.
            logs.update({k: v for k, v in taken.items() if k not in logs})
            self.write(taken)
        # Both are the same on every rank, so all of them look closer.
        if not all(math.isfinite(taken.get(name, 0.0)) for name in ("loss", "grad_norm")):
            trainer.check_finite()

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line for this step."""
        trainer = self.trainer
        line = {
            "step": trainer.state.global_step,
            "samples": trainer.samples_seen,
            "tokens": trainer.tokens_seen,
            "time": time.time(),
            **values,
        }
        # JSON has no NaN.
        finite = {k: None if _is_not_finite(v) else v for k, v in line.items()}
        self._append(json.dumps(finite, allow_nan=False) + "\n")

    def _count(self) -> int:
        """Return the tokens of the seconds counted since the last time, and add up both."""
        tokens = self.trainer.tokens_seen - self._tokens_logged
        self._tokens_logged = self.trainer.tokens_seen
        self._whole_tokens += tokens
        self._whole_seconds += self._training_seconds
        return tokens

    def speed(self) -> Speed:
        """Return what this start has taken so far; to be asked for where a step has been logged."""
        self._count()
        self._training_seconds = 0.0
        self._timed_steps = 0
        return Speed(self._whole_steps, self._whole_seconds, self._whole_tokens)

    def summary(self) -> str | None:
        """Return what this start has trained, in words; None where that was no step."""
        speed = self.speed()
        began = self.trainer.resumed.step if self.trainer.resumed else 0
        steps = self.trainer.state.global_step - began
        if not steps:
            return None
        seconds = time.monotonic() - self._began_at
        text = f"trained {counted(steps, 'step')} in {duration(seconds)}"
        if speed.tokens:
            text += f", {speed.tokens / max(speed.seconds, 1e-9):,.0f} tokens/s while training"
        return text

    def _say(self, warnings: list[str]) -> None:
        for text in warnings if self.trainer.is_world_process_zero() else ():
            logger.warning("%s", text)
            if self._console is not None:
                progress.write(text, self._console)

    def _host_of(self, rank: int) -> str | None:
        """Return the node of a rank, as that has announced itself."""
        try:
            note = json.loads((self.trainer.run_dir / HEARTBEATS / rank_beat(rank)).read_text())
            return str(note["host"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _append(self, line: str) -> None:
        try:
            with (self.trainer.run_dir / METRICS).open("a") as file:
                file.write(line)
        except OSError as error:  # as with checkpoints: a full disk must not end the run
            logger.warning("a line of metrics.jsonl is lost (%s): %s", error, line.rstrip())

    def _memory(self) -> dict[str, int]:
        """Return the most that any rank has: of a GPU's allocator, or on a CPU of the process."""
        device = self.trainer.args.device
        if device.type == "cuda":
            mine = {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "allocated_memory_bytes": torch.cuda.memory_allocated(),
                "reserved_memory_bytes": torch.cuda.memory_reserved(),
            }
        else:
            mine = {"peak_memory_bytes": peak_resident_bytes()}
        of_all = self.trainer.accelerator.gather(torch.tensor([list(mine.values())], device=device))
        return dict(zip(mine, of_all.view(-1, len(mine)).amax(0).tolist(), strict=True))


def _of_noise(found: Estimate | None) -> dict[str, float]:
    """Return what is logged of the gradient noise scale. Pure."""
    if found is None:
        return {}
    measured = {
        "gradient_square_estimate": found.gradient_square,
        "gradient_variance_estimate": found.variance,
    }
    return measured if found.scale is None else {"gradient_noise_scale": found.scale, **measured}


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_speed(key: str) -> bool:
    """Return whether the Trainer adds a metric of its own accord; those of sets have any name."""
    return "/" not in key and key.endswith(_SPEEDS)


_SPEEDS = ("_runtime", "_per_second", "_preparation_time")
