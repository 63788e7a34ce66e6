"""The comparison with the example scripts runs from end to end, and its figures add up on paper."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import examples, prose
from benchmarks.report import Figures
from benchmarks.train_cpu import (
    MODELS,
    OURS,
    PEER,
    Plan,
    Step,
    figures_of,
    overrides,
    peer_command,
    steps_of_peer,
)
from benchmarks.train_cpu_report import shown, summary
from benchmarks.watched import Line, Watched
from shardwright.launchers.composition.compose import compose, resolved
from shardwright.launchers.machine.facts import Machine
from shardwright.train.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "example_scripts"
HEAD = "objective.head_on_labels_only=false"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        models=list(MODELS),
        ranks=[1, 2],
        strategies=["ddp", "zero2"],
        without=[HEAD],
        batch=4,
        steps=3,
        warmup_steps=1,
        repeats=5,
        is_tiny=False,
        examples=SCRIPTS,
        directory=tmp_path,
        here=Machine(cores=2),
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_both_sides_train_the_same_batches(plan: Plan, model: str, ranks: int) -> None:
    (plan.directory / "text").mkdir()
    (plan.directory / "text" / MODELS[model].text).write_text('{"text": "a"}\n')
    for changed in plan.variants(model, ranks).values():
        (job,) = compose(overrides(plan, model, ranks, plan.directory / "run", changed))
        config = resolved(job, plan.here, "now")
        assert config.launcher.world_size == ranks
        assert config.trainer.samples_per_pass == 4 // ranks
        assert config.trainer.global_batch_size == 4
        words = peer_command(plan, model, ranks, plan.directory / "out")
        assert words[words.index("--per_device_train_batch_size") + 1] == str(4 // ranks)
        assert words[words.index("--max_steps") + 1] == str(config.trainer.max_steps) == "4"
        assert words[words.index("--learning_rate") + 1] == str(config.trainer.learning_rate)
        length = "--max_seq_length" if model == "kantaibert" else "--block_size"
        assert words[words.index(length) + 1] == str(config.data.tokens_per_sample)
        assert ("--line_by_line" in words) == config.data.line_by_line
        for word in ("torch.distributed.run", "--use_cpu", "--ddp_backend"):
            assert (word in words) == (ranks > 1)


def test_a_setting_is_a_row_of_the_models_that_have_it_on_one_rank(plan: Plan) -> None:
    assert list(plan.variants("kantaibert", 1)) == [OURS, HEAD]
    assert list(plan.variants("gpt2_small", 1)) == [OURS]
    assert list(plan.variants("kantaibert", 2)) == [OURS, "strategy=zero2"]
    of_one = replace(plan, without=["gpt2_small:model.fused_gelu=false", "no.such_field=1"])
    assert list(of_one.variants("kantaibert", 1)) == [OURS]
    assert list(of_one.variants("gpt2_small", 1)) == [OURS, "model.fused_gelu=false"]


def test_a_counted_run_of_the_peer_differs_by_the_counting_alone(plan: Plan) -> None:
    words = peer_command(plan, "kantaibert", 1, plan.directory / "out", counted=True)
    given: dict[str, Any] = json.loads(Path(words[-1]).read_text())
    assert given.pop("include_num_input_tokens_seen") == "non_padding"
    spoken = []
    for name, value in given.items():
        spoken += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    assert spoken == peer_command(plan, "kantaibert", 1, plan.directory / "out")[2:]


@pytest.mark.parametrize("quote", ["'", ""], ids=["text", "numbers"])
def test_steps_are_read_from_what_the_trainer_prints(quote: str) -> None:
    q = quote
    text = f"{{'loss': {q}7.25{q}, 'epoch': {q}0.1{q}, 'num_input_tokens_seen': {q}640{q}}}"
    lines = [
        Line(10.0, "Training new model from scratch"),
        Line(12.5, text),
        Line(13.0, f"{{'train_runtime': {q}3.0{q}, 'train_loss': {q}7.2{q}}}"),
    ]
    assert steps_of_peer(lines) == [Step(12.5, 7.25, 640)]
    assert steps_of_peer([Line(1.0, f"{{'loss': {q}7.25{q}}}")]) == [Step(1.0, 7.25, None)]


def test_speed_is_that_of_the_measured_steps(plan: Plan) -> None:
    watched = Watched(began=100.0, lines=[], peak_memory_bytes=7, problem=None)
    steps = [Step(110.0 + 2 * i, 7.0 - i, None) for i in range(4)]
    figures = figures_of(plan, watched, steps, [50, 150, 200, 350])
    assert figures["tokens_per_second"] == (350 - 50) / 6
    assert figures["seconds_to_first_step"] == 10
    assert figures["losses"] == [7.0, 6.0, 5.0, 4.0]
    failed = figures_of(plan, replace(watched, problem="exit code 1"), [], None)
    assert failed == {"error": "exit code 1"}


def one_run(tokens_per_second: float, peak: int, loss: float = 7.0, tokens: int = 100) -> Figures:
    return {
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": peak,
        "seconds_to_first_step": 9.0,
        "losses": [loss],
        "tokens": tokens,
    }


def test_ratios_come_from_medians() -> None:
    runs = {
        PEER: [one_run(100, 1000), one_run(90, 1000), one_run(1, 1000)],
        OURS: [one_run(180, 600), one_run(999, 600), one_run(2, 600)],
        HEAD: [one_run(120, 900)] * 3,
    }
    found = summary(runs, PEER, OURS)
    assert (found["ratio"], found["memory_ratio"]) == (2.0, 0.6)
    assert found["variants"][HEAD]["ratio_to_ours"] == pytest.approx(120 / 180)
    assert found["variants"][PEER]["spread"] == pytest.approx(99 / 90)
    rows = shown({"models": {"kantaibert": {"1": found}}}).splitlines()
    assert [row.split()[2:6] for row in rows[1:]] == [
        ["stock", "90", "110%", "1.00"],
        ["ours", "180", "554%", "2.00"],
        [HEAD, "120", "0%", "1.33"],
    ]


def test_sides_that_learned_something_else_have_no_ratio() -> None:
    runs = {PEER: [one_run(100, 1000, loss=7.0)], OURS: [one_run(180, 600, loss=6.5)]}
    found = summary(runs, PEER, OURS)
    assert found["ratio"] is None
    assert "the losses differ by 7.1%" in shown({"models": {"gpt2": {"1": found}}})


def test_sides_that_learned_from_other_numbers_of_tokens_have_no_ratio() -> None:
    runs = {PEER: [one_run(100, 1000, tokens=50)], OURS: [one_run(180, 600)]}
    found = summary(runs, PEER, OURS)
    assert found["ratio"] is None
    assert "the tokens are 50 and 100: no ratio" in shown({"models": {"gpt2": {"1": found}}})
    runs[PEER] = [one_run(100, 1000, tokens=60)]
    assert summary(runs, PEER, OURS)["ratio"] == 1.8


def test_a_side_that_fails_is_shown_and_has_no_ratio() -> None:
    runs: dict[str, list[Figures]] = {PEER: [{"error": "no script"}], OURS: [one_run(180, 600)]}
    found = summary(runs, PEER, OURS)
    assert found["ratio"] is None
    assert "stock failed:\nno script" in shown({"models": {"gpt2": {"2": found}}})


def test_paragraphs_of_docstrings_are_lines() -> None:
    source = (
        '"""One line that is long enough.\n\nAnother\n    one, joined up.\n\nshort\n"""\nx = 1\n'
    )
    assert list(prose.of_source(source.encode())) == [
        "One line that is long enough.",
        "Another one, joined up.",
    ]
    assert list(prose.of_source(b"def (")) == []
    lines = prose.paragraphs()
    assert len(lines) == len(set(lines)) > 5000
    assert all(line.isprintable() for line in lines)


def test_scripts_that_are_not_there_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "NEEDED", ())
    with pytest.raises(UserError, match=r"has no run_mlm.py and no run_clm.py; give the folder"):
        examples.find(tmp_path)
    assert examples.find(SCRIPTS) == SCRIPTS
    with socket.socket() as nobody:  # bound, and not listening: whoever connects is refused
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(UserError, match=r"cannot be downloaded .* with --examples DIR"):
            examples.find(None)
    monkeypatch.setattr(examples, "NEEDED", ("a_package_of_nobody",))
    with pytest.raises(UserError, match="pip install a_package_of_nobody"):
        examples.find(SCRIPTS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    file = tmp_path / "figures.json"
    arguments = ["--quick", "--model", "kantaibert", "--repeats", "1", "--batch", "4"]
    arguments += ["--without", HEAD, "--examples", str(SCRIPTS)]
    arguments += ["--directory", str(tmp_path), "--json", str(file)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_cpu", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(file.read_text())
    assert results["ratio"] > 0
    one, two = (results["models"]["kantaibert"][ranks] for ranks in ("1", "2"))
    assert set(one["variants"]) == {PEER, OURS, HEAD}
    assert set(two["variants"]) == {PEER, OURS}
    for found in (one, two):
        for figures in found["variants"].values():
            assert figures["tokens"] > 100
            assert figures["peak_memory_bytes"] > 2**26
            assert figures["seconds_to_first_step"] > 0
            assert len(figures["losses"]) == 4
    assert [path for path in tmp_path.iterdir() if path != file] == [], "nothing is left"
