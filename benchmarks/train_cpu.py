"""Training speed and memory on a CPU: `shardwright train` against transformers' example scripts.

`run_mlm.py` and `run_clm.py` are run as shipped, with the arguments that their users give. Both
sides train the same model with the same tokenizer, optimizer and batch on the same text, each run
in processes of its own from its command line; they take turns in an order that reverses from round
to round. Tokens are counted without padding; memory is the most that the ranks ever had.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks import examples, prose
from benchmarks.report import Figures
from benchmarks.train_cpu_report import shown, summary
from benchmarks.train_gpu import ROOT, prepare, versions
from benchmarks.watched import Line, Watched, watch
from shardwright.launchers.composition.compose import compose
from shardwright.launchers.machine import directories
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.train.config import from_tree
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import METRICS, TOKENIZER_FOLDER

PEER = "stock"
OURS = "ours"
SEQUENCE_LENGTH = 128
LIMIT_SECONDS = 900.0
"""Of one run; it is taken to hang after that."""


@dataclass(frozen=True)
class Setup:
    """What a model learns, and how its text becomes samples on either side."""

    objective: str
    script: str
    text: str
    ours: tuple[str, ...]
    peer: dict[str, Any]
    tiny: str
    """The model that stands in for it where only the benchmark itself is tried."""


MODELS = {
    "kantaibert": Setup(
        objective="mlm",
        script="run_mlm.py",
        text="train.txt",
        ours=("data.line_by_line=true", "data.max_cut_fraction=0.5"),
        peer={"line_by_line": True, "max_seq_length": SEQUENCE_LENGTH},
        tiny="roberta_tiny",
    ),
    "gpt2_small": Setup(
        objective="clm",
        script="run_clm.py",
        text="train.jsonl",
        ours=(),
        peer={"block_size": SEQUENCE_LENGTH},
        tiny="gpt2_tiny",
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    models: list[str]
    ranks: list[int]
    strategies: list[str]
    """Ours, on several ranks; the first is compared with what the peer has, which is DDP."""
    without: list[str]
    """Settings that switch one thing off: each is a row of its own, on one rank."""
    batch: int
    """Samples of a step; each rank takes its part of them in one pass."""
    steps: int
    warmup_steps: int
    repeats: int
    is_tiny: bool
    examples: Path
    directory: Path
    here: Machine

    @property
    def all_steps(self) -> int:
        return self.warmup_steps + self.steps

    def variants(self, model: str, ranks: int) -> dict[str, list[str]]:
        """Return what ours are called, each with what composes it beside the rest."""
        if ranks > 1:
            first, *others = self.strategies
            rows = {OURS: [f"strategy={first}"]}
            return rows | {f"strategy={name}": [f"strategy={name}"] for name in others}
        one = "strategy=single"
        named = [each.rpartition(":") for each in self.without]
        of_model = [
            setting
            for of, _, setting in named
            if of in ("", model) and composes(self, model, setting)
        ]
        return {OURS: [one], **{setting: [one, setting] for setting in of_model}}


# --- the two sides ------------------------------------------------------------------------------


def overrides(plan: Plan, model: str, ranks: int, run_dir: Path, changed: list[str]) -> list[str]:
    """Return what composes one of our runs. Pure."""
    setup = MODELS[model]
    return [
        f"run_dir={run_dir}",
        f"model={setup.tiny if plan.is_tiny else model}",
        f"objective={setup.objective}",
        "precision=fp32",
        "data=text",
        f"data.paths=[{plan.directory / 'text' / setup.text}]",
        f"data.sequence_length={SEQUENCE_LENGTH}",
        "data.eval_fraction=0",
        f"data.cache_dir={plan.directory / 'cache'}",
        *setup.ours,
        f"launcher={'local' if ranks == 1 else 'torchrun'}",
        *([] if ranks == 1 else [f"launcher.nproc_per_node={ranks}"]),
        "launcher.device=cpu",
        f"trainer.max_steps={plan.all_steps}",
        f"trainer.global_batch_size={plan.batch}",
        f"trainer.micro_batch_size={plan.batch // ranks}",
        "trainer.learning_rate=5e-5",
        "trainer.lr_scheduler=constant",
        "trainer.weight_decay=0",
        "trainer.adam_beta2=0.999",
        "trainer.log_every_steps=1",
        *changed,
    ]


def ours_command(
    plan: Plan, model: str, ranks: int, run_dir: Path, changed: list[str]
) -> list[str]:
    """Return the command line of ours. Pure."""
    words = overrides(plan, model, ranks, run_dir, changed)
    return [sys.executable, "-m", "shardwright", "train", *words]


def peer_arguments(plan: Plan, model: str, ranks: int, out: Path) -> dict[str, Any]:
    """Return what the example script is given. Pure."""
    setup, text = MODELS[model], plan.directory / "text"
    suffix = {".jsonl": ".json"}.get(Path(setup.text).suffix, ".txt")
    config = str(plan.directory / model / "config")
    return {
        "config_name": config,
        "tokenizer_name": config,
        "train_file": str(text / f"train{suffix}"),
        "validation_file": str(text / f"held_out{suffix}"),
        **setup.peer,
        "do_train": True,
        "max_steps": plan.all_steps,
        "per_device_train_batch_size": plan.batch // ranks,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(out),
        # Without a GPU the ranks of torchrun would otherwise train a model each, and say nothing.
        **({"use_cpu": True, "ddp_backend": "gloo"} if ranks > 1 else {}),
    }


def peer_command(
    plan: Plan, model: str, ranks: int, out: Path, *, counted: bool = False
) -> list[str]:
    """Return the command line of the example script; ``counted`` has it count its tokens."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher.append(str(plan.examples / MODELS[model].script))
    arguments = peer_arguments(plan, model, ranks, out)
    if counted:
        # A file, as transformers 5.23 takes a truth value alone for this on the command line.
        file = out.with_suffix(".json")
        file.write_text(json.dumps({**arguments, "include_num_input_tokens_seen": "non_padding"}))
        return [*launcher, str(file)]
    for name, value in arguments.items():
        launcher += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return launcher


def environment(plan: Plan, ranks: int) -> dict[str, str]:
    """Return what both sides are started with: the same threads, no GPU, no network."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HOME": str(plan.directory / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(max(1, plan.here.cores // ranks)),
        "PYTHONUNBUFFERED": "1",
    }


def composes(plan: Plan, model: str, setting: str) -> bool:
    """Say whether a setting is one of a model's; one of another objective's is not."""
    changed = ["strategy=single", setting]
    try:
        (job,) = compose(overrides(plan, model, 1, plan.directory / "run", changed))
        from_tree(OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True))
    except UserError:
        return False
    return True


# --- what is read of them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a side has said of one step."""

    time: float
    loss: float
    tokens: int | None
    """Of all steps up to this one, without padding; None where it was not counted."""


def steps_of_peer(lines: list[Line]) -> list[Step]:
    """Return the steps that an example script has logged. Pure."""
    found = []
    for line in lines:
        if loss := _number("loss", line.text):
            tokens = _number("num_input_tokens_seen", line.text)
            found.append(Step(line.time, loss, None if tokens is None else int(tokens)))
    return found


def _number(name: str, text: str) -> float | None:
    # The Trainer prints a dictionary, its numbers as they are or as text (transformers 5).
    _, found, rest = text.partition(f"'{name}': ")
    return float(rest.split(",")[0].strip("'} \r")) if found else None


def steps_of_ours(run_dir: Path) -> list[Step]:
    """Return the steps that a run of ours has logged."""
    try:
        text = (run_dir / METRICS).read_text()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    entries = [json.loads(line) for line in whole.splitlines()]
    return [Step(e["time"], e["loss"], e["tokens"]) for e in entries if "loss" in e]


def figures_of(
    plan: Plan, watched: Watched, steps: list[Step], tokens: list[int] | None
) -> Figures:
    """Return what one run has shown, or its ``error``. Pure.

    ``tokens`` are those of each step and all before, of a run that counted the very same batches.
    """
    if watched.problem is not None:
        return {"error": watched.problem}
    first, last = plan.warmup_steps - 1, plan.all_steps - 1
    totals = tokens or [step.tokens or 0 for step in steps]
    speed = None  # where nothing follows the warm-up
    if plan.steps:
        speed = (totals[last] - totals[first]) / (steps[last].time - steps[first].time)
    return {
        "tokens_per_second": speed,
        "seconds_to_first_step": watched.seconds_to(steps[0].time),
        "peak_memory_bytes": watched.peak_memory_bytes,
        "tokens": totals[last],
        "losses": [step.loss for step in steps[: plan.all_steps]],
    }


# --- measuring ----------------------------------------------------------------------------------


def make_ready(plan: Plan, model: str) -> None:
    """Write the text, train the tokenizer, and give the peer both and the model's config.

    Raises UserError where that fails.
    """
    from shardwright.train.data.tokens.tokenizer import load_tokenizer
    from shardwright.train.model.configs import transformers_config

    text = plan.directory / "text"
    if not text.exists():
        lines = prose.paragraphs()
        prose.write(text, lines[:400] if plan.is_tiny else lines)
    with tempfile.TemporaryDirectory(dir=plan.directory) as scratch:
        run_dir = Path(scratch) / "run"
        (job,) = compose(overrides(plan, model, 1, run_dir, ["strategy=single"]))
        tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
        config = machine.resolve(from_tree(tree), plan.here, str(run_dir))
        directories.create(config, run_dir)
        prepare(run_dir)
        tokenizer = load_tokenizer(config, run_dir / TOKENIZER_FOLDER)
        place = plan.directory / model / "config"
        transformers_config(config.model, tokenizer).save_pretrained(place)
        tokenizer.save_pretrained(place)


def run_peer(plan: Plan, model: str, ranks: int, tokens: list[int] | None) -> Figures:
    """Run the example script once; where ``tokens`` are not known yet it counts them."""
    with tempfile.TemporaryDirectory(dir=plan.directory) as scratch:
        watched = watch(
            peer_command(plan, model, ranks, Path(scratch) / "out", counted=tokens is None),
            environment(plan, ranks),
            cwd=Path(scratch),
            is_rank=lambda command: MODELS[model].script in command,
            is_done=lambda lines: len(steps_of_peer(lines)) >= plan.all_steps,
            limit_seconds=LIMIT_SECONDS,
        )
    steps = steps_of_peer(watched.lines)
    found = figures_of(plan, watched, steps, tokens)
    if tokens is None and "error" not in found:
        found["tokens_of_steps"] = [step.tokens for step in steps[: plan.all_steps]]
    return found


def run_ours(plan: Plan, model: str, ranks: int, changed: list[str]) -> Figures:
    """Run ours once."""
    with tempfile.TemporaryDirectory(dir=plan.directory) as scratch:
        run_dir = Path(scratch) / "run"
        watched = watch(
            ours_command(plan, model, ranks, run_dir, changed),
            environment(plan, ranks) | package_environment(os.environ, packages=ROOT),
            cwd=Path(scratch),
            is_rank=lambda command: "-m shardwright.train " in command,
            is_done=lambda lines: len(steps_of_ours(run_dir)) >= plan.all_steps,
            limit_seconds=LIMIT_SECONDS,
        )
        return figures_of(plan, watched, steps_of_ours(run_dir), None)


def measure(
    plan: Plan, model: str, ranks: int, say: Callable[[str], None]
) -> dict[str, list[Figures]]:
    """Return each variant's figures of each round, after a round that does not count."""
    first = run_peer(plan, model, ranks, None)
    say(f"{model}, {_ranks(ranks)}: {PEER} first, uncounted{_failed(first)}")
    tokens = first.get("tokens_of_steps")
    sides: dict[str, Callable[[], Figures]] = {
        PEER: lambda: run_peer(plan, model, ranks, tokens) if tokens else first
    }
    for name, changed in plan.variants(model, ranks).items():
        sides[name] = lambda changed=changed: run_ours(plan, model, ranks, changed)  # type: ignore[misc]
    runs: dict[str, list[Figures]] = {name: [] for name in sides}
    for repeat in range(plan.repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            figures = sides[name]()
            runs[name].append(figures)
            speed = f"{figures.get('tokens_per_second', 0):,.0f} tokens/s{_failed(figures)}"
            say(f"{model}, {_ranks(ranks)}, {repeat + 1}/{plan.repeats} {name}: {speed}")
    return runs


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _failed(figures: Figures) -> str:
    return f", failed: {figures['error'].splitlines()[0]}" if "error" in figures else ""


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten after each model and number of ranks."""
    results: Figures = {
        "benchmark": "train_cpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "CPU", "cores": plan.here.cores},
        "versions": versions(),
        "scripts": examples.hashes(plan.examples),
        "tiny": plan.is_tiny,
        **{name: getattr(plan, name) for name in ("batch", "steps", "warmup_steps", "repeats")},
        "sequence_length": SEQUENCE_LENGTH,
        "models": {},
        "ratio": None,
    }
    for model in plan.models:
        make_ready(plan, model)
        results["models"][model] = {}
        for ranks in plan.ranks:
            runs = measure(plan, model, ranks, lambda text: print(text, flush=True))
            found = {**summary(runs, PEER, OURS), "load_average": os.getloadavg()[0]}
            results["models"][model][str(ranks)] = found
            every = [each["ratio"] for of in results["models"].values() for each in of.values()]
            # The worst of all, as one knows one's model and not their mean.
            results["ratio"] = None if None in every else min(every)
            if json_file:
                json_file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.train_cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    found.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    found.add_argument("--strategy", nargs="+", default=["ddp"], help="ours, on several ranks")
    found.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="[MODEL:]FIELD=VALUE",
        help="a row of its own with one thing switched off, such as "
        "kantaibert:objective.head_on_labels_only=false",
    )
    found.add_argument("--batch", type=int, default=16, help="samples of a step")
    found.add_argument("--steps", type=int, default=3, help="measured steps of each run")
    found.add_argument("--warmup-steps", type=int, default=1)
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--quick", action="store_true", help="tiny models: tries the benchmark out")
    found.add_argument(
        "--examples",
        type=Path,
        metavar="DIR",
        help="folder of run_mlm.py and run_clm.py; they are downloaded where it is not given",
    )
    found.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    found.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    options = parser().parse_args(argv)
    counts = (options.batch, options.steps, options.warmup_steps, options.repeats, *options.ranks)
    if min(counts) < 1:
        parser().error("--ranks, --batch, --steps, --warmup-steps and --repeats are at least 1")
    if any(options.batch % ranks for ranks in options.ranks):
        parser().error("--batch is to be divided by each number of --ranks")
    return options


def plan_of(options: argparse.Namespace, directory: Path) -> Plan:
    """Return what the command line asks for. Raises UserError where the scripts are not there."""
    return Plan(
        models=options.model,
        ranks=options.ranks,
        strategies=options.strategy,
        without=options.without,
        batch=options.batch,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        repeats=options.repeats,
        is_tiny=options.quick,
        examples=examples.find(options.examples).resolve(),
        directory=directory,
        here=machine.detect({**os.environ, "CUDA_VISIBLE_DEVICES": ""}),
    )


def main(argv: list[str]) -> int:
    options = parse(argv)
    place = options.directory.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-", dir=place) as scratch:
            results = run(plan_of(options, Path(scratch)), options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(shown(results))
    return FAILED if results["ratio"] is None else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
