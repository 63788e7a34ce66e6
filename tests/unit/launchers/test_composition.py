"""Hydra composes a run once, and by libyaml; what comes of it is what Hydra alone makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra._internal.hydra
import omegaconf._utils
import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from shardwright.launchers.composition import compose as compose_module
from shardwright.launchers.composition import quickly
from shardwright.launchers.composition.compose import CONF, compose
from shardwright.train.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(CONF.rglob("*.yaml"))
COMMANDS: tuple[list[str], ...] = (
    [],
    ["experiment=demo"],
    ["experiment=demo", "hydra.mode=RUN"],
    ["model=llama_tiny", "strategy=zero2", "strategy.offload_optimizer=true", "seed=3"],
    ["objective=mlm", "model=roberta_tiny", "~experiment", "name='a=b'"],
    ["seed=1,2", "-m"],
    ["-m", "model=gpt2_tiny,llama_tiny", "seed=7"],
    ["-m", "seed=3"],
    ["seed=1,2", "hydra.mode=MULTIRUN"],
)
REFUSED = (
    ["seed=1,2"],
    ["model=none_such"],
    ["trainer.max_step=3"],
    ["hydra.mode=SIDEWAYS"],
    ["seed=${none_such"],
    ["~strategy.kind_of"],
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return what Hydra itself composes from now on: the overrides of each time."""
    calls: list[list[str]] = []
    sound = ConfigLoaderImpl._load_configuration_impl

    def counting(self: ConfigLoaderImpl, *args: Any, **options: Any) -> Any:
        calls.append(list(options.get("overrides", args[1:2])))
        return sound(self, *args, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counting)
    return calls


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def seen_of(arguments: list[str], patch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Return the runs, or the error, that arguments compose to, and all that Hydra knows of it."""
    wholes: list[Any] = []
    sound = HydraConfig.set_config

    def kept(self: HydraConfig, config: Any) -> None:
        wholes.append(OmegaConf.to_container(config.hydra))
        sound(self, config)

    patch.setattr(HydraConfig, "set_config", kept)
    try:
        jobs = compose(list(arguments))
    except UserError as error:
        return str(error), repr(error.__cause__)
    finally:
        patch.setattr(HydraConfig, "set_config", sound)
    trees = [(OmegaConf.to_container(j.tree), j.choices, j.number, j.arguments) for j in jobs]
    return trees, wholes


@pytest.mark.parametrize("arguments", [*COMMANDS, *REFUSED], ids=" ".join)
def test_what_is_composed_or_refused_is_what_hydra_alone_makes_of_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = str(tmp_path / "scratch")
    monkeypatch.setattr(compose_module.tempfile, "TemporaryDirectory", lambda: nullcontext(scratch))
    ours = seen_of(arguments, monkeypatch)
    monkeypatch.setattr(quickly, "composing", lambda conf: nullcontext())
    assert seen_of(arguments, monkeypatch) == ours
    assert isinstance(ours[0], str) == (arguments in REFUSED)


def test_an_option_of_the_user_may_ask_for_several_runs(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    option = tmp_path / "mine" / "experiment" / "both.yaml"
    option.write_text("hydra:\n  mode: MULTIRUN\n")
    jobs = compose([f"--config-dir={tmp_path / 'mine'}", "experiment=both", "seed=1,2"])
    assert [(job.number, job.tree.seed) for job in jobs] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("arguments", [[], ["experiment=demo", "seed=3"], ["hydra.mode=RUN"]])
def test_a_run_is_composed_once(arguments: list[str], counted: list[list[str]]) -> None:
    (job,) = compose(arguments)
    assert len(counted) == 1
    assert job.number is None


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_is_refused_is_composed_no_oftener_than_by_hydra(
    arguments: list[str], counted: list[list[str]]
) -> None:
    with pytest.raises(UserError):
        compose(arguments)
    assert len(counted) <= 2


def test_hydra_is_as_it_was_once_all_is_composed() -> None:
    before = (hydra._internal.hydra.ConfigLoaderImpl, omegaconf._utils.get_yaml_loader)
    compose([])
    with pytest.raises(UserError):
        compose(["model=none_such"])
    assert (hydra._internal.hydra.ConfigLoaderImpl, omegaconf._utils.get_yaml_loader) == before


def test_libyaml_reads_the_shipped_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    sound = yaml.reader.Reader.__init__

    def noted(self: Any, stream: Any) -> None:
        read.append(str(getattr(stream, "name", None)))
        sound(self, stream)

    monkeypatch.setattr(yaml.reader.Reader, "__init__", noted)
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "mine.yaml"
    own.write_text("seed: 7\n")
    (job,) = compose([f"--config-dir={tmp_path}", "experiment=mine"])
    assert job.tree.seed == 7
    assert str(own) in read
    assert not [name for name in read if Path(name).is_relative_to(CONF)]


@pytest.mark.parametrize("arguments", [["train", "--dry-run"], ["train", "seed=none", "--dry-run"]])
def test_no_garbage_is_looked_for_while_a_run_is_composed(arguments: list[str]) -> None:
    program = f"""
import gc, sys
searches = []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
from shardwright.launchers import __main__
begun = len(searches)
code = __main__.main({arguments!r})
print(begun, len(searches), gc.isenabled(), code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    begun, ended, is_enabled, code = done.stderr.split()[-4:]
    assert (is_enabled, code) == ("True", "0" if len(arguments) == 2 else "2")
    # Two are of each search: its begin and its end. What follows a composition takes a few.
    assert int(ended) - int(begun) < 60, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_a_shipped_file_says_the_same_to_libyaml(path: Path) -> None:
    plain = omegaconf._utils.get_yaml_loader()
    text = path.read_text(encoding="utf-8")
    expected = yaml.load(text, Loader=plain)
    found = yaml.load(text, Loader=quickly.libyaml_loader(plain))
    assert repr(found) == repr(expected)  # the types and the order too


def test_libyaml_keeps_what_omegaconf_makes_of_values_and_of_keys_that_come_twice() -> None:
    plain = omegaconf._utils.get_yaml_loader()
    swift = quickly.libyaml_loader(plain)
    text = "[1e-3, 1_000, 2020-01-01, .5, 1e3, 0x1f, yes, null, 12:30, .inf, '1', 1.5e+2]"
    assert repr(yaml.load(text, Loader=swift)) == repr(yaml.load(text, Loader=plain))
    for loader in (swift, plain):
        with pytest.raises(yaml.constructor.ConstructorError, match="found duplicate key a"):
            yaml.load("a: 1\na: 2\n", Loader=loader)


def test_a_bad_file_of_the_user_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    path.write_text("seed: 7\nname: [\n")
    with pytest.raises(UserError, match=f"cannot read {path}, line 3: expected the node content"):
        compose([f"--config-dir={tmp_path}", "experiment=mine"])


def test_a_dry_run_imports_nothing_that_others_need(tmp_path: Path) -> None:
    unused = {"tqdm", "unittest.mock", "asyncio"}
    assert imported(tmp_path, "train", "--dry-run") & unused == set()


def test_help_imports_neither_hydra_nor_the_config(tmp_path: Path) -> None:
    unused = {"hydra", "pydantic", "yaml", "tqdm", "difflib", "importlib.metadata", "inspect"}
    assert imported(tmp_path, "--help") & unused == set()


def imported(cwd: Path, *arguments: str) -> set[str]:
    """Return the modules that a command imports."""
    program = f"""
import sys
from shardwright.launchers.__main__ import main
code = main({list(arguments)!r})
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.split())
