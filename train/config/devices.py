"""What a device can compute, by the name that CUDA gives it: the data sheets in conf/hardware/."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[2] / "conf" / "hardware"


def option_of(cuda_name: str) -> str | None:
    """Return the project's option for a device; None without one.

    Of several whose words stand in its name, the one with the most.
    """
    words = set(re.split(r"[\s-]+", cuda_name))
    fitting = [
        (len(own), option)
        for option, tree in _options().items()
        for own in (name.split() for name in tree.get("cuda_names", ()))
        if words.issuperset(own)
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def peak_flops(cuda_name: str, dtype: str) -> float | None:
    """Return a device's dense peak in a dtype of ours in FLOP/s; None where it is not known."""
    option = option_of(cuda_name)
    teraflops = _options()[option]["peak_teraflops"].get(dtype) if option else None
    return None if teraflops is None else float(teraflops) * 1e12


@cache
def _options() -> dict[str, dict[str, Any]]:
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
