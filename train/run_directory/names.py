"""The names of what lies in a run directory; nothing else spells them. Imports nothing."""

from __future__ import annotations

# --- what it trains -------------------------------------------------------------------------------

RUN_CONFIG = "config.yaml"
RESUMES = "resumes"
"""A config for each resume, by its number, and what each start has noted of its versions."""
DATA_JSON = "data.json"
CHOICE_JSON = "choice.json"
TOKENIZER_FOLDER = "tokenizer"
MODEL_FOLDER = "model"
"""What is kept of a pretrained model: its config and its code."""
ORIGIN_JSON = "origin.json"
"""In there: where the model came from."""

# --- how it goes ----------------------------------------------------------------------------------

METRICS = "metrics.jsonl"
HISTORY = "history.jsonl"
ROLLBACKS = "rollbacks.jsonl"
PROVENANCE = "provenance.json"
"""Of the first start; in resumes/ it ends the names of those of later ones."""
ENGINE_JSON = "engine.json"
PLAN_JSON = "plan.json"
"""What was planned, and what was measured."""
OWNER = "owner.json"
STOP_REQUEST = "stop-request"
PROFILE_REQUEST = "profile-request"
STOPPED = "stopped.json"
PRUNED = "pruned.json"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
MLFLOW_FOLDER = "mlflow"
TRACKIO_FOLDER = "trackio"

# --- what comes of it -----------------------------------------------------------------------------

CHECKPOINTS = "checkpoints"
SET_ASIDE = "set-aside"
"""A folder for each resume that has gone back: what was newer than its checkpoint."""
ENGINE_FOLDER = "engine"
"""In a checkpoint: the engine's own files."""
FINAL = "final"
OBJECTIVE_KEY = "shardwright_objective"
"""In a model's config.json, how it was trained, where its architecture does not tell."""
ADAPTER_FOLDER = "adapter"
"""In final/: the adapter by itself."""
FINAL_EARLIER = "final-earlier"
"""What final/ is called from the first step after it until there is a new one."""

PUSHES = "pushes.jsonl"
PUBLISHING_FOLDER = ".publishing"
"""A checkpoint while it is pushed, and the model that is made of it for that."""

# --- logs/ ----------------------------------------------------------------------------------------

LOGS = "logs"
RUN_LOG = "run.log"
PROGRESS = "progress.txt"
"""How far the preparation of the data is, while it lasts."""
TORCHRUN_LOG = "torchrun.log"
TORCHRUN_LOGS = "torchrun*.log"
JOB_LOGS = "job-*.log"
FAILURES = "rank-*.error.json"
ALL_LOGS = "*.log"


def rank_log(rank: int) -> str:
    """Return what the log of a rank is called."""
    return f"rank-{rank}.log"


def failure(rank: int) -> str:
    """Return what a rank calls the note of its failure, which FAILURES matches."""
    return f"rank-{rank}.error.json"


def watcher_log(host: str) -> str:
    """Return what the log of the watcher of a node's ranks is called, where it has any lines."""
    return f"watcher-{host}.log"


def torchrun_log(host: str) -> str:
    """Return what the log of a node's launcher is called where a run has several."""
    return f"torchrun-{host}.log"


def job_log(job: str, task: str | None = None) -> str:
    """Return what the log of a job is called, or of a task of an array's."""
    return f"job-{job}.log" if task is None else f"job-{job}_{task}.log"


# --- where its ranks are --------------------------------------------------------------------------

HEARTBEATS = "heartbeats"
DIAGNOSIS_REQUEST = "request.json"
"""In there: who asks the watchers of all nodes for what their ranks show."""
DIAGNOSIS = "diagnosis"
"""A folder for each time that ranks have shown themselves."""
VERDICT = "verdict.txt"
RANK_BEATS = "rank-*.json"
NODE_BEATS = "node-*.json"


def rank_beat(rank: int) -> str:
    """Return what a rank calls the note by which its heartbeat is found."""
    return f"rank-{rank}.json"


def node_beats(host: str) -> str:
    """Return what the file with all heartbeats of a node is called, and a node's report."""
    return f"node-{host}.json"


def stacks(rank: int) -> str:
    """Return what the file with the stacks of a rank is called."""
    return f"rank-{rank}.stacks.txt"


# --- what its modules compute, in diagnosis/ -----------------------------------------------------

REPLAY = "replay.json"
"""In a directory that is no run: which steps of one are to be made again in it."""
REPLAYED = "replayed.json"
FINDINGS = "numerics-step-*-rank-*.json"


def numerics_report(step: int, rank: int) -> str:
    """Return what the ranges before the first bad tensor of a rank's step are called."""
    return f"numerics-step-{step}-rank-{rank}.txt"


def numerics_finding(step: int, rank: int) -> str:
    """Return what the same for programs is called, which FINDINGS matches."""
    return f"numerics-step-{step}-rank-{rank}.json"


def trace(step: int, rank: int, micro_batch: int) -> str:
    """Return what the ranges of a step of trainer.debug.trace_batches are called."""
    return f"ranges-step-{step}-rank-{rank}-micro-batch-{micro_batch}.txt"


def fingerprints(rank: int) -> str:
    """Return what all tensors of a rank's steps are called, a line for each micro-batch."""
    return f"fingerprints-rank-{rank}.jsonl"


def fingerprints_of_all() -> str:
    """Return what matches those of all ranks."""
    return "fingerprints-rank-*.jsonl"


# --- evaluated by itself --------------------------------------------------------------------------

EVALUATION = "evaluation.json"
"""In a directory that is no run: what its ranks are to measure."""
EVALUATED = "evaluated.json"
EVALUATIONS = "evaluations.jsonl"
"""In a run: what was measured of it by itself, where that was to be kept."""

# --- profile/ -------------------------------------------------------------------------------------

PROFILES = "profile"


def profile_of(step: int, rank: int) -> str:
    """Return how the names begin of what is written of a rank's steps from one on."""
    return f"step-{step}-rank-{rank}"


# --- what a launcher leaves -----------------------------------------------------------------------

ACCELERATE_YAML = "accelerate.yaml"
JOB_SCRIPT = "job.sbatch"
PREPARE_SCRIPT = "prepare.sbatch"
SLURM_JSON = "slurm.json"
CANCEL_JSON = "cancel.json"
