"""`shardwright runs`: which runs there are, which are wanted and how they are shown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright.launchers import columns
from shardwright.launchers.commands.runs import as_columns
from shardwright.launchers.composition.options import model_name, options, strategy_name
from shardwright.launchers.sweep import directory
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.watching import filters
from shardwright.launchers.watching.rows import COLUMNS, found, rows
from shardwright.train.errors import UserError
from shardwright.train.run_directory.metrics import HeldOut, held_out
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.launchers.run_directories import a_run, a_trained_run

shardwright = pytest.fixture(make_shardwright)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with two runs, a sweep of two and a run that cannot be read."""
    a_trained_run(tmp_path / "runs" / "good", [8.0, 6.0, 7.0, 6.5])
    zero = {"kind": "zero", "stage": 2}
    a_trained_run(
        tmp_path / "runs" / "poor", [9.0, 9.5], strategy=zero, trainer={"learning_rate": 0.5}
    )
    sweep_dir = tmp_path / "sweeps" / "lr"
    points = tuple(
        directory.Point(n, {"seed": n}, (f"seed={n}",)) for n, _ in enumerate(("first", "second"))
    )
    for point in points:
        a_trained_run(sweep_dir / str(point.number), [4.0, 5.0], seed=point.number)
    directory.write_plan(directory.Sweep(sweep_dir, "lr", 0.0, SweepConfig(), (), points))
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("nonsense: 1\n")
    (tmp_path / "runs" / "no run").mkdir()
    return tmp_path


def names(shardwright: Shardwright, *words: str) -> list[str]:
    outcome = shardwright("runs", "--json", *words)
    assert outcome.code == 0, outcome.err
    return [row["run"] for row in json.loads(outcome.out)]


def test_all_runs_of_a_working_directory_are_shown(shardwright: Shardwright, here: Path) -> None:
    outcome = shardwright("runs")
    head, *lines = outcome.out.splitlines()
    names_of_columns = "run settings model strategy step best held out loss tokens/s age state"
    assert head.split() == names_of_columns.split()
    assert [line.split()[0] for line in lines] == [
        *("runs/broken", "runs/good", "runs/poor", "sweeps/lr/0", "sweeps/lr/1")
    ]
    assert "cannot be read: " in lines[0]
    cells = "- gpt2-2x64 ddp 4/4 3.0000 3.2500 6.5000 504"
    assert lines[1].split()[1:9] == cells.split()
    assert lines[1].endswith("  done")
    assert " zero2 " in lines[2]
    assert lines[3].split()[1] == "seed=0"
    assert names(shardwright, "runs") == [*("runs/broken", "runs/good", "runs/poor")]
    assert names(shardwright, "sweeps/lr", "runs/good")[-1] == "runs/good"
    assert names(shardwright, str(here)) == names(shardwright)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["state=done"], "good poor 0 1"),
        (["state=unreadable"], "broken"),
        (["state=*not set*"], "broken"),
        (["state!=done"], "broken"),
        (["eval_loss<3"], "0 1"),
        (["best_eval_loss<=3", "run=runs/*"], "good"),
        (["eval_loss >= 3.25"], "good poor"),
        (["strategy=zero2"], "poor"),
        (["strategy=Z*"], "poor"),
        (["strategy.stage=2"], "poor"),
        (["trainer.learning_rate>=1e-1"], "poor"),
        (["seed=1"], "1"),
        (["model=gpt2-*", "seed!=1", "loss==5"], "0"),
        (["model.kind=gpt2", "data=stdlib", "precision=fp32", "step=2"], "poor 0 1"),
        (["trainer.max_epochs=null", "trainer.fused_loss=auto", "loss>9"], "poor"),
        (["tokens_per_second>502.5"], "good"),
        (["age>1d"], "good poor 0 1"),
        (["age<1h"], ""),
        (["state=done", "--sort", "loss"], "0 1 good poor"),
        (["state=done", "--sort", "best_eval_loss", "--reverse"], "poor good 0 1"),
        (["--sort", "seed", "--reverse"], "1 good poor 0 broken"),
        (["--sort", "run"], "broken good poor 0 1"),
        (["--reverse"], "1 0 poor good broken"),
    ],
)
def test_filters_and_order(
    shardwright: Shardwright, here: Path, words: list[str], expected: str
) -> None:
    found_ = [name.rpartition("/")[2] for name in names(shardwright, *words)]
    assert sorted(found_) == sorted(expected.split())
    if "--sort" in words or "--reverse" in words:
        assert found_ == expected.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lerning_rate<1"], "runs have no lerning_rate: did you mean trainer.learning_rate?"),
        (["best_loss<1"], "runs have no best_loss: did you mean best_eval_loss?"),
        (["lr<1"], "runs have no lr: did you mean trainer.learning_rate?"),
        (["xyzzy=1"], "runs have no xyzzy.\n       There are the columns run, state, model, "),
        (["xyzzy=1"], "the metrics eval_loss, loss, samples, step, tokens, tokens_per_second;"),
        (["--sort", "los"], "runs have no los: did you mean loss?"),
        (["state=dnoe"], "state=dnoe: no run has this state; did you mean done? there are waiting"),
        (["loss<low"], "loss<low: < needs a number behind it, such as loss<3"),
        (["age>7"], "age>7: > needs a time such as 2d, 12h or 30min behind it, such as age<2d"),
        (["model="], "model= names no value; model=null finds the runs that have none"),
        (["=3"], '=3 is not a filter: write KEY=VALUE, KEY!=VALUE, "KEY<VALUE"'),
        (["nowhere"], "nowhere does not exist; give a run, a sweep or a directory of them"),
        (["runs/no run"], "no runs in "),
    ],
)
def test_bad_input(shardwright: Shardwright, here: Path, words: list[str], message: str) -> None:
    outcome = shardwright("runs", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert not outcome.out


def test_json_and_csv_have_all_of_it(shardwright: Shardwright, here: Path) -> None:
    words = ("trainer.learning_rate>0.1", "state=done")
    (row,) = json.loads(shardwright("runs", "--json", *words).out)
    assert row.pop("age") > 0
    assert row == {
        "run_dir": str(here / "runs/poor"),
        "run": "runs/poor",
        "state": "done",
        "state_text": "done",
        "model": "gpt2-2x64",
        "strategy": "zero2",
        "step": 2,
        "total_steps": 2,
        "best_eval_loss": 4.75,
        "best_step": 2,
        "eval_loss": 4.75,
        "loss": 9.5,
        "tokens_per_second": 502.0,
        "settings": {},
        "metrics": {
            **{"step": 2, "samples": 16, "tokens": 1024, "loss": 9.5},
            **{"tokens_per_second": 502.0, "eval_loss": 4.75},
        },
        "trainer.learning_rate": 0.5,
    }
    table = list(csv.DictReader(io.StringIO(shardwright("runs", "--csv").out)))
    assert list(table[0]) == ["run_dir", *COLUMNS, "state_text", "seed"]
    assert [line["seed"] for line in table] == ["", "0", "0", "0", "1"]
    assert [line["best_eval_loss"] for line in table] == ["", "3.0", "4.75", "2.5", "2.5"]
    assert json.loads(shardwright("runs", "--json", "loss>99").out) == []


def test_that_none_fits_or_none_is_there_is_said(
    shardwright: Shardwright, tmp_path: Path, here: Path
) -> None:
    outcome = shardwright("runs", "loss>99", "state=done")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "none of 5 runs fits loss>99 state=done\n"
    (here / "runs").rename(here / "elsewhere")
    (here / "sweeps").rename(here / "other")
    outcome = shardwright("runs")
    assert outcome.err == f"no runs in runs/ and sweeps/ of {here}; give their paths\n"


@pytest.mark.parametrize("width", [200, 120, 80, 50])
def test_the_table_fits_the_terminal(here: Path, width: int) -> None:
    there = rows(found([], here), here)
    lines = columns.table(as_columns(there, ["seed"]), width)
    assert max(map(len, lines)) <= width
    head = lines[0].split()
    assert [head[0], head[-1]] == ["run", "state"]
    assert {"best", "seed"} <= set(head)
    assert ("strategy" in head) == (width == 200)


def test_a_directory_named_like_a_filter_is_a_directory(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    a_trained_run(tmp_path / "runs" / "seed=1", [1.0])
    a_trained_run(tmp_path / "runs" / "seed=2", [1.0])
    assert names(shardwright, "runs/seed=1") == ["runs/seed=1"]


def test_what_lies_in_a_run_is_not_a_run(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "runs" / "a")
    a_run(run_dir / "copy")
    assert found([], tmp_path) == [run_dir]
    assert found([tmp_path / "runs"], tmp_path) == [run_dir]
    assert found([run_dir], tmp_path) == [run_dir]
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "metrics.jsonl").touch()  # its config is gone
    assert rows(found([], tmp_path), tmp_path)[1].state.text.startswith("cannot be read: ")


def test_held_out_losses_are_found_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert held_out(path) is None
    lines: list[dict[str, Any]] = [{"step": n, "loss": 1.0, "eval_x": 0} for n in range(3000)]
    lines[100] |= {"eval_loss": 2.0, "eval_loss/de": 0.1}
    lines[5] |= {"eval_loss": 3.0}
    lines[200] |= {"eval_loss": 2.5}
    lines[300] |= {"eval_loss": None}
    path.write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"eval_loss": 0.1, "ste')
    assert held_out(path) == HeldOut(2.0, 100, 2.5, 200)
    path.write_text('{"step": 1, "loss": 2.0}\n')
    assert held_out(path) is None


def test_options_are_told_from_their_values() -> None:
    for name, section in options("strategy").items():
        assert strategy_name({**section, "nvme_path": "/disk"} if "nvme" in name else section) == (
            name
        )
    for name, section in options("model").items():
        if name not in ("pretrained", "from_config"):
            assert model_name({**section, "dropout": 0.3, "vocab_size": 99}) == name
    for kind in ("pretrained", "from_config"):
        assert model_name({"kind": kind, "name": "/models/roberta-base"}) == "roberta-base"
    small = options("model")["gpt2_small"]
    assert model_name({**small, "num_hidden_layers": 3}) == "gpt2-3x768"


def test_a_filter_compares_what_can_be_compared() -> None:
    with pytest.raises(UserError, match="needs a number"):
        filters.parsed("model<gpt2")
    assert filters.parsed("trainer.max_steps<=10_000").number == 10_000.0
    assert filters.parsed("age<2d").number == 172_800.0
