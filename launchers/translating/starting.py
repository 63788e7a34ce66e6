"""What stands before a training script: torchrun, accelerate launch, deepspeed or python. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.launchers.translating import accelerate_yaml
from shardwright.launchers.translating.accelerate_yaml import Reader
from shardwright.launchers.translating.translation import Translation
from shardwright.train.config.elsewhere import accelerate_launch
from shardwright.train.errors import UserError


@dataclass
class Started:
    """How many ranks a command line starts, and what becomes of its flags."""

    ranks: int = 1
    found: Translation = field(default_factory=Translation)


SCRIPT = re.compile(r"[^=]*\.py")


def divided(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Return what starts a script, the script, and its flags. Raises UserError without one."""
    for index, word in enumerate(words):
        if SCRIPT.fullmatch(word) and not word.startswith("-"):
            return list(words[:index]), word, list(words[index + 1 :])
    raise UserError(
        "the command line names no script, such as run_clm.py; give it as it is started: "
        "`shardwright translate -- torchrun --nproc_per_node 8 run_clm.py --learning_rate 1e-4`"
    )


def translate(words: Sequence[str], read: Reader) -> Started:
    """Return what becomes of the words before the script."""
    started = Started()
    rest = list(words)
    while rest and re.fullmatch(r"[A-Za-z_]\w*=.*", rest[0]):
        name, _, value = rest.pop(0).partition("=")
        started.found.ignores(name, value, "a variable of the environment: set it for this as well")
    program = rest[0].rpartition("/")[2] if rest else "python"
    if rest[:1] and re.fullmatch(r"python[\d.]*", program):
        module = rest[2] if rest[1:2] == ["-m"] and len(rest) > 2 else ""
        program = {"torch.distributed.run": "torchrun", "torch.distributed.launch": "torchrun"}.get(
            module, "python"
        )
        rest = rest[3:] if module else rest[1:]
    else:
        rest = rest[1:]
    if program == "accelerate":
        rest = rest[1:] if rest[:1] == ["launch"] else rest
    reader = _PROGRAMS.get(program)
    if reader is None:
        raise UserError(
            f"{program} is no program that starts training scripts here; there are "
            f"{', '.join(_PROGRAMS)}"
        )
    reader(started, _flags(rest), read)
    return started


def _flags(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if match := re.fullmatch(r"--?([A-Za-z][\w-]*)(?:=(.*))?", word, re.DOTALL):
            name = match[1].replace("-", "_")
            found[name] = True if match[2] is None else match[2]
        elif name is not None and found[name] is True:
            found[name] = word
        else:
            raise UserError(f"{word} belongs to no flag of the program that starts the script")
    return found


def _number(flags: Mapping[str, Any], *names: str, default: int = 1) -> int:
    for name in names:
        if name in flags and str(flags[name]).isdecimal():
            return int(str(flags[name]))
    return default


def _python(started: Started, flags: dict[str, Any], read: Reader) -> None:
    for name, value in flags.items():
        started.found.ignores(f"python -{name}", value, "the program is Shardwright's own")
    started.found.sets("ranks", 1, launcher__nproc_per_node=1)


def _torchrun(started: Started, flags: dict[str, Any], read: Reader) -> None:
    found = started.found
    each = _number(flags, "nproc_per_node")
    nodes = _number(flags, "nnodes")
    started.ranks = each * nodes
    found.sets("program", "torchrun", "launcher=torchrun")
    if not {"nproc_per_node"} & set(flags):
        found.sets("nproc_per_node", 1, launcher__nproc_per_node=1)
    for name, value in flags.items():
        if name == "nproc_per_node" and not str(value).isdecimal():
            found.sets(name, value, "launcher.nproc_per_node=auto")
        elif name == "nproc_per_node":
            found.sets(name, int(value), launcher__nproc_per_node=each)
        elif name == "nnodes" and str(value).isdecimal():
            found.sets(name, int(value), launcher__nodes=nodes)
        elif name == "nnodes":
            found.refuses(name, value, "set launcher.nodes and launcher.min_nodes")
        elif name in ("master_addr", "rdzv_endpoint") and nodes > 1:
            address, _, port = str(value).partition(":")
            given = {"launcher__head_address": address}
            found.sets(name, value, **given, **({"launcher__head_port": int(port)} if port else {}))
        elif name == "master_port" and nodes > 1:
            found.sets(name, value, launcher__head_port=int(str(value)))
        elif name == "node_rank":
            found.ignores(name, value, "`shardwright join RUN_DIR` on each other node")
        elif name == "max_restarts":
            found.sets(name, value, launcher__max_restarts=int(str(value)))
        elif name in _OF_TORCHRUN:
            found.ignores(name, value, "nodes and ranks find each other by themselves")
        else:
            found.refuses(name, value, "torchrun has no such flag, or it has no field here")


_OF_TORCHRUN = (
    *("standalone", "master_addr", "master_port", "rdzv_backend", "rdzv_id", "rdzv_endpoint"),
    *("rdzv_conf", "monitor_interval", "role", "start_method", "local_addr", "tee", "log_dir"),
    *("redirects", "use_env"),
)


def _deepspeed(started: Started, flags: dict[str, Any], read: Reader) -> None:
    found = started.found
    each, nodes = _number(flags, "num_gpus"), _number(flags, "num_nodes")
    has_hosts = bool({"hostfile", "H"} & flags.keys())
    here = None if has_hosts else _gpus_here(flags.get("include", flags.get("i")))
    started.ranks = each * nodes if here is None else len(here)
    found.sets("program", "deepspeed", "launcher=deepspeed")
    for name, value in flags.items():
        if name in ("include", "i") and here is not None:
            found.sets(name, value, launcher__gpu_ids=here)
        elif name == "num_gpus":
            found.sets(name, value, launcher__nproc_per_node=each)
        elif name == "num_nodes":
            found.sets(name, value, launcher__nodes=nodes)
        elif name in ("hostfile", "H"):
            found.sets(name, value, launcher__hostfile=str(value))
        elif name in ("include", "exclude", "i", "e"):
            key = {"i": "include", "e": "exclude"}.get(name, name)
            found.sets(name, value, **{f"launcher__{key}": str(value)})
        elif name in ("master_addr", "master_port") and nodes > 1:
            number = int(str(value)) if name == "master_port" else str(value)
            key = {"master_addr": "head_address", "master_port": "head_port"}[name]
            found.sets(name, value, **{f"launcher__{key}": number})
        else:
            found.ignores(name, value, "ranks find each other by themselves")


def _gpus_here(include: Any) -> list[int] | None:
    """Return the GPUs that a filter of DeepSpeed's chooses of this machine alone; else None."""
    found = re.fullmatch(r"(?:localhost|127\.0\.0\.1):(\d+(?:,\d+)*)", str(include))
    return [int(number) for number in found[1].split(",")] if found else None


def _accelerate(started: Started, flags: dict[str, Any], read: Reader) -> None:
    found = started.found
    found.sets("program", "accelerate launch", "launcher=accelerate")
    tree: dict[str, Any] = {}
    if "config_file" in flags:
        found.ignores("config_file", flags["config_file"], "its keys follow")
        tree |= read(str(flags.pop("config_file")))
    kinds = {"use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "multi_gpu": "MULTI_GPU"}
    for name, value in flags.items():
        number = int(value) if str(value).isdecimal() else value
        if name in kinds:
            tree["distributed_type"] = kinds[name]
        elif name.startswith("fsdp_"):
            tree.setdefault("fsdp_config", {})[name] = number
        elif name in accelerate_yaml.OF_DEEPSPEED:
            tree.setdefault("deepspeed_config", {})[name] = number
        elif accelerate_launch.row(name) is not None:
            tree[name] = number
        else:
            found.refuses(name, value, "accelerate launch has no such flag")
    translated = accelerate_yaml.translate(tree, read)
    found.absorbs(translated, "")
    started.ranks = int(tree.get("num_processes") or 1)


_PROGRAMS: dict[str, Callable[[Started, dict[str, Any], Reader], None]] = {
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "deepspeed": _deepspeed,
    "python": _python,
}
