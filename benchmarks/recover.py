"""Time and memory that whole weights cost: `shardwright recover` against the engines' own tools.

The same two-rank checkpoints are recovered by each program in a process of its own, in turns whose
order reverses from round to round: those of ZeRO by DeepSpeed's zero_to_fp32, that of FSDP by
`accelerate merge-weights`. Before each run the checkpoint leaves the page cache; the time is that
until the output is on the disk. The peak is the process's VmHWM. The results have to be equal bit
for bit. The model's head is not tied: zero_to_fp32 writes no safetensors where weights are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import fabricated
from benchmarks.report import Figures
from benchmarks.train_gpu import ROOT, versions
from shardwright.launchers.composition.compose import compose, plain
from shardwright.train.config import SingleStackModel, from_tree
from shardwright.train.errors import FAILED
from shardwright.train.program import package_environment

KINDS = ("zero2", "zero3", "fsdp")
MODELS = ("gpt2_tiny", "gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl")
LARGE_PARAMETERS = 500_000_000
"""From here on the engine of ZeRO needs more memory than most machines have to spare."""
OURS, DEEPSPEED, ACCELERATE = "shardwright", "zero_to_fp32", "merge-weights"
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Program:
    """One way to recover a checkpoint."""

    name: str
    command: list[str]
    imports: list[str]
    """What imports the same and does nothing."""


def programs(kind: str, checkpoint: Path, config: Path, out: Path) -> list[Program]:
    """Return our program and its peer, each writing into a folder of ``out``. Pure."""
    python = sys.executable
    ours = Program(
        OURS,
        [
            *(python, "-m", "shardwright", "recover", str(checkpoint), str(out / OURS)),
            *("--config", str(config)),
        ],
        [
            *(python, "-c"),
            "import shardwright.launchers.commands.recover, shardwright.train.export.recover; "
            "import transformers.models.gpt2.modeling_gpt2",
        ],
    )
    if kind == "fsdp":
        inner = checkpoint / "pytorch_model_fsdp_0"
        module = "accelerate.commands.accelerate_cli"
        command = [python, "-m", module, "merge-weights", str(inner), str(out / ACCELERATE)]
        imports = f"import {module}, torch.distributed.checkpoint.format_utils"
        return [ours, Program(ACCELERATE, command, [python, "-c", imports])]
    module = "deepspeed.utils.zero_to_fp32"
    command = [python, "-m", module, str(checkpoint), str(out / DEEPSPEED), "--safe_serialization"]
    return [ours, Program(DEEPSPEED, command, [python, "-c", f"import {module}"])]


# --- checkpoints --------------------------------------------------------------------------------


def model_config(preset: str) -> GPT2Config:
    """Return the config of a preset, its head untied."""
    (job,) = compose([f"model={preset}", "objective=clm", "data.sequence_length=8"])
    model = from_tree(plain(job.tree)).model
    assert isinstance(model, SingleStackModel)
    return GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_hidden_layers,
        n_head=model.num_attention_heads,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        architectures=["GPT2LMHeadModel"],
    )


def write_checkpoint(kind: str, config: Path, out: Path, *, large: bool) -> str:
    """Write a two-rank checkpoint; return who has: the engine, or nobody but this benchmark."""
    if large and kind != "fsdp":
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config.from_pretrained(config))
        fabricated.write_zero(int(kind.removeprefix("zero")), model, out)
        return "fabricated"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "benchmarks.engine_checkpoints", kind, str(config), str(out)),
        ],
        env=_environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return "engine"


# --- measuring ----------------------------------------------------------------------------------


def measure(program: Program, checkpoint: Path, output: Path) -> Figures:
    """Recover once, from a cold page cache; return seconds and peak memory, or the ``error``."""
    shutil.rmtree(output, ignore_errors=True)
    for path in _files(checkpoint):
        _drop(path)
    began = time.perf_counter()
    ended = _run(program.command)
    if ended.code != 0:
        return {"error": f"exit code {ended.code}\n{ended.log[-1500:]}"}
    for path in _files(output):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": ended.cpu_seconds,
        "peak_memory_bytes": ended.peak_memory_bytes,
    }


@dataclass(frozen=True)
class Ended:
    """What is left of a program that has run."""

    code: int
    peak_memory_bytes: int
    cpu_seconds: float
    """Of all its threads, in the kernel too."""
    log: str


def _run(command: list[str]) -> Ended:
    """Run a program to its end.

    The peak is asked for while the program lives: what `wait4` tells includes the process that
    started it. A program that replaces itself by another keeps its number.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=_environment(), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )
        status, peak = Path(f"/proc/{process.pid}/status"), 0
        pid = 0
        while pid == 0:
            if match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
                peak = max(peak, int(match[1]) * 1024)
            time.sleep(POLL_SECONDS)
            pid, wait_status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(wait_status)
        log.seek(0)
        return Ended(process.returncode, peak, used.ru_utime + used.ru_stime, log.read())


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        **package_environment(os.environ, packages=ROOT),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _drop(path: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def differences(ours: Path, peer: Path) -> list[str]:
    """Return the names of tensors that are not in both, or not equal bit for bit."""
    mine, theirs = _places(ours), _places(peer)
    wrong = sorted(set(mine) ^ set(theirs))
    for name in sorted(set(mine) & set(theirs)):
        with safe_open(mine[name], "pt") as a, safe_open(theirs[name], "pt") as b:
            left, right = a.get_tensor(name), b.get_tensor(name)
            if left.dtype != right.dtype or not torch.equal(left, right):
                wrong.append(name)
    return wrong


def _places(directory: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


# --- figures ------------------------------------------------------------------------------------


_RATIOS = ("ratio", "ratio_cpu", "ratio_peak", "ratio_above_imports")


def summary(runs: dict[str, list[Figures]], imports: dict[str, int]) -> Figures:
    """Return medians for each program, and the peer's over ours. Pure."""
    found: Figures = {}
    for name, each in runs.items():
        if failed := [run["error"] for run in each if "error" in run]:
            found[name] = {"error": failed[0]}
            continue
        peak = median(run["peak_memory_bytes"] for run in each)
        found[name] = {
            "seconds": median(run["seconds"] for run in each),
            "seconds_of_each_run": [run["seconds"] for run in each],
            "cpu_seconds": median(run["cpu_seconds"] for run in each),
            "peak_memory_bytes": peak,
            "imports_bytes": imports[name],
            "peak_above_imports_bytes": max(0, peak - imports[name]),
        }
    ours, (peer,) = found[OURS], [values for name, values in found.items() if name != OURS]
    ratios: dict[str, float | None] = dict.fromkeys(_RATIOS)
    if "error" not in ours and "error" not in peer:
        ratios = {
            "ratio": peer["seconds"] / ours["seconds"],
            "ratio_cpu": peer["cpu_seconds"] / ours["cpu_seconds"],
            "ratio_peak": peer["peak_memory_bytes"] / ours["peak_memory_bytes"],
            "ratio_above_imports": peer["peak_above_imports_bytes"]
            / max(1, ours["peak_above_imports_bytes"]),
        }
    return {"programs": found, **ratios}


def run(model: str, kinds: list[str], repeats: int, place: Path, file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten after each kind of checkpoint."""
    results: Figures = {
        "benchmark": "recover",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"cores": len(os.sched_getaffinity(0)), "memory_bytes": _memory_bytes()},
        "versions": versions(),
        "model": model,
        "ranks": 2,
        "repeats": repeats,
        "page_cache": "cold",
        "checkpoints": {},
        "ratio": None,
    }
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-", dir=place) as scratch:
            results["checkpoints"][kind] = _of_kind(model, kind, repeats, Path(scratch))
        ratios = [each["ratio"] for each in results["checkpoints"].values()]
        # The worst of all, as one knows one's engine and not their mean.
        results["ratio"] = None if None in ratios else min(ratios)
        if file:
            file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _of_kind(model: str, kind: str, repeats: int, scratch: Path) -> Figures:
    config, checkpoint, out = scratch / "config", scratch / "checkpoint", scratch / "out"
    settings = model_config(model)
    settings.save_pretrained(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT2LMHeadModel(settings).parameters())
    written_by = write_checkpoint(kind, config, checkpoint, large=parameters > LARGE_PARAMETERS)
    both = programs(kind, checkpoint, config, out)
    imports = {program.name: _run(program.imports).peak_memory_bytes for program in both}
    runs: dict[str, list[Figures]] = {program.name: [] for program in both}
    for number in range(repeats):
        for program in both if number % 2 == 0 else both[::-1]:
            runs[program.name].append(measure(program, checkpoint, out / program.name))
    found = summary(runs, imports)
    if found["ratio"] is not None:
        found["different"] = differences(*(out / program.name for program in both))
        if found["different"]:
            found["ratio"] = None  # what is not the same has no price
    return {
        "parameters": parameters,
        "written_by": written_by,
        "checkpoint_bytes": sum(path.stat().st_size for path in _files(checkpoint)),
        **found,
        "load_average": os.getloadavg()[0],
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shown(results: Figures) -> str:
    """Return the results as a table for a terminal. Pure."""
    return "\n".join(_lines(results))


def _lines(results: Figures) -> Iterator[str]:
    yield (
        "checkpoint  program        seconds  CPU seconds   peak MiB  above imports   "
        "ratios: time, CPU, peak, above"
    )
    for kind, figures in results["checkpoints"].items():
        if different := figures.get("different"):
            yield f"{kind:10}  these tensors differ: {', '.join(different)}"
        for name, values in figures["programs"].items():
            if "error" in values:
                yield f"{kind:10}  {name:13}  failed:\n{values['error']}"
                continue
            yield (
                f"{kind:10}  {name:13}  {values['seconds']:7.2f}  {values['cpu_seconds']:11.2f}  "
                f"{values['peak_memory_bytes'] / 2**20:9,.0f}  "
                f"{values['peak_above_imports_bytes'] / 2**20:13,.0f}" + _ratios(name, figures)
            )


def _ratios(name: str, figures: dict[str, Any]) -> str:
    if name != OURS or figures["ratio"] is None:
        return ""
    return "   " + ", ".join(f"{figures[each]:.2f}" for each in _RATIOS)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recover",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2_small")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats is at least 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    place = options.directory.resolve()
    results = run(options.model, options.kind, options.repeats, place, options.json)
    print(shown(results))
    return FAILED if results["ratio"] is None else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
