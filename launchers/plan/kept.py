"""What was measured of this machine: hardware in its user's cache, of this machine alone."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.plan import hardware
from shardwright.launchers.plan.hardware import GIB, GIGA, GROUP, MIB, TERA, Hardware
from shardwright.train.config import devices
from shardwright.train.data.tokens.cache import default_root
from shardwright.train.errors import UserError

HERE = "here"
"""The name that stands for it: hardware=here."""
_OF = "# of: "
"""What the line begins with that says of which machine a file is."""


def place(device: str) -> Path:
    """Return where it is kept: below the user's cache, by the host's name and what ranks run on."""
    return default_root() / GROUP / f"{platform.node()}-{device}.yaml"


def device_of(here: Machine) -> str:
    """Return what ranks run on where nobody says."""
    return "cuda" if here.gpus and here.torch_has_cuda else "cpu"


def identity(here: Machine, device: str) -> dict[str, Any]:
    """Return what makes a machine another, so that it has to be measured again. Pure."""
    gpus = sorted(set(here.gpu_names)) if device == "cuda" else []
    ram = None if here.ram_bytes is None else round(here.ram_bytes / GIB)
    return {"cores": here.cores, "ram_gib": ram, "gpus": gpus}


def text(found: Hardware, here: Machine, when: str) -> str:
    """Return the file of what was measured. Pure."""
    said = json.dumps(identity(here, found.device))
    return (
        f"# Measured on {platform.node()} at {when} by `shardwright plan {GROUP}={HERE}`.\n"
        f"{_OF}{said}\n"
        "# Once more: the same with --measure. To keep it elsewhere, copy it and give its path.\n"
        + yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False)
    )


def matching(here: Machine, device: str) -> Hardware | None:
    """Return what is kept of this machine; None where nothing is, or that of another.

    Raises UserError where the file cannot be read.
    """
    path = place(device)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); delete it, or measure again") from None
    said = next((line[len(_OF) :] for line in lines if line.startswith(_OF)), "")
    if said != json.dumps(identity(here, device)):
        return None
    return hardware.chosen([f"{GROUP}={path}"])


def shared(found: Hardware, ranks: int) -> Hardware:
    """Return a node of so many ranks: each a GPU, or a part of the cores. Pure."""
    if found.device == "cuda" or ranks == found.devices:
        return found
    part = found.devices / ranks
    tree = found.model_dump()
    peaks = tree["peak_teraflops"]
    tree["peak_teraflops"] = {n: None if v is None else v * part for n, v in peaks.items()}
    tree["memory_gb_per_second"] *= part
    return hardware.from_tree(tree | {"devices": ranks})


# --- from what the ranks measured -----------------------------------------------------------------


def measured(
    ranks: Sequence[Mapping[str, Any]], here: Machine, disk: Mapping[str, float]
) -> Hardware:
    """Return as hardware what the ranks of this machine measured, each a `Measured`. Pure.

    Of CPUs, as one rank that has all cores, and of a GPU that is not known, the peaks are what a
    block's step has reached. Of a known one they stay those of its data sheet, by which MFU is
    told, and the efficiencies are what was reached of them. ``disk`` has the bytes that are free,
    and those a second.
    """
    tree = _of_cores(ranks) if ranks[0]["device"] == "cpu" else _of_gpus(ranks, here)
    tree |= {
        "nodes": 1,
        "nvme_gib": max(0.001, disk["free"] / GIB),
        "nvme_gb_per_second": disk["bytes_per_second"] / GIGA,
    }
    if here.ram_bytes is not None:
        tree["host_memory_gib"] = here.ram_bytes / GIB
    return hardware.from_tree({name: _short(value) for name, value in tree.items()})


def _of_cores(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tree = hardware.shipped("cpu").model_dump()
    found = [rank["speeds"] for rank in ranks]
    reached = {n: sum(each["training"][n] for each in found) for n in found[0]["training"]}
    memory = sum(each["memory"] for each in found) / GIGA
    tree |= {
        "devices": 1,
        "peak_teraflops": tree["peak_teraflops"] | {n: v / TERA for n, v in reached.items()},
        "compute_efficiency": 1.0,
        "memory_gb_per_second": memory,
    }
    if "host_memory_gb_per_second" in tree:
        tree |= {"host_memory_gb_per_second": memory, "memory_efficiency": 1.0}
    if (link := ranks[0]["all_reduce_bytes_per_second"]) is not None:
        tree |= {"host_link_gb_per_second": link / GIGA, "link_efficiency": 1.0}
    return tree


def _of_gpus(ranks: Sequence[Mapping[str, Any]], here: Machine) -> dict[str, Any]:
    names = sorted({str(rank["device"]) for rank in ranks})
    option = devices.option_of(names[0]) if len(names) == 1 else None
    tree = hardware.shipped(option or "h100_pcie").model_dump()
    found = [rank["speeds"] for rank in ranks]
    reached = {n: min(each["training"][n] for each in found) for n in found[0]["training"]}
    if option is None:
        none = dict.fromkeys(tree["peak_teraflops"])
        tree |= {
            "cuda_names": (),
            "peak_teraflops": none | {n: v / TERA for n, v in reached.items()},
            "nvlink_gb_per_second": None,
            "compute_efficiency": 1.0,
        }
        tree["memory_gb_per_second"] = min(each["memory"] for each in found) / GIGA
    else:
        dtype = "bf16" if "bf16" in reached else "fp16"
        peak = tree["peak_teraflops"][dtype] * TERA
        tree["compute_efficiency"] = _share(reached[dtype], peak)
    if here.gpu_memory_bytes is not None:
        tree["memory_mib"] = here.gpu_memory_bytes // MIB
    tree |= {
        "devices": len(ranks),
        "host_link_gb_per_second": min(each["host_link"] for each in found) / GIGA,
    }
    if "memory_efficiency" in tree:
        speed = tree["memory_gb_per_second"] * GIGA
        tree["memory_efficiency"] = _share(min(each["memory"] for each in found), speed)
    link = statistics.median(rank["all_reduce_bytes_per_second"] or 0.0 for rank in ranks)
    if link and option is None:
        tree |= {"nvlink_gb_per_second": link / GIGA, "link_efficiency": 1.0}
    elif link:
        between = tree["nvlink_gb_per_second"] or tree["host_link_gb_per_second"]
        tree["link_efficiency"] = _share(link, between * GIGA)
    return tree


def _share(reached: float, peak: float) -> float:
    return min(1.0, max(0.01, reached / peak))


def _short(value: Any) -> Any:
    """Return numbers with as many digits as a measurement has."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return value
