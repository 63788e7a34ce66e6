"""Where runs go: `~` is the user's home, and no two runs are given one directory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers import launch, starting
from shardwright.launchers.composition.errors import with_home_quoted
from shardwright.launchers.machine import directories, names
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.slurm import jobs as slurm
from shardwright.train import config as run_config
from shardwright.train.config import RunConfig
from tests.unit.launchers.configs import config
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

TINY = ("model=gpt2_tiny", "data.sequence_length=64", "launcher.device=cpu", "strategy=ddp")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "the home"
    made.mkdir()
    monkeypatch.setenv("HOME", str(made))
    return made


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ("run_dir=~/run", "run_dir='~/run'"),
        ("data.paths=[~/a/**/*.txt, b.txt,~/c]", "data.paths=['~/a/**/*.txt', b.txt,'~/c']"),
        ("run_dir='~/a b'", "run_dir='~/a b'"),
        ("sweep_dir=a~b", "sweep_dir=a~b"),
        ("~model", "~model"),
    ],
)
def test_a_home_needs_no_quotes(given: str, quoted: str) -> None:
    assert with_home_quoted(given) == quoted


def frozen(text: str) -> Any:
    """Return the config that a dry run prints."""
    return yaml.safe_load(text.partition("config.yaml\n")[2].partition("# engine settings")[0])


def test_settings_that_are_paths_begin_at_home(home: Path, shardwright: Shardwright) -> None:
    (home / "corpus.txt").write_text("a few words " * 100)
    (home / "model").mkdir()
    outcome = shardwright(
        *("train", "--dry-run", "run_dir=~/runs/a", "data=text", "data.paths=[~/corpus.txt]"),
        *("data.cache_dir=~/cache", "tokenizer=pretrained", "tokenizer.name=~/model", *TINY),
    )
    tree = frozen(outcome.out)
    assert tree["run_dir"] == f"{home}/runs/a"
    assert tree["data"]["paths"] == [f"{home}/corpus.txt"]
    assert tree["data"]["cache_dir"] == f"{home}/cache"
    assert tree["tokenizer"]["name"] == f"{home}/model"
    saved = shardwright("train", "--dry-run", *TINY, "data=hub", "data.name=~/model")
    assert frozen(saved.out)["data"]["name"] == f"{home}/model"
    nowhere = shardwright("train", "--dry-run", *TINY, "data=hub", "data.name=./nothere")
    assert "nothere does not exist; give the directory of the data set, or its" in nowhere.err
    sweep = shardwright("train", "--dry-run", "-m", "seed=1,2", "sweep_dir=~/sweep", *TINY)
    # YAML folds a long line at the spaces of a path.
    assert f"run_dir: {home}/sweep/1" in " ".join(sweep.out.split())
    disk = shardwright("train", "--dry-run", *TINY, "strategy=zero3_nvme", "strategy.nvme_path=~/d")
    assert frozen(disk.out)["strategy"]["nvme_path"] == f"{home}/d"


@pytest.mark.parametrize(
    "words",
    [
        *("resume ~/no", "join ~/no", "status ~/no", "logs ~/no", "cancel ~/no", "sync ~/no"),
        *("checkpoints ~/no", "recover ~/no out", "push ~/no a/b", "sample ~/no --prompt=a"),
        *("train --config-dir=~/no", "sample ~/no --prompt=a --strategy=zero3"),
    ],
)
def test_directories_of_commands_begin_at_home(
    words: str, home: Path, shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str], *arguments: object, **options: object) -> None:
        ended = subprocess.run(argv, check=False)  # instead of taking this process's place
        raise SystemExit(ended.returncode)

    monkeypatch.setattr("shardwright.launchers.ranks.child.replace", run)
    outcome = shardwright(*words.split(" "))
    assert outcome.code == 2
    assert f"{home}/no" in outcome.err
    assert "~" not in outcome.err


def resolved(run_dir: Path) -> RunConfig:
    return resolve(config(), Machine(), str(run_dir))


def test_names_that_follow() -> None:
    base = Path("runs/run-20261129-075429")
    assert names.following(base).name == "run-20261129-075429-2"
    assert names.following(names.following(base)).name == "run-20261129-075429-3"


def test_runs_that_begin_together_have_a_directory_each(tmp_path: Path) -> None:
    run = resolved(tmp_path / "runs" / "run-20261129-075429")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: directories.create_named(run, is_generated=True), range(8)))
    places = {str(one.run_dir) for one, _ in made}
    assert len(places) == 8
    for one, _ in made:
        assert run_config.load(Path(str(one.run_dir))) == one


def test_sweeps_that_begin_together_have_a_directory_each(tmp_path: Path) -> None:
    runs = [resolved(tmp_path / "sweeps" / "run-20261129-075429" / str(n)) for n in range(2)]
    with directories.claimed_sweep(runs) as first, directories.claimed_sweep(runs) as second:
        for run in (*first, *second):
            directories.create(run, Path(str(run.run_dir)))
        parents = {Path(str(run.run_dir)).parent for run in (*first, *second)}
        assert len(parents) == 2
        assert first == runs
    assert all(parent.is_dir() for parent in parents)
    with directories.claimed_sweep([resolved(tmp_path / "other" / "sweep" / "0")]):
        pass
    assert not (tmp_path / "other").exists(), "nothing has come of it"


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], Path]], None]:
    """Make a directory just before a run makes its own, and after it has found its name free."""

    check = starting.check

    def before(place: Callable[[Path], Path]) -> None:
        def checked(configs: list[RunConfig], here: Machine) -> None:
            check(configs, here)
            place(Path(str(configs[0].run_dir))).mkdir(parents=True)

        monkeypatch.setattr(starting, "check", checked)

    return before


def test_a_run_here_takes_the_next_free_name(
    shardwright: Shardwright,
    tmp_path: Path,
    another: Callable[[Callable[[Path], Path]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[Path] = []
    monkeypatch.setattr(time, "strftime", lambda *arguments: "20261129-075429")
    monkeypatch.setattr(launch, "prepare", lambda config, claim: 0)

    def run(config: RunConfig, *rest: object) -> int:
        ran.append(Path(str(config.run_dir)))
        return 0

    monkeypatch.setattr(launch, "run_ranks", run)
    another(lambda run_dir: run_dir)
    assert shardwright("train", *TINY).code == 0
    assert ran == [tmp_path / "runs" / "run-20261129-075429-2"]
    assert run_config.load(ran[0]).run_dir == str(ran[0])
    assert list((tmp_path / "runs" / "run-20261129-075429").iterdir()) == []
    ran.clear()
    another(lambda run_dir: run_dir.parent)
    assert shardwright("train", "-m", "seed=1,2", *TINY).code == 0
    assert ran == [tmp_path / "sweeps" / "run-20261129-075429-2" / str(n) for n in range(2)]
    another(lambda run_dir: run_dir)
    refused = shardwright("train", "run_dir=mine", *TINY)
    assert refused.code == 2
    assert "mine exists already" in refused.err, "a name that was asked for is no other"


def test_a_job_takes_the_next_free_name(
    shardwright: Shardwright,
    tmp_path: Path,
    another: Callable[[Callable[[Path], Path]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *arguments: "20261129-075429")
    monkeypatch.setattr(slurm, "submit", lambda command, cwd: "7")
    another(lambda run_dir: run_dir)
    outcome = shardwright("train", *TINY, "launcher=slurm")
    assert outcome.code == 0, outcome.err
    taken = tmp_path / "runs" / "run-20261129-075429-2"
    assert str(taken) in (taken / "job.sbatch").read_text()
    another(lambda run_dir: run_dir.parent)
    assert shardwright("train", "-m", "seed=1,2", *TINY, "launcher=slurm").code == 0
    sweep = tmp_path / "sweeps" / "run-20261129-075429-2"
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "job.sbatch"]
