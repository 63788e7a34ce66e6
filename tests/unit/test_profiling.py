"""What a trace's steps are spent on, by events whose parts are known, and which are profiled."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.train.config import Rhythm, TrainerConfig
from shardwright.train.config.cadence import Cadence
from shardwright.train.config.profile import Profile
from shardwright.train.errors import UserError
from shardwright.train.loop.profiling.parts import (
    DATA,
    PARTS,
    communication_of,
    most_allocated,
    steps_of,
)
from shardwright.train.loop.profiling.profiler import last_of
from shardwright.train.loop.profiling.table import said_of_memory, table
from tests.unit.launchers.composed import composed

MAIN, OTHER = 1, 2


def span(
    category: str, name: str, begin: float, end: float, thread: int = MAIN, **args: Any
) -> dict[str, Any]:
    """Return an event as torch writes it, with times in milliseconds."""
    times = {"ts": 7e9 + 1e3 * begin, "dur": 1e3 * (end - begin)}
    return {"ph": "X", "cat": category, "name": name, "tid": thread, **times, "args": args}


def milliseconds(parts: Any) -> dict[str, float]:
    return {name: round(1e3 * value, 6) for name, value in parts.items() if value}


ON_A_CPU = [
    span("user_annotation", "ProfilerStep#4", 0, 100),
    span("user_annotation", DATA, 0, 10),
    span("cpu_op", "aten::stack", 2, 6),  # a batch's, and no arithmetic of the model
    span("user_annotation", "DistributedDataParallel.forward", 10, 45),
    span("cpu_op", "aten::linear", 12, 32),
    span("cpu_op", "aten::addmm", 14, 30),  # within the one above
    span("cpu_op", "aten::mul", 50, 60),
    span("cpu_op", "c10d::allreduce_", 60, 61),
    span("user_annotation", "gloo:all_reduce", 55, 75, OTHER),
    span("user_annotation", "gloo:all_reduce", 70, 80, 3),
    span("cpu_op", "aten::mul", 62, 64, OTHER),  # a thread of gloo's adds up what has come
    span("cpu_op", "autograd::engine::evaluate_function: HookBackward", 74, 79),
    span("cpu_op", "aten::add_", 95, 110),  # over the end
]


def test_on_a_cpu_each_moment_belongs_to_one_part() -> None:
    (step,) = steps_of(ON_A_CPU)
    assert (step.number, step.seconds) == (4, pytest.approx(0.1))
    assert milliseconds(step.parts) == {
        "data": 10,
        "compute": 20 + 10 + 5,
        "communication": 20,  # 60 to 80: 55 to 60 is hidden behind compute
        "host": 100 - 10 - 35 - 20,
    }
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert step.hidden == pytest.approx(0.005)


def test_a_cpus_adam_of_deepspeeds_is_compute() -> None:
    events = [
        span("user_annotation", "ProfilerStep#1", 0, 10),
        span("user_annotation", "Optimizer.step#DeepSpeedCPUAdam.step", 2, 9),
        span("user_annotation", "Optimizer.step#AdamW.step", 0, 10),  # has operators of its own
    ]
    assert milliseconds(steps_of(events)[0].parts) == {"compute": 7, "host": 3}


ON_A_GPU = [
    span("user_annotation", "ProfilerStep#8", 0, 50),
    span("user_annotation", "ProfilerStep#9", 60, 100),
    span("user_annotation", DATA, 0, 12),
    span("cpu_op", "aten::linear", 0, 50),  # only starts what the device does
    span("kernel", "ampere_gemm", 8, 20, 7),
    span("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 15, 35, 20),
    span("gpu_memcpy", "Memcpy HtoD", 30, 38, 9),
    span("gpu_memset", "Memset", 40, 41, 7),
    span("user_annotation", "gloo:all_reduce", 0, 50, OTHER),  # the ranks agree, nothing waits
    span("kernel", "elementwise", 90, 105, 7),
]


def test_on_a_gpu_the_device_tells() -> None:
    eight, nine = steps_of(ON_A_GPU)
    assert milliseconds(eight.parts) == {
        "compute": 12 + 1,
        "communication": 15,  # 20 to 35
        "copies": 3,  # 35 to 38
        "data": 8,
        "host": 2 + 9,
    }
    assert eight.hidden == pytest.approx(0.005)
    assert milliseconds(nine.parts) == {"compute": 10, "host": 30}
    for step in (eight, nine):
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        assert tuple(step.parts) == PARTS


def test_collectives_are_counted_where_steps_are() -> None:
    (annotated,) = communication_of(ON_A_CPU)
    assert (annotated.name, annotated.calls) == ("gloo:all_reduce", 2)
    assert annotated.seconds == pytest.approx(0.03)
    (kernel,) = communication_of(ON_A_GPU)
    assert kernel.name == "ncclDevKernel_AllReduce_Sum_f32_RING_LL"
    before = [span("user_annotation", "gloo:broadcast", -5, -1, OTHER), *ON_A_CPU]
    assert [each.name for each in communication_of(before)] == ["gloo:all_reduce"]


def test_memory_is_the_devices_where_there_is_one() -> None:
    def event(total: int, device: int) -> dict[str, Any]:
        args = {"Total Allocated": total, "Device Type": device}
        return {"ph": "i", "name": "[memory]", "args": args}

    host = [event(100, 0), event(700, 0), event(50, 0)]
    assert most_allocated(host) == 600
    assert most_allocated([*host, event(5, 1), event(9, 1)]) == 4
    assert most_allocated(ON_A_CPU) is None


def test_a_trace_without_steps_has_none() -> None:
    assert steps_of([]) == []
    assert "no step was traced" in table("rank 0", [], [], "")


def test_the_table_adds_up() -> None:
    text = table(
        "rank 0 on node7, cpu",
        steps_of(ON_A_CPU),
        communication_of(ON_A_CPU),
        said_of_memory(6_400_000, None),
    )
    assert text.splitlines()[:12] == [
        "rank 0 on node7, cpu",
        "",
        "ms                                step 4        mean    share",
        "compute                            35.00       35.00    35.0%",
        "communication, exposed             20.00       20.00    20.0%",
        "data                               10.00       10.00    10.0%",
        "host                               35.00       35.00    35.0%",
        "step                              100.00      100.00   100.0%",
        "",
        "communication, hidden               5.00        5.00",
        "",
        "collectives                               calls a step   ms a step",
    ]
    assert "gloo:all_reduce                                    2.0       30.00" in text
    assert "memory: at most 6.4 MB more than when the trace began;\nthere is no snapshot" in text
    assert max(map(len, text.splitlines())) <= 80


# --- which steps ----------------------------------------------------------------------------------


def trainer(**settings: Any) -> TrainerConfig:
    return TrainerConfig.model_validate({"max_steps": 100, **settings})


def test_an_evaluation_or_a_save_ends_a_profile() -> None:
    three, never = Profile(), Rhythm()
    assert last_of(three, never, 10, 100) == 12
    assert last_of(three, Rhythm(evaluate=Cadence(11)), 10, 100) == 11
    assert last_of(three, Rhythm(save=Cadence(10)), 10, 100) == 10
    assert last_of(Profile(steps=1), never, 10, 100) == 10
    assert last_of(three, never, 99, 100) == 100, "no more steps than there are"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.profile.at_step=30", "trainer.max_steps=20"],
            "profile.at_step=30 is behind the last step, max_steps=20",
        ),
        (["trainer.profile.ranks=[0,0]"], "ranks=[0, 0] names a rank twice"),
        (["trainer.profile.ranks=[]"], "trainer.profile.ranks"),
        (["trainer.profile.steps=21"], "trainer.profile.steps=21: must be at most 20"),
        (
            ["trainer.profile.ranks=[0,2]", "launcher.nproc_per_node=2"],
            "trainer.profile.ranks=[0, 2] names rank 2, but there are 2 rank(s), counted from 0",
        ),
        (["trainer.profile.at_steps=3"], "trainer.profile.at_step"),
    ],
)
def test_what_cannot_be_profiled_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        composed(*overrides)
    assert message in str(error.value)


def test_a_config_that_knows_of_no_profile_has_none() -> None:
    tree, run = composed()
    assert run.trainer.profile.at_step is None
    before = {k: v for k, v in tree["trainer"].items() if k != "profile"}
    assert TrainerConfig.model_validate(before) == run.trainer
