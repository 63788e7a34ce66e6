"""What a wheel brings: one name, which works beside files of the names that the tree has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cli import ROOT, on_one_rank
from tests.e2e.wheels import FOLDERS, built

OTHERS = ("tests", "docs", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def binaries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of a fresh environment, in which the wheel is installed.

    It sees the libraries of this one, and not the checkout: a path that a .pth names has its own
    .pth files ignored.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel))
    subprocess.run([sys.executable, "-m", "pip", f"--python={python}", *install], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(libraries)))
    return python.parent


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A directory of a user who has modules of every name that the tree has."""
    for name in (*FOLDERS, *OTHERS):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is the user\\'s ' + __file__)")
    return tmp_path


def run(cwd: Path, *command: str | Path) -> str:
    """Run a command as in a shell of its own, and return what it prints."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    ended = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=plain | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "this is the user's" not in ended.stdout + ended.stderr
    return ended.stdout


def test_it_has_one_name_and_all_of_the_tree_below_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    (information,) = {name for name in (n.partition("/")[0] for n in names) if "dist-info" in name}
    assert {name.partition("/")[0] for name in names} == {"shardwright", information}
    there = {name for name in names if not name.startswith(information)}
    expected = {
        f"shardwright/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "site.sh"
    }
    own = {f"shardwright/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    assert there == expected | own


def test_an_archive_of_the_sources_makes_the_same(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    again = built(archive, tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_its_modules_are_found_by_that_name_alone(binaries: Path, beside: Path) -> None:
    code = (
        "import importlib.util, sys, shardwright.train.config, shardwright.launchers.__main__\n"
        f"for name in {FOLDERS + OTHERS}:\n"
        "    print(importlib.util.find_spec(name).origin)\n"
        "print(*shardwright.__path__)\n"
        "print(sorted(sys.modules.keys() & {'torch', 'transformers', 'deepspeed', 'datasets'}))"
    )
    *found, path, heavy = run(beside, binaries / "python", "-c", code).splitlines()
    assert found == [str(beside / f"{name}.py") for name in FOLDERS + OTHERS]
    assert Path(path).is_relative_to(binaries.parent)
    assert heavy == "[]"


@pytest.mark.wide
def test_a_run_from_its_start_to_its_recovered_weights(
    binaries: Path, beside: Path, tiny: Callable[[str], tuple[str, ...]]
) -> None:
    settings = (
        *("strategy=ddp", "precision=fp32", "trainer.max_steps=2"),
        *("data.eval_fraction=0", "trainer.eval_max_samples=null"),
    )
    run(beside, binaries / "shardwright", "train", *tiny("clm"), *settings, "launcher=torchrun")
    said = run(beside, binaries / "python", "-m", "shardwright", "status", "run")
    assert "done" in said
    run(beside, binaries / "shardwright", "recover", "run", "out")
    final, out = (beside / name / "model.safetensors" for name in ("run/final", "out"))
    assert out.read_bytes() == final.read_bytes()
    facts = json.loads((beside / "run" / "provenance.json").read_text())
    assert facts["argv"][-3:-1] == ["-m", "shardwright.train"]
    assert str(ROOT) not in json.dumps(facts)


def test_what_a_job_runs_is_there(
    binaries: Path, beside: Path, tiny: Callable[[str], tuple[str, ...]]
) -> None:
    """Each module of a job's script, under whatever starts its ranks."""
    modules: set[str] = set()
    for starts in ("ranks", "torchrun"):
        given = ["launcher=slurm", "launcher.nproc_per_node=1", f"launcher.starts={starts}"]
        dry_run = ("train", "--dry-run", *on_one_rank(tiny("clm")), *given)
        script = run(beside, binaries / "shardwright", *dry_run)
        modules |= set(
            re.findall(r"(?:-m|--module) ((?:shardwright|train|launchers)[\w.]*)", script)
        )
    assert modules == {
        *("shardwright.train", "shardwright.train.data"),
        *("shardwright.launchers.relay", "shardwright.launchers.job_end"),
    }
    for module in modules:
        code = f"import importlib.util as u; assert u.find_spec({module!r})"
        run(beside, binaries / "python", "-c", code)
