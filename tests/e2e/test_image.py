"""The image is built as its recipe says, and trains: by whichever of three programs is there.

What a build needs to reach packages from here, such as a mounted pip.conf, is given from outside:
IMAGE_BUILD_FLAGS="-v /etc/pip.conf:/etc/pip.conf:ro" pytest -m slow tests/e2e/test_image.py
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BASE = "docker.io/library/debian:bookworm-slim"
NAME = "localhost/shardwright-test"
BUILDERS = ("docker", "podman", "buildah")
BUILD_SECONDS = 3600
"""CUDA's libraries are gigabytes."""
RUN_SECONDS = 1800
"""A compiler takes minutes, on a machine that has more to do a quarter of an hour."""
ANYONE = "4321:4321"
"""A user whom the image does not know, as `--user $(id -u):$(id -g)` gives."""

InImage = Callable[..., "subprocess.CompletedProcess[str]"]


def called(*words: str, seconds: float = RUN_SECONDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=seconds, cwd=ROOT)


def builder() -> str:
    """Return the program that builds; skip where none can."""
    for name in BUILDERS:
        if shutil.which(name) and called(name, "images").returncode == 0:
            break
    else:
        pytest.skip(f"none of {', '.join(BUILDERS)} is installed and works")
    if BASE.split("/")[-1] not in called(name, "images", "--format", IMAGES).stdout:
        pulled = called(name, "pull", BASE)
        if pulled.returncode:
            pytest.skip(f"{BASE} is not here and cannot be fetched: {pulled.stderr.strip()[-200:]}")
    return name


IMAGES = "{{.Repository}}:{{.Tag}}"


@pytest.fixture(scope="module")
def in_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InImage]:
    """Return a function that runs the image's command, with a folder as /work."""
    name = builder()
    # Without a network of its own, and without privileges that a container here may lack.
    plain = ["--isolation", "chroot"] if name == "buildah" else []
    flags = shlex.split(os.environ.get("IMAGE_BUILD_FLAGS", ""))
    where = [*plain, "--pull=never"] if name == "buildah" else []
    built = called(
        *(name, "build", *where, *flags, "-f", "container/Dockerfile", "-t", NAME, "."),
        seconds=BUILD_SECONDS,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    container = called(name, "from", "--pull=never", NAME).stdout.strip() if plain else ""

    def run(*words: str, work: Path, user: str = "0:0") -> subprocess.CompletedProcess[str]:
        mount = ["-v", f"{work}:/work", "--user", user]
        if container:  # which knows no entry point
            return called(name, "run", *plain, *mount, container, "--", "shardwright", *words)
        return called(name, "run", "--rm", *mount, NAME, *words)

    yield run
    if container:
        called(name, "rm", container)
    called(name, "rmi", NAME)


def work_of_anyone(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    return work


@pytest.mark.timeout(BUILD_SECONDS + RUN_SECONDS)
def test_a_user_without_a_home_trains_in_it(in_image: InImage, tmp_path: Path) -> None:
    work = work_of_anyone(tmp_path)
    words = ["experiment=demo", "trainer.max_steps=2", "launcher.nproc_per_node=2", "run_dir=run"]
    trained = in_image("train", *words, work=work, user=ANYONE)
    assert trained.returncode == 0, trained.stdout[-2000:] + trained.stderr[-2000:]
    assert (work / "run/final/model.safetensors").is_file()
    assert (work / ".cache/shardwright").is_dir(), "what was prepared outlives the container"


@pytest.mark.timeout(RUN_SECONDS + 60)
def test_its_compiler_builds_deepspeeds_own_adam(in_image: InImage, tmp_path: Path) -> None:
    work = work_of_anyone(tmp_path)
    words = ["experiment=demo", "trainer.max_steps=1", "launcher.nproc_per_node=1", "run_dir=run"]
    trained = in_image(
        *("train", *words, "strategy=zero2_offload", "strategy.cpu_adam=deepspeed"), work=work
    )
    assert trained.returncode == 0, trained.stdout[-2000:] + trained.stderr[-2000:]
    facts = json.loads((work / "run/engine.json").read_text())
    assert facts["optimizer"]["class"] == "DeepSpeedCPUAdam"
    assert [*(work / ".cache/torch_extensions").rglob("cpu_adam.so")]


def test_it_says_what_this_machine_is_like(in_image: InImage, tmp_path: Path) -> None:
    work = work_of_anyone(tmp_path)
    looked = in_image("doctor", work=work, user=ANYONE)
    found = [line for line in looked.stdout.splitlines() if line.startswith(("ok", "WRONG"))]
    assert {"compiler", "packages"} <= {line.split()[1] for line in found if line[:2] == "ok"}
