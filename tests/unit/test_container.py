"""The recipes of images: alike, and of files and extras that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

from tests.e2e.wheels import FOLDERS, built

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "container" / "Dockerfile").read_text()
APPTAINER = (ROOT / "container" / "apptainer.def").read_text()


def of_docker() -> dict[str, str]:
    """Return where each file that the image is made of comes to lie in it."""
    found = {}
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            found[source] = f"{target}{source}" if target.endswith("/") else target
    return found


def of_apptainer() -> dict[str, str]:
    section = APPTAINER.split("%files\n")[1].split("\n\n")[0]
    return dict(line.split() for line in section.splitlines())


def test_both_images_are_made_of_the_same_and_of_what_is_there() -> None:
    assert of_docker() == of_apptainer()
    for source, target in of_docker().items():
        assert (ROOT / source).exists()
        assert target == f"/src/{source}"
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"From: {base}\n" in APPTAINER


def test_both_have_the_same_extras_which_there_are() -> None:
    (extras,) = re.findall(r'^ARG EXTRAS="(.+)"$', DOCKERFILE, re.MULTILINE)
    assert f"/src/container/install.sh /src {extras}\n" in APPTAINER
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split()) <= project["optional-dependencies"].keys()


def test_both_are_made_and_run_by_the_same_commands() -> None:
    (steps,) = re.findall(r"^RUN (.+)$", DOCKERFILE, re.MULTILINE)
    (extras,) = re.findall(r'^ARG EXTRAS="(.+)"$', DOCKERFILE, re.MULTILINE)
    section = APPTAINER.split("%post\n")[1].split("\n\n")[0]
    assert [*map(str.strip, section.splitlines())] == steps.replace("$EXTRAS", extras).split(" && ")
    (path,) = re.findall(r"^ENV (PATH=\S+)", DOCKERFILE, re.MULTILINE)
    assert f"    export {path}\n" in APPTAINER
    (command,) = re.findall(r'^ENTRYPOINT \["(.+)"\]$', DOCKERFILE, re.MULTILINE)
    assert f'    exec {command} "$@"\n' in APPTAINER


def test_what_is_copied_is_all_that_a_wheel_is_built_of(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for name in of_docker():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    wheel = built(source, tmp_path / "dist")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in FOLDERS:
        there = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.yaml")}
        assert {f"shardwright/{name}" for name in there} <= set(names)
        assert any(name.startswith(f"shardwright/{folder}/") for name in names)


def test_the_script_is_one_that_a_shell_reads() -> None:
    script = ROOT / "container" / "install.sh"
    assert script.stat().st_mode & 0o111, "recipes run it as it is"
    subprocess.run(["sh", "-n", str(script)], check=True)
