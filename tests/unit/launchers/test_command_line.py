"""What `shardwright` prints and where it finds things."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shardwright.launchers.__main__ import COMMANDS
from shardwright.train.config import from_tree
from shardwright.train.console.terminal import READER_GONE
from shardwright.train.errors import BAD_INPUT, FAILED, INTERRUPTED, RESUMABLE
from tests.unit.launchers.fakes import ROOT, Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)


def test_help_names_the_commands(shardwright: Shardwright) -> None:
    outcome = shardwright("--help")
    assert outcome.code == 0
    assert "shardwright train [--dry-run]" in outcome.out
    assert "shardwright sample RUN_DIR" in outcome.out
    assert "shardwright checkpoints RUN_DIR [--verify]" in outcome.out


def test_every_command_has_its_own_page(shardwright: Shardwright) -> None:
    for command in COMMANDS:
        pages = [
            shardwright(*words)
            for words in ((command, "--help"), (command, "-h"), ("help", command), ("-h", command))
        ]
        assert {(page.code, page.err) for page in pages} == {(0, "")}, command
        assert len({page.out for page in pages}) == 1, command
        assert pages[0].out.startswith(
            "Compose a run out of groups"
            if command in ("train", "prepare")
            else f"usage: shardwright {command}"
        )
    page = shardwright("data", "show", "--help")
    assert (page.code, page.err) == (0, "")
    assert page.out.startswith("usage: shardwright data show")
    outcome = shardwright("data", "shwo")
    assert outcome.code == BAD_INPUT
    assert "invalid choice: 'shwo'" in outcome.err
    outcome = shardwright("help", "resum")
    assert (outcome.code, outcome.err) == (
        2,
        "error: unknown command resum: did you mean resume?\n",
    )
    assert shardwright("help").out == shardwright("help", "--help").out == shardwright("-h").out


def test_help_names_every_exit_code(shardwright: Shardwright) -> None:
    text = shardwright("help").out.partition("Exit codes\n")[2]
    for code in (0, FAILED, BAD_INPUT, RESUMABLE, INTERRUPTED, READER_GONE):
        assert re.search(rf"\b{code}\b", text), code


@pytest.mark.parametrize(
    "words",
    [
        *("train --info defaults-tree", "train --cfg job", "train --help", "help"),
        *("resume --help", "status all"),
    ],
)
def test_a_reader_that_leaves_early_ends_a_command_quietly(words: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("nonsense: 1\n")
    started = subprocess.Popen(
        [sys.executable, "-m", "shardwright", *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    started.stdout.close()
    assert started.stderr is not None
    with started.stderr:
        assert started.stderr.read() == ""
    assert started.wait() == READER_GONE


def test_no_command_is_bad_input(shardwright: Shardwright) -> None:
    assert shardwright().code == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "error: unknown command trian: did you mean train?\n"),
        (
            "xyz",
            f"error: unknown command xyz: there are {', '.join(COMMANDS[:-1])} and requeue\n",
        ),
        (
            "seed=1",
            "error: seed=1 comes after a command: shardwright train seed=1\n",
        ),
    ],
)
def test_unknown_command_names_the_nearest(
    shardwright: Shardwright, word: str, message: str
) -> None:
    outcome = shardwright(word)
    assert (outcome.code, outcome.err) == (2, message)


def test_train_help_lists_groups_and_options(shardwright: Shardwright) -> None:
    outcome = shardwright("train", "--help")
    assert outcome.code == 0
    assert "strategy: auto, ddp, fsdp, fsdp_grad_op, fsdp_hybrid" in outcome.out
    assert "shardwright train experiment=demo" in outcome.out


def test_cfg_prints_the_composed_config(shardwright: Shardwright) -> None:
    outcome = shardwright("train", "--cfg", "job", "strategy=zero3", "trainer.max_steps=7")
    tree = yaml.safe_load(outcome.out)
    assert (tree["strategy"]["kind"], tree["strategy"]["stage"]) == ("zero", 3)
    assert tree["trainer"]["max_steps"] == 7


def test_dry_run_prints_config_engine_environment_and_command(
    shardwright: Shardwright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # what a user has set is not set again
    outcome = shardwright(
        *("train", "--dry-run", "experiment=demo", "run_dir=my run", "launcher.device=cpu")
    )
    assert (outcome.code, outcome.err) == (0, "")
    parts = re.split(r"^# .*\n", outcome.out, flags=re.MULTILINE)[1:]
    config, engine, environment, command = parts
    run = from_tree(yaml.safe_load(config))
    assert run.run_dir == str(tmp_path / "my run")
    assert run.launcher.device == "cpu"
    assert json.loads(engine)["zero_optimization"]["stage"] == 2
    assert "DS_ACCELERATOR=cpu\n" in environment
    assert shlex.split(command)[-3:] == ["-m", "shardwright.train", str(tmp_path / "my run")]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize(
    "override",
    [
        "strategy.extra={wall_clock_breakdown: true, zero_optimization: {legacy_stage1: false}}",
        "strategy.extra.wall_clock_breakdown=true",
        "strategy.extra.zero_optimization.legacy_stage1=false",
    ],
)
def test_keys_of_deepspeed_are_given_like_all_others(
    shardwright: Shardwright, prefix: str, override: str
) -> None:
    outcome = shardwright(
        "train", "--dry-run", "strategy=zero2", "launcher.device=cpu", prefix + override
    )
    assert (outcome.code, outcome.err) == (0, "")
    settings = json.loads(outcome.out.split("# engine settings\n")[1].split("\n\n")[0])
    if "wall_clock" in override:
        assert settings["wall_clock_breakdown"] is True
    if "legacy_stage1" in override:
        assert settings["zero_optimization"]["legacy_stage1"] is False
    assert settings["zero_optimization"]["stage"] == 2


def test_dry_run_of_a_multirun_shows_each_job(shardwright: Shardwright, tmp_path: Path) -> None:
    outcome = shardwright(
        "train", "--dry-run", "seed=1,2", "-m", "sweep_dir=sweep", "launcher.device=cpu"
    )
    assert outcome.code == 0
    assert re.findall(r"^run_dir: (.*)$", outcome.out, re.MULTILINE) == [
        str(tmp_path / "sweep" / number) for number in "01"
    ]
    assert os.listdir(tmp_path) == []


def test_dry_run_shows_what_cannot_run_here_and_says_so(
    shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    outcome = shardwright("train", "--dry-run", "experiment=gpt2_small_clm")
    assert outcome.code == 2
    assert "--nproc-per-node=8" in outcome.out
    assert outcome.err.startswith("error: launcher.device=cuda, but this machine shows no NVIDIA")


def test_launcher_side_imports_no_torch(tmp_path: Path) -> None:
    program = """
import sys
from shardwright.launchers.__main__ import main
code = main(["train", "--dry-run", "experiment=demo", "launcher.device=cpu"])
libraries = {"torch", "transformers", "deepspeed", "accelerate", "datasets", "huggingface_hub"}
heavy = libraries & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""
    done = python(tmp_path, "-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_shows_where_values_come_from(tmp_path: Path) -> None:
    # Hydra sets up logging for it, which lasts as long as the process.
    done = python(tmp_path, "-m", "shardwright", "train", "--info", "defaults-tree")
    assert done.returncode == 0
    assert "strategy: ddp" in done.stdout


def test_sample_passes_everything_on(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "shardwright", "sample", "no such run", "--prompt", "a 'b'")
    assert done.returncode == 2
    assert "error: no such run holds no model" in done.stderr


def python(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
