"""Which chart shows which metrics, under what title and in which unit. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Panel:
    """One chart: a metric, or several of one run that are read together."""

    name: str
    """Also of its picture."""
    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    factor: float = 1.0
    """From what is logged to that unit."""
    format: str = ".4~g"
    """Of its numbers on the axis, by d3's rules."""
    is_noisy: bool = True
    """Whether it is smoothed where that is asked for."""


EVAL_LOSS = "eval_loss"
MARKED = "spike_"
"""What begins so is marked on the curves of others."""
_KNOWN = (
    Panel("loss", "Training loss", ("loss",)),
    Panel("eval_loss", "Held-out loss", (EVAL_LOSS,)),
    Panel("eval_average_loss", "Held-out loss of the average", ("eval_average_loss",)),
    Panel("eval_bits_per_byte", "Held-out bits per byte", ("eval_bits_per_byte",)),
    Panel("learning_rate", "Learning rate", ("learning_rate",), format="~e", is_noisy=False),
    Panel("grad_norm", "Gradient norm", ("grad_norm",)),
    Panel("gradient_noise_scale", "Gradient noise scale", ("gradient_noise_scale",), "samples"),
    Panel("tokens_per_second", "Speed", ("tokens_per_second",), "tokens per second", format="~s"),
    Panel("mfu", "MFU", ("mfu",), "%", 100.0),
    Panel(
        "sent_bytes_per_second",
        "Sent by a rank in collectives",
        ("sent_bytes_per_second",),
        "GB per second",
        factor=1e-9,
    ),
    Panel(
        "peak_memory_bytes",
        "Peak memory",
        ("peak_memory_bytes",),
        "GiB",
        factor=2.0**-30,
        is_noisy=False,
    ),
)
_OF_MODULES = {
    "weight_norm": "Norm of the weights",
    "gradient_norm": "Norm of the gradients, not clipped",
    "update_norm": "Norm of the updates",
    "gradient_zeros": "Share of gradients that are zero",
}
"""Of trainer.debug.statistics_every_steps: of the model, and behind a slash of each module."""
OF_RANKS = "_most_rank"
"""What ends the names of metrics that are a rank's number, of which there is no chart."""
_OF_TIMES = ("compute_seconds", "wait_seconds", "data_seconds")
_NAMES = {"loss": "training", EVAL_LOSS: "held out"}


def panels(metrics: Iterable[str], *, one_run: bool) -> list[Panel]:
    """Return the charts for what runs have logged, in the order in which they are read.

    Those of one run have its losses in one chart, and all of its held-out sets in another; of
    several, each has a chart of its own, in which the runs are compared.
    """
    found = {name for name in metrics if not (name.endswith(OF_RANKS) or name.startswith(MARKED))}
    sets: dict[str, list[str]] = {}
    for name in sorted(found):
        whole, slash, _ = name.partition("/")
        if slash:
            sets.setdefault(whole, []).append(name)
    shown: list[Panel] = []
    for known in _KNOWN:
        (metric,) = known.metrics
        if metric in found:
            shown.append(known)
        shown += _of_sets(known, sets.pop(metric, []), together=one_run)
    if one_run and {"loss", EVAL_LOSS} <= found:
        shown = [p for p in shown if p.name not in ("loss", EVAL_LOSS)]
        shown.insert(0, Panel("loss", "Loss", ("loss", EVAL_LOSS)))
    for whole, title in _OF_MODULES.items():
        if whole in found:
            shown.append(Panel(whole, title, (whole,)))
        names = sets.pop(whole, [])
        if one_run and names:
            # Several runs have too many of them to be compared.
            shown.append(Panel(f"{whole}_of_modules", f"{title}, of each module", tuple(names)))
        found -= set(names)
    for whole, names in sets.items():
        shown += _of_sets(Panel(whole, _words(whole), ()), names, together=one_run)
    taken = {metric for panel in shown for metric in panel.metrics}
    return shown + [Panel(name, _words(name), (name,)) for name in sorted(found - taken)]


def _of_sets(panel: Panel, names: list[str], *, together: bool) -> list[Panel]:
    if not names:
        return []
    if together:
        what = "of a step, of the ranks" if panel.name in _OF_TIMES else "of each set"
        title = f"{panel.title} {what}"
        return [replace(panel, name=f"{panel.name}_of_sets", title=title, metrics=tuple(names))]
    return [
        replace(
            panel,
            name=name.replace("/", "_"),
            title=f"{panel.title}: {name.partition('/')[2]}",
            metrics=(name,),
        )
        for name in names
    ]


def curve_name(metric: str) -> str:
    """Return what a metric is called beside others of one run."""
    return _NAMES.get(metric) or metric.partition("/")[2] or metric


def _words(name: str) -> str:
    text = name.replace("_", " ").removeprefix("eval ")
    return f"Held-out {text}" if name.startswith("eval_") else text[:1].upper() + text[1:]
