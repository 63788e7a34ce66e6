"""The files of a run directory are named in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from shardwright.train.checkpoint.format import layout
from shardwright.train.run_directory import names

ROOT = Path(__file__).resolve().parents[2]
HOMES = ("train/run_directory/names.py", "train/checkpoint/format/layout.py")
IN_A_RUN = {
    value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)
}
IN_A_CHECKPOINT = {
    *(layout.MANIFEST, layout.TRAINER_STATE, layout.LOSS_SCALE, layout.PARAMETER_ORDER),
}
OF_OTHERS = {
    "launchers/slurm/script.py: 'job.sbatch'": "the template of all job scripts, in this project",
}


def test_the_names_are_those_that_scripts_rely_on() -> None:
    assert {
        *("config.yaml", "resumes", "data.json", "tokenizer", "model", "metrics.jsonl"),
        *("history.jsonl", "provenance.json", "engine.json", "owner.json", "stopped.json"),
        *("checkpoints", "final", "logs", "run.log", "job.sbatch"),
    } <= IN_A_RUN
    assert names.rank_log(3) == "rank-3.log"
    assert names.failure(3) == "rank-3.error.json"
    assert Path(names.failure(3)).match(names.FAILURES)
    assert (names.job_log("7"), names.job_log("7", "1")) == ("job-7.log", "job-7_1.log")
    assert Path(names.job_log("7")).match(names.JOB_LOGS)
    assert Path(names.torchrun_log("a")).match(names.TORCHRUN_LOGS)


def test_no_name_is_spelled_twice() -> None:
    values = [v for n, v in vars(names).items() if n.isupper() and isinstance(v, str)]
    assert len(values) == len(set(values))


def test_nothing_else_spells_them() -> None:
    found = {
        f"{name}: {text!r}"
        for room in ("train", "launchers", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        if (name := str(path.relative_to(ROOT))) not in HOMES
        for text in spelled(ast.parse(path.read_text()))
    }
    assert found == set(OF_OTHERS)


def spelled(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module spells: files' anywhere, folders' where they are paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_file = "." in node.value
            if is_file and node.value in IN_A_RUN | IN_A_CHECKPOINT:
                yield node.value
        for part in _as_path(node):
            if isinstance(part, ast.Constant) and part.value in IN_A_RUN:
                yield part.value


def _as_path(node: ast.AST) -> Iterator[ast.expr]:
    """Yield what a node takes for a part of a path, or gives a name of its own."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        yield node.right
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("Path", ".joinpath", ".with_name", ".glob", "path.join")
    ):
        yield from node.args
    elif isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".name"):
        yield from node.comparators
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
        *("FILE", "FOLDER", "NOTE", "NAME", "TAG"),
    ):
        yield node.value


def test_a_spelled_name_is_seen() -> None:
    seen = [
        *("run / 'checkpoints' / 'engine'", "x = 'metrics.jsonl'", "Path(run, 'logs')"),
        *("path.name == 'final'", "TAG = 'engine'", "path.with_name('tokenizer')"),
    ]
    assert [len(set(spelled(ast.parse(text)))) for text in seen] == [2, 1, 1, 1, 1, 1]
    assert not list(spelled(ast.parse("facts['engine'], tree['model'], 'logs', kind == 'wandb'")))
