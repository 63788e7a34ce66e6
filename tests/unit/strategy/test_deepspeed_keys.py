"""The list of DeepSpeed's keys is that of the installed DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.strategy.deepspeed_keys import FREE, OWNED, REFUSED, problems


def known(section: str) -> set[str]:
    prefix = f"{section}."
    decided = {p.removeprefix(prefix) for p in (*OWNED, *REFUSED) if p.startswith(prefix)}
    return {name for name in decided if "." not in name} | (FREE[section] or set())


def fields(model: Any) -> set[str]:
    """Return a DeepSpeed section's keys as its JSON spells them, deprecated ones left out."""
    return {
        field.alias or name
        for name, field in model.model_fields.items()
        if not (field.json_schema_extra or {}).get("deprecated")
    }


def test_sections_are_those_that_deepspeed_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert known("zero_optimization") == fields(DeepSpeedZeroConfig)
    assert known("bf16") == fields(DeepSpeedBF16Config)
    assert known("fp16") == fields(DeepSpeedFP16Config)
    profiler = {
        value
        for name, value in vars(constants).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("_DEFAULT", "_FORMAT"))
    }
    assert known("flops_profiler") == profiler
    assert known("comms_logger") == fields(CommsLoggerConfig)


def test_every_top_level_key_is_read_by_deepspeed() -> None:
    import importlib.util

    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    sources = "\n".join(p.read_text() for p in Path(spec.origin).parent.rglob("*.py"))
    for path in [*OWNED, *FREE]:
        key = path.split(".")[0]
        assert f'"{key}"' in sources or f"'{key}'" in sources, key


def test_a_free_key_passes() -> None:
    assert list(problems({"wall_clock_breakdown": True, "fp16": {"hysteresis": 2}})) == []
