"""The section "launcher": what starts the ranks, and where."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from shardwright.train.config.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    shown,
)

LogLevel = Literal["debug", "info", "warning", "error"]


class LauncherSection(Section):
    """What every launcher has."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda where this machine has an NVIDIA GPU, else cpu; resolved before config.yaml is
    written. mps is an Apple GPU, for strategy=single (not tried on hardware)."""
    gpu_ids: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)] | None = None
    """GPUs of this machine to take, one for each rank, by the numbers that nvidia-smi gives them,
    such as [2,3]; null takes the first ones. Where CUDA_VISIBLE_DEVICES is set they have to be
    among those that it shows."""
    grace_seconds: PositiveFloat = 30.0
    """Seconds from a signal to stop until the ranks are killed: SLURM's KillWait, Kubernetes'
    terminationGracePeriodSeconds or the time that --signal gives. A last checkpoint that would not
    fit is not begun."""
    log_level: LogLevel | None = None
    """From which level on libraries' messages are kept in a rank's log; null is info, and warning
    for transformers."""
    log_level_other_ranks: LogLevel | None = None
    """The same for all ranks but the first; null is as log_level."""

    # What the rest asks of a launcher, whatever its kind.

    @property
    def knows_ranks(self) -> bool:
        """Whether it is settled how many ranks each node has."""
        return True

    @property
    def is_job(self) -> bool:
        """Whether the ranks are a cluster's job, which starts later and has a log of its own."""
        return False

    @property
    def is_elsewhere(self) -> bool:
        """Whether ranks run on machines of which this one need not be any."""
        return False

    @property
    def binds_cores(self) -> bool:
        """Whether each rank takes its equal part of its node's cores by itself."""
        return False

    @property
    def paths(self) -> tuple[str, ...]:
        """The fields that are paths, made absolute before config.yaml is written."""
        return ()

    @property
    def asked_gpus(self) -> str | None:
        """Which GPUs a job asks for, as its cluster calls them; None where it takes any."""
        return None

    @property
    def asked_memory(self) -> str | None:
        """Host memory of each node that a job asks for, with its unit, or all; None: no word."""
        return None

    @model_validator(mode="after")
    def _gpus_are_chosen_once(self) -> Self:
        ids = self.gpu_ids
        if ids is None:
            return self
        given = f"gpu_ids={shown(list(ids))}"
        if not ids:
            raise ValueError(f"{given} leaves no GPU; name some, or set gpu_ids=null")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{given} names a GPU twice; name each once")
        if self.device in ("cpu", "mps"):
            raise ValueError(
                f"{given} chooses among NVIDIA GPUs, but device={self.device}; set device=cuda, "
                "or leave gpu_ids out"
            )
        ranks = getattr(self, "nproc_per_node", 1)
        if ranks not in ("auto", len(ids)):
            raise ValueError(
                f"{given} is one GPU for each rank, but there are {len(ids)} of them and {ranks} "
                f"rank(s); name {ranks}, or choose launcher=torchrun with nproc_per_node="
                f"{len(ids)}"
            )
        return self

    def log_level_of(self, rank: int) -> LogLevel | None:
        """Return from which level on a rank keeps what libraries say; None: as they come."""
        own = self.log_level_other_ranks if rank > 0 else None
        return own if own is not None else self.log_level

    def gpus_of_node(self, here: int) -> int:
        """Return the GPUs that a node of the run has, where this machine has ``here``."""
        return here


class LocalLauncher(LauncherSection):
    """One rank in one process on this machine."""

    kind: Literal["local"]

    @property
    def nodes(self) -> int:
        return 1

    @property
    def ranks_per_node(self) -> int:
        return 1

    @property
    def world_size(self) -> int:
        return 1

    @property
    def world_sizes(self) -> tuple[int, ...]:
        return (1,)


class SeveralRanks(LauncherSection):
    """What all launchers of several ranks have, on one node or more."""

    nproc_per_node: PositiveInt | Literal["auto"] = "auto"
    """Ranks on each node; auto is one for each GPU (of the job's, under SLURM), or 1 on a CPU."""
    nodes: PositiveInt = 1
    """Nodes of the run; the maximum where they may be lost and come back."""

    @model_validator(mode="after")
    def _gpus_are_of_one_machine(self) -> Self:
        if self.gpu_ids is not None and self.nodes > 1:
            raise ValueError(
                f"gpu_ids={shown(list(self.gpu_ids))} are GPUs of one machine, but nodes="
                f"{self.nodes}, of which each may have others free; leave it out, and set "
                "CUDA_VISIBLE_DEVICES on each node"
            )
        return self

    @property
    def knows_ranks(self) -> bool:
        return self.nproc_per_node != "auto"

    @property
    def ranks_per_node(self) -> int:
        """``nproc_per_node``, once the launcher has resolved it."""
        assert self.nproc_per_node != "auto", "resolved before the config is frozen"
        return self.nproc_per_node

    @property
    def world_size(self) -> int:
        """Ranks of the run, the most where nodes may come and go."""
        return self.ranks_per_node * self.nodes

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """All numbers of ranks with which it may run."""
        return (self.world_size,)


class MeetingRanks(SeveralRanks):
    """What all launchers of several nodes have."""

    head_address: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]+$")] | None = None
    """Name or address of the first node, for the rendezvous; null where there is one node."""
    head_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the rendezvous; null takes a port that is free on the machine that starts the run."""

    @model_validator(mode="after")
    def _nodes_meet_somewhere(self) -> Self:
        if self.nodes > 1 and self.head_address is None:
            raise ValueError(
                f"nodes={self.nodes} need a rendezvous, but head_address is not given; set it to "
                "the first node's name or address"
            )
        return self


class TorchrunLauncher(MeetingRanks):
    """torchrun, on each node; the others than the first are started by `shardwright join`."""

    kind: Literal["torchrun"]
    rendezvous: Literal["c10d", "static"] = "c10d"
    """c10d: nodes come in any order and may be lost and come back; static: each has its rank."""
    min_nodes: PositiveInt | None = None
    """Start with, and continue with, as few nodes as these; null waits for all of ``nodes``."""
    max_restarts: NonNegativeInt = 0
    """How often all ranks are started again, from the newest whole checkpoint, after one of them
    has failed or a node was lost."""
    bind: Literal["none", "cores", "numa"] = "none"
    """cores: each rank gets an equal part of its node's cores; numa: those near its GPU."""

    @property
    def binds_cores(self) -> bool:
        return self.bind == "cores"

    @property
    def world_sizes(self) -> tuple[int, ...]:
        fewest = self.min_nodes or self.nodes
        return tuple(self.ranks_per_node * nodes for nodes in range(fewest, self.nodes + 1))

    @model_validator(mode="after")
    def _is_elastic(self) -> TorchrunLauncher:
        if self.min_nodes is None or self.min_nodes == self.nodes:
            return self
        if self.min_nodes > self.nodes:
            raise ValueError(
                f"min_nodes={self.min_nodes} is more than nodes={self.nodes}; nodes is the most"
            )
        if self.rendezvous == "static":
            raise ValueError(
                f"min_nodes={self.min_nodes} lets nodes come and go, but rendezvous=static fixes "
                "their ranks; set rendezvous=c10d"
            )
        if self.max_restarts == 0:
            raise ValueError(
                f"min_nodes={self.min_nodes} continues without a lost node by starting all ranks "
                "again, but max_restarts=0 allows no such start; set max_restarts=3"
            )
        return self

    @model_validator(mode="after")
    def _ranks_meet_again(self) -> TorchrunLauncher:
        if self.nodes > 1 and self.rendezvous == "static" and self.max_restarts:
            raise ValueError(
                f"max_restarts={self.max_restarts} starts ranks again, but with rendezvous=static "
                "they would meet where those before them left their addresses; set "
                "rendezvous=c10d, or max_restarts=0"
            )
        return self

    @model_validator(mode="after")
    def _numa_is_that_of_gpus(self) -> TorchrunLauncher:
        if self.bind == "numa" and self.device == "cpu":
            raise ValueError(
                "bind=numa asks which memory is near each rank's GPU, but device=cpu; set "
                "bind=cores"
            )
        return self


class DeepspeedLauncher(MeetingRanks):
    """DeepSpeed's own command, on one node or over a hostfile."""

    kind: Literal["deepspeed"]
    hostfile: str | None = None
    """Lines of "host slots=N"; null is this machine alone. It decides nodes and nproc_per_node."""
    include: str | None = None
    """Of the hostfile only these: host1@host2:0,1."""
    exclude: str | None = None
    """Of the hostfile all but these."""
    backend: Literal["pdsh", "openmpi", "slurm"] = "pdsh"
    """What starts the other nodes' processes; slurm is srun, inside an allocation of that very
    hostfile."""
    backend_arguments: str = ""
    """Further arguments of pdsh, mpirun or srun, as in a shell."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the nodes' ssh servers; null is ssh's own."""
    bind_cores_to_rank: bool = False
    """Give each rank an equal part of this machine's cores (needs numactl)."""

    @property
    def is_elsewhere(self) -> bool:
        return self.hostfile is not None

    @field_validator("backend", mode="before")
    @classmethod
    def _failures_are_told(cls, backend: object) -> object:
        if backend == "mpich":
            raise ValueError(
                "DeepSpeed 0.19 starts MPICH's ranks behind a helper that returns 0 whatever "
                "they return, so that a failed run would look like a finished one; set "
                "backend=openmpi or backend=pdsh"
            )
        return backend

    @model_validator(mode="after")
    def _backend_takes_what_is_given(self) -> DeepspeedLauncher:
        if self.bind_cores_to_rank and self.hostfile is not None:
            raise ValueError(
                f"bind_cores_to_rank=true, but DeepSpeed binds no ranks over a hostfile "
                f"(hostfile={shown(self.hostfile)}); leave it out, or bind by backend=openmpi with "
                'backend_arguments="--map-by numa --bind-to numa"'
            )
        if self.ssh_port is not None and self.backend == "slurm":
            raise ValueError(
                f"ssh_port={self.ssh_port}, but backend=slurm starts ranks with srun, without ssh; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _filters_have_a_hostfile(self) -> DeepspeedLauncher:
        for name, value in (("include", self.include), ("exclude", self.exclude)):
            if value is not None and self.hostfile is None:
                raise ValueError(
                    f"{name}={shown(value)} chooses among the hosts of a hostfile, but "
                    "hostfile=null; give one or leave it out"
                )
        if self.include is not None and self.exclude is not None:
            raise ValueError(
                f"include={shown(self.include)} and exclude={shown(self.exclude)} exclude each "
                "other; give one of them"
            )
        if self.gpu_ids is not None and self.hostfile is not None:
            raise ValueError(
                f"gpu_ids={shown(list(self.gpu_ids))} are GPUs of this machine, but hostfile="
                f"{shown(self.hostfile)} names hosts with slots of their own; choose those with "
                "include=host@host:0,1, and leave gpu_ids out"
            )
        if self.nodes > 1 and self.hostfile is None:
            raise ValueError(
                f"nodes={self.nodes}, but hostfile=null: DeepSpeed starts other nodes over a "
                "hostfile; give one, or set launcher=torchrun"
            )
        return self


class AccelerateLauncher(MeetingRanks):
    """`accelerate launch` with a YAML that is written into the run's directory."""

    kind: Literal["accelerate"]


def _slurm_word(value: str) -> str:
    """Refuse what would not reach SLURM as it is written: a directive has no quoting to rely on."""
    if not re.fullmatch(r"[^\s\"'\\\\#\x00-\x1f\x7f]+", value):
        raise ValueError(
            f"{shown(value)} has to be one word: SLURM would misread a blank, a quote, a "
            "backslash, # or an empty text in a job script; leave it out"
        )
    return value


SlurmWord = Annotated[str, AfterValidator(_slurm_word)]

# Flags that a field decides, or that the launcher itself needs, and the field.
_DECIDED_FLAGS = {
    "account": "launcher.account",
    "array": "-m with several runs, and launcher.array_limit",
    "chdir": "run_dir",
    "constraint": "launcher.constraint",
    "cpus-per-task": "launcher.cpus_per_rank",
    "dependency": "launcher.dependency",
    "error": "run_dir, which holds the log",
    "exclusive": "launcher.exclusive",
    "gpus-per-node": "launcher.gpus_per_node",
    "gres": "launcher.gpus_per_node and launcher.gpu_type",
    "job-name": "name",
    "mail-type": "launcher.mail_type",
    "mail-user": "launcher.mail_user",
    "mem": "launcher.memory_per_node",
    "no-requeue": "launcher.requeue",
    "nodes": "launcher.nodes",
    "ntasks": "launcher.nodes and launcher.nproc_per_node",
    "ntasks-per-node": "launcher.nproc_per_node",
    "open-mode": "nothing: a log is always appended to",
    "output": "run_dir, which holds the log",
    "parsable": "nothing: the launcher reads what sbatch prints",
    "partition": "launcher.partition",
    "qos": "launcher.qos",
    "requeue": "launcher.requeue",
    "signal": "launcher.grace_seconds",
    "time": "launcher.time_limit",
    "wait": "launcher.wait",
    "wrap": "nothing: the job script is the launcher's",
}


def _sbatch_line(line: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.+)?", line, re.DOTALL):
        raise ValueError(f"{shown(line)} is not a whole flag of sbatch; write each as --flag=value")
    _slurm_word(line)
    flag = line[2:].partition("=")[0]
    if (field := _DECIDED_FLAGS.get(flag)) is not None:
        raise ValueError(f"--{flag} is decided by {field}; leave it out here")
    return line


def _slurm_time(limit: int | str) -> int | str:
    if isinstance(limit, str) and not re.fullmatch(r"(\d+-)?\d{1,2}:[0-5]\d:[0-5]\d", limit):
        raise ValueError(
            f"{shown(limit)} is read differently by SLURM and by people; write minutes as a "
            "whole number, or hours:minutes:seconds or days-hours:minutes:seconds"
        )
    # What YAML makes of 12:00:00 without quotes, a number to the base of 60.
    if isinstance(limit, int) and limit >= 3600:
        raise ValueError(
            f"{limit} minutes may be a time of day that YAML has read as one number; write so "
            'long a limit in quotes as "days-hours:minutes:seconds", '
            f'such as "{limit // 1440}-{limit // 60 % 24:02}:{limit % 60:02}:00"'
        )
    return limit


def _slurm_memory(memory: str) -> str:
    if memory != "all" and not re.fullmatch(r"[1-9]\d*[KMGT]", memory):
        raise ValueError(
            f"{shown(memory)} needs a unit, since SLURM takes a plain number for megabytes; "
            "write a whole number and K, M, G or T, such as 64G, or all"
        )
    return memory


def _slurm_dependency(text: str) -> str:
    if not re.fullmatch(r"(singleton|after\w*:[\d_+:]+|[,?])+", _slurm_word(text)):
        raise ValueError(
            f"{shown(text)} is not a dependency that SLURM knows; write one such as "
            "afterok:1234, afterany:1234:1235 or singleton"
        )
    return text


class SlurmLauncher(SeveralRanks):
    """A job of a SLURM cluster; its script is made out of slurm/job.sbatch."""

    kind: Literal["slurm"]
    starts: Literal["ranks", "torchrun", "deepspeed"] = "ranks"
    """What a task of srun is. ranks: a rank, which gets its signals from SLURM itself; torchrun,
    deepspeed: a node's launcher, behind a parent that passes signals on to its ranks."""

    gpus_per_node: NonNegativeInt = 0
    """GPUs to request on each node; 0 requests none."""
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "gres"
    """The flag that requests GPUs; none requests none, where a partition has its own."""
    gpu_type: SlurmWord | None = None
    """As the cluster calls it (a100); null takes any."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores of each rank; null is SLURM's own default, mostly one."""
    memory_per_node: Annotated[str, AfterValidator(_slurm_memory)] | None = None
    """Host memory with its unit, such as 64G, or all; null is the partition's default."""
    time_limit: Annotated[PositiveInt | str, AfterValidator(_slurm_time)] | None = None
    """Minutes, "hours:minutes:seconds" or "days-hours:minutes:seconds"; null: the partition's."""
    partition: SlurmWord | None = None
    """Partition to run in; null is the cluster's default."""
    account: SlurmWord | None = None
    """Account that the job is charged to; null is the user's default."""
    qos: SlurmWord | None = None
    """Quality of service; null is the user's default."""
    constraint: SlurmWord | None = None
    """Features that the nodes must have, such as a100|h100."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    dependency: Annotated[str, AfterValidator(_slurm_dependency)] | None = None
    """Jobs to wait for, such as afterok:1234."""
    array_limit: PositiveInt | None = None
    """Of the runs of a sweep (-m), which are one job array, this many at once; null: all."""
    array: PositiveInt | None = None
    """Tasks among which `shardwright prepare` divides a corpus, array_limit of them at once; null:
    one job does it all. No run has any."""
    mail_user: SlurmWord | None = None
    """Recipient of the mails of mail_type; null is the submitting user."""
    mail_type: Annotated[
        tuple[
            Literal[
                "ALL",
                "ARRAY_TASKS",
                "BEGIN",
                "END",
                "FAIL",
                "INVALID_DEPEND",
                "NONE",
                "REQUEUE",
                "STAGE_OUT",
                "TIME_LIMIT",
                "TIME_LIMIT_50",
                "TIME_LIMIT_80",
                "TIME_LIMIT_90",
            ],
            ...,
        ],
        Field(strict=False),
    ] = ()
    """Events that SLURM writes a mail about."""
    extra_sbatch: Annotated[
        tuple[Annotated[str, AfterValidator(_sbatch_line)], ...], Field(strict=False)
    ] = ()
    """Further flags, each whole: --reservation=lab."""

    grace_seconds: Annotated[PositiveFloat, Field(le=65535)] = 120.0
    """Seconds before the time limit at which the ranks are told to save and stop (SLURM may be a
    minute early). A last checkpoint that would not fit is not begun."""
    requeue: bool = True
    """Put the job back into the queue when it was stopped, preempted or lost a node."""
    max_requeues: NonNegativeInt = 20
    """How many times, at most, the job puts itself back into the queue."""
    wait: bool = False
    """Wait until the job has ended and return its exit code, instead of returning at once."""
    site: str | None = None
    """Shell file with the cluster's own settings; null is slurm/site.sh where there is one."""

    @property
    def is_job(self) -> bool:
        return True

    @property
    def is_elsewhere(self) -> bool:
        return True

    @property
    def paths(self) -> tuple[str, ...]:
        return ("site",)

    @property
    def asked_gpus(self) -> str | None:
        return self.gpu_type

    @property
    def asked_memory(self) -> str | None:
        return self.memory_per_node

    def gpus_of_node(self, here: int) -> int:
        return self.gpus_per_node

    @model_validator(mode="after")
    def _gpus_are_asked_for(self) -> SlurmLauncher:
        if self.gpu_ids is not None:
            raise ValueError(
                f"gpu_ids={shown(list(self.gpu_ids))} chooses among a machine's GPUs, but SLURM "
                "gives a job those that are free, and shows it no others; say how many with "
                "gpus_per_node and which with gpu_type or constraint, and leave gpu_ids out"
            )
        if self.device == "cuda" and not self.gpus_per_node:
            raise ValueError(
                "device=cuda needs GPUs, but gpus_per_node=0 requests none; set gpus_per_node "
                "(with gpu_request=none where the partition brings them) or device=cpu"
            )
        if (
            self.device == "cuda"
            and self.nproc_per_node != "auto"
            and self.nproc_per_node > self.gpus_per_node
        ):
            raise ValueError(
                f"nproc_per_node={self.nproc_per_node} ranks need as many GPUs, but "
                f"gpus_per_node={self.gpus_per_node}; change one of them or set device=cpu"
            )
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError(
                f"gpu_type={self.gpu_type} says which GPUs, but gpus_per_node=0 requests none; "
                "set gpus_per_node or leave gpu_type out"
            )
        if self.gpu_type is not None and self.gpu_request == "none":
            raise ValueError(
                f"gpu_type={self.gpu_type} is part of a request, but gpu_request=none makes none; "
                "set gpu_request=gres or leave gpu_type out (launcher.constraint chooses nodes)"
            )
        return self


LauncherConfig = Annotated[
    LocalLauncher | TorchrunLauncher | DeepspeedLauncher | AccelerateLauncher | SlurmLauncher,
    Field(discriminator="kind"),
]
