"""Training speed on one GPU: ours against the stock transformers Trainer, in the same minutes.

Every figure is the median of several runs, each in a process of its own. The runs take turns
(stock, single, ..., stock, single, ...), so that whatever else the machine does hits all of them.
Without a GPU it trains tiny models in fp32, which says nothing about speed but keeps it whole.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from omegaconf import OmegaConf

from benchmarks.flops import peak_bf16_flops
from benchmarks.report import STOCK, Figures, markdown, overall_ratio, summary
from shardwright.launchers import preflight
from shardwright.launchers.composition.compose import compose
from shardwright.launchers.machine import directories
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.command import prepare_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.train.config import RunConfig, from_tree
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import LOGS

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setup:
    """What a model is trained on: 16,384 tokens a step, enough to keep a GPU busy."""

    objective: str
    sequence_length: int
    micro_batch_size: int
    tiny: str
    """The model that stands in for it on a CPU."""


MODELS = {
    "kantaibert": Setup("mlm", sequence_length=512, micro_batch_size=32, tiny="roberta_tiny"),
    "gpt2_small": Setup("clm", sequence_length=1024, micro_batch_size=16, tiny="gpt2_tiny"),
}
VARIANTS = {
    STOCK: ["strategy=single"],
    "single": ["strategy=single"],
    "single_compile": ["strategy=single", "trainer.compile=true"],
    "zero2": ["strategy=zero2"],
    "fsdp": ["strategy=fsdp"],
}


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    models: list[str]
    variants: list[str]
    """Stock first."""
    steps: int
    warmup_steps: int
    repeats: int
    here: Machine


def uses_gpu(here: Machine) -> bool:
    return bool(here.gpus) and here.torch_has_cuda


def overrides(plan: Plan, model: str, variant: str) -> list[str]:
    """Return what composes the run of one variant of one model. Pure."""
    setup, steps = MODELS[model], plan.warmup_steps + plan.steps
    if uses_gpu(plan.here):
        batch = setup.micro_batch_size
        sizes = [f"model={model}", f"data.sequence_length={setup.sequence_length}"]
        sizes += ["precision=bf16", f"trainer.log_every_steps={min(10, steps)}"]
    else:
        batch = 4
        sizes = [f"model={setup.tiny}", "data.sequence_length=128", "data.max_documents=30"]
        sizes += ["precision=fp32", "trainer.log_every_steps=1"]
    return [
        f"objective={setup.objective}",
        "launcher=local",
        f"trainer.max_steps={steps}",
        f"trainer.global_batch_size={batch}",
        f"trainer.micro_batch_size={batch}",
        "data.eval_fraction=0",
        *sizes,
        *VARIANTS[variant],
    ]


def freeze(plan: Plan, model: str, variant: str, run_dir: Path) -> RunConfig:
    """Compose a run and create its directory, as `shardwright train` does.

    Raises UserError where this machine cannot run it.
    """
    (job,) = compose(overrides(plan, model, variant))
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    config = machine.resolve(from_tree(tree), plan.here, str(run_dir))
    preflight.check(config, plan.here)
    directories.create(config, run_dir)
    return config


def prepare(run_dir: Path) -> None:
    """Train the tokenizer and pack the samples; every later run finds them in the cache.

    Raises UserError where that fails; why is on stderr then.
    """
    environment = os.environ | package_environment(os.environ, packages=ROOT)
    if subprocess.run(prepare_command(run_dir), env=environment).returncode != 0:
        raise UserError("the data could not be prepared, see above")


def measure(plan: Plan, config: RunConfig, run_dir: Path, variant: str) -> Figures:
    """Train in a process of its own; return its figures, or its ``error``."""
    environment = {
        **os.environ,
        **rank_environment(config, plan.here, os.environ, packages=ROOT),
        # With several GPUs in sight the stock Trainer would take DataParallel.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    side = STOCK if variant == STOCK else "ours"
    argv = [sys.executable, "-m", "benchmarks.timed_run", side, str(run_dir)]
    argv.append(str(plan.warmup_steps))
    log = run_dir / LOGS / "benchmark.log"
    with log.open("w") as output:
        ended = subprocess.run(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if ended.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        return {"error": "\n".join([f"exit code {ended.returncode}", *tail])}
    figures: Figures = json.loads((run_dir / "figures.json").read_text())
    tokens = plan.steps * config.trainer.global_batch_size * config.data.sequence_length
    return {**figures, "tokens_per_second": tokens / figures["seconds"]}


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten each round, so that a stop loses little."""
    results: Figures = {
        "benchmark": "train_gpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "unknown", "cuda": None, "cores": plan.here.cores},
        "versions": versions(),
        "steps": plan.steps,
        "warmup_steps": plan.warmup_steps,
        "repeats": plan.repeats,
        "peak_bf16_flops": None,
        "models": {},
        "ratio": None,
    }
    for model in plan.models:
        runs: dict[str, list[Figures]] = {variant: [] for variant in plan.variants}
        for repeat in range(plan.repeats):
            for variant in plan.variants:
                with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-") as scratch:
                    run_dir = Path(scratch) / "run"
                    config = freeze(plan, model, variant, run_dir)
                    if not runs[STOCK]:
                        prepare(run_dir)
                    figures = measure(plan, config, run_dir, variant)
                runs[variant].append(figures)
                speed = figures.get("tokens_per_second")
                shown = f"{speed:,.0f} tokens/s" if speed else figures["error"]
                print(f"{model} {repeat + 1}/{plan.repeats} {variant}: {shown}", flush=True)
                if "device" in figures:
                    results["hardware"] |= {k: figures[k] for k in ("device", "cuda")}
                    results["peak_bf16_flops"] = peak_bf16_flops(figures["device"])
            results["models"][model] = summary(config, runs)
            results["ratio"] = overall_ratio(results["models"])
            if json_file:
                json_file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def versions() -> dict[str, str]:
    """Return the versions that the speed depends on, of what is installed."""
    installed: dict[str, str] = {}
    for distribution in metadata.distributions():
        installed.setdefault(distribution.name, distribution.version)  # the first is imported
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    found = {package: installed[package] for package in packages if package in installed}
    return {"python": platform.python_version(), **found}


def parse(argv: list[str]) -> argparse.Namespace:
    on_gpu = uses_gpu(machine.detect(os.environ))
    ours = [variant for variant in VARIANTS if variant != STOCK]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variant", nargs="+", choices=ours, default=ours, help="beside stock")
    parser.add_argument("--steps", type=int, default=50 if on_gpu else 5, help="measured steps")
    parser.add_argument("--warmup-steps", type=int, default=20 if on_gpu else 2)
    parser.add_argument("--repeats", type=int, default=3 if on_gpu else 1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    options = parser.parse_args(argv)
    if min(options.steps, options.warmup_steps, options.repeats) < 1:
        parser.error("--steps, --warmup-steps and --repeats are at least 1")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    plan = Plan(
        models=options.model,
        variants=[STOCK, *options.variant],
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        repeats=options.repeats,
        here=machine.detect(os.environ),
    )
    try:
        results = run(plan, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    page = markdown(results)
    print(f"\n{page}", end="")
    if options.markdown:
        options.markdown.write_text(page)
    variants = [v for model in results["models"].values() for v in model["variants"].values()]
    return FAILED if any("error" in figures for figures in variants) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
