"""Shell completion knows the subcommand, in bash itself."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.launchers import __main__ as launchers
from shardwright.launchers.commands.completion import complete
from tests.unit.launchers.fakes import ROOT

COMMANDS = ("train", "sample")
FLAG = re.compile(r"(?<!\S)--[a-z][a-z-]*")
BEHIND_HYDRA = {"train", "prepare", "plan"}  # whose own page their --help shows


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shardwright ", ["train", "sample", "--help", "--version"]),
        ("shardwright tr", ["train", "translate"]),
        ("shardwright sample runs/", []),
        ("shardwright checkpoints runs/", []),
        ("shardwright checkpoints --ver", ["--verify"]),
        ("shardwright recover runs/x out --dt", ["--dtype"]),
        ("shardwright push --pu", ["--public"]),
        ("shardwright logs runs/a --f", ["--follow"]),
        ("shardwright cancel runs/a --", ["--help", "--now"]),
        ("shardwright resume runs/a --co", ["--config-dir"]),
        ("shardwright join runs/a --", ["--help", "--node-rank"]),
        ("shardwright data sh", ["show"]),
        ("shardwright data verify --a", ["--all"]),
        ("shardwright data clean --o", ["--older-than"]),
        ("shardwright data show runs/", []),
        ("shardwright data show --js", ["--json"]),
        ("shardwright inspect --he", ["--held-out", "--help"]),
        ("shardwright inspect model=gpt2_s", "shardwright model=gpt2_s"),
        ("shardwright data nothing --", ["--help"]),
        ("shardwright nothing --", []),
        ("shardwright --help --", []),
        ("shardwright plan --st", ["--states-only"]),
        ("shardwright plan ha", ["hardware="]),
        ("shardwright plan hardware=h200", ["hardware=h200", "hardware=h200_nvl"]),
        ("shardwright plan hardware.devi", ["hardware.device=", "hardware.devices="]),
        ("shardwright plan hardware=h200 --json strat", "shardwright strat"),
        ("shardwright sweep --re", ["--retry-failed"]),
        ("shardwright sweep sweep=", ["sweep=learning_rates", "sweep=strategies"]),
        ("shardwright sweep seed=1,2 sweep.li", ["sweep.limit="]),
        ("shardwright sweep sweep_", ["sweep_dir="]),
        ("shardwright sweep sweep.seeds=2 strat", "shardwright strat"),
        ("shardwright train --dr", ["--dry-run"]),
        ("shardwright train strategy=deep", ["strategy=deepspeed_file"]),
        ("shardwright sweep strategy=a", ["strategy=accelerate_file", "strategy=auto"]),
        ("shardwright train strategy=deepspeed_file strat", ["strategy.path="]),
        ("shardwright train strategy=accelerate_file seed=1 na", "shardwright seed=1 na"),
        ("shardwright train ", "shardwright "),
        ("shardwright train strat", "shardwright strat"),
        ("shardwright train --dry-run seed=1 na", "shardwright seed=1 na"),
        (
            "shardwright train experiment=demo trainer.",
            "shardwright experiment@_global_=demo trainer.",
        ),
        ("shardwright train experiment=de", "shardwright experiment=de"),
    ],
)
def test_line_that_hydra_gets(line: str, expected: list[str] | str) -> None:
    commands = COMMANDS if line == "shardwright " else launchers.COMMANDS
    assert complete(line, commands, launchers.module_of) == expected


@pytest.mark.parametrize("command", sorted({*launchers.COMMANDS} - BEHIND_HYDRA))
def test_flags_are_those_of_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(launchers.module_of(command)).main(["--help"])
    shown = capsys.readouterr().out
    flags = {flag for line in re.findall(r"^  (-.*)$", shown, re.M) for flag in FLAG.findall(line)}
    line = f"shardwright {command} -"
    assert complete(line, launchers.COMMANDS, launchers.module_of) == sorted(flags)


def test_flags_of_train_are_hydras_and_ours() -> None:
    assert complete("shardwright train -", launchers.COMMANDS, launchers.module_of) == [
        *("--cfg", "--config-dir", "--dry-run", "--help", "--hydra-help", "--info"),
        *("--multirun", "--package", "--resolve"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shardwright tra", "train"),
        ("shardwright train strat", "strategy."),
        ("shardwright train strategy=ze", "strategy=zero0 strategy=zero1 strategy=zero2"),
        ("shardwright train experiment=demo_m", "experiment=demo_mlm"),
        ("shardwright train strategy=zero3 experiment=demo trainer.max_s", "trainer.max_steps="),
    ],
)
def test_tab_in_bash(tmp_path: Path, line: str, expected: str) -> None:
    program = tmp_path / "shardwright"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m shardwright "$@"\n')
    program.chmod(0o755)
    # What bash does on TAB: call the function that is registered for the program's name.
    script = f"""
eval "$(shardwright train -sc install=bash)"
function=$(complete -p shardwright | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
COMP_LINE='{line}'
COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=($COMP_LINE)
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$function
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(expected)
    assert done.stderr == ""
