"""launcher=deepspeed, and the argv of DeepSpeed's command for whatever else starts ranks by it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from shardwright.launchers.kinds.launcher import UNKNOWN, Launcher, Task
from shardwright.launchers.machine import handed_on, hostfile
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import DeepspeedLauncher
from shardwright.train.process.arguments import encoded
from shardwright.train.program import PACKAGES, package_environment

DEEPSPEED_ENVIRONMENT = "deepspeed.env"
"""In a run's directory: the variables that the command hands on to other nodes."""
LAUNCHERS_ALONE = {
    "DS_ENV_FILE",
    "OMPI_MCA_hwloc_base_binding_policy",
    "OMPI_MCA_plm_rsh_args",
}
"""Variables that no rank reads."""
SSH_OPTIONS = (
    *("-o", "BatchMode=yes"),
    *("-o", "ControlMaster=no"),  # one of its own would outlive it, with its streams
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),  # a node that is lost
)
_SAFE = r"[\w@%+=:,./-]+"
"""What arrives through a shell without quotes, and through DeepSpeed's quotes without them."""


class Deepspeed(Launcher[DeepspeedLauncher]):
    """DeepSpeed's own command, on one node or over a hostfile."""

    def command(self, task: Task, python: str, node_rank: int, machine: Machine) -> list[str]:
        launcher = self.section
        switches = ["--bind_cores_to_rank"] if launcher.bind_cores_to_rank else []
        port = str(launcher.head_port or machine.free_port)
        if launcher.hostfile is None:
            return argv(
                python,
                switches=switches,
                port=port,
                # It takes /job/hostfile, where that is, if none is named; /dev/null counts as none.
                hostfile="/dev/null",
                further=[self._ranks_here(machine)],
                program=["--module", task.module, *task.words],
            )
        # Its back end for srun knows no --module (launcher/multinode_runner.py, 0.19.8).
        is_srun = launcher.backend == "slurm"
        named = [_script(task.module)] if is_srun else ["--module", task.module]
        return argv(
            python,
            switches=switches,
            port=port,
            hostfile=launcher.hostfile,
            further=self._over_a_hostfile(),
            program=[*named, *map(encoded, task.words)],
        )

    def _ranks_here(self, machine: Machine) -> str:
        launcher = self.section
        # Beside --num_accelerators it ignores CUDA_VISIBLE_DEVICES (launcher/runner.py, 0.19.8).
        if launcher.gpu_ids is not None:
            return f"--include=localhost:{','.join(map(str, launcher.gpu_ids))}"
        if launcher.device == "cuda" and machine.cuda_visible_devices:
            chosen = machine.cuda_visible_devices.split(",")[: launcher.ranks_per_node]
            return f"--include=localhost:{','.join(name.strip() for name in chosen)}"
        return f"--num_accelerators={launcher.ranks_per_node}"

    def _over_a_hostfile(self) -> list[str]:
        launcher = self.section
        flags = {
            "include": launcher.include,
            "exclude": launcher.exclude,
            "launcher": launcher.backend,
            "launcher_args": self._backend_arguments() or None,
            "master_addr": launcher.head_address,
            "ssh_port": launcher.ssh_port,
        }
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        if launcher.backend == "slurm":
            given.append("--no_ssh_check")
        # A hostfile of one host may name another machine than this one.
        return [*given, "--force_multi"]

    def _backend_arguments(self) -> str:
        launcher = self.section
        if launcher.backend != "slurm":
            return launcher.backend_arguments
        # srun is told the number of ranks only, and may put them anywhere in the allocation; of
        # equal flags it takes the last.
        counts = f"--nodes={launcher.nodes} --ntasks-per-node={launcher.ranks_per_node}"
        return f"{counts} --kill-on-bad-exit=1 {launcher.backend_arguments}".rstrip()

    def variables(self) -> Mapping[str, str]:
        launcher = self.section
        if launcher.hostfile is None:
            return {}
        # DeepSpeed looks for it in the working directory and at home otherwise.
        wanted = {"DS_ENV_FILE": str(Path(str(self.config.run_dir)) / DEEPSPEED_ENVIRONMENT)}
        if launcher.backend == "openmpi":
            # mpirun gives each of two ranks a single core otherwise, whatever their threads.
            wanted["OMPI_MCA_hwloc_base_binding_policy"] = "none"
            if launcher.ssh_port is not None:
                # DeepSpeed tells the port to pdsh only.
                wanted["OMPI_MCA_plm_rsh_args"] = f"-p {launcher.ssh_port}"
        return wanted

    def environment(
        self, machine: Machine, user: Mapping[str, str], *, packages: Path = PACKAGES
    ) -> dict[str, str]:
        found = super().environment(machine, user, packages=packages)
        if self.section.hostfile is None:
            return found
        # Of the user's own it hands on Python's, NCCL's and MLflow's alone.
        return {**handed_on.places(user), **found}

    def files(
        self, environment: Mapping[str, str], machine: Machine = UNKNOWN
    ) -> Mapping[str, str]:
        launcher = self.section
        if launcher.hostfile is None:
            return {}
        wanted = dict(environment) | {"SHARDWRIGHT_RANKS_OF": launcher.backend}
        for name in LAUNCHERS_ALONE & wanted.keys():
            del wanted[name]
        if launcher.backend in ("openmpi", "slurm"):
            wanted |= {
                "MASTER_ADDR": str(launcher.head_address),
                "MASTER_PORT": str(launcher.head_port or machine.free_port),
            }
        lines = (f"{name}={in_quotes(value)}\n" for name, value in wanted.items())
        return {DEEPSPEED_ENVIRONMENT: "".join(lines)}

    def hosts(self) -> Sequence[str]:
        launcher = self.section
        if launcher.hostfile is None:
            return ()
        text = Path(launcher.hostfile).read_text(encoding="utf-8")
        return list(hostfile.hosts(text, launcher.include, launcher.exclude))

    def on_host(self, host: str, script: str) -> list[str]:
        launcher = self.section
        if launcher.backend == "slurm":
            given = shlex.split(launcher.backend_arguments)
            one = ("--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap")
            return ["srun", *one, *given, "sh", "-c", script]
        # As pdsh and mpirun do, both by ssh, but for each node by itself: none of them tells what
        # a node prints from what it has to say, nor hands on what it is told.
        port = [] if launcher.ssh_port is None else ["-p", str(launcher.ssh_port)]
        return ["ssh", "-T", *SSH_OPTIONS, *port, "--", host, f"exec sh -c {shlex.quote(script)}"]

    def problems_with_hosts(self) -> Iterator[str]:
        launcher = self.section
        program = "srun" if launcher.backend == "slurm" else "ssh"
        if shutil.which(program) is None:
            yield (
                f"launcher.hostfile={launcher.hostfile}: {program} reaches its hosts, and is not "
                "installed; install it, or leave the hostfile out"
            )
        elif launcher.backend == "slurm":
            yield from _allocation_problems(launcher)

    def problems(self) -> Iterator[str]:
        if self.section.hostfile is not None:
            yield from self._problems_over_a_hostfile()
        if self.section.bind_cores_to_rank and shutil.which("numactl") is None:
            yield (
                "launcher.bind_cores_to_rank=true needs numactl, which is not installed; install "
                "it (apt install numactl) or leave it out"
            )

    def _problems_over_a_hostfile(self) -> Iterator[str]:
        launcher = self.section
        # ompi_info tells Open MPI from another's mpirun.
        programs = {"pdsh": ["pdsh"], "openmpi": ["mpirun", "ompi_info"], "slurm": ["srun"]}
        missing = [name for name in programs[launcher.backend] if shutil.which(name) is None]
        for program in missing[:1]:
            yield (
                f"launcher.backend={launcher.backend} starts ranks with {program}, which is not "
                "installed; install it, choose another backend, or launcher=torchrun"
            )
        if launcher.backend != "pdsh" and (launcher.include or launcher.exclude):
            yield (
                f"launcher.backend={launcher.backend} accepts only whole hostfiles, but "
                "launcher.include or exclude is given; write another hostfile, or set "
                "backend=pdsh"
            )
        elif launcher.backend == "slurm":
            yield from _allocation_problems(launcher)
        unsafe = [p for p in (sys.executable, str(PACKAGES)) if not re.fullmatch(_SAFE, p)]
        if launcher.backend == "pdsh" and unsafe:
            yield (
                f"launcher.backend=pdsh sends {unsafe[0]} through a shell unquoted, which would "
                "break it; install to a path without blanks and quotes, or use launcher=torchrun"
            )
        path = package_environment(os.environ)["PYTHONPATH"]
        if launcher.backend != "pdsh" and not re.fullmatch(_SAFE, path):
            yield (
                f"launcher.backend={launcher.backend} gets PYTHONPATH={path} from DeepSpeed in "
                "quotes, which the ranks would treat as part of it; install to a path without "
                "blanks and quotes, or use launcher=torchrun"
            )


def argv(
    python: str,
    *,
    switches: Iterable[str] = (),
    port: str,
    hostfile: str,
    further: Iterable[str],
    program: Iterable[str],
) -> list[str]:
    """Return the argv of DeepSpeed's command, which has ranks run a ``program``. Pure."""
    return [
        *(python, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--quiet"),
        *switches,
        *(f"--master_port={port}", f"--hostfile={hostfile}"),
        *further,
        *program,
    ]


def in_quotes(value: str) -> str:
    """Escape what means something between the double quotes that DeepSpeed writes around values."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _script(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None, module
    path = Path(str(found.origin))
    return str(path if found.submodule_search_locations is None else path.with_name("__main__.py"))


def _allocation_problems(launcher: DeepspeedLauncher) -> Iterator[str]:
    """Yield a message where srun would start ranks elsewhere than the hostfile says."""
    if "SLURM_JOB_ID" not in os.environ:
        yield (
            "launcher.backend=slurm starts ranks with srun inside an allocation, and this is "
            "not one; start with salloc, or set launcher=slurm, which submits a job"
        )
        return
    wanted = list(hostfile.hosts(Path(str(launcher.hostfile)).read_text(encoding="utf-8")))
    ended = subprocess.run(
        ["scontrol", "show", "hostnames"], capture_output=True, text=True, check=False
    )
    if (allocated := ended.stdout.split()) != wanted:
        yield (
            f"launcher.hostfile={launcher.hostfile} has {', '.join(wanted)}, but the allocation "
            f"is {', '.join(allocated) or ended.stderr.strip()}, and the ranks' rendezvous is on "
            "the host of srun's first rank; write it with: scontrol show hostnames | sed 's/$/ "
            f"slots={launcher.ranks_per_node}/'"
        )
