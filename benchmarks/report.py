"""From the figures of single runs to medians, ratios and a page of Markdown; all of it pure."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from benchmarks.flops import peak_bf16_flops, training_flops_per_token
from shardwright.train.config import RunConfig, ScratchModel

STOCK = "stock"
"""The peer: what one would run with transformers alone."""
TUNED = "stock_tuned"
"""The same as one tunes it: compiled as well; both have bf16, SDPA and fused AdamW."""
PEERS = (STOCK, TUNED)
LIKE_FOR_LIKE = "single"
"""The variant that does exactly what stock does; its ratio is the model's."""

Figures = dict[str, Any]
"""Figures by name, as they go into the JSON file."""


def summary(
    config: RunConfig,
    runs: dict[str, list[Figures]],
    peer: str = STOCK,
    expected: int | None = None,
) -> Figures:
    """Return one model's figures: medians for each variant, its MFU and its ratio to the peer.

    The model's ratio is that of the run which is like for like; where there is none, that of the
    first beside the peer.
    """
    model = config.model
    assert isinstance(model, ScratchModel)
    variants = {name: _medians(repeats) for name, repeats in runs.items()}
    facts: Figures = {
        "model_kind": model.kind,
        "objective": config.objective.kind,
        "compute_dtype": config.precision.compute_dtype,
        "sequence_length": config.data.tokens_per_sample,
        "micro_batch_size": config.trainer.samples_per_pass,
        "peer": peer,
        "expected_tokens_per_second": expected,
    }
    succeeded = [run for repeats in runs.values() for run in repeats if "error" not in run]
    if not succeeded:
        return {**facts, "variants": variants, "ratio": None}

    parameters = succeeded[0]["matmul_parameters"]
    flops = training_flops_per_token(
        parameters=parameters,
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        head_dim=model.hidden_size // model.num_attention_heads,
        sequence_length=config.data.tokens_per_sample,
    )
    peak = peak_bf16_flops(succeeded[0]["device"])
    stock = variants.get(peer, {}).get("tokens_per_second")
    tuned = variants.get(TUNED, {}).get("tokens_per_second")
    for figures in variants.values():
        if "error" not in figures:
            speed = figures["tokens_per_second"]
            figures["mfu"] = speed * flops / peak if peak else None
            figures["ratio"] = speed / stock if stock else None
            figures["ratio_to_tuned"] = speed / tuned if tuned else None
    ours = [name for name in variants if name not in (*PEERS, peer)]
    chosen = LIKE_FOR_LIKE if LIKE_FOR_LIKE in ours else next(iter(ours), "")
    return {
        **facts,
        "matmul_parameters": parameters,
        "flops_per_token": flops,
        "variants": variants,
        "compared": chosen,
        "ratio": variants.get(chosen, {}).get("ratio"),
    }


def overall_ratio(models: dict[str, Figures]) -> float | None:
    """Return the geometric mean of the models' ratios; None where no model has one."""
    ratios = [figures["ratio"] for figures in models.values() if figures["ratio"]]
    return math.prod(ratios) ** (1 / len(ratios)) if ratios else None


def _medians(runs: list[Figures]) -> Figures:
    if failed := [run["error"] for run in runs if "error" in run]:
        return {"error": failed[0]}
    speeds = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": median(speeds),
        "tokens_per_second_of_each_run": speeds,
        "peak_memory_bytes": median(run["peak_memory_bytes"] for run in runs),
        "losses": runs[0]["losses"],
    }


# --- what a person reads ------------------------------------------------------------------------


def markdown(results: Figures) -> str:
    """Return the results as a page of Markdown whose tables are aligned for a terminal too."""
    hardware, ratio = results["hardware"], results["ratio"]
    device = hardware["device"]
    cuda = f", CUDA {hardware['cuda']}" if hardware["cuda"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Training speed on one device: {device}",
        "",
        f"{results['date']}. {device}{cuda}, {hardware['cores']} CPU cores. {versions}.",
        "",
        f"Medians of {results['repeats']} run(s) of {results['steps']} steps after "
        f"{results['warmup_steps']} of warm-up; ratio is tokens per second over those of the "
        "first row: stock is the plain transformers Trainer, stock_tuned the same compiled.",
    ]
    if results["peak_bf16_flops"] is None:
        lines += ["", f"MFU is not given: no bf16 peak is known for {device}."]
    for model, figures in results["models"].items():
        lines += [
            "",
            f"## {model}",
            "",
            f"{figures['model_kind']}, {figures['objective']}, {figures['compute_dtype']}, "
            f"micro-batches of {figures['micro_batch_size']} x {figures['sequence_length']} tokens",
            "",
            *_table(figures["variants"]),
        ]
        if (expected := figures["expected_tokens_per_second"]) is not None:
            lines += ["", f"Expected of ours on an H200: {expected:,} tokens/s"]
        for variant, values in figures["variants"].items():
            if "error" in values:
                lines += ["", f"{variant} failed:", "", "```", values["error"], "```"]
    overall = f"{ratio:.3f}" if ratio else "unknown"
    lines += ["", f"Overall ratio: {overall}"]
    return "\n".join(lines) + "\n"


def _table(variants: dict[str, Figures]) -> list[str]:
    rows = [["run", "tokens/s", "spread", "ratio", "MFU", "peak memory", "last loss"]]
    for name, figures in variants.items():
        if "error" in figures:
            rows.append([name, "failed", *[""] * 5])
            continue
        speed, each = figures["tokens_per_second"], figures["tokens_per_second_of_each_run"]
        rows.append(
            [
                name,
                f"{speed:,.0f}",
                f"{(max(each) - min(each)) / speed:.1%}",
                f"{figures['ratio']:.3f}" if figures["ratio"] else "",
                f"{figures['mfu']:.1%}" if figures["mfu"] else "n/a",
                f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB",
                f"{figures['losses'][-1]:.4f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
