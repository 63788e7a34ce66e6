"""The session of minutes on a GPU, rehearsed on a CPU: it loses nothing and ends by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_session, train_gpu
from benchmarks.gpu_session import (
    ESTIMATES,
    ROWS,
    WITHOUT,
    WORTH,
    Session,
    Tables,
    in_words,
    install,
    order,
    outcomes,
    planned_beside,
    pytest_command,
)
from benchmarks.train_gpu import MODELS, VARIANTS, Plan, freeze
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.child import descendants
from shardwright.train.config import load
from shardwright.train.run_directory import plan
from shardwright.train.run_directory.plan import Measured, Planned, settings_of
from tests.fixtures import Freeze, TreeOf

ROOT = Path(__file__).parents[2]
ONE_H200 = Machine(compute_capabilities=(9.0,), cores=16)


def plan_on(here: Machine) -> Plan:
    return Plan(list(MODELS), list(VARIANTS), [], steps=2, warmup_steps=1, repeats=1, here=here)


def test_every_row_is_one_of_train_gpu() -> None:
    """Whose tests compose them all."""
    assert {model for model, _ in WORTH} == set(ESTIMATES) == set(MODELS)
    for model, variant in order(1, list(ESTIMATES)):
        assert variant in MODELS[model].variants or "=" in variant


def test_what_is_switched_off_is_a_setting_of_its_model(tmp_path: Path) -> None:
    for model, variant in WITHOUT:
        if "=" in variant:
            freeze(plan_on(ONE_H200), model, variant, tmp_path / f"{model}-{variant}")


def test_rounds_come_in_the_order_of_their_worth_and_turn_about() -> None:
    found = list(order(2, ["kantaibert", "llama_8b"]))
    first, second = [("kantaibert", v) for v in WORTH[0][1]], [("llama_8b", v) for v in WORTH[4][1]]
    once = [each for each in WITHOUT if each[0] in ("kantaibert", "llama_8b")]
    assert found == [*first, *second, *once, *first[::-1], *second[::-1]]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ROWS).read_text().splitlines()]


def test_a_row_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    tables = Tables(Session(50.0, tmp_path), plan_on(Machine(cores=2)), is_tiny=False)
    tables.row("llama_8b", "single")
    (row,) = rows(tmp_path)
    assert row["not_begun"].startswith("150 s, and 4")
    tables.took["llama_8b", "single"] = 10.0
    assert tables.estimate("llama_8b", "single") == 15
    assert tables.estimate("llama_8b", "fsdp") == 150, "another one has all to compile"
    assert tables.estimate("gpt2_small", "single") == 60


def test_each_row_is_written_as_it_comes_and_what_fails_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def measure(plan: Any, config: Any, run_dir: Path, variant: str, limit: float) -> Any:
        limits.append(limit)
        if variant == "stock":
            return {"error": "killed after 60 s\nlast words"}
        return {
            "tokens_per_second": 100.0,
            "peak_memory_bytes": 2**30,
            "losses": [7.0],
            "matmul_parameters": 1000,
            "device": "NVIDIA H200",
            "cuda": "13.0",
        }

    monkeypatch.setattr(train_gpu, "measure", measure)
    monkeypatch.setattr(train_gpu, "prepare", lambda run_dir: None)
    peak = {"peak_bytes": {"planned": 9, "measured": 10, "off": -0.1}}
    monkeypatch.setattr(gpu_session, "planned_beside", lambda run_dir: {"plan": peak})
    tables = Tables(Session(500.0, tmp_path), plan_on(ONE_H200), is_tiny=False)
    for variant in ("stock", "single", "no.such_field=1"):
        tables.row("gpt2_small", variant)
    stock, single, unknown = rows(tmp_path)
    assert stock["error"].startswith("killed after 60 s")
    assert single["tokens_per_second"] == 100
    assert (single["plan"], "plan" in stock) == (peak, False)
    assert "unknown key no.such_field" in unknown["error"]
    assert in_words(stock).endswith("train_gpu gpt2_small stock: failed: killed after 60 s")
    assert limits[0] == 150, "two and a half times what it is expected to take"
    found = json.loads((tmp_path / gpu_session.TABLES).read_text())
    assert found["hardware"]["device"] == "NVIDIA H200"
    assert found["models"]["gpt2_small"]["variants"]["single"]["tokens_per_second"] == 100
    assert "stock failed" in (tmp_path / gpu_session.PAGE).read_text()


def test_a_row_has_what_was_planned_beside_what_was_measured(
    tiny_tree: TreeOf, frozen_run: Freeze
) -> None:
    run_dir = frozen_run(tiny_tree("clm"))
    planned = Planned(110, 0, 0, {}, 40, 20, 30, step_seconds=0.9)
    measured = Measured("cuda", 100, parameters_bytes=40, steps=2, seconds=2.0, tokens=64)
    plan.note(run_dir, settings_of(load(run_dir)), planned=planned, measured=measured)
    found = planned_beside(run_dir)["plan"]
    assert found["peak_bytes"] == {
        "planned": 110,
        "measured": 100,
        "off": pytest.approx(0.1),
    }
    assert found["step_seconds"]["off"] == pytest.approx(-0.1)
    assert "gradients_bytes" not in found, "nobody has measured them"


def test_a_plan_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    assert "plan_problem" in planned_beside(tmp_path)


def test_outcomes_are_read_of_a_log_that_ends_anywhere() -> None:
    log = """
tests/gpu/test_a.py::test_one[cuda-fp32] PASSED                     [ 25%]
tests/gpu/test_a.py::test_two[a b] FAILED                           [ 50%]
tests/gpu/test_a.py::test_three SKIPPED (no GPU)                    [ 75%]
FAILED tests/gpu/test_a.py::test_two[a b] - AssertionError
tests/gpu/test_a.py::test_four"""
    assert outcomes(log) == {
        "tests/gpu/test_a.py::test_one[cuda-fp32]": "PASSED",
        "tests/gpu/test_a.py::test_two[a b]": "FAILED",
        "tests/gpu/test_a.py::test_three": "SKIPPED",
    }


def test_on_a_gpu_the_tests_of_a_gpu_are_run(tmp_path: Path) -> None:
    words = pytest_command(on_gpu=True, is_tiny=False, report=tmp_path)
    marks = [words[i + 1] for i, word in enumerate(words) if word == "-m"]
    assert marks == ["pytest", "gpu"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session", "--seconds", "30", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert "this machine has no GPU that torch sees; --device=cpu" in ended.stderr


def test_it_ends_by_itself_with_every_row_accounted_for(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--no-tests", "--seconds", "12", "--rounds", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session", *arguments, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = rows(tmp_path)
    assert [(row["model"], row["variant"]) for row in found[1:-1]] == list(
        order(1, list(ESTIMATES))
    )
    assert all("not_begun" in row for row in found[1:-1])
    assert found[-1]["said"] == "ended by itself"


def test_what_ends_the_session_ends_what_it_has_started(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--seconds", "100", "--out", str(tmp_path)]
    session = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_session", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert session.stdout is not None
    assert "session" in session.stdout.readline()
    while not (started := descendants(session.pid)):  # the tests
        assert session.poll() is None
    session.terminate()
    assert session.wait() == 128 + 15
    assert [pid for pid in started if Path(f"/proc/{pid}/exe").exists()] == []


def test_wheels_are_installed_into_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: said.append(words))
    (tmp_path / "one-1.0-py3-none-any.whl").touch()
    folder = install(tmp_path)
    (words,) = said
    assert words[-1] == str(tmp_path / "one-1.0-py3-none-any.whl")
    assert words[words.index("--target") + 1] == str(folder)
    assert {"--no-index", "--no-deps"} <= set(words)
    folder.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--tiny", "--seconds", "900", "--rounds", "1"]
    arguments += ["--model", "kantaibert", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session", *arguments],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tests, *tables = rows(tmp_path / "out")[1:-1]
    assert tests["counts"] == {"PASSED": 1}
    assert len(tables) == 3 + sum(model == "kantaibert" for model, _ in WITHOUT)
    assert all(row["tokens_per_second"] > 0 for row in tables)
