"""What every engine shares and must be as asked for: batch, clip, optimizer, schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, Schedule, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from train.strategy.training import Training

SMALLEST_LOSS_SCALE = 1.0
"""Below it losses would be made smaller, when it is there to keep gradients from vanishing."""

# Our names of the schedules, and those of transformers.
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "warmup_stable_decay": "warmup_stable_decay",
    "inverse_sqrt": "inverse_sqrt",
}


def expected(config: RunConfig, world_size: int, schedule: Schedule) -> dict[str, Any]:
    """Return the facts that `read_back` must find. Pure."""
    trainer = config.trainer
    return {
        "global_batch_size": trainer.global_batch_size,
        "micro_batch_size": trainer.samples_per_pass,
        "accumulation_steps": accumulation_steps(trainer, world_size),
        "clip": trainer.max_grad_norm,
        "optimizer": _expected_optimizer(config),
        "schedule": _facts_of(schedule),
        **_recomputed(config),
        **_blocks_run_as(config),
        **_numerics(config),
    }


def read_back(trainer: Training) -> dict[str, Any]:
    """Return facts read off the live loop."""
    import torch

    from train import activation_checkpointing, fp8

    args = trainer.args
    return {
        "global_batch_size": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        "micro_batch_size": args.per_device_train_batch_size,
        "accumulation_steps": args.gradient_accumulation_steps,
        "clip": args.max_grad_norm,
        "optimizer": _optimizer(trainer),
        "schedule": _facts_of(_live_schedule(trainer)),
        **activation_checkpointing.read_back(trainer.model),
        **_how_blocks_run(trainer),
        **fp8.read_back(trainer.model),
        # Not allow_tf32, which raises where transformers has set this newer name.
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
    }


# What each algorithm's parameter groups hold, by torch's names and by ours.
_HYPER_PARAMETERS = {
    "adamw": {"initial_lr": "peak_learning_rate", "betas": "betas", "eps": "epsilon"},
    "adafactor": {
        "initial_lr": "peak_learning_rate",
        "beta2_decay": "beta2_decay",
        "d": "clip_threshold",
        "eps": "epsilons",
    },
    "muon": {
        "initial_lr": "peak_learning_rate",
        "momentum": "momentum",
        "nesterov": "nesterov",
        "ns_steps": "newton_schulz_steps",
        "adjust_lr_fn": "learning_rate_scale",
    },
}


def _expected_optimizer(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    peak = _seven_digits(trainer.learning_rate)
    adamw = {
        "peak_learning_rate": peak,
        "betas": [trainer.adam_beta1, trainer.adam_beta2],
        "epsilon": trainer.adam_epsilon,
    }
    adafactor = {
        "peak_learning_rate": peak,
        "beta2_decay": trainer.adafactor_beta2_decay,
        "clip_threshold": trainer.adafactor_clip_threshold,
        "epsilons": [trainer.adafactor_epsilon1, trainer.adafactor_epsilon2],
    }
    muon = {
        "peak_learning_rate": _seven_digits(trainer.muon_learning_rate or trainer.learning_rate),
        "momentum": trainer.muon_momentum,
        "nesterov": True,
        "newton_schulz_steps": trainer.muon_newton_schulz_steps,
        "learning_rate_scale": trainer.muon_learning_rate_scale,
    }
    named = {
        "adamw": (
            "DeepSpeedCPUAdam" if config.strategy.has_own_adam else "AdamW",
            {"adamw": adamw},
        ),
        "adamw_8bit": ("AdamW8bit", {"adamw": adamw}),
        "adafactor": ("Adafactor", {"adafactor": adafactor}),
        "muon": ("MuonWithAdamW", {"muon": muon, "adamw": adamw}),
    }
    class_name, algorithms = named[trainer.optimizer]
    decays = sorted({trainer.weight_decay, 0.0})
    return {"class": class_name, "weight_decays": decays, "algorithms": algorithms}


def _optimizer(trainer: Training) -> dict[str, Any]:
    groups = trainer.torch_optimizer().param_groups
    class_name = type(trainer.innermost_optimizer()).__name__
    only = "adafactor" if class_name == "Adafactor" else "adamw"
    algorithms: dict[str, dict[str, Any]] = {}
    for group in groups:
        algorithm = group.get("algorithm", only)
        for key, name in _HYPER_PARAMETERS[algorithm].items():
            value: Any = group.get(key)
            if key == "initial_lr":
                value = _seven_digits(float(value))
            value = list(value) if isinstance(value, tuple) else value
            known = algorithms.setdefault(algorithm, {}).setdefault(name, value)
            if known != value:
                algorithms[algorithm][name] = f"{known} and {value}"
    return {
        "class": class_name,
        "weight_decays": sorted({g["weight_decay"] for g in groups} | {0.0}),
        "algorithms": algorithms,
    }


def _seven_digits(value: float) -> float:
    # torchao keeps the rate in an fp32 tensor.
    return float(f"{value:.7g}")


def _recomputed(config: RunConfig) -> dict[str, Any]:
    every_blocks = config.trainer.checkpoint_activations_every_blocks
    facts: dict[str, Any] = {
        "checkpoint_activations_every_blocks": every_blocks,
        "offload_activations": config.trainer.offload_activations,
    }
    # Pretrained weights bring their number of blocks along.
    if (layers := getattr(config.model, "num_hidden_layers", None)) is not None:
        facts["recomputed_blocks"] = 0 if every_blocks is None else math.ceil(layers / every_blocks)
    return facts


def _blocks_run_as(config: RunConfig) -> dict[str, Any]:
    compiles = config.trainer.compile
    facts: dict[str, Any] = {"compile": compiles, "compiled_otherwise": []}
    if config.model.attention != "auto":
        facts["attention"] = config.model.attention
    if (layers := getattr(config.model, "num_hidden_layers", None)) is not None:
        facts["compiled_blocks"] = layers if compiles else 0
    return facts


def _how_blocks_run(trainer: Training) -> dict[str, Any]:
    """Return by which attention it runs, and which of its modules torch.compile has got hold of."""
    # `Module.compile` leaves this; `torch.compile` wraps, as accelerate does of its own accord.
    compiled = {
        id(module): module
        for module in trainer.model_wrapped.modules()
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    }
    blocks = [compiled.pop(id(b)) for b in _blocks(trainer.model) if id(b) in compiled]
    return {
        "attention": trainer.model.config._attn_implementation,
        "compile": bool(blocks),
        "compiled_blocks": len(blocks),
        "compiled_otherwise": sorted({type(module).__name__ for module in compiled.values()}),
    }


def _blocks(model: Any) -> list[Any]:
    from train.errors import UserError
    from train.models import blocks

    try:
        return blocks(model)
    except UserError:  # it has none, and whatever is compiled is not one
        return []


def _numerics(config: RunConfig) -> dict[str, Any]:
    precision = config.precision
    recipe = precision.fp8_recipe
    facts: dict[str, Any] = {
        "precision": {
            "compute": precision.compute_dtype,
            "reduction": "none" if config.strategy.kind == "single" else precision.reduce_dtype,
            "master": precision.master_dtype,
            "moments": "8-bit"
            if config.trainer.optimizer == "adamw_8bit"
            else precision.moments_dtype,
        },
        "tf32": precision.allow_tf32 and config.launcher.device == "cuda",
        "fp8_recipe": recipe,
        "loss_scale_growth_steps": None,
        "initial_loss_scale": None,
    }
    if recipe is not None:
        facts["fp8_layers_missed"] = 0
    if precision.compute_dtype == "fp16":
        facts["loss_scale_growth_steps"] = precision.loss_scale_growth_steps
        facts["initial_loss_scale"] = precision.initial_loss_scale
    return facts


_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def in_words(dtypes: Iterable[Any]) -> str:
    """Return torch dtypes by our names, several joined by "+". Pure."""
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    return "+".join(_DTYPES.get(name, name) for name in names)


def moments_dtypes(optimizer: torch.optim.Optimizer, masters: Iterable[Any]) -> set[Any]:
    """Return the dtypes of the optimizer's running averages.

    Before the first step there may be none yet; they will take those of the master weights.
    torchao's 8-bit ones are tensors of a class of their own.
    """
    if type(optimizer).__name__ == "AdamW8bit":
        return {"8-bit"}
    averages = {
        value.dtype
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "dtype") and value.ndim > 0
    }
    return averages or set(masters)


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
    if trainer.config.precision.compute_dtype != "fp16":
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
    if trainer.config.precision.compute_dtype != "fp16":
        return None
    if (scaler := trainer.accelerator.scaler) is not None:
        return scaler._get_scale_async() * scaler.get_backoff_factor() <= SMALLEST_LOSS_SCALE
    own = _deepspeeds_scaler(trainer)
    smallest = getattr(own, "min_scale", None) or getattr(own, "min_loss_scale", None) or 0
    return own.cur_scale <= max(SMALLEST_LOSS_SCALE, smallest)


def restore_loss_scale(trainer: Training, state: dict[str, float]) -> None:
    """Let the loss scale go on from what `loss_scale_state` returned."""
    if not state or trainer.config.precision.compute_dtype != "fp16":
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


def _live_schedule(trainer: Training) -> Schedule:
    scheduler: Any = trainer.lr_scheduler
    found: Schedule = scheduler.lr_lambdas[0]
    return found


def _facts_of(schedule: Schedule) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": SCHEDULES[schedule.name],
        "num_warmup_steps": schedule.warmup_steps,
    }
    if schedule.name in ("linear", "cosine"):
        facts["num_training_steps"] = schedule.total_steps
    if schedule.name == "warmup_stable_decay":
        facts["num_decay_steps"] = schedule.decay_steps
    if schedule.by_samples:
        facts["samples_per_step"] = schedule.samples_per_step
    return facts
