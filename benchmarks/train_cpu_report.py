"""From the runs of train_cpu to medians, ratios and lines for a terminal; all of it pure."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from benchmarks.report import Figures

NEAR = 0.05
"""Two sides that draw their masks, dropout and order differently have the same loss to this share,
after a few steps from fresh weights; a side that did other work would not."""
FEWEST_TOKENS = 0.6
"""Of the other side's: a few steps of lines in another order hold about as many. Half of them are
those of ranks that each train by themselves."""


def summary(runs: dict[str, list[Figures]], peer: str, ours: str) -> Figures:
    """Return medians of each variant, ours over the peer's, and each variant's to both.

    There is no ratio where a side has failed, or where the two have not learned alike or not from
    about as many tokens.
    """
    variants = {name: medians(each) for name, each in runs.items()}
    stock, mine = variants[peer], variants[ours]
    found: Figures = {
        "variants": variants,
        **dict.fromkeys(("ratio", "memory_ratio", "loss_difference")),
    }
    if "error" in mine:
        return found
    for figures in variants.values():
        if "error" in figures:
            continue
        figures["ratio_to_ours"] = figures["tokens_per_second"] / mine["tokens_per_second"]
        if "error" not in stock:
            figures["ratio"] = figures["tokens_per_second"] / stock["tokens_per_second"]
            figures["memory_ratio"] = figures["peak_memory_bytes"] / stock["peak_memory_bytes"]
    if "error" not in stock:
        difference = abs(fmean(mine["losses"]) / fmean(stock["losses"]) - 1)
        found["loss_difference"] = difference
        fewest, most = sorted((mine["tokens"], stock["tokens"]))
        if difference <= NEAR and fewest >= FEWEST_TOKENS * most:
            found |= {name: mine[name] for name in ("ratio", "memory_ratio")}
    return found


def medians(runs: list[Figures]) -> Figures:
    if failed := [run["error"] for run in runs if "error" in run]:
        return {"error": failed[0]}
    speeds = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": median(speeds),
        "tokens_per_second_of_each_run": speeds,
        "spread": spread(speeds),
        **{
            name: median(run[name] for run in runs)
            for name in ("peak_memory_bytes", "seconds_to_first_step")
        },
        "losses": runs[0]["losses"],
        "tokens": runs[0]["tokens"],
    }


def spread(values: list[float]) -> float:
    """Return (max - min) / median."""
    return (max(values) - min(values)) / median(values)


def shown(results: dict[str, Any]) -> str:
    """Return the results as a table for a terminal."""
    row = "{:11} {:>5}  {:36} {:>9} {:>7} {:>6} {:>10} {:>7} {:>6} {:>7}".format
    names = ("model", "ranks", "run", "tokens/s", "spread", "ratio")
    lines = [row(*names, "peak MiB", "memory", "start", "loss")]
    for model, of_model in results["models"].items():
        for ranks, found in of_model.items():
            for name, figures in found["variants"].items():
                if "error" in figures:
                    lines.append(f"{model:11} {ranks:>5}  {name} failed:\n{figures['error']}")
                    continue
                lines.append(row(model, ranks, name, *_cells(figures)))
            if found["ratio"] is None and found["loss_difference"] is not None:
                lines.append(
                    f"the losses differ by {found['loss_difference']:.1%}, the tokens are "
                    f"{' and '.join(str(each['tokens']) for each in found['variants'].values())}: "
                    "no ratio"
                )
    return "\n".join(lines)


def _cells(figures: Figures) -> list[str]:
    def ratio(name: str) -> str:
        return f"{figures[name]:.2f}" if name in figures else ""

    return [
        f"{figures['tokens_per_second']:,.0f}",
        f"{figures['spread']:.0%}",
        ratio("ratio"),
        f"{figures['peak_memory_bytes'] / 2**20:,.0f}",
        ratio("memory_ratio"),
        f"{figures['seconds_to_first_step']:.1f}",
        f"{figures['losses'][-1]:.3f}",
    ]
