"""The group "hardware": the machines that `shardwright plan` supposes, which no run's config names.

A run's config.yaml says what is trained, and means the same on whatever it is trained; what a plan
supposes of machines that need not even exist has no effect on any run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from shardwright.train.config import devices, messages
from shardwright.train.config.section import (
    PositiveFloat,
    PositiveInt,
    Section,
    Strings,
    shown,
)
from shardwright.train.errors import UserError

GROUP = "hardware"
"""Of conf/, and what words of a command line for it begin with."""
CONF = devices.CONF
MIB, GIB, GIGA, TERA = 2**20, 2**30, 10**9, 10**12

Share = Annotated[float, Field(gt=0, le=1)]


class Peaks(Section):
    """Dense matrix products of a device, in TFLOP/s; null where it has none of a dtype."""

    fp32: PositiveFloat
    """Of fp32, without tensor cores."""
    tf32: PositiveFloat | None
    """Of fp32 rounded to TF32, precision.allow_tf32=true."""
    bf16: PositiveFloat | None
    """Of bf16, sums in fp32."""
    fp16: PositiveFloat | None
    """Of fp16, sums in fp32."""
    fp8: PositiveFloat | None
    """Of fp8, precision=fp8."""


class Hardware(Section):
    """Equal devices in equal nodes. A GB is 10^9 bytes, of a link those in each direction."""

    device: Literal["cuda", "cpu"]
    """What ranks run on."""
    cuda_names: Strings = ()
    """By which it is told: for each, words that all stand in the name that CUDA gives."""
    devices: PositiveInt = 1
    """Devices, and so ranks, of each node."""
    nodes: PositiveInt = 1
    """Nodes."""
    memory_mib: PositiveInt | None
    """Memory of a device, as nvidia-smi shows it; null: ranks take the host's."""
    peak_teraflops: Peaks
    """Its dense matrix products by dtype, in TFLOP/s."""
    memory_gb_per_second: PositiveFloat
    """Between a device and its memory."""
    nvlink_gb_per_second: PositiveFloat | None
    """From a device to others of its node; null: over the host's link."""
    host_link_gb_per_second: PositiveFloat
    """Between a device and the host's memory."""
    network_gb_per_second: PositiveFloat
    """From a device to other nodes: its part of what the node has."""
    host_memory_gib: PositiveFloat
    """Memory of a node's host."""
    host_memory_gb_per_second: PositiveFloat
    """Between a node's processors and its memory, all sockets together."""
    nvme_gib: PositiveFloat
    """Local disks of a node together."""
    nvme_gb_per_second: PositiveFloat
    """What they read or write in a second, together."""
    compute_efficiency: Share = 0.5
    """Part of the peak that a training step's products reach."""
    link_efficiency: Share = 0.7
    """Part of a link's speed that collectives and copies reach."""
    memory_efficiency: Share = 0.8
    """Part of a memory's speed that the optimizer's step reaches."""

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def host_memory_bytes(self) -> int:
        return round(self.host_memory_gib * GIB)

    @property
    def memory_bytes(self) -> int:
        """Of a rank's device; on CPUs an equal part of the host's."""
        if self.memory_mib is None:
            return self.host_memory_bytes // self.devices
        return self.memory_mib * MIB

    def peak_flops(self, dtype: str) -> float | None:
        """Return a device's dense peak of a dtype of ours in FLOP/s; None where it has none."""
        teraflops: float | None = getattr(self.peak_teraflops, dtype)
        return None if teraflops is None else teraflops * TERA


# --- what a command line says of it ---------------------------------------------------------------


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what of a command line is for the hardware, and the rest. Pure."""
    own = re.compile(rf"^\+{{0,2}}{GROUP}(\.[^=]*)?=")
    mine = [argument.lstrip("+") for argument in arguments if own.match(argument)]
    return mine, [argument for argument in arguments if not own.match(argument)]


def chosen(words: Sequence[str], config_dir: Path | None = None) -> Hardware | None:
    """Return the hardware that words of a command line ask for; None where they name none.

    ``words`` are as `split` has them, ``config_dir`` is where the user keeps options of their own.
    Raises UserError on whatever there is not, or cannot be.
    """
    named = [word.partition("=")[2] for word in words if word.startswith(f"{GROUP}=")]
    if not named:
        if words:
            raise UserError(f"{words[0]}: of which hardware? Add {GROUP}=NAME, such as h200x8")
        return None
    path, sizes = _found(named[-1], config_dir)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{GROUP}={named[-1]}: cannot read {path} ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{GROUP}={named[-1]}: {path} is not a mapping of keys to values")
    return with_keys(tree | sizes, words)


def with_keys(tree: Mapping[str, Any], words: Sequence[str]) -> Hardware:
    """Return hardware with what words of a command line say of single keys."""
    found = dict(tree)
    for word in words:
        key, _, value = word.partition("=")
        if key != GROUP:
            _set(found, key.split(".")[1:], _value(word, value))
    return from_tree(found)


def from_tree(tree: Mapping[str, Any]) -> Hardware:
    """Validate hardware; raise UserError with one line for each problem."""
    try:
        return Hardware.model_validate(dict(tree))
    except ValidationError as error:
        found = error.errors()
        unknown = [e for e in found if e["type"] == "extra_forbidden"]
        others = [e for e in found if e["type"] != "extra_forbidden"]
        for each in others:
            each["loc"] = (GROUP, *each["loc"])
        lines = [_unknown_key(".".join(map(str, e["loc"])), e["input"]) for e in unknown]
        raise UserError("\n".join([*lines, *messages.problems(others)])) from None


def known_keys() -> list[str]:
    """Return the dotted keys of hardware, without what they begin with."""
    return [*Hardware.model_fields, *(f"peak_teraflops.{name}" for name in Peaks.model_fields)]


def options(*directories: Path) -> list[str]:
    """Return the names of the options there are, in directories besides the project's own."""
    return sorted({path.stem for where in (CONF, *directories) for path in where.glob("*.yaml")})


def _found(word: str, config_dir: Path | None) -> tuple[Path, dict[str, int]]:
    """Return the file that a word means, and devices and nodes where it says how many."""
    if word.endswith((".yaml", ".yml")):
        path = Path(word).expanduser()
        if not path.is_file():
            raise UserError(f"{GROUP}={word}: there is no such file; give one as conf/{GROUP}/ has")
        return path, {}
    own = [] if config_dir is None else [config_dir.expanduser() / GROUP]
    for name, counts in _readings(word):
        for where in (*own, CONF):
            if (path := where / f"{name}.yaml").is_file():
                if 0 in counts.values():
                    raise UserError(f"{GROUP}={word}: devices and nodes are counted from 1")
                return path, counts
    there_are = options(*own)
    name = list(_readings(word))[-1][0]
    near = difflib.get_close_matches(name, there_are, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there_are)}."
    raise UserError(
        f"unknown {GROUP} {shown(word)}: {hint} A node of 8 is NAMEx8, 4 such nodes NAMEx8x4; what "
        "is not there is described in a YAML file, whose path is given in place of a name"
    )


def _readings(word: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield what a word may mean: an option's name, and how many. Pure."""
    yield word, {}
    if counted := re.fullmatch(r"(.+?)x(\d+)(?:x(\d+))?", word):
        name, devices, nodes = counted.groups()
        yield name, {"devices": int(devices), **({"nodes": int(nodes)} if nodes else {})}


def _value(word: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"{word}: the value cannot be read; write a number, a word or null"
        ) from None


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *sections, leaf = path
    for name in sections:
        inner = tree.get(name)
        tree[name] = dict(inner) if isinstance(inner, dict) else {}
        tree = tree[name]
    tree[leaf] = value


def _unknown_key(key: str, value: Any) -> str:
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
    hint = f"did you mean {GROUP}.{near[0]}?" if near else f"there are {', '.join(known_keys())}"
    return f"unknown key {GROUP}.{key}={shown(value)}: {hint}"


# --- by what CUDA calls a device ------------------------------------------------------------------


def of_device(name: str) -> Hardware | None:
    """Return the project's option for a device by its name as CUDA gives it; None without one."""
    option = devices.option_of(name)
    return None if option is None else shipped(option)


def shipped(option: str) -> Hardware:
    """Return an option of the project's own."""
    return from_tree(yaml.safe_load((CONF / f"{option}.yaml").read_text(encoding="utf-8")))
