"""DeepSpeed's JSON becomes overrides of a run. Pure.

What a key is called here says the passthrough's own list of keys, `rules/deepspeed_keys.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from shardwright.launchers.translating.translation import Translation, is_on
from shardwright.train.config import OPTIMIZERS
from shardwright.train.config.elsewhere.deepspeed_json import DEEPSPEED_JSON
from shardwright.train.config.rules import deepspeed_keys
from shardwright.train.config.rules.deepspeed_keys import FREE, OWNED, REFUSED
from shardwright.train.config.rules.unread import STAGES

_AUTO = "auto is filled by the run's own values, here"
_A_FIELD = re.compile(r"(strategy|trainer|precision)\.[a-z0-9_]+")
_AT_STAGE_3 = re.compile(r"zero_optimization\.(stage3_.*|zero_(hpz|quantized)_.*|offload_param)")


def translate(tree: Mapping[str, Any], ranks: int | None = None) -> Translation:
    """Return what becomes of each key. ``ranks`` are those of the run, where anybody says."""
    found = Translation()
    zero = tree.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    _strategy(found, zero, stage)
    _batch(found, tree, ranks)
    _precision(found, tree)
    for key, value in tree.items():
        if key in _DONE:
            continue
        if (handler := _SECTIONS.get(key)) is not None and isinstance(value, Mapping):
            handler(found, key, value)
        else:
            _leaf(found, key, value, FREE, stage)
    return found


def _strategy(found: Translation, zero: Any, stage: Any) -> None:
    if not isinstance(zero, Mapping):
        found.sets("zero_optimization", zero, f"strategy=zero{1 if zero else 0}")
        return
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        found.refuses("zero_optimization.stage", stage, "there are the stages 0 to 3")
        return
    found.sets("zero_optimization.stage", stage, f"strategy=zero{stage}")
    for key, value in zero.items():
        if key != "stage":
            _leaf(found, f"zero_optimization.{key}", value, FREE["zero_optimization"], stage)


def _leaf(
    found: Translation, path: str, value: Any, known: Mapping[str, Any], stage: int = 0
) -> None:
    """Note a key that is read by itself, or a section of such keys."""
    name = path.rpartition(".")[2]
    if path in _OFFLOADS and isinstance(value, Mapping) and (stage == 3 or "param" not in path):
        _offload(found, path, value)
    elif _AT_STAGE_3.fullmatch(path) and stage != 3:
        found.ignores(path, value, f"read at stage 3 alone, and this is {stage}")
    elif path == "zero_optimization.round_robin_gradients" and stage not in (1, 2):
        found.ignores(path, value, f"read at stages 1 and 2 alone, and this is {stage}")
    elif path in REFUSED:
        _refused(found, path, value)
    elif value == "auto":
        found.ignores(path, value, f"{_AUTO} {OWNED.get(path, 'of no field')}")
    elif path in _CPU_OFFLOAD:
        _cpu_offload(found, path, value)
    elif path in _OF_NO_FIELD:
        found.ignores(path, value, _OF_NO_FIELD[path])
    elif path in _FLAGS:
        word = _FLAGS[path]
        found.sets(path, value, word) if value else found.ignores(path, value, "off")
    elif stage not in STAGES.get(OWNED.get(path, ""), (stage,)):
        *first, last = map(str, STAGES[OWNED[path]])
        reading = f"stages {', '.join(first)} and {last}" if first else f"stage {last}"
        found.ignores(path, value, f"read at {reading} alone, and this is {stage}")
    elif (field := OWNED.get(path)) is not None and _A_FIELD.fullmatch(field):
        found.sets(path, value, **{field.replace(".", "__"): _as_the_field_has_it(path, value)})
    elif isinstance(kind := known.get(name), dict) and isinstance(value, Mapping):
        for inner, each in value.items():
            _leaf(found, f"{path}.{inner}", each, kind)
    elif name in known:
        _extra(found, path, value)
    elif path in OWNED:
        found.refuses(path, value, f"this value has no translation; set {OWNED[path]}")
    else:
        row = DEEPSPEED_JSON.get(path)
        found.by_row(path, value, row, "DeepSpeed has no such key and would ignore it")


def _as_the_field_has_it(path: str, value: Any) -> Any:
    """Return a number as its field's type: sizes are often written 1e9, norms 1."""
    if path == "gradient_clipping" and _is_number(value):
        return float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _extra(found: Translation, path: str, value: Any) -> None:
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    if problems := list(deepspeed_keys.problems(nested)):
        found.refuses(path, value, problems[0].partition(": ")[2] or problems[0])
    else:
        found.extra(path, value)


def _refused(found: Translation, path: str, value: Any) -> None:
    if is_on(value) and not (path.endswith("ratio") and value == 1.0):
        found.refuses(path, value, f"it {REFUSED[path]}")
    else:
        found.ignores(path, value, "off")


# --- ZeRO -----------------------------------------------------------------------------------------

_OFFLOADS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_OFFLOADED = {
    "offload_optimizer": {
        "device": "strategy.offload_optimizer",
        "pin_memory": "strategy.pin_memory",
        "nvme_path": "strategy.nvme_path",
    },
    "offload_param": {
        "device": "strategy.offload_parameters",
        "pin_memory": "strategy.pin_memory",
        "nvme_path": "strategy.nvme_path",
        "buffer_count": "strategy.nvme_buffer_count",
        "buffer_size": "strategy.nvme_buffer_elements",
        "max_in_cpu": "strategy.max_elements_in_cpu",
    },
}


def _offload(found: Translation, path: str, section: Mapping[str, Any]) -> None:
    device = section.get("device", "none") or "none"
    fields = _OFFLOADED[path.partition(".")[2]]
    if "device" not in section:
        found.ignores(path, dict(section), "without a device nothing is offloaded")
        return
    for key, value in section.items():
        name = f"{path}.{key}"
        if name in REFUSED:
            _refused(found, name, value)
        elif key == "device":
            found.sets(name, value, **{fields[key].replace(".", "__"): device})
        elif key not in fields:
            found.ignores(name, value, "what is offloaded here is read and written by itself")
        elif value == "auto":
            found.ignores(name, value, f"{_AUTO} {fields[key]}")
        elif device == "none" or (device != "nvme" and key in ("nvme_path", *_OF_NVME)):
            found.ignores(name, value, f"read by another device than {device}")
        else:
            of_field = _as_the_field_has_it(name, value)
            found.sets(name, value, **{fields[key].replace(".", "__"): of_field})


_OF_NVME = ("buffer_count", "buffer_size", "max_in_cpu")
_CPU_OFFLOAD = {
    "zero_optimization.cpu_offload": "strategy.offload_optimizer=cpu",
    "zero_optimization.cpu_offload_param": "strategy.offload_parameters=cpu",
}


def _cpu_offload(found: Translation, path: str, value: Any) -> None:
    if value:
        found.sets(path, value, _CPU_OFFLOAD[path])
    else:
        found.ignores(path, value, "off")


def _aio(found: Translation, key: str, section: Mapping[str, Any]) -> None:
    uses_nvme = "nvme" in (
        found.overrides.get("strategy.offload_optimizer"),
        found.overrides.get("strategy.offload_parameters"),
    )
    fields = {
        "block_size": "block_size_bytes",
        "queue_depth": "queue_depth",
        "intra_op_parallelism": "threads",
        "thread_count": "threads",
        "single_submit": "single_submit",
        "overlap_events": "overlap_events",
    }
    for name, value in section.items():
        path = f"{key}.{name}"
        if not uses_nvme:
            found.ignores(path, value, "nothing is offloaded to nvme")
        elif name in fields:
            found.sets(path, value, **{f"strategy__aio__{fields[name]}": value})
        else:
            found.by_row(path, value, DEEPSPEED_JSON.get(path), "DeepSpeed has no such key")


# --- batch and precision --------------------------------------------------------------------------


def _batch(found: Translation, tree: Mapping[str, Any], ranks: int | None) -> None:
    """Note the sizes of batches, of which the accumulation steps follow."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, micro, steps = (tree.get(name) for name in names)
    for name in names:
        if tree.get(name) == "auto":
            found.ignores(name, "auto", f"{_AUTO} {OWNED[name]}")
    if _is_number(micro):
        found.sets(names[1], micro, trainer__micro_batch_size=micro)
    if _is_number(whole):
        found.sets(names[0], whole, trainer__global_batch_size=whole)
        if _is_number(steps):
            found.ignores(names[2], steps, "it follows from both batch sizes and the ranks")
    elif _is_number(steps) and not _is_number(micro):
        found.refuses(names[2], steps, "it needs a batch size beside it")
    elif isinstance(micro, int) and ranks is None:
        of = steps if isinstance(steps, int) else 1
        found.refuses(
            names[2],
            of,
            f"trainer.global_batch_size is {micro} x {of} x the number of ranks, which nothing "
            "here says; give trainer.global_batch_size, or launcher.nproc_per_node=N",
        )
    elif isinstance(micro, int) and ranks is not None:
        of = steps if isinstance(steps, int) else 1
        found.sets(names[2], of, trainer__global_batch_size=micro * of * ranks)


def _precision(found: Translation, tree: Mapping[str, Any]) -> None:
    """Note which numbers are in which dtype: one of the options, and its fields."""
    name = "bf16" if "bf16" in tree or "bfloat16" not in tree else "bfloat16"
    for key in ("bf16", "bfloat16", "fp16"):
        if key in tree and not isinstance(tree[key], Mapping):
            found.refuses(key, tree[key], "must be a section: {enabled: true}")
        elif key == "bfloat16" != name and key in tree:
            found.ignores(key, tree[key], "its newer name, bf16, is there as well")
    bf16, fp16 = (
        each if isinstance(each := tree.get(key), Mapping) else {} for key in (name, "fp16")
    )
    halves = [key for key, each in ((name, bf16), ("fp16", fp16)) if each.get("enabled") is True]
    if len(halves) > 1:
        found.refuses("fp16.enabled", True, f"{name}.enabled=true contradicts it")
        return
    is_pure = bool(bf16.get("bf16_master_weights_and_grads") and bf16.get("bf16_optimizer_states"))
    for key, value in bf16.items():
        _bf16(found, f"{name}.{key}", value, is_on=name in halves, is_pure=is_pure)
    for key, value in fp16.items():
        _fp16(found, f"fp16.{key}", value, is_on="fp16" in halves)
    for key, value in (
        ("communication_data_type", tree.get("communication_data_type")),
        ("data_types", tree.get("data_types")),
    ):
        values = value if isinstance(value, Mapping) else {None: value}
        for inner, each in values.items():
            path = key if inner is None else f"{key}.{inner}"
            if each is None:
                if key in tree:
                    found.ignores(path, each, "unset")
            elif path in OWNED and each in ("fp32", "bf16"):
                found.sets(path, each, precision__reduce_dtype=each)
            else:
                _leaf(found, path, each, FREE["data_types"])


def _bf16(found: Translation, path: str, value: Any, *, is_on: bool, is_pure: bool) -> None:
    key = path.rpartition(".")[2]
    if value == "auto":
        found.ignores(path, value, f"{_AUTO} precision")
    elif key == "enabled" and value:
        found.sets(path, value, "precision=bf16_pure" if is_pure else "precision=bf16")
    elif key in ("bf16_master_weights_and_grads", "bf16_optimizer_states") and value and is_on:
        if is_pure:
            found.ignores(path, value, "precision=bf16_pure says so")
        else:
            found.refuses(path, value, f"{OWNED[f'bf16.{key}']} goes with the other of both")
    elif not is_on or value is False:
        found.ignores(path, value, "off")
    else:
        _leaf(found, path, value, FREE["bf16"])


def _fp16(found: Translation, path: str, value: Any, *, is_on: bool) -> None:
    key = path.rpartition(".")[2]
    if value == "auto":
        found.ignores(path, value, f"{_AUTO} precision")
    elif not is_on:
        found.ignores(path, value, "off")
    elif key == "enabled":
        found.sets(path, value, "precision=fp16")
    elif key == "loss_scale":
        if value:
            found.refuses(path, value, "a scale that stays is not included: it moves")
        else:
            found.ignores(path, value, "the scale moves, as 0 says")
    elif key == "initial_scale_power" and isinstance(value, int):
        found.sets(path, value, precision__initial_loss_scale=float(2**value))
    else:
        _leaf(found, path, value, FREE["fp16"])


# --- optimizer and schedule -----------------------------------------------------------------------

_OPTIMIZERS = {
    "adam": "adamw",
    "adamw": "adamw",
    "lion": "lion",
    "sgd": "sgd",
    "muon": "muon",
    "adafactor": "adafactor",
}


def _optimizer(found: Translation, key: str, section: Mapping[str, Any]) -> None:
    kind = str(section.get("type", ""))
    name = _OPTIMIZERS.get(kind.lower())
    parameters = section.get("params") or {}
    if name is None or (kind.lower() == "adam" and parameters.get("adam_w_mode") is False):
        there_are = ", ".join(dict.fromkeys(_OPTIMIZERS.values()))
        found.refuses(f"{key}.type", kind, f"there are {there_are}")
        _without_a_type(found, key, section)
        return
    found.sets(f"{key}.type", kind, f"trainer.optimizer={name}")
    for parameter, value in parameters.items():
        path = f"{key}.params.{parameter}"
        if value == "auto":
            found.ignores(path, value, f"{_AUTO} {OWNED[key]}")
        elif parameter == "betas" and name in ("adamw", "lion", "muon"):
            prefix = "lion_beta" if name == "lion" else "adam_beta"
            pair = {f"trainer__{prefix}{i}": float(b) for i, b in enumerate(value, 1)}
            found.sets(path, value, **pair)
        elif (field := _PARAMETERS.get(parameter, "")) and _reads(name, field):
            of_field = value if isinstance(value, bool) else float(value)
            found.sets(path, value, **{f"trainer__{field}": of_field})
        else:
            found.ignores(path, value, f"trainer.optimizer={name} has no such setting")
    for other in section.keys() - {"type", "params"}:
        row = DEEPSPEED_JSON.get(f"{key}.{other}")
        found.by_row(f"{key}.{other}", section[other], row, "DeepSpeed has no such key")


def _without_a_type(found: Translation, key: str, section: Mapping[str, Any]) -> None:
    for name, value in section.items():
        if name != "type":
            found.ignores(f"{key}.{name}", value, f"it goes with {key}.type, which is refused")


_PARAMETERS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "eps": "adam_epsilon",
    "momentum": "sgd_momentum",
    "nesterov": "sgd_nesterov",
}


def _reads(optimizer: str, field: str) -> bool:
    """Return whether an optimizer reads a field of `_PARAMETERS`. Pure."""
    if field.startswith("adam_"):
        return OPTIMIZERS[optimizer].runs_adamw  # type: ignore[index]
    return not field.startswith("sgd_") or optimizer == "sgd"


def _scheduler(found: Translation, key: str, section: Mapping[str, Any]) -> None:
    kind = str(section.get("type", ""))
    name = {
        "warmuplr": "constant",
        "warmupdecaylr": "linear",
        "warmupcosinelr": "cosine",
    }.get(kind.lower())
    if name is None:
        found.refuses(f"{key}.type", kind, "set trainer.lr_scheduler and its neighbours")
        _without_a_type(found, key, section)
        return
    found.sets(f"{key}.type", kind, f"trainer.lr_scheduler={name}")
    for parameter, value in (section.get("params") or {}).items():
        path = f"{key}.params.{parameter}"
        if value == "auto":
            found.ignores(path, value, f"{_AUTO} the trainer's")
        elif parameter == "warmup_num_steps":
            found.sets(path, value, trainer__warmup_steps=int(value))
        elif parameter == "total_num_steps":
            found.sets(path, value, trainer__max_steps=int(value))
        elif parameter == "warmup_max_lr":
            found.sets(path, value, trainer__learning_rate=float(value))
        elif parameter == "cos_min_ratio" and name == "cosine":
            found.sets(path, value, trainer__min_learning_rate_ratio=float(value))
        elif parameter in ("warmup_min_lr", "warmup_min_ratio", "warmup_type"):
            found.ignores(path, value, "the warm-up is linear and begins at 0")
        else:
            found.ignores(path, value, f"trainer.lr_scheduler={name} has no such setting")


def _recomputation(found: Translation, key: str, section: Mapping[str, Any]) -> None:
    """transformers' models do not call deepspeed.checkpointing, by which these keys are read."""
    for name, value in section.items():
        found.ignores(
            f"{key}.{name}", value, f"transformers' models do not read it; set {OWNED[key]}"
        )


_FLAGS = {
    "zero_force_ds_cpu_optimizer": "strategy.cpu_adam=deepspeed",
}
_OF_NO_FIELD = {
    "zero_allow_untested_optimizer": "the optimizer is the one that every strategy shares",
    "amp": "set precision",
    "torch_autocast": "set precision",
}
_SECTIONS: dict[str, Callable[[Translation, str, Mapping[str, Any]], None]] = {
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "aio": _aio,
    "activation_checkpointing": _recomputation,
}
_DONE = (
    *("zero_optimization", "bf16", "bfloat16", "fp16", "communication_data_type", "data_types"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)
"""What is read together, before the rest."""
