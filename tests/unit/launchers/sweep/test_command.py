"""`shardwright sweep` before anything starts: what it shows, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shardwright.launchers.composition.compose import CONF, group_options
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.sweep import definition, directory, grid, request
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.directory import Point, PointState, Sweep
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.launchers.sweep.claims import CLAIMS

shardwright = pytest.fixture(make_shardwright)
SHIPPED = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
TINY = ("model=gpt2_tiny", "launcher=local", "launcher.device=cpu", "strategy=single")


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "detect", lambda environment: Machine(cores=2))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_composes_and_is_checked(shardwright: Shardwright, name: str) -> None:
    outcome = shardwright("sweep", f"sweep={name}", "model=gpt2_tiny", "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    tree = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())
    assert tree["name"] == name
    assert f"sweeps/{name}-" in outcome.out
    config = request.of([f"sweep={name}"], group_options()).config
    points = grid.points(config, grid.axes(config, group_options()))
    assert len(points) == {"learning_rates": 15, "strategies": 10}[name]
    rows = [line.split()[0] for line in outcome.out.splitlines() if "not started" in line]
    assert rows[: len(points)] == [str(point.number) for point in points]


def test_a_dry_run_shows_the_points_and_leaves_nothing(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    words = ("trainer.learning_rate=1e-4,3e-4", "sweep.seeds=2", "sweep_dir=a", "--dry-run")
    outcome = shardwright("sweep", *TINY, *words)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["point", "state", "learning_rate", "seed"]
    assert lines[1].split() == ["0", "not", "started", "0.0001", "0"]
    assert lines[4].split() == ["3", "not", "started", "0.0003", "1"]
    assert f"{tmp_path}/a: 4 not started; runs 1 at a time, each on core" in outcome.out
    assert "# point 0, the first of 4 new ones\n" in outcome.out
    started = f"trainer.learning_rate=0.0001 seed=0 run_dir={tmp_path}/a/0"
    assert lines[-1].endswith(started)
    assert list(tmp_path.iterdir()) == []


def test_a_word_of_the_command_line_goes_before_the_named_sweep() -> None:
    options = group_options()
    wide = request.of(["sweep=learning_rates", "trainer.learning_rate=1,2", "a.b=1"], options)
    assert wide.config.grid == {"trainer.learning_rate": "1,2"}
    assert wide.arguments == ("a.b=1",)
    fixed = request.of(["sweep=learning_rates", "trainer.learning_rate=1"], options)
    assert (fixed.config.grid, fixed.config.overrides) == ({}, ("trainer.learning_rate=1",))
    own = request.of(["sweep=learning_rates", "sweep.seeds=[7]", "sweep.search.kind=grid"], options)
    assert (own.config.seeds, own.config.search.kind) == ((7,), "grid")


def test_a_sweep_of_the_users_own(shardwright: Shardwright, tmp_path: Path) -> None:
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "seeds.yaml").write_text(
        "seeds: 3\noverrides: [model=gpt2_tiny]"
    )
    words = ("sweep=seeds", *TINY, "--config-dir", "mine", "--dry-run")
    outcome = shardwright("sweep", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "sweeps/seeds-" in outcome.out
    assert f"train --config-dir={tmp_path}/mine" in outcome.out


BAD = {
    "nothing varies": ([], "nothing varies in this sweep: give a key several values"),
    "an empty grid": (["seed=range(3,1)"], "seed=range(3,1): has no value to run, the range is"),
    "a range that is none": (["seed=range(a,b)"], "seed=range(a,b): is not a range ("),
    "bounds": (["trainer.learning_rate=interval(1,2)"], "has bounds and no values, so that a"),
    "an unknown setting": (["trainer.lr=1,2"], "unknown key trainer.lr: use trainer.learning_r"),
    "an unknown option": (["strategy=zero2,zero9"], "strategy=zero9: there is no such option;"),
    "an unknown sweep": (
        ["sweep=learning_rate"],
        "sweep=learning_rate: there is no such sweep; did you mean learning_rates? there are "
        "learning_rates, strategies, and those of --config-dir DIR in DIR/sweep/",
    ),
    "a bad key": (["seed=1,2", "sweep.limt=3"], "unknown key sweep.limt=3: did you mean sweep.l"),
    "a grid by its key": (
        ["sweep.grid.seed=3"],
        "what varies is written as it is for a run, seed=",
    ),
    "no seeds": (["sweep.seeds=0"], "sweep.seeds=0: must be at least 1"),
    "seeds twice": (["seed=1,2", "sweep.seeds=2"], "sweep.seeds=2 repeats each point, but seed is"),
    "an idle exclusion": (
        ["seed=1,2", "sweep.exclude=[{seed:3}]"],
        'sweep.exclude={"seed": 3}: fits no combination of this sweep, which varies seed=1,2',
    ),
    "a judge without a search": (
        ["seed=1,2", "sweep.search.pruner=asha"],
        "search.pruner=asha is read by a search, and search.kind=none runs each combination; set "
        "sweep.search.kind (grid tries each one too), or leave it out",
    ),
    "devices of a job": (
        ["seed=1,2", "launcher=slurm", "sweep.devices_per_point=2"],
        "sweep.devices_per_point=2, but with launcher=slurm a point has what its job asks for; set "
        "launcher.gpus_per_node or launcher.nproc_per_node, or leave it out",
    ),
    "a flag": (["seed=1,2", "--resume"], "unknown flag --resume"),
    "a setting as a flag": (["--seed=1,2"], "leave the dashes out and write seed=1,2"),
    "no such directory": (["nowhere"], "cannot read the override 'nowhere'"),
    "two directories": (["seed=1,2", "sweep_dir=a", "sweep_dir=b"], "a and b: a sweep has one dir"),
    "no such folder": (["seed=1,2", "--config-dir", "no"], "--config-dir no is not a directory"),
    "one run's place": (["seed=1,2", "run_dir=a"], "run_dir=a is one directory, and a sweep has"),
    "two launchers": (
        ["launcher=local,slurm"],
        "launcher=local,slurm: the points of a sweep are started here or as jobs, not both",
    ),
    "nodes that join": (
        ["seed=1,2", "launcher=torchrun", "launcher.nodes=2", "launcher.head_address=a"],
        "launcher.nodes=2, but with launcher=torchrun the other nodes of each point would have",
    ),
    "what one of its points does not read": (
        ["trainer.optimizer=adamw,adafactor", "trainer.adam_beta2=0.98"],
        "trainer.adam_beta2=0.98 is read with trainer.optimizer=adamw, muon, adamw_8bit or "
        "schedule_free only, but trainer.optimizer=adafactor, which has no AdamW; set "
        "trainer.optimizer=adamw, or leave trainer.adam_beta2=0.95 (point 1)",
    ),
    "no such hostfile": (
        ["seed=1,2", "launcher=deepspeed", "launcher.hostfile=none"],
        "launcher.hostfile=none cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_nothing(
    shardwright: Shardwright, tmp_path: Path, case: str
) -> None:
    words, message = BAD[case]
    own = [
        word
        for word in TINY
        if not any(w.partition("=")[0] == word.partition("=")[0] for w in words)
    ]
    outcome = shardwright("sweep", *own, *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_it_says_how_it_is_called(shardwright: Shardwright) -> None:
    outcome = shardwright("sweep")
    assert outcome.code == 2
    assert outcome.err.startswith("usage: shardwright sweep [SWEEP_DIR]")
    assert "--retry-failed" in shardwright("sweep", "--help").out


def test_what_is_wrong_with_many_points_is_said_once(shardwright: Shardwright) -> None:
    long = ("data.sequence_length=512", "seed=1,2,3")
    outcome = shardwright("sweep", *TINY, *long)
    assert outcome.code == 2
    assert outcome.err.count("data.sequence_length=512 is longer than the 256 positions") == 1
    assert "(point" not in outcome.err
    some = shardwright("sweep", *TINY, "data.sequence_length=64,512", "seed=1,2")
    assert some.err.count("is longer than the 256 positions") == 1
    assert some.err.rstrip().endswith("(points 2, 3)")


def test_two_problems_are_both_told(shardwright: Shardwright) -> None:
    outcome = shardwright(
        "sweep", *TINY, "trainer.micro_batch_size=0,8", "seed=1", "model.dropout=2,0"
    )
    assert "trainer.micro_batch_size=0: must be at least 1" in outcome.err
    assert "model.dropout=2: must be at most 1" in outcome.err.replace("less than", "at most")


# --- a directory that is there --------------------------------------------------------------------


def begun(place: Path) -> Sweep:
    config = SweepConfig(grid={"seed": "1,2"}, overrides=TINY)
    points = tuple(Point(n, {"seed": n + 1}, (f"seed={n + 1}",)) for n in range(2))
    sweep = Sweep(place, "sweep", 1.0, config, TINY, points, str(place.parent))
    place.mkdir(parents=True)
    directory.write_plan(sweep)
    return sweep


def test_a_directory_of_another_sweep_is_refused_with_what_differs(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    begun(tmp_path / "a")
    same = ("sweep_dir=a", "--dry-run")
    other = shardwright("sweep", *TINY, "trainer.max_steps=7", "seed=1,2", *same)
    assert other.code == 2
    assert (
        "is that of another sweep: all its points have nothing where trainer.max_steps=7 is as"
        in other.err
    )
    keys = shardwright("sweep", *TINY, "trainer.max_steps=7,8", *same)
    assert "it varies seed, and this one trainer.max_steps; give another sweep_dir" in keys.err
    fewer = shardwright("sweep", *TINY, "seed=2,3", *same)
    assert "its points 0 (seed=1) are not among those asked for" in fewer.err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    full = shardwright("sweep", *TINY, "seed=1,2", "sweep_dir=b")
    assert "sweep_dir=b" in full.err.replace(f"{tmp_path}/", "")
    assert "is no sweep's and is not empty" in full.err
    bare = shardwright("sweep", "b")
    assert "is not a directory of a sweep: cannot read" in bare.err


def test_a_grown_grid_takes_up_new_points(shardwright: Shardwright, tmp_path: Path) -> None:
    sweep = begun(tmp_path / "sweeps" / "a")
    directory.write_state(sweep.directory, PointState(0, "done", values={"eval_loss": 2.5}))
    grown = shardwright("sweep", *TINY, "seed=1,2,3", "--dry-run")
    assert grown.code == 0
    rows = [line.split() for line in grown.out.splitlines()[:4]]
    assert rows[0] == ["point", "state", "seed", "eval_loss"]
    assert rows[1:] == [
        ["0", "done", "1", "2.5"],
        ["1", "not", "started", "2"],
        ["2", "not", "started", "3"],
    ]
    assert f"{sweep.directory}: 1 done, 2 not started" in grown.out
    by_name = shardwright("sweep", str(sweep.directory), "seed=1,2,3,4", "--dry-run")
    assert "1 done, 3 not started" in by_name.out
    limited = shardwright(
        "sweep", str(sweep.directory), "seed=range(1,9)", "sweep.limit=3", "--dry-run"
    )
    assert "1 done, 2 not started" in limited.out
    assert json.loads((sweep.directory / "sweep.json").read_text())["points"][-1]["number"] == 1


def test_a_sweep_that_another_owns_is_left_alone(shardwright: Shardwright, tmp_path: Path) -> None:
    # The same process may lock a file twice, so that another one has to.
    sweep = begun(tmp_path / "a")
    argv = [sys.executable, "-c", CLAIMS, str(sweep.directory)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        outcome = shardwright("sweep", str(sweep.directory))
        assert outcome.code == 2
        assert f"belongs to a sweep that is alive (process {other.pid} on" in outcome.err
        other.kill()
    assert directory.state_of(sweep.directory, 0).attempts == 0


def test_train_says_where_sweeps_are(shardwright: Shardwright) -> None:
    outcome = shardwright("train", "sweep=strategies")
    assert "unknown key sweep: use `shardwright sweep sweep=NAME`" in outcome.err


def test_the_definitions_keys_are_known() -> None:
    assert {"limit", "seeds", "search.trials"} <= set(definition.known_keys())


def test_train_with_several_runs_says_that_there_is_a_command_for_them(
    shardwright: Shardwright,
) -> None:
    several = shardwright("train", "-m", *TINY, "seed=1,2", "--dry-run")
    assert several.code == 0
    assert several.err.count("`shardwright sweep` with the same words") == 1
    assert "shardwright sweep" not in shardwright("train", *TINY, "--dry-run").err
