"""DeepSpeed's AdamW of what it keeps in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer


def deepspeed_cpu_adam(
    groups: list[dict[str, Any]], *, moments_dtype: str, **settings: Any
) -> Optimizer:
    """Return DeepSpeed's vectorised AdamW for host memory, compiled where it is not yet.

    Raises UserError where that fails.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from shardwright.train.strategy.zero.operators import ready_to_build

    ready_to_build("cpu_adam")
    try:
        return DeepSpeedCPUAdam(
            groups, fp32_optimizer_states=moments_dtype == "fp32", adamw_mode=True, **settings
        )
    except RuntimeError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(
            f"strategy.cpu_adam=deepspeed cannot be compiled here ({reason}); install a C++ "
            "compiler and ninja, or set strategy.cpu_adam=torch"
        ) from error
