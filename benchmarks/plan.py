"""What a plan says that ranks hold, against what live engines hold: python -m benchmarks.plan.

Real engines train small models of every family on gloo ranks, and every tensor that is alive is
counted; the plan is made of the same configs, as `shardwright plan` makes it. The sizes are others
than those of the tests, by which the formulas were once found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import frozen
from benchmarks.live_engine import answer, environment_of, free_ports
from benchmarks.report import Figures
from benchmarks.table import RESULTS, aligned
from benchmarks.train_gpu import ROOT, prepare, versions
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.plan import child
from shardwright.launchers.plan.peak import peak, uses_autocast
from shardwright.train.config import RunConfig
from shardwright.train.errors import FAILED
from shardwright.train.program import package_environment

WIDE = (
    "model.hidden_size=192",
    "model.num_attention_heads=3",
    "model.intermediate_size=640",
    "model.num_hidden_layers=3",
    "model.vocab_size=2900",
    "data.sequence_length=96",
    "trainer.micro_batch_size=3",
)
DEEP = (
    "model.hidden_size=80",
    "model.num_attention_heads=5",
    "model.intermediate_size=272",
    "model.num_hidden_layers=8",
    "model.vocab_size=1300",
    "data.sequence_length=208",
    "trainer.micro_batch_size=2",
)
"""Two sizes of a model and its batch."""
RUN = (
    "model.max_position_embeddings=226",
    "tokenizer.vocab_size=1100",
    "data=stdlib",
    "data.max_documents=60",
    "data.eval_fraction=0",
    "data.document_attention=false",
    "data.unpad=false",
    "launcher=torchrun",
    "launcher.device=cpu",
    "trainer.max_steps=6",
    "trainer.log_every_steps=6",
)
GPT2, ROBERTA = "model=gpt2_tiny", "model=roberta_tiny"
LLAMA = ("model=llama_tiny", "model.num_key_value_heads=1")
UNTIED = "model.tie_word_embeddings=false"
MODERNBERT = ("model=modernbert_base", "model.local_attention_window=32")
BF16, PURE = "precision=bf16", "precision=bf16_pure"
RECOMPUTED = "trainer.checkpoint_activations_every_blocks=1"
BUCKETS = ("strategy.reduce_bucket_elements=270000", "strategy.allgather_bucket_elements=150000")
LIMITS = (
    "strategy.prefetch_elements=120000",
    "strategy.max_live_elements=400000",
    "strategy.max_reuse_distance_elements=300000",
    "strategy.persistence_elements=700",
)


@dataclass(frozen=True)
class Case:
    """A run of so many ranks."""

    name: str
    ranks: int
    words: tuple[str, ...]


CASES = (
    Case("single", 1, ("strategy=single", *WIDE, *LLAMA)),
    Case("single-bf16", 1, ("strategy=single", *DEEP, ROBERTA, BF16)),
    Case("ddp", 2, ("strategy=ddp", *DEEP, GPT2)),
    Case("ddp-bf16", 4, ("strategy=ddp", *WIDE, *MODERNBERT, BF16, RECOMPUTED)),
    Case("zero0-bf16", 2, ("strategy=zero0", *WIDE, *LLAMA, UNTIED, BF16, RECOMPUTED)),
    Case("zero1", 2, ("strategy=zero1", *DEEP, ROBERTA)),
    Case("zero1-bf16", 4, ("strategy=zero1", *WIDE, GPT2, BF16, *BUCKETS)),
    Case("zero2", 2, ("strategy=zero2", *WIDE, *LLAMA, *BUCKETS)),
    Case("zero2-bf16", 4, ("strategy=zero2", *DEEP, GPT2, BF16, RECOMPUTED)),
    Case("zero2-pure", 2, ("strategy=zero2", *WIDE, ROBERTA, PURE, *BUCKETS)),
    Case("zero2-offload", 2, ("strategy=zero2_offload", *DEEP, *LLAMA, UNTIED, BF16)),
    Case("zero3", 2, ("strategy=zero3", *DEEP, *LLAMA, UNTIED, *BUCKETS)),
    Case("zero3-limits", 4, ("strategy=zero3", *WIDE, GPT2, BF16, RECOMPUTED, *BUCKETS, *LIMITS)),
    Case("zero3-offload", 2, ("strategy=zero3_offload", *WIDE, ROBERTA, BF16)),
    Case("fsdp", 4, ("strategy=fsdp", *WIDE, GPT2, RECOMPUTED)),
    Case("fsdp-bf16", 2, ("strategy=fsdp", *DEEP, *LLAMA, UNTIED, BF16)),
    Case("fsdp_grad_op", 2, ("strategy=fsdp_grad_op", *WIDE, ROBERTA, BF16)),
    Case("fsdp_hybrid", 4, ("strategy=fsdp_hybrid", *DEEP, *MODERNBERT, BF16)),
    Case("fsdp_offload", 2, ("strategy=fsdp_offload", *DEEP, GPT2)),
)
CATEGORIES = ("parameters", "gradients", "optimizer", "peak")
ALLOWED = {**dict.fromkeys(CATEGORIES, 0.02), "peak": 0.05}
"""By how much a plan may miss."""
MICRO_BATCHES = 2
"""Of a step: between them the gradients are held."""
LIMIT_SECONDS = 240.0
"""For each run of a group of ranks, imports included."""
PAGE = ROOT / "docs" / "plan.md"
FILE = RESULTS / "plan-cpu.json"
BEGIN = "<!-- Made by `python -m benchmarks.plan --table`. -->"
END = "<!-- The end of what is made. -->"


def overrides(case: Case) -> list[str]:
    """Return what composes a run. Pure."""
    groups = sorted(case.words, key=lambda word: "." in word.partition("=")[0])
    per_rank = next(w for w in groups if w.startswith("trainer.micro_batch_size="))
    samples = MICRO_BATCHES * int(per_rank.partition("=")[2]) * case.ranks
    ranks = (f"launcher.nproc_per_node={case.ranks}", f"trainer.global_batch_size={samples}")
    own = {word.partition("=")[0] for word in case.words}
    common = [word for word in RUN if word.partition("=")[0] not in own]
    return [*groups, *common, *ranks]


def planned(config: RunConfig) -> dict[str, int]:
    """Return what a plan says that a rank has alive, by category, wherever that lies."""
    autocast = uses_autocast(config)
    model, (traced,) = child.looked_at(config, [autocast])
    found = peak(config, model, traced)
    held = (found.states.device, found.states.host)
    # Of DDP's buckets Python knows nothing; those of ZeRO are alive, as gradients are.
    counts_buckets = config.strategy.kind != "ddp"
    buckets = sum(each.buckets for each in held) if counts_buckets else 0
    return {
        "parameters": sum(each.weights for each in held),
        "gradients": sum(each.gradients for each in held) + buckets,
        "optimizer": sum(each.optimizer for each in held),
        "peak": found.device + found.host,
    }


def measured(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return what the rank with most of it has, of each category. Pure."""
    of_states = {each: max(rank[each] for rank in found) for each in CATEGORIES if each != "peak"}
    return {**of_states, "peak": max(max(rank["passes"], rank["update"]) for rank in found)}


def row(config: RunConfig, of_plan: Mapping[str, int], of_ranks: Mapping[str, int]) -> Figures:
    """Return a case's figures, `missed` by category: (planned - measured) / measured. Pure."""
    missed = {each: of_plan[each] / of_ranks[each] - 1 for each in CATEGORIES}
    recomputes = config.trainer.checkpoint_activations_every_blocks is not None
    return {
        "ranks": config.launcher.world_size,
        "model": config.model.kind,
        "parameters": config.model.parameters,
        "compute_dtype": config.precision.compute_dtype,
        "master_dtype": config.precision.master_dtype,
        "recomputes": recomputes,
        "planned": dict(of_plan),
        "measured": dict(of_ranks),
        "missed": missed,
        "is_within": all(abs(missed[each]) <= ALLOWED[each] for each in CATEGORIES),
    }


def train(ranks: int, run_dirs: Sequence[Path]) -> None:
    """Train runs one after the other on the same ranks; each leaves its answers, or none."""
    ports = free_ports(len(run_dirs))
    words = [sys.executable, "-m", "benchmarks.live_engine", *map(str, run_dirs)]
    common = {**os.environ, **package_environment(os.environ, packages=ROOT)}
    common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            words,
            env={**common, **environment_of(rank, ranks, ports)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    ends = time.monotonic() + LIMIT_SECONDS * len(run_dirs)
    try:
        for process in started:
            process.wait(max(ends - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        pass  # what has no answer is told of as that
    finally:
        for process in started:
            process.kill()
            process.wait()


def of_group(cases: Sequence[Case], folder: Path, *, is_first: bool) -> Iterator[tuple[str, Any]]:
    """Yield the figures of cases of as many ranks, or the ``error`` of one."""
    here = machine.detect({**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    configs = {}
    for case in cases:
        configs[case.name] = frozen.freeze(overrides(case), here, folder / case.name)
    if is_first:
        prepare(folder / cases[0].name)
    left = list(cases)
    while left:
        train(cases[0].ranks, [folder / case.name for case in left])
        done = 0
        for case in left:
            files = [answer(folder / case.name, rank) for rank in range(case.ranks)]
            found = [json.loads(file.read_text()) for file in files if file.exists()]
            errors = [each["error"] for each in found if "error" in each]
            if len(found) == case.ranks and not errors:
                config = configs[case.name]
                yield case.name, row(config, planned(config), measured(found))
                done += 1
                continue
            yield case.name, {"error": (errors or ["no answer"])[0]}
            done += 1
            break  # those behind it have not begun
        left = left[done:]


def run(cases: Sequence[Case], json_file: Path | None) -> Figures:
    """Measure all; the JSON file is rewritten after each case."""
    results: Figures = {
        "benchmark": "plan",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "CPU", "cores": len(os.sched_getaffinity(0))},
        "versions": versions(),
        "cases": {},
        "ratio": None,
    }
    if json_file is not None and json_file.exists():
        # Of some cases measured alone the others stay.
        results["cases"] = json.loads(json_file.read_text())["cases"]
    with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-") as scratch:
        is_first = True
        for ranks in sorted({case.ranks for case in cases}):
            group = [case for case in cases if case.ranks == ranks]
            for name, figures in of_group(group, Path(scratch), is_first=is_first):
                results["cases"][name] = figures
                print(said(name, figures), flush=True)
                results["ratio"] = worst(results["cases"])
                if json_file is not None:
                    json_file.write_text(json.dumps(results, indent=2) + "\n")
            is_first = False
    return results


def worst(cases: Mapping[str, Figures], category: str = "peak") -> float | None:
    """Return planned / measured of the case that misses it by most. Pure."""
    found = [each["missed"][category] for each in cases.values() if "missed" in each]
    return 1 + max(found, key=abs) if found else None


def said(name: str, figures: Figures) -> str:
    """Return a case in words. Pure."""
    if "error" in figures:
        return f"{name}: failed\n{figures['error']}"
    parts = [f"{each} {figures['missed'][each]:+.1%}" for each in CATEGORIES]
    return f"{name}: {', '.join(parts)}{'' if figures['is_within'] else '  (missed)'}"


def table(results: Figures) -> str:
    """Return the rows for people, in Markdown. Pure."""
    head = ["run", "ranks", "model", "precision", "recomputed", *CATEGORIES, "peak, MiB"]
    body = []
    for name, each in results["cases"].items():
        if "error" in each:
            body.append([f"`{name}`", *["failed"] * (len(head) - 1)])
            continue
        dtypes = (each["compute_dtype"], each["master_dtype"])
        precision = dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]} over {dtypes[1]}"
        body.append(
            [
                f"`{name}`",
                str(each["ranks"]),
                f"{each['model']}, {each['parameters'] / 1e6:.2f}M",
                precision,
                "yes" if each["recomputes"] else "no",
                *(f"{each['missed'][category]:+.1%}" for category in CATEGORIES),
                f"{each['measured']['peak'] / 2**20:.1f}",
            ]
        )
    where = ", ".join(f"{k} {v}" for k, v in {**results["hardware"], **results["versions"]}.items())
    return "\n".join([*aligned(head, body), "", f"{where}; {results['date']}."])


def write_page() -> None:
    """Put what was measured into the chapter."""
    before, rest = PAGE.read_text().split(BEGIN)
    made = table(json.loads(FILE.read_text()))
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--table", action="store_true", help="write the table, and measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.table:
        write_page()
        return 0
    results = run([case for case in CASES if case.name in options.only], options.json)
    return FAILED if any("error" in each for each in results["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
