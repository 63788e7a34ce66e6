"""How long a corpus takes to become samples: ours against `datasets.map`, as run_clm uses it.

The corpus is the standard library's sources, a document each in a .jsonl, and with --megabytes the
same repeated to that size. Both sides have the same tokenizer, a byte-level BPE of 16,384 tokens,
and keep to one core, then to two. They take turns. A time is that of an empty cache, without
imports, and the peer's also without its reading of the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median

from benchmarks import frozen
from benchmarks.report import Figures
from benchmarks.timed_prepare import RESULT, SEQUENCE_LENGTH
from benchmarks.train_cpu_report import spread
from benchmarks.train_gpu import ROOT, versions
from benchmarks.watched import end
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.child import descendants
from shardwright.train.data.sources.corpus import read_corpus
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import TOKENIZER_FOLDER

OURS, PEER = "ours", "map"
EMBEDDED, REPEATED = "embedded", "repeated"
VOCABULARY = 16_384
POLL_SECONDS = 0.05
PSS_EVERY = 10
"""Polls between two looks at what processes share, for which the kernel has to walk their pages."""


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    corpora: dict[str, Path]
    processes: list[int]
    repeats: int
    directory: Path
    tokenizer: Path
    here: Machine


@dataclass
class Memory:
    """The most that a command and what it starts have had, seen from outside."""

    of_one: int = 0
    """Bytes of the largest process, which VmHWM keeps for it."""
    of_all: int = 0
    """Bytes of all at one time, each page that is shared counted once."""
    looks: int = field(default=0, repr=False)

    def look(self, root: int) -> None:
        pids = [root, *descendants(root)]
        self.of_one = max([self.of_one, *(_kib(pid, "status", "VmHWM") for pid in pids)])
        if self.looks % PSS_EVERY == 0:
            self.of_all = max(self.of_all, sum(_kib(pid, "smaps_rollup", "Pss") for pid in pids))
        self.looks += 1


def _kib(pid: int, file: str, name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def measure(arguments: Sequence[str], processes: int, place: Path) -> Figures:
    """Run one side on so many cores; return its figures, or the ``error``."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    environment = {
        **os.environ,
        **package_environment(os.environ, packages=ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(place / "datasets"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.timed_prepare", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    memory = Memory()
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            memory.look(process.pid)
            time.sleep(POLL_SECONDS)
        reader.join()
    finally:
        end(process)
    said = next((line for line in lines if line.startswith(RESULT)), None)
    if process.returncode != 0 or said is None:
        return {"error": f"exit code {process.returncode}\n{''.join(lines[-20:])}"}
    figures: Figures = json.loads(said.removeprefix(RESULT))
    peaks = {"peak_memory_bytes": memory.of_one, "peak_memory_of_all_bytes": memory.of_all}
    return {**figures, **peaks}


def overrides(corpus: Path | None, tokenizer: Path | None, cache: Path) -> list[str]:
    """Return what composes a preparation. Pure."""
    data = ["data=stdlib"] if corpus is None else ["data=text", f"data.paths=[{corpus}]"]
    trained = ["tokenizer=byte_bpe", f"tokenizer.vocab_size={VOCABULARY}"]
    given = ["tokenizer=pretrained", f"tokenizer.name={tokenizer}"]
    return [
        "model=gpt2_tiny",
        f"model.vocab_size={VOCABULARY}",
        "objective=clm",
        "strategy=single",
        "launcher=torchrun",
        "launcher.nproc_per_node=1",
        "trainer.max_steps=1",
        *data,
        f"data.sequence_length={SEQUENCE_LENGTH}",
        "data.eval_fraction=0",
        f"data.cache_dir={cache}",
        *(trained if tokenizer is None else given),
    ]


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """Give a folder, and remove what a run has left in it: a corpus many times over."""
    place = Path(tempfile.mkdtemp(prefix="prepare-", dir=directory))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def measure_ours(plan: Plan, corpus: Path, processes: int) -> Figures:
    """Prepare a corpus by the package. Raises UserError where this machine cannot."""
    with scratch(plan.directory) as place:
        words = overrides(corpus, plan.tokenizer, place / "cache")
        frozen.freeze(words, plan.here, place / "run")
        return measure(["ours", str(place / "run")], processes, place)


def measure_peer(plan: Plan, corpus: Path, processes: int) -> Figures:
    with scratch(plan.directory) as place:
        words = [str(corpus), str(plan.tokenizer), str(place / "cache"), str(processes)]
        return measure(["peer", *words], processes, place)


SIDES = {PEER: measure_peer, OURS: measure_ours}


def summary(runs: list[Figures], megabytes: float) -> Figures:
    """Return the medians of one side on some cores. Pure."""
    if failed := [run["error"] for run in runs if "error" in run]:
        return {"error": failed[0]}
    seconds = [run["seconds"] for run in runs]
    return {
        **runs[0],
        "seconds": median(seconds),
        "seconds_of_each_run": seconds,
        "spread": spread(seconds),
        "megabytes_per_second": megabytes / median(seconds),
        **{
            name: max(run[name] for run in runs)
            for name in ("peak_memory_bytes", "peak_memory_of_all_bytes")
        },
    }


def ratio(of_peer: Figures, of_ours: Figures) -> float | None:
    """Return the peer's seconds over ours; None where one has failed. Pure."""
    if "error" in of_peer or "error" in of_ours:
        return None
    return float(of_peer["seconds"] / of_ours["seconds"])


def measure_corpus(plan: Plan, corpus: Path) -> Figures:
    """Return what both sides take for a corpus, over rounds whose order reverses."""
    turns = [(side, count) for count in plan.processes for side in SIDES]
    runs: dict[tuple[str, int], list[Figures]] = {turn: [] for turn in turns}
    for repeat in range(plan.repeats):
        for side, count in turns[:: -1 if repeat % 2 else 1]:
            runs[side, count].append(SIDES[side](plan, corpus, count))
        print(f"{corpus.stem}: round {repeat + 1} of {plan.repeats}", flush=True)
    megabytes = corpus.stat().st_size / 1e6
    sides = {
        str(count): {side: summary(runs[side, count], megabytes) for side in SIDES}
        for count in plan.processes
    }
    ratios = {count: ratio(each[PEER], each[OURS]) for count, each in sides.items()}
    return {"megabytes": megabytes, "processes": sides, "ratio": ratios}


def run(plan: Plan, json_file: Path | None, *, is_tiny: bool) -> Figures:
    """Measure everything; the JSON file is rewritten after each corpus."""
    found = {name: metadata.version(name) for name in ("tokenizers", "datasets")}
    results: Figures = {
        "benchmark": "prepare",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "CPU", "cores": plan.here.cores},
        "versions": {**versions(), **found},
        "repeats": plan.repeats,
        "tiny": is_tiny,
        "corpora": {},
        "ratio": None,
    }
    for name, corpus in plan.corpora.items():
        results["corpora"][name] = measure_corpus(plan, corpus)
        ratios = [r for each in results["corpora"].values() for r in each["ratio"].values()]
        results["ratio"] = None if None in ratios else min(ratios)
        results["load_average"] = os.getloadavg()[0]
        if json_file:
            json_file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def shown(results: Figures) -> str:
    """Return the results as a table for a terminal. Pure."""
    lines = ["corpus      MB  processes  side       s  spread     MB/s  peak MiB  of all  ratio"]
    for corpus, figures in results["corpora"].items():
        for count, sides in figures["processes"].items():
            for side, each in sides.items():
                if "error" in each:
                    lines.append(f"{corpus}, {side} on {count} failed:\n{each['error']}")
                    continue
                found = figures["ratio"][count] if side == OURS else None
                lines.append(
                    f"{corpus:8} {figures['megabytes']:5,.0f}  {count:>9}  {side:4} "
                    f"{each['seconds']:7.2f}  {each['spread']:6.0%}  "
                    f"{each['megabytes_per_second']:7.2f}  "
                    f"{each['peak_memory_bytes'] / 2**20:8,.0f}  "
                    f"{each['peak_memory_of_all_bytes'] / 2**20:6,.0f}"
                    + (f"  {found:5.1f}" if found else "")
                )
    return "\n".join(lines)


def write_corpora(directory: Path, megabytes: int | None, quick: bool) -> dict[str, Path]:
    """Write what is measured; return where it lies."""
    texts = _sources(20 if quick else None)
    documents = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    corpora = {EMBEDDED: directory / f"{EMBEDDED}.jsonl"}
    corpora[EMBEDDED].write_text("".join(documents), encoding="utf-8")
    if megabytes is not None:
        corpora[REPEATED] = directory / f"{REPEATED}.jsonl"
        with corpora[REPEATED].open("w", encoding="utf-8") as file:
            while file.tell() < megabytes * 10**6:
                file.writelines(documents)
    return corpora


def _sources(most: int | None) -> Iterator[str]:
    """Yield the embedded corpus's documents, whole ones."""
    from pydantic import TypeAdapter

    from shardwright.train.config import DataConfig

    whole: list[str] = []
    tree = {"kind": "stdlib", "max_documents": most, "eval_fraction": 0.0, "unpad": False}
    settings: DataConfig = TypeAdapter(DataConfig).validate_python(tree)
    for piece in read_corpus(settings, Path()):
        whole.append(piece.text)
        if piece.ends:
            yield "".join(whole)
            whole = []


def trained_tokenizer(directory: Path, corpus: Path, here: Machine) -> Path:
    """Return the directory of a tokenizer of the corpus. Raises UserError where that fails."""
    from benchmarks.train_gpu import prepare

    run_dir = directory / "trained"
    frozen.freeze(overrides(corpus, None, directory / "cache"), here, run_dir)
    prepare(run_dir)
    return run_dir / TOKENIZER_FOLDER


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, metavar="N", help="repeat the corpus to so many")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="twenty documents: tries it out")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if min([options.repeats, options.megabytes or 1, *options.processes]) < 1:
        parser.error("--megabytes, --processes and --repeats are at least 1")
    return options


def measured_in(parent: Path, measure: Callable[[Path, Machine], int]) -> int:
    """Return the exit code of a measurement on CPUs, in a directory that does not stay."""
    here = machine.detect({**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    try:
        with tempfile.TemporaryDirectory(
            prefix="shardwright-benchmark-", dir=parent.resolve()
        ) as place:
            return measure(Path(place), here)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def main(argv: list[str]) -> int:
    options = parse(argv)

    def all_of_it(directory: Path, here: Machine) -> int:
        corpora = write_corpora(directory, options.megabytes, options.quick)
        plan = Plan(
            corpora=corpora,
            processes=options.processes,
            repeats=options.repeats,
            directory=directory,
            tokenizer=trained_tokenizer(directory, corpora[EMBEDDED], here),
            here=here,
        )
        results = run(plan, options.json, is_tiny=options.quick)
        print(shown(results))
        return FAILED if results["ratio"] is None else 0

    return measured_in(options.directory, all_of_it)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
