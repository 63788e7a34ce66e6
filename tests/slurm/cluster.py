"""A real SLURM cluster on one machine: a login node with slurmctld, and nodes that can be killed.

Every machine of it is a set of namespaces (network, host name, mounts, processes) with an init of
its own, so killing that init is a crash of the machine, and the end of the process that started
the cluster, however it comes, is the end of all of it. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
NETWORK = "10.77.0"
KILL_WAIT_SECONDS = 30
"""From SIGTERM to SIGKILL, as on most clusters."""
CPUS = 4
"""As SLURM sees a node, whatever the machine has."""
GPUS = 2
"""Fake ones: links to /dev/null, which is a device as SLURM demands."""
_PR_SET_PDEATHSIG = 1


def missing() -> str | None:
    """Return why no cluster can be started here, or None where one can."""
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(lacking)} not found (apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    return None


class Cluster:
    """``nodes`` nodes, node1 and so on, in the partitions low, polite and high."""

    def __init__(self, directory: Path, nodes: int = 2) -> None:
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self._cgroup = f"shardwright-test-{uuid.uuid4().hex}"  # this kernel's, for all clusters

    # --- from start to stop ---------------------------------------------------------------------

    def start(self) -> None:
        for folder in ("etc", "munge", "state", "log", "spool", "tmp", "dev", "cgroup"):
            (self.directory / folder).mkdir(parents=True)
        self._write_configuration()
        key = self.directory / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = self.directory / "munge"
        munged = [
            *("munged", "--force"),  # a temporary directory is closed to others
            f"--key-file={key}",
            *(f"--{kind}-file={munge}/munged.{kind}" for kind in ("pid", "log", "seed")),
            f"--socket={munge}/socket",
        ]
        self._boot(
            "login",
            "ip link add bridge type bridge",
            f"ip addr add {NETWORK}.1/24 dev bridge",
            "ip link set bridge up",
            shlex.join(munged),
            "slurmctld -D & wait",
        )
        until((munge / "socket").exists, "the login node up", 30, self.logs)
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes(*self.nodes)

    def stop(self) -> None:
        """Kill every machine and remove what is left of them; safe to call at any time."""
        for machine in self._machines.values():
            machine.kill()
            machine.wait()
        self._machines.clear()
        self._remove_cgroups()

    def start_node(self, node: str) -> None:
        """Boot a node; `wait_for_nodes` waits until SLURM takes it."""
        number = self.nodes.index(node) + 1
        cgroup = shlex.quote(str(self.directory / "cgroup"))
        self._boot(
            node,
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done",
            f"ip addr add {NETWORK}.{10 + number}/24 dev eth0",
            "ip link set eth0 up",
            # A hierarchy of the node's own view, so that the host need not have one mounted.
            f"mount -t tmpfs none {cgroup}",
            f"mkdir {cgroup}/all {cgroup}/freezer",
            f"mount -t cgroup -o freezer none {cgroup}/all",
            f"mkdir -p {cgroup}/all/{self._cgroup}",
            f"mount --bind {cgroup}/all/{self._cgroup} {cgroup}/freezer",
            f"slurmd -D -N {node} & wait",
        )
        login, here = (_init_of(self._machines[name]) for name in ("login", node))
        # From outside, where both inits have a number; the cable goes when the node's end does.
        _call(
            *("nsenter", f"--net=/proc/{login}/ns/net"),
            *("ip", "link", "add", f"to-{node}", "type", "veth"),
            *("peer", "name", "eth0", "netns", str(here)),
        )
        _call(
            *("nsenter", f"--net=/proc/{login}/ns/net"),
            *("ip", "link", "set", f"to-{node}", "master", "bridge", "up"),
        )

    def kill_node(self, node: str) -> None:
        """Crash a node: each of its processes is gone at once."""
        machine = self._machines.pop(node)
        machine.kill()
        machine.wait()
        with contextlib.suppress(subprocess.CalledProcessError):  # gone with the node by itself
            self.run("ip", "link", "del", f"to-{node}")

    def wait_for_nodes(self, *nodes: str, seconds: float = 30) -> None:
        def idle() -> bool:
            found = self.run("sinfo", "-hN", "-p", "low", "-o", "%N %t", timeout=5).split()
            states = dict(zip(found[::2], found[1::2], strict=True))
            return all(states.get(node) in ("idle", "mix", "alloc") for node in nodes)

        until(idle, f"{nodes} up", seconds, self.logs)

    def _boot(self, name: str, *commands: str) -> None:
        hosts = shlex.quote(str(self.directory / "etc" / "hosts"))
        script = "\n".join(
            [
                "set -e",
                f"hostname {name}",
                f"mount --bind {hosts} /etc/hosts",
                "mount -t tmpfs -o size=2g tmpfs /dev/shm",
                "ip link set lo up",
                *commands,
            ]
        )
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            self._machines[name] = subprocess.Popen(
                ["unshare", *namespaces, "--kill-child=SIGKILL", "bash", "-c", script],
                env=self._daemon_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _daemon_environment(self) -> dict[str, str]:
        # What a daemon has, its jobs may get; a test's own variables have to travel by sbatch.
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "SLURM_CONF": str(self.directory / "etc" / "slurm.conf")}

    def _remove_cgroups(self) -> None:
        view = shlex.quote(str(self.directory / "cgroup"))
        script = (
            f"mount -t cgroup -o freezer none {view} && "
            f"find {view}/{self._cgroup} -depth -type d -exec rmdir {{}} +"
        )

        def gone() -> bool:
            ended = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True)
            return ended.returncode == 0 or b"No such file" in ended.stderr

        if self.directory.exists():
            until(gone, "the cluster's cgroups empty", 10)

    # --- talking to it --------------------------------------------------------------------------

    def on_login(self, *argv: str) -> list[str]:
        """Return the argv that runs a command on the login node."""
        init = _init_of(self._machines["login"])
        return ["nsenter", f"--target={init}", "--net", "--uts", *argv]

    @property
    def environment(self) -> Mapping[str, str]:
        """What a command on the login node needs to find SLURM."""
        return {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf")}

    def run(self, *argv: str, timeout: float = 60) -> str:
        """Run a command on the login node to its end; return what it prints."""
        ended = subprocess.run(
            self.on_login(*argv),
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if ended.returncode != 0:
            print(ended.stderr)
        ended.check_returncode()
        return ended.stdout

    def job(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says of a job, by field."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states; return its record."""
        seen: list[dict[str, str]] = [{}]

        def there() -> bool:
            seen[0] = self.job(job)
            return seen[0]["JobState"] in states

        until(there, f"job {job} {'/'.join(states)}", seconds, lambda: f"{seen[0]}")
        return seen[0]

    def cancel_all(self) -> None:
        """End every job, so that the next test starts with an empty cluster."""
        self.run("scancel", "--user=root")
        until(lambda: not self.run("squeue", "-h"), "an empty queue", 60)

    def logs(self) -> str:
        """Return the end of every daemon's log."""
        ends = []
        for path in sorted((self.directory / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            ends.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(ends)

    # --- configuration --------------------------------------------------------------------------

    def _write_configuration(self) -> None:
        here, etc = self.directory, self.directory / "etc"
        addresses = {node: f"{NETWORK}.{11 + i}" for i, node in enumerate(self.nodes)}
        hosts = {"localhost": "127.0.0.1", "login": f"{NETWORK}.1", **addresses}
        (etc / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in hosts.items()))
        (etc / "slurm.conf").write_text(
            "\n".join(
                [
                    *_SLURM_CONF.format(
                        here=here, network=NETWORK, kill_wait=KILL_WAIT_SECONDS
                    ).splitlines(),
                    *(
                        f"NodeName={node} NodeAddr={ip} CPUs={CPUS} RealMemory=8000 "
                        f"Gres=gpu:{GPUS} State=UNKNOWN"
                        for node, ip in addresses.items()
                    ),
                    "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=0",
                    "PartitionName=polite Nodes=ALL PriorityTier=1 GraceTime=15",
                    "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
                    "",
                ]
            )
        )
        (etc / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={here}/cgroup\n"
        )
        for gpu in range(GPUS):
            (here / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
        names = ",".join(self.nodes)
        (etc / "gres.conf").write_text(
            f"NodeName={names} Name=gpu File={here}/dev/nvidia[0-{GPUS - 1}]\n"
        )


# cred_expire is how long a requeued job waits before it starts again (two minutes by default);
# config_overrides lets a node have more CPUs than this machine.
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost=login({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/munge/socket,cred_expire=5
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool/%n
TmpFS={here}/tmp
SlurmctldPidFile={here}/state/slurmctld.pid
SlurmdPidFile={here}/spool/%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd-%n.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={here}/log/jobcomp.txt
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
MinJobAge=3600
KillWait={kill_wait}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def until(
    true: Callable[[], Any],
    what: str,
    seconds: float,
    say: Callable[[], str] = lambda: "",
    every: float = 0.1,
) -> None:
    """Wait until a condition holds; fail with ``what`` was waited for and what ``say`` returns."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.SubprocessError):
            if true():
                return
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{say()}"
        time.sleep(every)


def _init_of(machine: subprocess.Popen[bytes]) -> int:
    """Return the process, as this machine numbers it, that is a namespace's first."""
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
    found: list[int] = []

    def there() -> bool:
        assert machine.poll() is None, "the machine is down"
        found[:] = map(int, children.read_text().split())
        return bool(found)

    until(there, "the machine's init", 5)
    return found[0]


def _call(*argv: str) -> None:
    ended = subprocess.run(argv, capture_output=True, text=True)
    assert ended.returncode == 0, f"{argv}: {ended.stderr}"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
