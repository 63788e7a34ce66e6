"""What is right and wrong with this machine for a training run: looked at without torch.

A function that looks is thin; one that judges is pure and takes what was seen.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from shardwright.launchers.machine.facts import Machine, addresses, default_interface, is_reached_by
from shardwright.train.config import OPTIMIZERS
from shardwright.train.process.open_files import needed_open_files, raised
from shardwright.train.program import PACKAGES
from shardwright.train.strategy.zero import nvme
from shardwright.train.strategy.zero.operators import is_abandoned
from shardwright.train.units import counted

MIB, GIB = 2**20, 2**30
PROBE_BYTES = 256 * MIB
"""What the disk check writes and reads."""
SLOW_DISK_BYTES_PER_SECOND = 50 * MIB
"""Less than a single spinning disk: a checkpoint of a 1B model (12 GB) takes four minutes."""
SMALL_SHARED_MEMORY_BYTES = 128 * MIB
"""Docker's default is 64 MiB, in which NCCL and data loaders fail with a bus error."""
CLOCK_SKEW_SECONDS = 2.0
RENDEZVOUS_PORT = 29500
"""torchrun's own default."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: Literal["ok", "note", "wrong"]
    """A note may cost speed or comfort; what is wrong stops runs."""
    text: str
    remedy: str = ""


def look(
    directory: Path,
    machine: Machine,
    environment: Mapping[str, str],
    *,
    world_size: int = 1,
    gpu_ids: Sequence[int] | None = None,
) -> list[Finding]:
    """Return all findings about this machine.

    ``directory`` is where runs are to go, ``world_size`` how many ranks a run is to have, and
    ``gpu_ids`` which GPUs, by nvidia-smi's numbers; None is all.
    """
    return [
        *python_and_packages(installed()),
        *gpus(chosen(_nvidia_smi(), gpu_ids)),
        *build_tools(),
        *operators(_deepspeed_operators(environment), _abandoned_locks()),
        *cores(machine.cores, _cpu_quota()),
        *host_memory(_meminfo(), _cgroup_memory_limit()),
        *shared_memory(_size_of("/dev/shm")),
        *limits(*resource.getrlimit(resource.RLIMIT_NOFILE), world_size),
        *disk(directory),
        *host_name(socket.gethostname(), addresses()),
        *port(RENDEZVOUS_PORT),
        *settings(environment),
    ]


# --- versions -----------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Return the version of every installed package, by its canonical name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def python_and_packages(
    versions: Mapping[str, str], requirements: Mapping[str, Sequence[str]] | None = None
) -> Iterator[Finding]:
    """Compare what is installed with what this project and the engines it stands on ask for.

    ``requirements`` holds, by package, the requirement strings of its metadata.
    """
    asked = _requirements(versions) if requirements is None else requirements
    problems = list(_unmet(versions, asked))
    for package, requirement, found in problems:
        what = f"{package} needs {requirement}, " + (f"found {found}" if found else "not installed")
        yield Finding("packages", "wrong", what, f"pip install '{requirement}'")
    if not problems:
        names = ("torch", "transformers", "accelerate", "deepspeed")
        stack = ", ".join(f"{name} {versions.get(name, '?')}" for name in names)
        yield Finding("packages", "ok", f"Python {platform.python_version()}, {stack}")


def _requirements(versions: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the requirements of this project and of its direct dependencies."""
    try:
        own = importlib.metadata.requires("shardwright") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        project = PACKAGES / "pyproject.toml"
        own = tomllib.loads(project.read_text())["project"]["dependencies"]
    found = {"shardwright": own}
    for line in own:
        name = canonicalize_name(Requirement(line).name)
        if name in versions:
            found[name] = importlib.metadata.requires(name) or []
    return found


def _unmet(
    versions: Mapping[str, str], requirements: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, str | None]]:
    for package, lines in requirements.items():
        for line in lines:
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = versions.get(canonicalize_name(requirement.name))
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                yield package, f"{requirement.name}{requirement.specifier}", found


# --- devices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi tells."""

    names: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    driver_cuda: tuple[int, int] | None = None
    """The newest CUDA that the driver serves."""
    links: tuple[str, ...] = ()
    """Kinds of connection between two of them, such as NV18, PIX, SYS."""
    torch_cuda: tuple[int, int] | None = None
    """The CUDA that torch was built with; None for a CPU build."""


def chosen(seen: Gpus | None, gpu_ids: Sequence[int] | None) -> Gpus | None:
    """Return what is told of some GPUs alone, but for how they are linked. Pure."""
    if seen is None or gpu_ids is None or max(gpu_ids) >= len(seen.names):
        return seen
    memory = seen.memory_bytes
    return replace(
        seen,
        names=tuple(seen.names[number] for number in gpu_ids),
        memory_bytes=tuple(memory[number] for number in gpu_ids)
        if len(memory) == len(seen.names)
        else memory,
        links=seen.links if len(gpu_ids) > 1 else (),
    )


def gpus(seen: Gpus | None) -> Iterator[Finding]:
    """Judge the GPUs; None stands for a machine without nvidia-smi."""
    if seen is None or not seen.names:
        yield Finding("gpus", "ok", "none; ranks run on the CPU")
        return
    kinds = dict.fromkeys(seen.names)
    counts = ", ".join(f"{seen.names.count(name)} x {name}" for name in kinds)
    memory = f"{min(seen.memory_bytes) / GIB:.0f} GiB each" if seen.memory_bytes else ""
    links = f"linked by {', '.join(dict.fromkeys(seen.links))}" if seen.links else ""
    text = ", ".join(part for part in (counts, memory, links) if part)
    if len(kinds) > 1:
        yield Finding(
            "gpus",
            "note",
            f"{text}: not all alike, the slowest sets the pace",
            "choose some of one kind with launcher.gpu_ids",
        )
    else:
        yield Finding("gpus", "ok", text)
    if seen.torch_cuda is None:
        yield Finding(
            "gpus",
            "wrong",
            "there are GPUs, but the installed torch is a CPU build",
            "install torch with CUDA: see https://pytorch.org/get-started/locally",
        )
    elif seen.driver_cuda is not None and seen.driver_cuda[0] < seen.torch_cuda[0]:
        have = ".".join(map(str, seen.driver_cuda))
        need = ".".join(map(str, seen.torch_cuda))
        yield Finding(
            "gpus",
            "wrong",
            f"the driver supports CUDA {have}, torch was built with {need}",
            "update the driver, or install a torch for an older CUDA",
        )
    if any(link in ("SYS", "NODE") for link in seen.links):
        yield Finding(
            "gpus",
            "note",
            "some GPUs reach each other only through the CPU's interconnect",
            "keep shards within GPUs that are linked better, with strategy=fsdp_hybrid",
        )


def parse_links(topology: str) -> tuple[str, ...]:
    """Return the kinds of links between GPUs in what `nvidia-smi topo -m` prints."""
    links = []
    for line in topology.splitlines():
        cells = line.split()
        if cells and re.fullmatch(r"GPU\d+", cells[0]):
            links += [
                cell for cell in cells[1:] if re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", cell)
            ]
    return tuple(links)


def _nvidia_smi() -> Gpus | None:
    table = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    if table is None:
        return None
    rows = [line.rpartition(",") for line in table.splitlines() if "," in line]
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", _output("nvidia-smi") or "")
    local = re.search(r"\+cu(\d+)(\d)$", importlib.metadata.version("torch"))
    return Gpus(
        names=tuple(name.strip() for name, _, _ in rows),
        memory_bytes=tuple(int(float(size)) * MIB for _, _, size in rows if _is_number(size)),
        driver_cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        links=parse_links(_output("nvidia-smi", "topo", "-m") or "") if len(rows) > 1 else (),
        torch_cuda=(int(local[1]), int(local[2])) if local else None,
    )


# --- what is compiled ---------------------------------------------------------------------------


def build_tools() -> Iterator[Finding]:
    """Look for the compiler and the build tool of what is compiled on first use."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    compiler = next((name for name in ("c++", "g++") if shutil.which(name)), None)
    if compiler is None:
        compiled = [name for name, facts in OPTIMIZERS.items() if facts.is_compiled]
        yield Finding(
            "compiler",
            "note",
            f"no C++ compiler: {', '.join(['trainer.compile', *compiled])} and DeepSpeed's own "
            "operators cannot be built",
            "install one (Debian and Ubuntu: apt install g++)",
        )
        return
    version = (_output(compiler, "-dumpfullversion") or "?").strip()
    has_ninja = shutil.which("ninja", path=path) is not None
    has_nvcc = shutil.which("nvcc") is not None
    text = (
        f"{compiler} {version}" + (", ninja" if has_ninja else "") + (", nvcc" if has_nvcc else "")
    )
    if has_ninja:
        yield Finding("compiler", "ok", text)
    else:
        yield Finding("compiler", "note", f"{text}, but no ninja", "pip install ninja")


def operators(
    compatible: Mapping[str, bool] | None, abandoned_locks: Sequence[Path]
) -> Iterator[Finding]:
    """Judge which of DeepSpeed's operators will build; None where DeepSpeed cannot be asked."""
    uses = {"async_io": "strategy=zero3_nvme", "cpu_adam": "strategy.cpu_adam=deepspeed"}
    if compatible is None:
        yield Finding(
            "operators",
            "wrong",
            "deepspeed does not import",
            "see why: DS_ACCELERATOR=cpu python -c 'import deepspeed'",
        )
    else:
        for operator, use in uses.items():
            if compatible.get(operator):
                yield Finding("operators", "ok", f"{operator} builds ({use})")
            else:
                needs = "libaio-dev" if operator == "async_io" else "g++"
                yield Finding(
                    "operators",
                    "note",
                    f"{operator} cannot be built, {use} will not start",
                    f"apt install {needs}, if you need it",
                )
    for lock in abandoned_locks:
        yield Finding(
            "operators",
            "wrong",
            f"{lock} is left by a build that was killed: the next one waits forever",
            f"remove it: rm {lock}",
        )


_PROBE_DEEPSPEED = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()):
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
    builders = AsyncIOBuilder(), CPUAdamBuilder()
    found = {builder.NAME: bool(builder.is_compatible(verbose=False)) for builder in builders}
print("operators", json.dumps(found))
"""


def _deepspeed_operators(environment: Mapping[str, str]) -> dict[str, bool] | None:
    """Ask DeepSpeed itself, in a child: its import costs seconds and prints."""
    path = os.pathsep.join([environment.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    child = subprocess.run(
        [sys.executable, "-c", _PROBE_DEEPSPEED],
        env={"DS_ACCELERATOR": "cpu", **environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    found = re.search(r"^operators (.*)$", child.stdout, re.MULTILINE)
    if found is None:
        return None
    answer = json.loads(found[1])
    # DeepSpeed is content with the library; its build needs the headers too.
    answer["async_io"] = answer.get("async_io", False) and nvme.can_be_built()
    return answer


def _abandoned_locks() -> list[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # the second below torch's own default
    return [lock for lock in locks if is_abandoned(lock)]


# --- cores and memory ---------------------------------------------------------------------------


def cores(usable: int, quota: float | None) -> Iterator[Finding]:
    """Judge the CPU cores that this process may use against its control group's share of time."""
    if quota is not None and quota < usable:
        yield Finding(
            "cores",
            "note",
            f"{usable} cores visible, but the control group grants the time of {quota:g}",
            f"set OMP_NUM_THREADS so that all ranks together use {max(1, int(quota))}",
        )
    else:
        yield Finding("cores", "ok", f"{usable}")


def host_memory(meminfo: Mapping[str, int], limit: int | None) -> Iterator[Finding]:
    """Judge host memory; all in bytes."""
    total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    capped = limit is not None and limit < total
    text = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    if capped:
        assert limit is not None
        text += f", limited to {limit / GIB:.1f} GiB by the control group"
    if min(available, limit if capped and limit is not None else available) < 2 * GIB:
        yield Finding(
            "memory",
            "wrong",
            f"{text}: less than the ranks' libraries take",
            "free some, or raise the limit (docker --memory, SLURM --mem)",
        )
    else:
        yield Finding("memory", "ok", text)


def shared_memory(total_bytes: int | None) -> Iterator[Finding]:
    """Judge the size of /dev/shm, through which NCCL and data loaders pass tensors."""
    if total_bytes is None:
        yield Finding("/dev/shm", "wrong", "is not there", "mount a tmpfs at /dev/shm")
    elif total_bytes < SMALL_SHARED_MEMORY_BYTES:
        yield Finding(
            "/dev/shm",
            "wrong",
            f"{total_bytes / MIB:.0f} MiB: ranks die with a bus error",
            "docker run --shm-size=8g (or --ipc=host)",
        )
    else:
        yield Finding("/dev/shm", "ok", f"{total_bytes / GIB:.1f} GiB")


def limits(open_files: int, hard_open_files: int, world_size: int) -> Iterator[Finding]:
    """Judge the number of files and sockets that a rank may have open once it has raised it."""
    allowed, needed = raised(open_files, hard_open_files), needed_open_files(world_size)
    if 0 <= allowed < needed:
        yield Finding(
            "open files",
            "wrong",
            f"{allowed:,} allowed a process at most; {counted(world_size, 'rank')} may need "
            f"{needed:,} each, as gloo connects every rank with every other one",
            "have the hard limit raised: nofile in /etc/security/limits.conf, LimitNOFILE= of the "
            "service, docker run --ulimit nofile=65536",
        )
    else:
        yield Finding("open files", "ok", f"{allowed} allowed a process")


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    pairs = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _cgroup_memory_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (text := _text(path)) and text.strip().isdecimal():
            return int(text)
    return None


def _cpu_quota() -> float | None:
    """Return how many cores' time the control group grants, None where it is not limited."""
    if text := _text("/sys/fs/cgroup/cpu.max"):
        quota, _, period = text.partition(" ")
        return int(quota) / int(period) if quota.isdecimal() else None
    quota = (_text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1").strip()
    period = (_text("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "100000").strip()
    return int(quota) / int(period) if int(quota) > 0 else None


# --- disk and clock -----------------------------------------------------------------------------


def disk(directory: Path, probe_bytes: int = PROBE_BYTES) -> Iterator[Finding]:
    """Write, flush and read back a file where runs go, and compare its clock with ours."""
    place = directory
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < 2 * probe_bytes:
        yield Finding(
            "disk",
            "wrong",
            f"{free / MIB:.0f} MiB free in {place}: no room for a checkpoint",
            "free some, or choose another run_dir",
        )
        return
    try:
        written, read, skew = timed(place, probe_bytes)
    except OSError as error:
        yield Finding(
            "disk",
            "wrong",
            f"{place} is not writable: {error.strerror}",
            "choose another run_dir, or change its permissions",
        )
        return
    text = (
        f"{place} ({_file_system(place)}): {free / GIB:.0f} GiB free, writes "
        f"{written / MIB:,.0f} MiB/s, reads {read / MIB:,.0f} MiB/s"
    )
    if written < SLOW_DISK_BYTES_PER_SECOND:
        yield Finding(
            "disk",
            "note",
            f"{text}: slow",
            "put run_dir on a faster file system, or set checkpoint.async=true",
        )
    else:
        yield Finding("disk", "ok", text)
    yield from clock(skew, _is_synchronised())


def clock(skew_seconds: float, is_synchronised: bool | None) -> Iterator[Finding]:
    """Judge this machine's clock against the file system's and by what timedatectl says."""
    if abs(skew_seconds) > CLOCK_SKEW_SECONDS:
        yield Finding(
            "clock",
            "note",
            f"{skew_seconds:+.1f} s from the clock of the file system: times in "
            "logs of several nodes will not agree",
            "let chrony or ntpd set this machine's clock",
        )
    elif is_synchronised is False:
        yield Finding(
            "clock",
            "note",
            "is not synchronised with a time server",
            "timedatectl set-ntp true",
        )
    else:
        yield Finding("clock", "ok", "agrees with the file system's")


def timed(place: Path, size: int) -> tuple[float, float, float]:
    """Return bytes per second written (fsync included) and read, and the clocks' difference."""
    block = os.urandom(4 * MIB)
    with tempfile.NamedTemporaryFile(dir=place, prefix=".shardwright-doctor-") as file:
        began = time.monotonic()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = size / (time.monotonic() - began)
        skew = time.time() - os.stat(file.name).st_mtime
        # Out of the page cache, which would be measured instead.
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.monotonic()
        while file.read(len(block)):
            pass
        return written, size / (time.monotonic() - began), skew


def _file_system(place: Path) -> str:
    best, kind = "", "?"
    for line in (_text("/proc/mounts") or "").splitlines():
        _, mount, found, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if place.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def _is_synchronised() -> bool | None:
    found = (_output("timedatectl", "show", "-p", "NTPSynchronized", "--value") or "").strip()
    return {"yes": True, "no": False}.get(found)


# --- network ------------------------------------------------------------------------------------


def host_name(name: str, found: Sequence[str]) -> Iterator[Finding]:
    """Judge whether other ranks can reach this machine by its name."""
    if is_reached_by(found):
        yield Finding("host name", "ok", f"{name} resolves to {found[0]}")
        return
    what = f"resolves to {found[0]} only" if found else "does not resolve"
    yield Finding(
        "host name",
        "note",
        f"{name} {what}: other nodes cannot reach it by that name",
        "runs on several nodes take the interface of the default route, "
        f"{default_interface() or 'of which there is none'}; set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME for another",
    )


def port(number: int) -> Iterator[Finding]:
    """Judge whether ranks can listen, and whether torchrun's own port is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("", 0))
        except OSError as error:
            yield Finding(
                "ports",
                "wrong",
                f"no port can be listened on: {error.strerror}",
                "look at the firewall and at net.ipv4.ip_local_port_range",
            )
            return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError:
            yield Finding(
                "ports",
                "note",
                f"{number}, torchrun's default rendezvous port, is in use",
                "a single node takes a free one; for several give another port",
            )
            return
    yield Finding("ports", "ok", f"{number} and others are free")


# --- environment --------------------------------------------------------------------------------

_COSTLY: dict[str, tuple[Callable[[str], bool], str]] = {
    "CUDA_LAUNCH_BLOCKING": (lambda v: v == "1", "every kernel is waited for"),
    "TORCH_DISTRIBUTED_DEBUG": (lambda v: v.upper() == "DETAIL", "every collective is checked"),
    "NCCL_P2P_DISABLE": (lambda v: v == "1", "GPUs exchange tensors through host memory"),
    "NCCL_IB_DISABLE": (lambda v: v == "1", "nodes exchange tensors over TCP"),
    "NCCL_SHM_DISABLE": (lambda v: v == "1", "GPUs of one node exchange tensors over TCP"),
    "TORCHDYNAMO_DISABLE": (lambda v: v == "1", "trainer.compile does nothing"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (lambda v: v != "", "every tensor is allocated again"),
}


def settings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Name the variables of the environment that make runs slow, or that do something else."""
    clean = True
    for name, (is_costly, effect) in _COSTLY.items():
        value = environment.get(name, "")
        if name in environment and is_costly(value):
            clean = False
            yield Finding("environment", "note", f"{name}={value}: {effect}", f"unset {name}")
    if clean:
        yield Finding("environment", "ok", "no variable is set that is known to slow runs down")


# --- looking ------------------------------------------------------------------------------------


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _size_of(path: str) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_frsize * found.f_blocks


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdecimal()
