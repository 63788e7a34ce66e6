"""What has been measured, as one table: from the JSON files of results/ to Markdown; pure.

What has not been measured is a row too, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
Results = Mapping[str, Figures]
"""What each benchmark has written, by its name."""
RESULTS = Path(__file__).resolve().parent / "results"
TABLE = RESULTS / "TABLE.md"
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- Made by `python -m benchmarks --table`. -->"
END = "<!-- The end of what is made. -->"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Value:
    """What a row shows."""

    ratio: str
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    """One comparison that is wanted, measured or not."""

    benchmark: str
    what: str
    peer: str
    expected: str
    value: Callable[[Figures], Value | None]
    """From the benchmark's figures; None where they do not have it."""


def ratio_of(*path: str) -> Callable[[Figures], Value | None]:
    """Return what finds a ratio by the keys that lead to it."""

    def find(figures: Figures) -> Value | None:
        found = at(figures, *path)
        return None if found is None else Value(f"{found:.2f}")

    return find


def at(figures: Any, *path: str) -> Any:
    """Return what lies at the end of a path of keys; None where it ends early."""
    for key in path:
        if not isinstance(figures, Mapping) or key not in figures:
            return None
        figures = figures[key]
    return figures


def train_cpu(model: str, ranks: str, name: str = "ratio") -> Callable[[Figures], Value | None]:
    def find(figures: Figures) -> Value | None:
        found = at(figures, "models", model, ranks)
        if found is None or figures.get("tiny") or found[name] is None:
            return None
        spread = max(found["variants"][side]["spread"] for side in ("ours", "stock"))
        return Value(f"{found[name]:.2f}", spread if name == "ratio" else None)

    return find


def train_gpu(model: str, *, as_ratio: bool) -> Callable[[Figures], Value | None]:
    def find(figures: Figures) -> Value | None:
        found = at(figures, "models", model)
        best = None if found is None else at(found, "variants", found.get("compared", ""))
        if best is None or "error" in best or figures["hardware"]["device"].startswith("CPU"):
            return None
        ratio = f"{best['ratio']:.2f}" if best.get("ratio") else ""
        if as_ratio:
            return Value(ratio) if ratio else None
        beside = f", {ratio} of its peer" if ratio else ""
        return Value(f"{best['tokens_per_second']:,.0f} tokens/s{beside}")

    return find


def startup(part: str) -> Callable[[Figures], Value | None]:
    def find(figures: Figures) -> Value | None:
        found = at(figures, part)
        if found is None or found["ratio"] is None or "tiny" in found.get("model", ""):
            return None
        spread = max(each.get("spread", 0) for each in found["commands"].values())
        return Value(f"{found['ratio']:.2f}", spread)

    return find


def prepare(corpus: str, processes: str) -> Callable[[Figures], Value | None]:
    def find(figures: Figures) -> Value | None:
        found = at(figures, "corpora", corpus)
        if found is None or figures.get("tiny") or not found["ratio"].get(processes):
            return None
        spread = max(each["spread"] for each in found["processes"][processes].values())
        return Value(f"{found['ratio'][processes]:.1f}", spread)

    return find


_GPU = "stock Trainer; tuned"
_MAPS = "`map` twice"
ROWS = (
    Row("train_cpu", "MLM, 1 rank", "`run_mlm.py`", "1.8", train_cpu("kantaibert", "1")),
    Row("train_cpu", "MLM, 2 ranks", "`run_mlm.py`", "1.8", train_cpu("kantaibert", "2")),
    Row("train_cpu", "CLM, 1 rank", "`run_clm.py`", "1.15", train_cpu("gpt2_small", "1")),
    Row("train_cpu", "CLM, 2 ranks", "`run_clm.py`", "1.15", train_cpu("gpt2_small", "2")),
    *(
        Row(
            "train_cpu",
            f"peak memory, {objective}, {ranks} rank{'s' if ranks == '2' else ''}",
            f"`run_{objective.lower()}.py`",
            "at most 0.7",
            train_cpu(model, ranks, "memory_ratio"),
        )
        for objective, model in (("MLM", "kantaibert"), ("CLM", "gpt2_small"))
        for ranks in ("1", "2")
    ),
    *(
        Row("overhead", what, "the stock Trainer's tax", "2", ratio_of("ranks", what[0], "ratio"))
        for what in ("1 rank", "2 ranks")
    ),
    Row("prepare", "12 MB, 1 core", _MAPS, "20", prepare("embedded", "1")),
    Row("prepare", "12 MB, 2 cores", _MAPS, "20", prepare("embedded", "2")),
    Row("prepare", "repeated to 1 GB, 2 cores", _MAPS, "20", prepare("repeated", "2")),
    Row("startup", "first step", "`run_mlm.py`", "1", startup("first_step")),
    Row("startup", "`--dry-run`", "`import hydra`", "0.67", startup("dry_run")),
    *(
        Row("save", f"async, `{name}`", "sync", "1", ratio_of("strategies", name, "ratio"))
        for name in ("zero2", "ddp")
    ),
    Row("recover", "`zero2`", "`zero_to_fp32`", "1.5", ratio_of("checkpoints", "zero2", "ratio")),
    Row("recover", "`zero3`", "`zero_to_fp32`", "1.5", ratio_of("checkpoints", "zero3", "ratio")),
    Row("recover", "`fsdp`", "`merge-weights`", "1.5", ratio_of("checkpoints", "fsdp", "ratio")),
    Row("cpu_adam", "DeepSpeed's", "torch's", "none", ratio_of("ratio")),
    Row("collectives", "bytes of a step", "ZeRO's paper", "1", ratio_of("ratio")),
    Row("train_gpu", "MLM", _GPU, "1.8", train_gpu("kantaibert", as_ratio=True)),
    Row("train_gpu", "125M", _GPU, "480,000 tokens/s", train_gpu("gpt2_small", as_ratio=False)),
    Row("train_gpu", "1.3B", _GPU, "52,000 tokens/s", train_gpu("llama_1.3b", as_ratio=False)),
    Row("train_gpu", "8B", _GPU, "9,500 tokens/s", train_gpu("llama_8b", as_ratio=False)),
    Row(
        "train_gpu",
        "ModernBERT-base",
        _GPU,
        "350,000 tokens/s",
        train_gpu("modernbert_base", as_ratio=False),
    ),
    Row(
        "offload_gpu",
        "7B",
        "not offloaded",
        "0.5",
        train_gpu("llama_7b_offloaded", as_ratio=True),
    ),
)
"""In the order in which they are read."""
SAME_FILE = {"offload_gpu": "train_gpu"}
"""Benchmarks whose figures lie among those of another where they have no file."""


def read(folder: Path = RESULTS) -> dict[str, Figures]:
    """Return the figures in a folder, the newest of each benchmark."""
    every = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {each["benchmark"]: each for each in sorted(every, key=lambda each: each["date"])}


def rows(results: Results) -> Iterator[list[str]]:
    """Yield the cells of each comparison that is wanted."""
    for row in ROWS:
        figures = results.get(row.benchmark) or results.get(SAME_FILE.get(row.benchmark, ""))
        value = row.value(figures) if figures else None
        yield [
            f"`{row.benchmark}`",
            row.what,
            row.peer,
            value.ratio if value else NOT_MEASURED,
            row.expected,
            f"{value.spread:.0%}" if value and value.spread is not None else "",
            figures["date"] if value and figures else "",
        ]


def switched_off(results: Results) -> Iterator[list[str]]:
    """Yield the cells of each optimisation that was measured on and off."""
    for benchmark in ("train_cpu", "train_gpu"):
        for where, name, on_over_off, memory in _settings(benchmark, results.get(benchmark, {})):
            yield [f"`{benchmark}`", where, f"`{name}`", on_over_off, memory]


def _settings(benchmark: str, figures: Figures) -> Iterator[tuple[str, str, str, str]]:
    for model, of_model in figures.get("models", {}).items():
        if benchmark == "train_cpu":
            tables = {f"{model}, {ranks} rank": each for ranks, each in of_model.items()}
            ours = "ours"
        else:
            tables, ours = {model: of_model}, "single"
        for where, found in tables.items():
            mine = at(found, "variants", ours)
            for name, off in at(found, "variants").items():
                if "=" in name and mine and "error" not in mine and "error" not in off:
                    speed = mine["tokens_per_second"] / off["tokens_per_second"]
                    memory = mine["peak_memory_bytes"] / off["peak_memory_bytes"]
                    yield where, name, f"{speed:.2f}", f"{memory:.2f}"


def provenance(results: Results) -> Iterator[list[str]]:
    """Yield where and with what each benchmark was measured."""
    for name, figures in sorted(results.items()):
        hardware = ", ".join(
            f"{key} {value}" for key, value in figures["hardware"].items() if value
        )
        if cpu := at(figures, "machine", "cpu"):
            hardware += f", {cpu}"
        versions = ", ".join(f"{k} {v}" for k, v in figures.get("versions", {}).items())
        load = figures.get("load_average") or at(figures, "machine", "load_average")
        yield [f"`{name}`", figures["date"], hardware, versions, f"{load:.1f}" if load else ""]


def aligned(head: list[str], body: list[list[str]]) -> list[str]:
    """Return a table of Markdown whose columns are aligned for a terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


HEAD = ["benchmark", "what", "against", "ratio", "expected", "spread", "measured"]


def page(results: Results) -> str:
    """Return results/TABLE.md."""
    lines = [
        "# What has been measured",
        "",
        "Ours to the peer in the same run, medians of rounds in which the two take turns; above 1 "
        "is better, but for memory. Spread is (max - min) / median, the wider side's.",
        "",
        *aligned(HEAD, list(rows(results))),
    ]
    if off := list(switched_off(results)):
        head = ["benchmark", "model", "switched off", "speed, on to off", "memory, on to off"]
        lines += ["", "## One thing off", "", *aligned(head, off)]
    if where := list(provenance(results)):
        head = ["benchmark", "date", "hardware", "versions", "load"]
        lines += ["", "## Where and with what", "", *aligned(head, where)]
    return "\n".join(lines) + "\n"


def of_readme(results: Results) -> str:
    """Return the README's rows: one for each benchmark, each ratio with what is expected of it."""
    grouped: dict[str, list[list[str]]] = {}
    for cells in rows(results):
        grouped.setdefault(cells[0], []).append(cells)
    lines = ["| benchmark | ratios (expected) | measured |", "|---|---|---|"]
    for name, each in grouped.items():
        found = [f"{what} {ratio} ({wanted})" for _, what, _, ratio, wanted, *_ in _measured(each)]
        lacking = [what for _, what, _, ratio, *_ in each if ratio == NOT_MEASURED]
        if lacking:
            found.append(f"{NOT_MEASURED}: {', '.join(lacking)}" if found else NOT_MEASURED)
        lines.append(f"| {name} | {'; '.join(found)} | {max(cells[-1] for cells in each)} |")
    where = {facts[2] for facts in provenance(results) if facts[0].strip("`") in _CPU}
    versions = {facts[3] for facts in provenance(results) if facts[0].strip("`") in _CPU}
    said = "; ".join([*sorted(where), *sorted(versions)])
    return "\n".join(lines) + (f"\n\n{said}." if said else "")


_CPU = ("train_cpu",)
"""Benchmarks whose machine stands for all in the README."""


def _measured(found: list[list[str]]) -> list[list[str]]:
    return [cells for cells in found if cells[3] != NOT_MEASURED]


def between(text: str, made: str) -> str:
    """Return a page with what is made between its two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def write() -> None:
    """Write the table of what lies in results/, and the README's part of it."""
    results = read()
    RESULTS.mkdir(exist_ok=True)
    TABLE.write_text(page(results))
    README.write_text(between(README.read_text(), of_readme(results)))
