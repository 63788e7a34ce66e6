"""The list of DeepSpeed's keys is that of the installed DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from shardwright.train.config.rules.deepspeed_keys import FREE, OWNED, REFUSED, problems


def known(section: str) -> set[str]:
    prefix = f"{section}."
    decided = {p.removeprefix(prefix) for p in (*OWNED, *REFUSED) if p.startswith(prefix)}
    return {name for name in decided if "." not in name} | set(FREE[section])


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


def test_values_have_the_types_that_deepspeed_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    for section, model in (
        (FREE["bf16"], DeepSpeedBF16Config),
        (FREE["fp16"], DeepSpeedFP16Config),
        (FREE["zero_optimization"], DeepSpeedZeroConfig),
        (FREE["zero_optimization"]["leaf_module"], DeepSpeedZeroLeafModuleConfig),
        (FREE["comms_logger"], CommsLoggerConfig),
        (FREE["csv_monitor"], CSVConfig),
        (FREE["tensorboard"], TensorBoardConfig),
        (FREE["wandb"], WandbConfig),
        (FREE["timers"]["throughput"], DeepSpeedThroughputTimerConfig),
    ):
        theirs = {field.alias or name: field for name, field in model.model_fields.items()}
        assert set(section) <= set(theirs)
        for key, kind in section.items():
            if isinstance(kind, dict):
                assert issubclass(theirs[key].annotation, BaseModel)
                continue
            field = theirs[key]
            wanted = list[str] if field.annotation is list else field.annotation
            if field.metadata:
                wanted = Annotated[wanted, Field(ge=field.metadata[0].ge)]
            assert bounds(kind) == bounds(wanted), key
    for section, model in (
        (FREE["csv_monitor"], CSVConfig),
        (FREE["tensorboard"], TensorBoardConfig),
        (FREE["wandb"], WandbConfig),
    ):
        assert set(section) == fields(model)


def bounds(kind: Any) -> Any:
    """Return what a type accepts, in a form that compares."""
    return TypeAdapter(kind).json_schema()


def test_words_are_those_that_deepspeed_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import constants
    from deepspeed.runtime.model_checkpointing import constants as writer
    from deepspeed.utils.logging import log_levels

    def words(kind: Any) -> list[str]:
        return sorted(word.upper() for word in get_args(kind))

    checkpoint = FREE["checkpoint"]
    assert words(FREE["log_level"]) == sorted(level.upper() for level in log_levels)
    assert get_args(FREE["gradient_allreduce_op"]) == constants.GRADIENT_ALLREDUCE_OP_SUPPORTED
    assert words(checkpoint["tag_validation"]) == sorted(writer.CHECKPOINT_TAG_VALIDATION_MODES)
    assert words(checkpoint["writer"]["type"]) == sorted(writer.CHECKPOINT_WRITER_TYPES)
    assert words(checkpoint["writer"]["data_parallel"]) == sorted(
        writer.CHECKPOINT_DATA_PARALLEL_UNITS
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"wall_clock_breakdown": "yess"}, "wall_clock_breakdown=yess: must be true or false"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown=1: must be true or false"),
        ({"prescale_gradients": None}, "prescale_gradients=null: must be true or false"),
        ({"gradient_predivide_factor": "x"}, "gradient_predivide_factor=x: must be a number"),
        ({"log_level": "loud"}, "log_level=loud: must be debug, info, warning, error or critical"),
        (
            {"zero_optimization": {"ignore_unused_parameters": 3}},
            "zero_optimization.ignore_unused_parameters=3: must be true or false",
        ),
        (
            {"zero_optimization": {"stage3_model_persistence_threshold": -1}},
            "zero_optimization.stage3_model_persistence_threshold=-1: must be at least 0",
        ),
        ({"comms_logger": {"prof_ops": "all"}}, "comms_logger.prof_ops=all: must be a list"),
        ({"csv_monitor": 3}, "csv_monitor=3: must be a section: {key: value}"),
        ({"checkpoint": {"writer": {"type": "quick"}}}, "type=quick: must be mock, python or fast"),
        (
            {"data_types": {"keep_in_fp32_modules": "norms"}},
            "keep_in_fp32_modules=norms: must be auto or a list",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(extra: dict[str, Any], message: str) -> None:
    (problem,) = problems(extra)
    assert problem.startswith("strategy.extra.")
    assert message in problem


def test_a_key_deep_within_is_checked_too() -> None:
    (problem,) = problems({"timers": {"throughput": {"synchronised": True}}})
    assert problem == (
        "unknown key strategy.extra.timers.throughput.synchronised: did you mean "
        "timers.throughput.synchronized?"
    )


def test_a_key_like_no_other_in_its_section_is_said_to_be_ignored() -> None:
    (problem,) = problems({"zero_optimization": {"foo": 1}})
    assert problem == (
        "unknown key strategy.extra.zero_optimization.foo: DeepSpeed has no such key and would "
        "ignore it"
    )


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
