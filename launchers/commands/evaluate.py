"""`shardwright evaluate`: the held-out loss of a run, a checkpoint or a model, without training."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.launchers import columns, evaluating, preflight
from shardwright.launchers.columns import NOTHING, Column
from shardwright.launchers.commands.recover import step as step_of
from shardwright.launchers.composition.compose import compose, plain, quoted
from shardwright.launchers.composition.errors import refuse_dashes, with_home_quoted
from shardwright.launchers.evaluating import Target
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.resuming import (
    Kept,
    changed,
    largest_micro_batch,
    options_chosen,
)
from shardwright.train import config as run_config
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.console import terminal
from shardwright.train.data.sources.corpus import located, with_sets_located
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.process.arguments import path as path_of
from shardwright.train.run_directory import evaluations
from shardwright.train.run_directory.evaluations import Evaluated
from shardwright.train.run_directory.names import EVALUATIONS
from shardwright.train.sampling import sample
from shardwright.train.units import counted

_KEPT = Kept(
    {
        "model": "the weights have its shape",
        "model.attention": None,
        "adapter": "it is in the weights that are evaluated",
        "tokenizer": "the model has learned its tokens",
        "objective": "the model was trained with it",
        "objective.prompts": None,
        "objective.eval_masking_rate": None,
        "objective.noise_density": None,
        "objective.mean_span_length": None,
        "run_dir": "an evaluation writes into a directory of its own",
        "sweep_dir": "an evaluation writes into a directory of its own",
    },
    "an evaluation",
    "leave it out",
)
"""What may not change, and what depends on it. The longest prefix counts; None allows."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print what was measured, and return the exit code."""
    refuse_dashes(arguments)
    options = parser().parse_intermixed_args(arguments)
    if "=" in options.place and not path_of(options.place).is_dir():
        raise UserError(
            "evaluate needs a run, a checkpoint or a model directory first: shardwright evaluate "
            "RUN_DIR [key=value]"
        )
    of = evaluating.target(Path(absolute(options.place)), options.step)
    if options.record and of.run_dir is None:
        raise UserError(
            f"--record appends to the {EVALUATIONS} of a run, and {of.weights} belongs to none; "
            "leave it out, and keep what --json prints"
        )
    here = machine.detect(os.environ)
    overrides = [*map(with_home_quoted, options.overrides)]
    as_job = AS_JOB in overrides
    if unread := evaluating.not_read(overrides):
        print(
            "warning: an evaluation makes no step and writes nothing to a tracker: "
            f"{', '.join(unread)} changes nothing of it",
            file=sys.stderr,
        )
    with evaluating.directory_of(of, as_job=as_job) as directory:
        config, has_own_data = _config(of, overrides, options.config_dir, here, directory)
        preflight.check_machine(config, here)
        evaluating.lay_out(directory, config, of, has_own_data=has_own_data)
        found = evaluating.run(directory, config, here)
    if isinstance(found, int):
        return found
    shutil.rmtree(directory, ignore_errors=True)
    entry = facts(of, config, overrides, found)
    if options.record and of.run_dir is not None:
        evaluations.record(of.run_dir, {"time": time.time(), **entry})
    print(json.dumps(entry, indent=2) if options.json else shown(entry, terminal.columns()))
    if (note := beside_packed(of)) is not None:
        print(note, file=sys.stderr)
    return 0


def beside_packed(of: Target) -> str | None:
    """Return what to say where a run has measured other weights than these: its packed ones."""
    bits = NOT_QUANTIZED
    if of.run_dir is not None:
        bits = quantization_of(run_config.load(of.run_dir).model)
    if bits == NOT_QUANTIZED:
        return None
    return (
        "note: these weights are whole, as final/ has them; what the run itself has logged was "
        f"measured beside weights in {bits.removesuffix('bit')} bits (model.quantization={bits})"
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright evaluate`."""
    found = argparse.ArgumentParser(
        prog="shardwright evaluate",
        usage="%(prog)s RUN_DIR|CHECKPOINT|MODEL_DIR [--step N|latest|best] [--json] [--record] "
        "[group=option] [key=value] ...",
        description="Measure held-out loss, perplexity and, of masked models, accuracy of what a "
        "run has trained, without training, by the evaluation of the training loop: of a "
        "checkpoint it gives the number that the run logged at its step, but for a run beside "
        "packed weights (model.quantization), whose weights it measures whole. A run means its "
        "final/, or its newest checkpoint where it has none. Strategy, ranks, precision and data "
        "are the run's, but for what is overridden.",
        epilog="Examples: shardwright evaluate runs/a --step best; shardwright evaluate runs/a "
        "data.eval_paths='{mine: texts/}' trainer.eval_max_samples=null; shardwright evaluate "
        "runs/a strategy=fsdp launcher.nproc_per_node=4; shardwright evaluate runs/a "
        "launcher=slurm (a job, waited for). Exit codes: 0, 1 failed, 2 bad input.",
    )
    found.add_argument("place", metavar="RUN_DIR|CHECKPOINT|MODEL_DIR")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    found.add_argument(
        "--step",
        type=step_of,
        metavar="N|latest|best",
        help="which checkpoint of a run: that of a step, the newest that is whole, or the best by "
        "the run's checkpoint.best_metric",
    )
    found.add_argument("--json", action="store_true", help="print what was measured as JSON")
    found.add_argument(
        "--record",
        action="store_true",
        help=f"append a line to RUN_DIR/{EVALUATIONS}; nothing else is written into the run",
    )
    found.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="a folder with options of your own, as for train"
    )
    return found


def _config(
    of: Target,
    overrides: Sequence[str],
    config_dir: str | None,
    here: Machine,
    directory: Path,
) -> tuple[RunConfig, bool]:
    """Return the config of the ranks, and whether the run's own tokens are those to evaluate on."""
    config_dir = config_dir and os.path.expanduser(config_dir)
    as_job = AS_JOB in overrides
    if of.run_dir is None:
        flags = [] if config_dir is None else ["--config-dir", config_dir]
        (job,) = compose([*flags, *_of_a_model(of.weights), *overrides])
        before = after = from_tree(plain(job.tree), job.typed)
        after = after.model_copy(update={"data": located(after.data)})
        limit = run_config.DEFAULT_MICRO_BATCH_SIZE
    else:
        before = run_config.load(of.run_dir)
        if as_job and before.launcher.is_job:  # as the run's own was
            before = without_dependency(before)
            overrides = [word for word in overrides if word != AS_JOB]
        _, trees = options_chosen(overrides, config_dir)
        after = changed(before, overrides, trees, _KEPT)
        data = with_sets_located(after.data)
        has_another = "data" in trees or _corpus(after) != _corpus(before)
        after = after.model_copy(update={"data": located(data) if has_another else data})
        limit = largest_micro_batch(before, overrides)
    if not as_job:
        evaluating.check_starts_here(after, [word.partition("=")[0] for word in overrides])
    tree = evaluating.config_of_run(after, of.weights, directory, as_job=as_job)
    config = machine.resolve(from_tree(tree), here, str(directory), limit)
    return config, of.run_dir is not None and _corpus(config) == _corpus(before)


AS_JOB = "launcher=slurm"
"""The word by which an evaluation is submitted as a job, and not started here."""


def without_dependency(config: RunConfig) -> RunConfig:
    """Return a run's config without the jobs that its own had to wait for. Pure."""
    launcher = config.launcher.model_copy(update={"dependency": None})
    return config.model_copy(update={"launcher": launcher})


def _of_a_model(weights: Path) -> list[str]:
    """Return the overrides by which a model directory is evaluated that belongs to no run."""
    objective = sample.objective_of(weights)
    name = quoted(str(weights))
    return [
        *("model=pretrained", f"model.name={name}", f"objective={objective}"),
        *("tokenizer=pretrained", f"tokenizer.name={name}", "trainer.max_steps=1"),
    ]


_NOT_OF_THE_CORPUS = {
    *("eval_paths", "eval_split", "names", "cache_dir"),
    *("document_attention", "unpad", "stages"),
}


def _corpus(config: RunConfig) -> dict[str, Any]:
    """Return what the tokens of a run, those of its own held-out sets aside, are made of. Pure."""
    return config.data.model_dump(exclude=_NOT_OF_THE_CORPUS)


# --- what was measured ----------------------------------------------------------------------------


def facts(
    of: Target, config: RunConfig, overrides: Sequence[str], found: Evaluated
) -> dict[str, Any]:
    """Return what was measured and on what, as JSON and evaluations.jsonl have it. Pure."""
    return {
        "weights": str(of.weights),
        "run_dir": str(of.run_dir) if of.run_dir is not None else None,
        "step": of.step or None,
        "strategy": config.strategy.kind,
        "world_size": config.launcher.world_size,
        "overrides": list(overrides),
        "metrics": dict(found.metrics),
        "samples": found.samples,
        "sets": dict(found.sets),
    }


def shown(entry: Mapping[str, Any], width: int | None) -> str:
    """Return what was measured as a table: that of which the run's loss is, then each set. Pure."""
    metrics, sets = entry["metrics"], entry["sets"]
    rows = [("all of the corpus" if sets else "held out", "", entry["samples"])]
    rows += [(name, f"/{name}", count) for name, count in sets.items()]
    cells: dict[str, list[str]] = {name: [] for name in ("set", "samples", *_COLUMNS)}
    for name, ending, count in rows:
        values = {key: metrics.get(f"eval_{key}{ending}") for key in _COLUMNS.values()}
        if (loss := values["loss"]) is not None:
            values["perplexity"] = math.exp(min(loss, 700.0))
        cells["set"].append(name)
        cells["samples"].append(f"{count:,}")
        for title, key in _COLUMNS.items():
            cells[title].append(NOTHING if (value := values[key]) is None else f"{value:.4f}")
    made = [
        Column(title, tuple(column), is_text=title == "set", least=8 if title == "set" else None)
        for title, column in cells.items()
    ]
    head = f"{entry['weights']}: {entry['strategy']} on {counted(entry['world_size'], 'rank')}"
    lines = columns.table([column for column in made if not column.is_empty], width)
    return "\n".join([head, *(f"  {line}" for line in lines)])


_COLUMNS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "masked_accuracy",
    "bits/byte": "bits_per_byte",
}
