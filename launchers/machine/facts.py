"""What this machine has, and what a config's `auto` values come to on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import netrc
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from shardwright.launchers.machine import hostfile, names
from shardwright.train.config import (
    DEFAULT_MICRO_BATCH_SIZE,
    DEFAULT_SEQUENCE_LENGTH,
    LauncherConfig,
    ModelConfig,
    NamedModel,
    PrecisionConfig,
    RunConfig,
    documents,
    from_tree,
    rank_layout,
)
from shardwright.train.config import largest_micro_batch as micro_batch
from shardwright.train.config.positions import longest_sample
from shardwright.train.config.precision import DTYPES, FP8_RECIPES, TF32_COMPUTE_CAPABILITY
from shardwright.train.config.tracking import wandb_mode
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.process.cores import usable_cores


@dataclass(frozen=True)
class Machine:
    """The facts that a run depends on, found without torch."""

    compute_capabilities: tuple[float | None, ...] = ()
    """One for each GPU that this process may use, in its order; None where it is not known."""
    gpu_indices: tuple[int | None, ...] | None = None
    """What nvidia-smi numbers each of them; None is a part of one (MIG). None in all: from 0 on."""
    cores: int = 1
    """CPU cores that this process may use."""
    has_loopback: bool = True
    torch_has_cuda: bool = True
    has_wandb_key: bool = False
    wandb_mode: str | None = None
    """What the environment asks W&B for, if anything."""
    free_port: int = 29500
    """One that nothing listens on."""
    cuda_visible_devices: str = ""
    interface: str | None = None
    """Through which other nodes are reached, where this machine's own name does not lead there."""

    memory_bytes: int | None = None
    """Of the host, swap included, within its control group's limit; None where it is not known."""
    ram_bytes: int | None = None
    """The same without swap."""
    gpu_memory_bytes: int | None = None
    """Of the largest GPU."""
    gpu_names: tuple[str, ...] = ()
    """As CUDA calls them, one for each that this process may use; none where nobody says."""
    has_varlen: bool = True
    """Whether the installed torch attends in rows of several lengths by one kernel."""
    has_flash_attn: bool = False
    has_mps: bool = False
    """Whether it is a Mac with a GPU of Apple's, which its memory belongs to as well."""

    @property
    def gpus(self) -> int:
        return len(self.compute_capabilities)

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """``gpu_indices``, where these are told or not."""
        return tuple(range(self.gpus)) if self.gpu_indices is None else self.gpu_indices

    def with_gpus(self, places: Sequence[int]) -> Machine:
        """Return it with some of its GPUs alone, by their places among them."""
        names = self.gpu_names
        if len(names) == self.gpus:
            names = tuple(names[place] for place in places)
        return replace(
            self,
            compute_capabilities=tuple(self.compute_capabilities[place] for place in places),
            gpu_names=names,
            gpu_indices=tuple(self.numbers[place] for place in places),
        )


def detect(environment: Mapping[str, str]) -> Machine:
    """Look at this machine, within what the environment lets a process see of it."""
    asked, seen = environment.get("CUDA_VISIBLE_DEVICES"), _gpus()
    names_of = [(gpu.uuid, gpu.name) for gpu in seen]
    return Machine(
        compute_capabilities=visible([(gpu.uuid, gpu.capability) for gpu in seen], asked),
        gpu_indices=visible([(gpu.uuid, index) for index, gpu in enumerate(seen)], asked),
        gpu_names=tuple(name for name in visible(names_of, asked) if name),
        cores=len(usable_cores()),
        has_loopback="lo" in (name for _, name in socket.if_nameindex()),
        torch_has_cuda=not importlib.metadata.version("torch").endswith("+cpu"),
        has_wandb_key=has_wandb_key(environment),
        wandb_mode=wandb_mode(environment),
        free_port=_free_port(),
        cuda_visible_devices=environment.get("CUDA_VISIBLE_DEVICES", ""),
        memory_bytes=_memory_bytes(),
        ram_bytes=_memory_bytes(with_swap=False),
        gpu_memory_bytes=_gpu_memory_bytes(),
        has_varlen=_version("torch") >= documents.VARLEN_TORCH,
        has_flash_attn=importlib.util.find_spec("flash_attn") is not None,
        has_mps=(platform.system(), platform.machine()) == ("Darwin", "arm64"),
        interface=None if is_reached_by(addresses()) else default_interface(),
    )


T = TypeVar("T")


def visible(
    gpus: Sequence[tuple[str, T | None]], cuda_visible_devices: str | None
) -> tuple[T | None, ...]:
    """Return what is known of the GPUs that CUDA would show, given each with its UUID.

    As in CUDA, the list of indices or UUID prefixes ends at the first that does not exist.
    """
    if cuda_visible_devices is None:
        return tuple(capability for _, capability in gpus)
    chosen: list[T | None] = []
    for name in cuda_visible_devices.split(","):
        name = name.strip()
        if name.isdecimal() and int(name) < len(gpus):
            chosen.append(gpus[int(name)][1])
        elif name.startswith("MIG-") and gpus:
            chosen.append(None)
        elif found := [c for uuid, c in gpus if name.startswith("GPU-") and uuid.startswith(name)]:
            chosen.append(found[0])
        else:
            break
    return tuple(chosen)


def given_to(machine: Machine, launcher: LauncherConfig) -> Machine:
    """Return a machine with the GPUs alone that a run chooses among its own. Pure.

    One that is not there is left out; `lacking` says so.
    """
    if launcher.gpu_ids is None:
        return machine
    numbers = machine.numbers
    places = [numbers.index(number) for number in launcher.gpu_ids if number in numbers]
    shown = ",".join(map(str, (numbers[place] for place in places)))
    return replace(machine.with_gpus(places), cuda_visible_devices=shown)


def resolve(
    config: RunConfig,
    machine: Machine,
    run_dir: str,
    largest_micro_batch: int = DEFAULT_MICRO_BATCH_SIZE,
) -> RunConfig:
    """Return the config with what is left open, and every relative path, as it comes to here.

    What a plan has to choose is left as it is. ``largest_micro_batch`` bounds
    trainer.micro_batch_size=null. Raises UserError where the values
    contradict each other then.
    """
    tree = config.model_dump(mode="json")
    tree["run_dir"] = run_dir
    # The frozen config must mean the same from any working directory.
    data = tree["data"]
    if data["cache_dir"] is not None:
        data["cache_dir"] = absolute(data["cache_dir"])
    model, tokenizer = tree["model"], tree["tokenizer"]
    if isinstance(config.model, NamedModel):
        # The very checkpoint: a resume must not look which one is the newest then.
        model["name"] = names.model(model["name"], model.get("step"))
        found = _own_config(config.model, model["name"])
        if "step" in model:
            model["step"] = None
        if tree["strategy"]["kind"] == "zero":
            # What its buckets are derived from.
            model["hidden_size"] = model["hidden_size"] or hidden_size(found)
        if "vocab_size" in model:
            model["vocab_size"] = model["vocab_size"] or vocabulary(found)
    if tokenizer["kind"] == "pretrained":
        tokenizer["name"] = names.tokenizer(tokenizer["name"])
    if tree["strategy"].get("nvme_path") is not None:
        tree["strategy"]["nvme_path"] = absolute(tree["strategy"]["nvme_path"])
    launcher = tree["launcher"]
    resolve_launcher(launcher, config, machine)
    settled = config.tracking.settled(machine.wandb_mode, has_key=machine.has_wandb_key)
    tree["tracking"] = settled.model_dump(mode="json")
    if data["sequence_length"] == "auto":
        positions = _positions(config.model, tree["model"].get("name"))
        data["sequence_length"] = min(DEFAULT_SEQUENCE_LENGTH, positions or DEFAULT_SEQUENCE_LENGTH)
    data |= _documents(config, machine, launcher["device"], model.get("name"))
    if tree["trainer"]["micro_batch_size"] is None:
        # Only now it is certain how many ranks there may be. Where they cannot share the batch,
        # that is said below, with all else that is wrong.
        with contextlib.suppress(ValidationError, UserError):
            ranks = TypeAdapter[LauncherConfig](LauncherConfig).validate_python(launcher)
            layouts = [rank_layout(config.strategy, count) for count in ranks.world_sizes]
            tree["trainer"]["micro_batch_size"] = micro_batch(
                config.trainer.global_batch_size, layouts, largest_micro_batch
            )
    return from_tree(tree)


def resolve_launcher(launcher: dict[str, Any], config: RunConfig, machine: Machine) -> None:
    """Replace what is open in a config's section "launcher" by what it comes to here."""
    gpus = config.launcher.gpus_of_node(machine.gpus if machine.torch_has_cuda else 0)
    if gpus and config.launcher.gpu_ids is not None:
        gpus = len(config.launcher.gpu_ids)
    for path in config.launcher.paths:
        launcher[path] = launcher[path] and absolute(launcher[path])
    if launcher["device"] == "auto":
        launcher["device"] = "cuda" if gpus else "cpu"
    if launcher.get("hostfile") is not None:
        launcher.update(from_hostfile(launcher))
    if launcher.get("nodes", 1) > 1 and launcher.get("head_port", 1) is None:
        launcher["head_port"] = machine.free_port
    if launcher.get("nproc_per_node") == "auto":
        one_rank = launcher["device"] != "cuda" or config.strategy.kind == "single"
        launcher["nproc_per_node"] = 1 if one_rank else max(1, gpus)


def hidden_size(config_json: Mapping[str, Any]) -> int | None:
    """Return the width of a model by its config.json; None where that does not say. Pure."""
    # Models of several parts keep that of their text apart.
    text = config_json.get("text_config")
    section = text if isinstance(text, Mapping) else config_json
    # As architectures call it; transformers knows each of them by the first.
    known = (section.get(name) for name in ("hidden_size", "n_embd", "d_model", "dim"))
    return next((size for size in known if isinstance(size, int) and size > 0), None)


def vocabulary(config_json: Mapping[str, Any]) -> int | None:
    """Return the rows of a model's embedding by its config.json; None where it says none. Pure."""
    text = config_json.get("text_config")
    rows = (text if isinstance(text, Mapping) else config_json).get("vocab_size")
    return rows if isinstance(rows, int) and rows > 0 else None


def _own_config(model: NamedModel, name: str) -> dict[str, Any]:
    """Return a model's config.json with what the run overrides; nothing where it is not here."""
    found = names.config_json(name, model.revision, os.environ)
    return {} if found is None else {**found, **model.overrides}


def _documents(
    config: RunConfig, machine: Machine, device: str, name: str | None
) -> dict[str, bool]:
    """Return whether documents are kept apart, and lines laid end to end.

    ``device`` is that of the ranks, ``name`` what that of a pretrained model means here.
    """
    data, model = config.data, config.model
    found: Mapping[str, Any] = {"model_type": model.kind, "attention_dropout": 0.0}
    if isinstance(model, NamedModel):
        # Where that is not here yet the ranks would have to say: left as transformers has it.
        found = _own_config(model, name or model.name)
    dropout = getattr(model, "attention_dropout", documents.attention_dropout(found))
    kernel = documents.kernel(
        model.attention,
        on_gpu=device == "cuda",
        in_16_bits=config.precision.computes_in.size_bytes == 2,
        dropout=dropout,
        has_varlen=machine.has_varlen
        and all(
            known is None or known >= documents.VARLEN_COMPUTE_CAPABILITY
            for known in machine.compute_capabilities
        ),
        has_flash_attn=machine.has_flash_attn,
    )
    can_be_told = found.get("model_type") in documents.MODELS
    apart, unpadded = data.document_attention, data.unpad
    if apart == "auto":
        is_free = kernel in ("varlen", "flash_attention_2")
        wanted = config.objective.is_masked or is_free
        apart = data.line_by_line or (can_be_told and wanted)
    if unpadded == "auto":
        # Eager attention weighs each token against each other one, lines of others included.
        fixed = config.precision.token_multiple > 1 or kernel == "eager"
        unpadded = data.line_by_line and can_be_told and not fixed
    return {"document_attention": apart, "unpad": unpadded}


def _version(package: str) -> tuple[int, ...]:
    """Return the first two numbers of an installed package's version."""
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:2]))


def _positions(model: ModelConfig, name: str | None) -> int | None:
    """Return the longest sample that a model takes; None where that is found out by the ranks.

    ``name`` is what that of a pretrained one means here.
    """
    if not isinstance(model, NamedModel) or model.max_sequence_length is not None:
        return model.max_sequence_length
    found = _own_config(model, name or model.name)
    return longest_sample(found) if found else None


def from_hostfile(launcher: dict[str, Any]) -> dict[str, Any]:
    """Return what a hostfile decides: nodes, ranks of each and where they meet; its own path."""
    path = absolute(launcher["hostfile"])
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"launcher.hostfile={path} cannot be read ({reason}); give a file with lines of: "
            "host slots=8"
        ) from None
    name = f"launcher.hostfile={path}"
    chosen = hostfile.hosts(text, launcher["include"], launcher["exclude"], name)
    decided = {"nodes": len(chosen), "nproc_per_node": hostfile.ranks_per_node(chosen, name)}
    for name, value in decided.items():
        if launcher[name] not in (value, "auto", 1):
            raise UserError(
                f"launcher.{name}={launcher[name]}, but launcher.hostfile={path} gives {value}; "
                f"leave it out, or choose hosts and slots with launcher.include"
            )
    head = launcher["head_address"] or next(iter(chosen))
    return {**decided, "hostfile": path, "head_address": head}


def not_there(gpu_ids: Sequence[int], machine: Machine) -> list[str]:
    """Return a message where a GPU is chosen that this machine does not show. Pure."""
    if not (missing := [number for number in gpu_ids if number not in machine.numbers]):
        return []
    numbers = ", ".join(str(number) for number in machine.numbers if number is not None)
    hides = machine.cuda_visible_devices and (
        f" (CUDA_VISIBLE_DEVICES={machine.cuda_visible_devices} hides any other)"
    )
    return [
        f"launcher.gpu_ids={list(gpu_ids)}: this machine shows no GPU {missing[0]}, but "
        f"{numbers or 'none by a number'}{hides}; choose among these, or leave it out"
    ]


def lacking(
    device: str,
    ranks: int,
    precision: PrecisionConfig,
    machine: Machine,
    gpu_ids: Sequence[int] | None = None,
) -> list[str]:
    """Return a message for each thing asked for that this machine does not have."""
    problems = []
    if device == "cpu":
        if not precision.computes_in.cpu_computes:
            problems.append(
                f"precision.compute_dtype={precision.compute_dtype} needs a GPU, but the ranks run "
                "on cpu; choose precision=bf16 or precision=fp32"
            )
        if precision.allow_tf32:
            problems.append(
                "precision.allow_tf32=true needs a GPU, but the ranks run on cpu; "
                "choose precision=fp32"
            )
        if precision.fp8_recipe is not None:
            problems.append(
                f"precision.fp8_recipe={precision.fp8_recipe} needs a GPU, but the ranks run on "
                "cpu; choose precision=bf16"
            )
        return problems

    if device == "mps":
        if machine.has_mps:
            return []
        return [
            "launcher.device=mps, but this machine is no Mac with an Apple GPU "
            f"({platform.system()}, {platform.machine()}); choose launcher.device=cpu or auto"
        ]
    if not machine.gpus:
        return [
            "launcher.device=cuda, but this machine shows no NVIDIA GPU (CUDA_VISIBLE_DEVICES may "
            "hide it); choose launcher.device=cpu"
        ]
    if not machine.torch_has_cuda:
        return [
            "launcher.device=cuda, but the installed torch is a CPU build; install one with CUDA "
            "or choose launcher.device=cpu"
        ]
    if gpu_ids is not None and (problems := not_there(gpu_ids, machine)):
        return problems
    if gpu_ids is not None:
        machine = machine.with_gpus([machine.numbers.index(number) for number in gpu_ids])
    if ranks > machine.gpus:
        problems.append(
            f"launcher.nproc_per_node={ranks} is more than the {machine.gpus} GPU(s) of this "
            f"machine; choose launcher.nproc_per_node={machine.gpus} or launcher.device=cpu"
        )
    return [*problems, *_too_old(ranks, precision, machine)]


def _too_old(ranks: int, precision: PrecisionConfig, machine: Machine) -> list[str]:
    """Return a message for each thing that the oldest GPU of the ranks does not compute."""
    known = [c for c in machine.compute_capabilities[:ranks] if c is not None]
    oldest = min(known, default=math.inf)
    dtype, recipe = precision.compute_dtype, precision.fp8_recipe
    older = [name for name, facts in DTYPES.items() if facts.compute_capability <= oldest]
    asked = [
        (f"compute_dtype={dtype}", DTYPES[dtype].compute_capability, older[::-1]),
        ("allow_tf32=true", TF32_COMPUTE_CAPABILITY * precision.allow_tf32, ["fp32"]),
        *(
            [(f"fp8_recipe={recipe}", FP8_RECIPES[recipe].compute_capability, ["bf16"])]
            if recipe is not None
            else []
        ),
    ]
    return [
        f"precision.{setting} needs compute capability {needed}, but a GPU here has {oldest}; "
        f"choose {' or '.join(f'precision={name}' for name in others)}"
        for setting, needed, others in asked
        if oldest < needed
    ]


class _Gpu(NamedTuple):
    uuid: str
    capability: float | None = None
    name: str | None = None


def _gpus() -> list[_Gpu]:
    query = ["nvidia-smi", "--query-gpu=uuid,compute_cap,name", "--format=csv,noheader"]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        devices = [p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdecimal()]
        return [_Gpu("")] * len(devices)
    gpus: list[_Gpu] = []
    for line in output.splitlines():
        uuid, capability, name = (part.strip() for part in [*line.split(",", 2), "", ""][:3])
        try:
            gpus.append(_Gpu(uuid, float(capability), name or None))
        except ValueError:
            gpus.append(_Gpu(uuid, None, name or None))
    return gpus


def _gpu_memory_bytes() -> int | None:
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            query, capture_output=True, text=True, timeout=30, check=True
        ).stdout
        return max(int(line) for line in output.splitlines()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _memory_bytes(*, with_swap: bool = True) -> int | None:
    found: list[int] = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            found.append(int(Path(path).read_text()))
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        pairs = (line.split(":") for line in lines)
        sizes = {name: int(size.split()[0]) * 1024 for name, size in pairs}
        swap = sizes["SwapTotal"] if with_swap else 0
        found = [limit + swap for limit in found] + [sizes["MemTotal"] + swap]
    if not found:  # no Linux
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def addresses() -> list[str]:
    """Return what this machine's own name resolves to; gloo meets its peers there."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), 0)})
    except OSError:
        return []


def is_reached_by(found: Sequence[str]) -> bool:
    """Return whether other nodes can reach one of some addresses. Pure."""
    return any(not address.startswith("127.") and address != "::1" for address in found)


def default_interface() -> str | None:
    """Return the interface of the default route, as far as the kernel tells."""
    try:
        routes = Path("/proc/net/route").read_text().splitlines()[1:]
    except OSError:
        return None
    fields = (line.split() for line in routes)
    return next((route[0] for route in fields if route[1] == "00000000"), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# Its server has two names, and keys are kept under either (wandb 0.31, sdk/lib/urls.py).
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Return whether W&B would find a key: in the environment, or in the netrc file."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = environment.get("WANDB_BASE_URL", "").split("//")[-1].split("/")[0]
    try:
        keys = netrc.netrc(environment.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(host) is not None for host in ((own,) if own else _WANDB_HOSTS))
