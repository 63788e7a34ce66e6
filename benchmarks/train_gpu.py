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

from benchmarks import frozen
from benchmarks.flops import peak_bf16_flops
from benchmarks.report import (
    LIKE_FOR_LIKE,
    PEERS,
    STOCK,
    TUNED,
    Figures,
    markdown,
    overall_ratio,
    summary,
)
from benchmarks.watched import end
from shardwright.launchers.machine import facts as machine
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks.command import prepare_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import LOGS

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setup:
    """What a model is trained on, and how: 16,384 tokens a step keep a GPU busy.

    Half of them where logits of 128,256 words would not fit beside the peer's optimizer.
    """

    objective: str
    sequence_length: int
    micro_batch_size: int
    tiny: tuple[str, ...]
    """What stands in for it on a CPU."""
    model: tuple[str, ...]
    """What composes it."""
    variants: tuple[str, ...] = ("stock", "stock_tuned", "single", "single_eager", "zero2", "fsdp")
    """What it is trained by; the first is its peer."""
    recompute: bool = False
    """All activations are, on either side."""
    expected: int | None = None
    """Tokens per second that ours are to reach on an H200."""


_LLAMA_TINY = ("model=llama_tiny",)
MODELS = {
    "kantaibert": Setup("mlm", 512, 32, ("model=roberta_tiny",), ("model=kantaibert",)),
    "gpt2_small": Setup(
        "clm", 1024, 16, ("model=gpt2_tiny",), ("model=gpt2_small",), expected=480_000
    ),
    "modernbert_base": Setup(
        "mlm",
        1024,
        16,
        (
            *("model=modernbert_base", "model.hidden_size=64", "model.intermediate_size=96"),
            *("model.num_hidden_layers=3", "model.num_attention_heads=2", "model.vocab_size=2048"),
        ),
        ("model=modernbert_base",),
        variants=("stock", "stock_tuned", "single", "single_eager"),
        expected=350_000,
    ),
    "llama_1.3b": Setup(
        "clm",
        2048,
        8,
        _LLAMA_TINY,
        (
            *("model=llama_1b", "model.num_hidden_layers=24", "model.num_attention_heads=16"),
            *("model.num_key_value_heads=16", "model.intermediate_size=5504"),
            "model.vocab_size=32000",
        ),
        variants=("stock", "stock_tuned", "single", "fsdp"),
        expected=52_000,
    ),
    "llama_8b": Setup(
        "clm",
        4096,
        2,
        _LLAMA_TINY,
        ("model=llama_8b",),
        variants=("stock_tuned", "fsdp", "single"),
        recompute=True,
        expected=9_500,
    ),
    "llama_7b_offloaded": Setup(
        "clm",
        4096,
        4,
        _LLAMA_TINY,
        (
            *("model=llama_8b", "model.vocab_size=32000", "model.num_key_value_heads=32"),
            "model.intermediate_size=11008",
        ),
        variants=("fsdp", "zero2_offload", "fsdp_offload"),
        recompute=True,
    ),
}
"""Of the sizes that one GPU of 140 GB trains; the last one's peer is itself, not offloaded."""
VARIANTS = {
    STOCK: ["strategy=single"],
    TUNED: ["strategy=single"],
    "single": ["strategy=single"],
    "single_eager": ["strategy=single", "trainer.compile=false"],
    "zero2": ["strategy=zero2"],
    "fsdp": ["strategy=fsdp"],
    "zero2_offload": ["strategy=zero2_offload"],
    "fsdp_offload": ["strategy=fsdp_offload"],
}
DEFAULT_MODELS = ("kantaibert", "gpt2_small", "modernbert_base")
"""Those whose rounds take minutes; the others are named."""


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where."""

    models: list[str]
    variants: list[str]
    """Those beside each model's peer; a model has some of them."""
    without: list[str]
    """Settings that switch one thing off: each is a row of its own."""
    steps: int
    warmup_steps: int
    repeats: int
    here: Machine


def uses_gpu(here: Machine) -> bool:
    return bool(here.gpus) and here.torch_has_cuda


def variants_of(plan: Plan, model: str) -> list[str]:
    """Return how a model is trained here, its peer first. Pure."""
    peer, *others = MODELS[model].variants
    return [peer, *(v for v in others if v in plan.variants), *plan.without]


def overrides(plan: Plan, model: str, variant: str) -> list[str]:
    """Return what composes the run of one variant of one model. Pure.

    A variant that has no name is a setting of the run that is like for like.
    """
    setup, steps = MODELS[model], plan.warmup_steps + plan.steps
    if uses_gpu(plan.here):
        batch = setup.micro_batch_size
        sizes = [*setup.model, f"data.sequence_length={setup.sequence_length}"]
        sizes += ["precision=bf16", f"trainer.log_every_steps={min(10, steps)}"]
    else:
        batch = 4
        sizes = [*setup.tiny, "data.sequence_length=128", "data.max_documents=30"]
        sizes += ["precision=fp32", "trainer.log_every_steps=1"]
    return [
        f"objective={setup.objective}",
        "launcher=local",
        f"trainer.max_steps={steps}",
        f"trainer.global_batch_size={batch}",
        f"trainer.micro_batch_size={batch}",
        "data.eval_fraction=0",
        *(["trainer.checkpoint_activations_every_blocks=1"] if setup.recompute else []),
        *sizes,
        *VARIANTS.get(variant, [*VARIANTS[LIKE_FOR_LIKE], variant]),
    ]


def freeze(plan: Plan, model: str, variant: str, run_dir: Path) -> RunConfig:
    """Create the directory of a run. Raises UserError where this machine cannot run it."""
    return frozen.freeze(overrides(plan, model, variant), plan.here, run_dir)


def prepare(run_dir: Path) -> None:
    """Train the tokenizer and pack the samples; every later run finds them in the cache.

    Raises UserError where that fails; why is on stderr then.
    """
    environment = os.environ | package_environment(os.environ, packages=ROOT)
    if subprocess.run(prepare_command(run_dir), env=environment).returncode != 0:
        raise UserError("the data could not be prepared, see above")


def measure(
    plan: Plan, config: RunConfig, run_dir: Path, variant: str, limit_seconds: float | None = None
) -> Figures:
    """Train in a process of its own; return its figures, or its ``error``.

    What has not ended after ``limit_seconds`` is killed, with all that descends from it.
    """
    environment = {
        **os.environ,
        **rank_environment(config, plan.here, os.environ, packages=ROOT),
        # With several GPUs in sight the stock Trainer would take DataParallel.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    side = variant if variant in PEERS else "ours"
    argv = [sys.executable, "-m", "benchmarks.timed_run", side, str(run_dir)]
    argv.append(str(plan.warmup_steps))
    log = run_dir / LOGS / "benchmark.log"
    problem = run_within(argv, environment, log, limit_seconds)
    if problem is not None:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        return {"error": "\n".join([problem, *tail])}
    figures: Figures = json.loads((run_dir / "figures.json").read_text())
    tokens = plan.steps * config.trainer.global_batch_size * config.data.tokens_per_sample
    return {**figures, "tokens_per_second": tokens / figures["seconds"]}


def run_within(
    argv: list[str], environment: dict[str, str], log: Path, limit_seconds: float | None
) -> str | None:
    """Run a command to its end or to a limit; return how it failed."""
    with log.open("w") as output:
        process = subprocess.Popen(
            argv,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return f"killed after {limit_seconds:.0f} s"
        finally:
            end(process)
    return None if code == 0 else f"exit code {code}"


def empty_results(plan: Plan) -> Figures:
    """Return what is known before anything is measured."""
    return {
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


def run(plan: Plan, json_file: Path | None) -> Figures:
    """Measure everything; the JSON file is rewritten each round, so that a stop loses little."""
    results = empty_results(plan)
    for model in plan.models:
        variants = variants_of(plan, model)
        runs: dict[str, list[Figures]] = {variant: [] for variant in variants}
        for repeat in range(plan.repeats):
            for variant in variants[:: -1 if repeat % 2 else 1]:
                with tempfile.TemporaryDirectory(prefix="shardwright-benchmark-") as scratch:
                    run_dir = Path(scratch) / "run"
                    config = freeze(plan, model, variant, run_dir)
                    if repeat == 0 and variant == variants[0]:
                        prepare(run_dir)
                    figures = measure(plan, config, run_dir, variant)
                runs[variant].append(figures)
                speed = figures.get("tokens_per_second")
                shown = f"{speed:,.0f} tokens/s" if speed else figures["error"]
                print(f"{model} {repeat + 1}/{plan.repeats} {variant}: {shown}", flush=True)
                if "device" in figures:
                    results["hardware"] |= {k: figures[k] for k in ("device", "cuda")}
                    results["peak_bf16_flops"] = peak_bf16_flops(figures["device"])
            results["models"][model] = summary(
                config, runs, peer=variants[0], expected=MODELS[model].expected
            )
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(DEFAULT_MODELS))
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="beside the peer"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="a row of its own with one thing switched off, such as trainer.fused_loss=false",
    )
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
        variants=options.variant,
        without=options.without,
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
