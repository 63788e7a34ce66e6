"""accelerate's config file becomes overrides of a run. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardwright.launchers.translating import deepspeed_json, fsdp_fields
from shardwright.launchers.translating.translation import Translation
from shardwright.train.config.elsewhere import accelerate_launch

Reader = Callable[[str], Mapping[str, Any]]
"""Returns what a JSON file holds; raises UserError."""
_OTHERS = "Shardwright's launchers are torchrun, deepspeed, accelerate, slurm and local"
_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP")


def translate(tree: Mapping[str, Any], read: Reader) -> Translation:
    """Return what becomes of each key; ``read`` reads the DeepSpeed file that one may name."""
    found = Translation()
    kind = str(tree.get("distributed_type", "NO"))
    machines = tree.get("num_machines") or 1
    ranks = tree.get("num_processes") if isinstance(tree.get("num_processes"), int) else None
    if "distributed_type" in tree:
        _kind(found, kind, tree)
    for key, value in tree.items():
        if key == "distributed_type":
            continue
        if key == "deepspeed_config" and isinstance(value, Mapping):
            _deepspeed(found, value, ranks, read, is_used=kind == "DEEPSPEED")
        elif key == "fsdp_config" and isinstance(value, Mapping):
            if kind == "FSDP":
                fsdp_fields.translate(found, value, "fsdp_config.")
            else:
                _unused(found, key, value, f"distributed_type is {kind}")
        elif isinstance(value, Mapping):
            _unused(found, key, value, "this section is not read", rows=True)
        else:
            _key(found, key, value, int(machines))
    if fsdp_fields.sharding(tree.get("fsdp_config") or {}) in (
        "fsdp_hybrid",
        "fsdp_hybrid_grad_op",
    ):
        found.sets("num_machines", machines, strategy__replicas=int(machines))
    return found


def _kind(found: Translation, kind: str, tree: Mapping[str, Any]) -> None:
    if kind == "FSDP":
        option = fsdp_fields.sharding(tree.get("fsdp_config") or {}) or "fsdp"
        found.sets("distributed_type", kind, f"strategy={option}")
    elif kind == "DEEPSPEED":
        found.ignores("distributed_type", kind, "strategy=zero0 to zero3, by deepspeed_config")
    elif kind in _KINDS:
        found.sets("distributed_type", kind, "strategy=ddp")
    else:
        found.refuses("distributed_type", kind, f"there are {', '.join(_KINDS)}")


def _key(found: Translation, key: str, value: Any, machines: int) -> None:
    """Note a key of the file's own, or a flag of `accelerate launch` of the same name."""
    if key == "mixed_precision":
        names = {"no": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
        if str(value).lower() in names:
            found.sets(key, value, f"precision={names[str(value).lower()]}")
        else:
            found.refuses(key, value, f"there are {', '.join(names)}")
    elif key == "num_processes" and isinstance(value, int):
        each, rest = divmod(value, machines)
        if rest:
            found.refuses(key, value, f"{machines} machines cannot have equal parts of it")
        else:
            found.sets(key, value, launcher__nproc_per_node=each)
    elif key == "num_machines" and isinstance(value, int):
        if value > 1:
            found.sets(key, value, launcher__nodes=value)
        else:
            found.ignores(key, value, "one node is the default")
    elif key in ("main_process_ip", "main_process_port") and value is not None and machines > 1:
        name = {"main_process_ip": "head_address", "main_process_port": "head_port"}[key]
        found.sets(key, value, **{f"launcher__{name}": value})
    elif key in ("main_process_ip", "main_process_port"):
        found.ignores(key, value, "of several nodes alone")
    elif key in ("use_cpu", "cpu"):
        if value:
            found.sets(key, value, "launcher.device=cpu")
        else:
            found.ignores(key, value, "off")
    elif key == "gpu_ids":
        _gpus(found, key, value, machines)
    elif key == "rdzv_backend" and str(value) in ("static", "c10d"):
        found.ignores(key, value, "nodes meet at launcher.head_address")
    elif key == "compute_environment":
        found.ignores(key, value, _OTHERS)
    elif key == "gradient_accumulation_steps" and value in (1, "1"):
        found.ignores(key, value, "trainer.global_batch_size decides")
    elif key == "gradient_clipping" and not isinstance(value, str):
        found.sets(key, value, trainer__max_grad_norm=float(value))
    else:
        row = accelerate_launch.row(key)
        found.by_row(key, value, row, "accelerate documents no such key")


def _gpus(found: Translation, key: str, value: Any, machines: int) -> None:
    numbers = [word.strip() for word in str(value).split(",")]
    if value in (None, "", "all"):
        found.ignores(key, value, "all is the default")
    elif not all(map(str.isdecimal, numbers)):
        found.refuses(key, value, "give the numbers of GPUs, such as 0,1")
    elif machines > 1:
        found.refuses(key, value, "of several nodes each has its own CUDA_VISIBLE_DEVICES; set it")
    else:
        found.sets(key, value, launcher__gpu_ids=[int(number) for number in numbers])


def _unused(
    found: Translation, section: str, values: Mapping[str, Any], why: str, *, rows: bool = False
) -> None:
    if not values:
        found.ignores(section, {}, "empty")
    for key, value in values.items():
        row = accelerate_launch.row(key) if rows else None
        if row is None:
            found.ignores(f"{section}.{key}", value, why)
        else:
            found.by_row(f"{section}.{key}", value, row, why)


# --- DeepSpeed ------------------------------------------------------------------------------------

_IN_JSON = {
    "zero_stage": ("zero_optimization", "stage"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("gradient_clipping",),
    "offload_optimizer_device": ("zero_optimization", "offload_optimizer", "device"),
    "offload_optimizer_nvme_path": ("zero_optimization", "offload_optimizer", "nvme_path"),
    "offload_param_device": ("zero_optimization", "offload_param", "device"),
    "offload_param_nvme_path": ("zero_optimization", "offload_param", "nvme_path"),
    "zero3_save_16bit_model": (
        "zero_optimization",
        "stage3_gather_16bit_weights_on_model_save",
    ),
}
"""Where a short name of accelerate's stands in DeepSpeed's JSON."""
OF_DEEPSPEED = (*_IN_JSON, "deepspeed_config_file", "zero3_init_flag", "deepspeed_hostfile")
"""What stands in the section of DeepSpeed."""


def _deepspeed(
    found: Translation,
    section: Mapping[str, Any],
    ranks: int | None,
    read: Reader,
    *,
    is_used: bool,
) -> None:
    if not is_used:
        _unused(found, "deepspeed_config", section, "distributed_type is not DEEPSPEED")
        return
    tree: dict[str, Any] = {}
    named: dict[str, str] = {}
    for key, value in section.items():
        if key == "deepspeed_config_file":
            found.ignores(f"deepspeed_config.{key}", value, "its keys follow")
            tree |= read(str(value))
        elif key in _IN_JSON and value not in (None, "none", "None"):
            place = _IN_JSON[key]
            if key == "gradient_accumulation_steps":
                # Of a micro-batch that the training script has, and this file has not.
                found.ignores(
                    f"deepspeed_config.{key}",
                    value,
                    "the steps follow from trainer.global_batch_size, which is "
                    f"{value} x trainer.micro_batch_size x the ranks",
                )
                continue
            _put(tree, place, value)
            named[".".join(place)] = f"deepspeed_config.{key}"
        elif key in _IN_JSON:
            found.ignores(f"deepspeed_config.{key}", value, "off")
        else:
            row = accelerate_launch.row(key)
            found.by_row(f"deepspeed_config.{key}", value, row, "accelerate has no such key")
    found.absorbs(deepspeed_json.translate(tree, ranks), "deepspeed_config.", named)


def _put(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for part in place[:-1]:
        tree = tree.setdefault(part, {})
    tree[place[-1]] = value
