"""The scale of fp16's losses, whoever keeps it: torch or DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from shardwright.train.strategy.training import Training


SMALLEST_LOSS_SCALE = 1.0
"""Below it losses would be made smaller, when it is there to keep gradients from vanishing."""


def keep_beside_gradients(scaler: torch.amp.GradScaler | None, device: torch.device) -> None:
    """Have torch's loss scale lie on ``device``, where the gradients of the optimizer are.

    Else it lies where the loss is, and of gradients in host memory torch would ask by copies for
    which nothing waits (2.13, amp/grad_scaler.py, _MultiDeviceReplicator): an overflow could be
    seen too late, and gradients be divided by what is not there yet.
    """
    if scaler is not None and scaler.is_enabled():
        scaler._lazy_init_scale_growth_tracker(device)


def loss_scaling(scaler: torch.amp.GradScaler | None) -> dict[str, Any]:
    """Return the facts of torch's loss scaling, None where losses are not scaled."""
    if scaler is None or not scaler.is_enabled():
        return {"initial_loss_scale": None, "loss_scale_growth_steps": None}
    return {
        "initial_loss_scale": scaler.get_scale(),
        "loss_scale_growth_steps": scaler.get_growth_interval(),
    }


def loss_scale_state(trainer: Training) -> dict[str, float]:
    """Return the loss scale and for how many steps it has stood; nothing where none is scaled."""
    if not trainer.config.precision.computes_in.scales_losses:
        return {}
    if (scaler := trainer.accelerator.scaler) is not None:
        state = scaler.state_dict()
        return {"scale": state["scale"], "stable_steps": state["_growth_tracker"]}
    own = _deepspeeds_scaler(trainer)
    return {"scale": float(own.cur_scale), "stable_steps": own.cur_iter - own.last_overflow_iter}


def loss_scale_is_exhausted(trainer: Training) -> Any:
    """Return whether one more overflow leaves no smaller loss scale; None where none is scaled.

    To be asked before torch's scaler is updated by a step, and after DeepSpeed's is.
    """
    if not trainer.config.precision.computes_in.scales_losses:
        return None
    if (scaler := trainer.accelerator.scaler) is not None:
        return scaler._get_scale_async() * scaler.get_backoff_factor() <= SMALLEST_LOSS_SCALE
    own = _deepspeeds_scaler(trainer)
    smallest = getattr(own, "min_scale", None) or getattr(own, "min_loss_scale", None) or 0
    return own.cur_scale <= max(SMALLEST_LOSS_SCALE, smallest)


def restore_loss_scale(trainer: Training, state: dict[str, float]) -> None:
    """Restore the loss scale from what `loss_scale_state` returned."""
    if not (state and trainer.config.precision.computes_in.scales_losses):
        return
    stable = int(state["stable_steps"])
    if (scaler := trainer.accelerator.scaler) is not None:
        tracker = stable % trainer.config.precision.loss_scale_growth_steps
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": tracker}
        )
        return
    own = _deepspeeds_scaler(trainer)
    own.cur_scale = state["scale"]
    own.cur_iter, own.last_overflow_iter = stable - 1, -1


def _deepspeeds_scaler(trainer: Training) -> Any:
    # Stage 0 keeps it in a class of its own (deepspeed 0.19 runtime/fp16/unfused_optimizer.py).
    optimizer = trainer.model_wrapped.optimizer
    return getattr(optimizer, "loss_scale_config", None) or optimizer.loss_scaler
