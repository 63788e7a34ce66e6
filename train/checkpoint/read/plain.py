"""Whole weights in safetensors or in torch.save's files as portable state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shardwright.train.checkpoint.format.junk import is_junk
from shardwright.train.checkpoint.format.lazy import (
    Fragment,
    LazyTensor,
    PortableState,
    Unreadable,
    describe,
    lazy,
)
from shardwright.train.checkpoint.read.model_states import IGNORED
from shardwright.train.checkpoint.read.reader import Reader

SAFETENSORS, TORCH = ".safetensors", (".bin", ".pt", ".pth", ".ckpt")

# In the order in which they are looked for: masters come before copies of them.
NAMES = (
    "pytorch_model_fsdp.bin",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# What programs leave beside the weights, in the same formats.
_OTHERS = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|training_args\.bin|rng.*|random_states.*|sampler.*|dl_.*"
    r"|custom_checkpoint.*|early_stopping.*"
)
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the format itself."""

_MODELS = ("model", "module", "state_dict", "model_state_dict")
_AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict")
_STEPS = ("step", "global_step", "global_steps", "iter_num", "iteration")


def find(path: Path) -> Path | None:
    """Return the file of a directory that holds its weights, or lists the files that do.

    A file is itself. Beside the usual names that is a file of another name where there is only
    one. Raises Unreadable where there are several.
    """
    if path.is_file():
        return path
    directory = path
    for name in NAMES:
        if (directory / name).is_file():
            return directory / name
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix in (SAFETENSORS, *TORCH)
        and not _OTHERS.fullmatch(path.name)
        and not is_junk(path.name)
    ]
    if parts := [path.name for path in found if re.fullmatch(r".*_rank\d+\.bin", path.name)]:
        raise Unreadable(
            f"{directory} holds {parts[0]}: a rank's part of the weights, which only ranks that "
            "wrote it can load; save with SHARDED_STATE_DICT through torch.distributed.checkpoint"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise Unreadable(
            f"{directory} holds {names}{' and more' if len(found) > 4 else ''}, and no index "
            f"that joins them (such as {NAMES[1]}); name the file to read, or restore the index"
        )
    return found[0] if found else None


def read(path: Path, section: str | None = None) -> PortableState:
    """Return the weights of a file, or of those that an index lists. Raises Unreadable.

    ``section`` names the keys that lead to them in what `torch.save` wrote.
    """
    if path.suffix in TORCH:
        return _torch(path, section)
    if section is not None:
        raise Unreadable(f"{path} has no sections; leave --section={section} out")
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if path.suffix == SAFETENSORS:
        return state(_safetensors(path), "safetensors")
    return _torch(path, section)


def state(
    tensors: Mapping[str, LazyTensor],
    origin: str,
    ema: Mapping[str, LazyTensor] | None = None,
    step: int | None = None,
) -> PortableState:
    weights = {n: t for n, t in tensors.items() if t.dtype.is_floating_point}
    # Trained are floating points only.
    buffers = {n: t for n, t in tensors.items() if n not in weights}
    return PortableState(weights, {}, {}, buffers, ema or {}, origin, step)


def _indexed(index: Path) -> PortableState:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{index} is refused: {type(error).__name__}: {error}") from None
    inside: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        path = index.parent / file
        if not path.resolve().is_relative_to(index.parent.resolve()):
            raise Unreadable(f"{index} names the file {file}, which is not in its directory")
        if not path.is_file():
            raise Unreadable(f"{index} names the file {file}, which is missing")
        inside[file] = path
    is_safe = all(path.suffix == SAFETENSORS for path in inside.values())
    held = {
        file: _safetensors(path) if is_safe else _tensors(describe(path, IGNORED), path)
        for file, path in inside.items()
    }
    if missing := [name for name, file in files.items() if name not in held[file]]:
        raise Unreadable(f"{files[missing[0]]} does not hold {missing[0]}, as {index} says it does")
    return state(
        {name: held[file][name] for name, file in files.items()},
        "safetensors" if is_safe else "torch.save",
    )


# --- safetensors --------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a file."""
    return with_metadata(path)[0]


def with_metadata(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and what it says besides. Raises Unreadable.

    The file is 8 bytes of length, a header in JSON, then the data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise Unreadable(f"{path} is not a safetensors file, or is truncated")
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _entry(path, entry, 8 + length, size) for name, entry in entries.items()}
        metadata = {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"{path} is refused: {type(error).__name__}: {error}") from None
    return tensors, metadata


def _entry(path: Path, entry: Mapping[str, Any], base: int, size: int) -> LazyTensor:
    shape = tuple(int(length) for length in entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise Unreadable(f"{path} holds a tensor in {entry['dtype']}, which is unknown")
    begin, end = (int(offset) for offset in entry["data_offsets"])
    elements = math.prod(shape)
    if min((0, *shape)) < 0 or begin < 0 or end - begin != elements * dtype.itemsize:
        raise Unreadable(f"{path} has {end - begin} bytes for a tensor of {shape} in {dtype}")
    if base + end > size:
        raise Unreadable(f"{path} ends {base + end - size} bytes too early")
    return LazyTensor(shape, dtype, (Fragment(path, base + begin, 0, elements),))


# --- torch.save ---------------------------------------------------------------------------------


def _torch(path: Path, section: str | None) -> PortableState:
    found = describe(path, IGNORED)
    weights = weights_in(found, path) if section is None else _section(found, section, path)
    ema: Any = {}
    step = None
    if isinstance(found, Mapping):
        ema = next((found[key] for key in _AVERAGES if _is_state(found.get(key))), {})
        steps = (found.get(key) for key in _STEPS)
        step = next((s for s in steps if isinstance(s, int) and not isinstance(s, bool)), None)
    return state(_tensors(weights, path), "torch.save", _tensors(ema, path), step)


def weights_in(found: Any, path: Path) -> Mapping[str, Any]:
    """Return the mapping of tensors that is meant. Raises Unreadable where that is not plain."""
    at_top = found if isinstance(found, Mapping) else {}
    # A tensor may stand beside the weights: a loss, random numbers.
    for key in _MODELS:
        if _is_state(at_top.get(key)):
            return at_top[key]
    sections = dict(_sections(at_top))
    most = max((_count(tensors) for tensors in sections.values()), default=0)
    if _count(at_top) > most:
        return at_top
    largest = [section for section, tensors in sections.items() if _count(tensors) == most]
    if len(largest) == 1 and "." not in largest[0]:
        return sections[largest[0]]
    keys = ", ".join(map(str, list(found)[:8])) if isinstance(found, Mapping) else "no mapping"
    hint = f". Name the one to read: --section {largest[0]}" if largest else ""
    raise Unreadable(
        f"{path} was searched for tensors by name, at its top or under {', '.join(_MODELS)}; "
        f"found: {', '.join(sections) or keys}{hint}"
    )


def _sections(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the mappings of tensors in a mapping, by the keys that lead there."""
    for key, value in found.items():
        if key in _AVERAGES or not isinstance(value, Mapping) or prefix.count(".") > 2:
            continue
        if _is_state(value):
            yield f"{prefix}{key}", value
        else:
            yield from _sections(value, f"{prefix}{key}.")


def _section(found: Any, section: str, path: Path) -> Mapping[str, Any]:
    """Return what lies at a path of keys, such as trainer.model. Raises Unreadable."""
    at = found
    for key in section.split("."):
        if not isinstance(at, Mapping) or key not in at:
            there = ", ".join(map(str, list(at)[:8])) if isinstance(at, Mapping) else "no mapping"
            raise Unreadable(f"{path} has no section {section}: {key} is not among {there}")
        at = at[key]
    if not _is_state(at):
        raise Unreadable(f"section {section} of {path} holds no tensors by name")
    return at


def _is_state(found: Any) -> bool:
    """Whether it is tensors by name; other values may stand among them."""
    return isinstance(found, Mapping) and _count(found) > 0


def _count(found: Mapping[str, Any]) -> int:
    return sum(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    )


def _tensors(found: Any, path: Path) -> dict[str, LazyTensor]:
    if not isinstance(found, Mapping):
        raise Unreadable(f"{path} holds no mapping of tensors")
    return {str(n): lazy(t, path) for n, t in found.items() if isinstance(t, torch.Tensor)}


READER = Reader(
    f"{', '.join(NAMES)}, one *.pt, *.pth, *.ckpt or *.safetensors",
    find,
    read,
    read_section=read,
)
