"""All that a GPU is wanted for, in the minutes that there is one: tests first, then the tables.

Each row is written as it comes and is on the disk before the next one begins, so that what ends the
session loses nothing. It stops by itself: a row that would not fit into what is left is not begun,
and one that takes longer than it may is killed with all that it has started; both are noted. Rows
come round by round, each model's variants one after the other, in the order of their worth.

--wheels DIR installs packages that the machine lacks, from files, for this session alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.train_gpu import Plan

# Nothing of the project or of what it is built on is imported before --wheels has been installed.
ROOT = Path(__file__).resolve().parents[1]
ROWS, TESTS_LOG, TABLES, PAGE = "rows.jsonl", "tests.log", "train_gpu.json", "train_gpu.md"
RESERVE_SECONDS = 5.0
"""Kept back for the last row and the tables."""
TINY_TEST = "test_fsdp_trains_parameters_that_stay_in_host_memory and cpu-bf16"

WORTH: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kantaibert", ("stock", "stock_tuned", "single")),
    ("gpt2_small", ("stock", "stock_tuned", "single")),
    ("modernbert_base", ("stock", "stock_tuned", "single")),
    ("llama_1.3b", ("stock_tuned", "single")),
    ("llama_8b", ("stock_tuned", "fsdp")),
    ("llama_7b_offloaded", ("fsdp", "zero2_offload")),
)
"""Each model with the variants of the first rounds, the dearest to know first."""
WITHOUT: tuple[tuple[str, str], ...] = (
    ("kantaibert", "objective.head_on_labels_only=false"),
    ("modernbert_base", "data.document_attention=false"),
    ("gpt2_small", "model.fused_gelu=false"),
    ("kantaibert", "single_eager"),
    ("gpt2_small", "single_eager"),
    ("gpt2_small", "zero2"),
    ("gpt2_small", "fsdp"),
    ("llama_8b", "single"),
    ("llama_7b_offloaded", "fsdp_offload"),
)
"""What is seen once, when each table has its figures: one thing off, or another engine."""
ESTIMATES = {
    "kantaibert": 60.0,
    "gpt2_small": 60.0,
    "modernbert_base": 70.0,
    "llama_1.3b": 90.0,
    "llama_8b": 150.0,
    "llama_7b_offloaded": 240.0,
}
"""Seconds that a first run of a model may take, imports and compilation included."""
TINY_SECONDS = 25.0
MOST_TIMES = 2.5
"""By how much a row may outlast what it is expected to take before it is killed."""


@dataclass
class Session:
    """What is left of the time, and where rows go."""

    seconds: float
    out: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - RESERVE_SECONDS - (time.monotonic() - self.began)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and have it on the disk."""
        line = {"at_seconds": round(time.monotonic() - self.began, 1), **row}
        with (self.out / ROWS).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(in_words(line), flush=True)


def in_words(row: dict[str, Any]) -> str:
    """Return a row for a terminal. Pure."""
    name = " ".join(str(row[key]) for key in ("row", "model", "variant") if key in row)
    if "error" in row:
        said = f"failed: {row['error'].splitlines()[0]}"
    elif "not_begun" in row:
        said = f"not begun: {row['not_begun']}"
    elif "tokens_per_second" in row:
        peak = row["peak_memory_bytes"] / 2**30
        said = f"{row['tokens_per_second']:,.0f} tokens/s, {peak:.1f} GiB"
    else:
        said = row.get("said", "")
    return f"[{row['at_seconds']:6.1f} s] {name}: {said}"


# --- tests --------------------------------------------------------------------------------------


def pytest_command(*, on_gpu: bool, is_tiny: bool, report: Path) -> list[str]:
    """Return what runs the tests: those of a GPU, or the ones that rehearse them. Pure."""
    chosen = ["-m", "gpu"] if on_gpu else ["-m", "distributed and not slow and not gpu"]
    if is_tiny:
        chosen += ["-k", TINY_TEST]
    words = [sys.executable, "-m", "pytest", "tests/gpu", *chosen, "-v", "-p", "no:cacheprovider"]
    return [*words, f"--junitxml={report}"]


def run_tests(session: Session, *, on_gpu: bool, is_tiny: bool, limit_seconds: float) -> None:
    """Run the tests and note what came of them; those that were not reached have no outcome."""
    from benchmarks.train_gpu import run_within

    report, log = session.out / "tests.xml", session.out / TESTS_LOG
    limit = min(limit_seconds, session.left)
    argv = pytest_command(on_gpu=on_gpu, is_tiny=is_tiny, report=report)
    problem = run_within(argv, dict(os.environ), log, limit)
    found = outcomes(log.read_text(errors="replace"))
    counts = {kind: sum(o == kind for o in found.values()) for kind in sorted(set(found.values()))}
    said = ", ".join(f"{count} {kind.lower()}" for kind, count in counts.items())
    row = {"row": "tests", "counts": counts, "said": said or "none was run"}
    row["not_passed"] = [name for name, outcome in found.items() if outcome in ("FAILED", "ERROR")]
    session.write(row | ({"problem": problem} if problem else {}))


def outcomes(log: str) -> dict[str, str]:
    """Return what pytest's log says of each test. Pure."""
    found: dict[str, str] = {}
    for line in log.splitlines():
        words = line.split()
        for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
            if outcome in words and words[0].startswith("tests/"):
                found[line.partition(f" {outcome}")[0].strip()] = outcome
    return found


# --- tables -------------------------------------------------------------------------------------


def order(rounds: int, models: list[str]) -> Iterator[tuple[str, str]]:
    """Yield models and variants in the order in which they are run. Pure."""
    for number in range(rounds):
        for model, variants in WORTH:
            if model in models:
                yield from ((model, variant) for variant in variants[:: -1 if number % 2 else 1])
        if number == 0:
            yield from (each for each in WITHOUT if each[0] in models)


class Tables:
    """The figures of train_gpu, as they come."""

    def __init__(self, session: Session, plan: Plan, *, is_tiny: bool) -> None:
        self.session, self.plan, self.is_tiny = session, plan, is_tiny
        self.runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.configs: dict[str, Any] = {}
        self.took: dict[tuple[str, str], float] = {}

    def estimate(self, model: str, variant: str) -> float:
        """Return the seconds that a row may take: by half more than it has taken before."""
        if (mine := self.took.get((model, variant))) is not None:
            return 1.5 * mine
        return min(ESTIMATES[model], TINY_SECONDS) if self.is_tiny else ESTIMATES[model]

    def row(self, model: str, variant: str) -> None:
        """Run one variant of a model once, if it fits, and note what came of it."""
        from shardwright.train.errors import UserError

        name = {"row": "train_gpu", "model": model, "variant": variant}
        wanted, left = self.estimate(model, variant), max(self.session.left, 0)
        if wanted > left:
            self.session.write({**name, "not_begun": f"{wanted:.0f} s, and {left:.0f} s are left"})
            return
        try:
            figures = self.measured(model, variant, wanted)
        except UserError as error:
            self.session.write({**name, "error": str(error)})
            return
        self.runs.setdefault(model, {}).setdefault(variant, []).append(figures)
        self.session.write({**name, **figures})
        self.write()

    def measured(self, model: str, variant: str, wanted: float) -> dict[str, Any]:
        """Return a run's figures. Raises UserError where it cannot be here."""
        from benchmarks import train_gpu

        with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-") as scratch:
            run_dir = Path(scratch) / "run"
            config = train_gpu.freeze(self.plan, model, variant, run_dir)
            if model not in self.configs:
                train_gpu.prepare(run_dir)
            self.configs[model] = config
            began = time.monotonic()
            # What hangs must not take it all; what compiles may take its time.
            limit = min(MOST_TIMES * max(wanted, ESTIMATES[model]), self.session.left)
            figures = train_gpu.measure(self.plan, config, run_dir, variant, limit)
            is_new = (model, variant) not in self.took and variant not in train_gpu.PEERS
            planned = planned_beside(run_dir) if is_new and "error" not in figures else {}
        self.took[model, variant] = time.monotonic() - began
        return {"took_seconds": round(self.took[model, variant], 1), **figures, **planned}

    def write(self) -> None:
        """Write the tables of what there is."""
        from benchmarks.report import markdown

        found = self.results()
        (self.session.out / TABLES).write_text(json.dumps(found, indent=2) + "\n")
        (self.session.out / PAGE).write_text(markdown(found))

    def results(self) -> dict[str, Any]:
        """Return the figures as train_gpu has them."""
        from benchmarks.report import overall_ratio, summary
        from benchmarks.train_gpu import MODELS, empty_results, peak_bf16_flops

        found = empty_results(self.plan)
        for model, runs in self.runs.items():
            peer = next(
                (v for v in ("stock", "stock_tuned") if v in runs), MODELS[model].variants[0]
            )
            found["models"][model] = summary(
                self.configs[model], runs, peer=peer, expected=MODELS[model].expected
            )
            for run in (run for each in runs.values() for run in each if "device" in run):
                found["hardware"] |= {key: run[key] for key in ("device", "cuda")}
                found["peak_bf16_flops"] = peak_bf16_flops(run["device"])
        found["ratio"] = overall_ratio(found["models"])
        return found


def planned_beside(run_dir: Path) -> dict[str, Any]:
    """Return what a plan says of a run that has ended, beside what the run has measured itself.

    A plan is no more than a figure of its row: where it cannot be made, that is the figure.
    """
    from shardwright.launchers.plan import of_run
    from shardwright.train.errors import UserError
    from shardwright.train.run_directory.plan import differences

    try:
        starts, problem = of_run.starts(run_dir)
    except UserError as error:
        return {"plan_problem": str(error)}
    found = {
        each.name: {"planned": each.planned, "measured": each.measured, "off": each.missed}
        for each in differences(starts[-1])
    }
    return {"plan": found, **({} if problem is None else {"plan_problem": problem})}


# --- the session --------------------------------------------------------------------------------


def install(wheels: Path) -> Path:
    """Install wheels into a folder of their own, without a network; return it."""
    folder = Path(tempfile.mkdtemp(prefix="shardwright-wheels-"))
    files = sorted(map(str, wheels.glob("*.whl")))
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*words, "--no-compile", "--target", str(folder), *files], check=True)
    return folder


def start_again(argv: list[str], folder: Path, began: float) -> None:
    """Become the same session with the folder's packages first; the time so far counts."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    spent = ["--already-spent", str(time.monotonic() - began)]
    environment = os.environ | {"PYTHONPATH": path}
    words = [sys.executable, "-m", "benchmarks.gpu_session", *argv, *spent]
    os.execve(sys.executable, words, environment)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--seconds", type=float, required=True, help="after which it has ended")
    found.add_argument("--out", type=Path, default=Path("gpu-session"), help="where rows go")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--tiny", action="store_true", help="one test and few steps: a rehearsal")
    found.add_argument("--wheels", type=Path, metavar="DIR", help="packages to install first")
    found.add_argument("--model", nargs="+", choices=ESTIMATES, default=list(ESTIMATES))
    found.add_argument("--without", nargs="+", default=[], metavar="MODEL:FIELD=VALUE")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--test-seconds", type=float, default=240.0, help="at most, for the tests")
    found.add_argument("--no-tests", action="store_true")
    found.add_argument("--no-tables", action="store_true")
    found.add_argument("--already-spent", type=float, default=0.0, help=argparse.SUPPRESS)
    return found


def plan_of(options: argparse.Namespace) -> Plan:
    """Return how each row is trained, on the device that was asked for."""
    from benchmarks.train_gpu import VARIANTS, Plan, uses_gpu
    from shardwright.launchers.machine import facts as machine
    from shardwright.train.errors import UserError

    here = machine.detect(os.environ)
    if options.device == "cuda" and not uses_gpu(here):
        raise UserError("--device=cuda, and this machine has no GPU that torch sees; --device=cpu")
    return Plan(
        models=options.model,
        variants=list(VARIANTS),
        without=[],
        steps=2 if options.tiny else 30,
        warmup_steps=1 if options.tiny else 10,
        repeats=options.rounds,
        here=here,
    )


def run(options: argparse.Namespace, began: float) -> None:
    """Do what fits into the time. Raises UserError where the device is not there."""
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    plan = plan_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options.seconds - options.already_spent, options.out.resolve(), began)
    session.write({"row": "session", "said": f"{session.left:.0f} s", "options": sys.argv[1:]})
    if not options.no_tests:
        limit = options.test_seconds
        on_gpu = options.device == "cuda"
        run_tests(session, on_gpu=on_gpu, is_tiny=options.tiny, limit_seconds=limit)
    if not options.no_tables:
        tables = Tables(session, plan, is_tiny=options.tiny)
        more = [tuple(each.split(":", 1)) for each in options.without]
        for model, variant in [*order(options.rounds, options.model), *more]:
            tables.row(model, variant)
        tables.write()
    session.write({"row": "session", "said": "ended by itself"})


def main(argv: list[str]) -> int:
    options, began = parser().parse_args(argv), time.monotonic()
    # So that whoever ends the session ends what it has started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.wheels is not None:
        place = argv.index("--wheels") if "--wheels" in argv else None
        if place is None:
            parser().error("--wheels and its DIR are two words")
        folder = install(options.wheels)
        start_again([*argv[:place], *argv[place + 2 :]], folder, began)
    os.chdir(ROOT)
    from shardwright.train.errors import BAD_INPUT, UserError

    try:
        run(options, began)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
