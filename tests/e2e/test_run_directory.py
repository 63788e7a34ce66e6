"""Everything that a run must give exists, holds what it should, and nothing that it should not.

One file for all that looks at a run which has ended, as a file's tests share their runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoTokenizer

from shardwright.launchers.composition.compose import compose
from shardwright.launchers.machine import facts as machine
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import from_tree, load, to_yaml
from shardwright.train.data.prepare import prepare
from shardwright.train.data.sources.corpus import read_corpus
from shardwright.train.data.tokens.cache import cache_root
from shardwright.train.loop.trainer import METRICS
from tests.e2e.cli import ROOT, SECRETS, finish, processes, shardwright, start_python
from tests.e2e.conftest import PROMPTS, Run
from tests.logged import OF_RANKS
from tests.unit.trackers import expected, of_tensorboard, of_wandb

pytestmark = pytest.mark.distributed

STEPS, SAMPLES_A_STEP, SEQUENCE_LENGTH = 4, 16, 32


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_terminal_tells_what_runs_how_well_and_where_it_lies(run: Run) -> None:
    out = run.ended.stdout
    assert "2 x cpu (torchrun)" in out
    assert f"step {STEPS}/{STEPS}  held-out loss " in out
    assert ("masked accuracy" in out) == (run.objective == "mlm")
    assert PROMPTS[run.objective] in out
    assert f"model       {run.directory}/final\n" in out
    assert f"shardwright sample {run.directory} --prompt '...'\n" in out
    assert "Traceback" not in run.ended.stderr


def test_no_process_is_left(run: Run) -> None:
    assert list(processes(run.directory.parent)) == []


def test_the_directory_holds_what_is_documented_and_nothing_else(run: Run) -> None:
    documented = (
        "config.yaml owner.json provenance.json engine.json data.json metrics.jsonl plan.json"
    )
    folders = "logs tokenizer checkpoints final heartbeats"
    tracker = "tensorboard" if run.objective == "clm" else "wandb"
    found = sorted(path.name for path in run.directory.iterdir())
    assert found == sorted([*documented.split(), *folders.split(), tracker])
    logs = sorted(path.name for path in (run.directory / "logs").iterdir())
    assert logs == ["rank-0.log", "rank-1.log", "run.log", "torchrun.log"]
    checkpoints = layout.whole_checkpoints(run.directory / "checkpoints")
    assert [step for step, _ in checkpoints] == [3, STEPS]


def test_config_is_what_was_asked_for_with_nothing_left_open(run: Run) -> None:
    frozen = load(run.directory)
    (job,) = compose(list(run.overrides))
    asked = from_tree(OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True))
    assert frozen == machine.resolve(asked, machine.detect(os.environ), str(run.directory))
    assert frozen.trainer.max_steps == STEPS
    assert frozen.strategy.kind == ("fsdp" if run.objective == "clm" else "zero")
    # Sizes of the engine's buckets stay `auto`: they follow from the model, not from the machine.
    of_the_machine = [frozen.launcher.model_dump(), frozen.tracking.model_dump()]
    assert "auto" not in [value for section in of_the_machine for value in section.values()]
    text = (run.directory / "config.yaml").read_text()
    assert text == to_yaml(from_tree(yaml.safe_load(text)))


def test_provenance_tells_versions_commit_command_and_hardware(run: Run) -> None:
    facts = json.loads((run.directory / "provenance.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    packages = {"transformers", "accelerate", "deepspeed", "datasets", "hydra-core"}
    assert packages <= {name for name, version in facts["versions"].items() if version}
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", facts["commit"])
    assert facts["argv"][-3:] == ["-m", "shardwright.train", str(run.directory)]
    assert facts["world_size"] == 2
    weights = load_file(run.directory / "final" / "model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert facts["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert facts["hardware"]["memory_bytes"] > 2**28


def test_no_file_holds_a_secret_or_another_variable_of_the_environment(run: Run) -> None:
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{path} holds the value of {name}"
    assert not any(value in run.ended.stdout + run.ended.stderr for value in SECRETS.values())


def test_each_rank_has_a_log(run: Run) -> None:
    for rank in range(2):
        log = (run.directory / f"logs/rank-{rank}.log").read_text()
        assert f" [rank {rank}] INFO shardwright.train" in log


def test_engine_is_the_one_asked_for(run: Run) -> None:
    facts = json.loads((run.directory / "engine.json").read_text())
    assert facts["world_size"] == 2
    if run.objective == "clm":
        assert facts["engine"] == "FSDP2"
        assert facts["compute_dtypes"] == ["bfloat16"]
    else:
        assert facts["stage"] == 3


def test_each_step_is_a_line_of_metrics(run: Run) -> None:
    lines = metrics_of(run.directory)
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert len(lines) == len(trained) + len(evaluated)

    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluated] == [2, 4]
    position = {"step", "samples", "tokens", "time"}
    speed = {"tokens_per_second", "sent_bytes_per_second", "peak_memory_bytes"}
    for line in trained:
        # The first step compiles and allocates, and counts for no speed.
        known = speed if line["step"] > 1 else {"peak_memory_bytes"}
        of_ranks = {name for name in line if name.endswith(OF_RANKS)}
        # Those of the steps that were over when the ranks agreed on this one.
        assert len(of_ranks) == (12 if line["step"] >= 3 else 0)
        assert set(line) - of_ranks == position | known | {"loss", "learning_rate", "grad_norm"}
        assert line.get("tokens_per_second", 1) > 0
        assert line.get("sent_bytes_per_second", 1) > 0
        assert 2**26 < line["peak_memory_bytes"] < 2**34
    more = "eval_masked_accuracy" if run.objective == "mlm" else "eval_bits_per_byte"
    for line in evaluated:
        assert set(line) == position | {more, "eval_loss", "eval_perplexity"}
    for line in lines:
        assert line["samples"] == line["step"] * SAMPLES_A_STEP
        assert line["tokens"] == line["samples"] * SEQUENCE_LENGTH
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert all(line["loss"] != round(line["loss"], 4) for line in trained), "losses are rounded"
    # The cosine's end is 0, and the step before it still learned.
    assert trained[0]["learning_rate"] > trained[-1]["learning_rate"] > 0


def test_checkpoints_are_whole_to_the_last_byte(run: Run) -> None:
    for step in (3, STEPS):
        checkpoint = run.directory / "checkpoints" / f"checkpoint-{step}"
        assert layout.what_is_wrong(checkpoint) is None
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["step"] == step
        for name, described in manifest["files"].items():
            assert layout.hash_file(checkpoint / name) == described["xxh3_128"], name


def test_final_is_a_model_directory_in_fp32(run: Run) -> None:
    final = run.directory / "final"
    generation = {"generation_config.json"} if run.objective == "clm" else set()
    assert {path.name for path in final.iterdir()} == generation | {
        *("README.md", "loss.svg", "config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    }
    assert {t.dtype for t in load_file(final / "model.safetensors").values()} == {torch.float32}
    config = json.loads((final / "config.json").read_text())
    head = {"clm": "GPT2LMHeadModel", "mlm": "RobertaForMaskedLM"}[run.objective]
    assert config["architectures"] == [head]
    assert config["dtype"] == "float32"
    tokenizer = (run.directory / "tokenizer" / "tokenizer.json").read_text()
    assert (final / "tokenizer.json").read_text() == tokenizer
    if run.objective == "clm":
        settings = json.loads((final / "generation_config.json").read_text())
        tokens = {t["content"]: t["id"] for t in json.loads(tokenizer)["added_tokens"]}
        assert settings["eos_token_id"] == tokens["</s>"]
        assert settings["pad_token_id"] == tokens["<pad>"]


def test_model_card_has_a_metadata_header_and_the_measured_loss(run: Run) -> None:
    card = (run.directory / "final" / "README.md").read_text()
    _, header, text = card.split("---\n", maxsplit=2)
    (last,) = [x for x in metrics_of(run.directory) if "eval_loss" in x and x["step"] == STEPS]
    found = yaml.safe_load(header)
    (results,) = found.pop("model-index")[0]["results"]
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if run.objective == "clm" else "fill-mask",
        "tags": ["shardwright", "gpt2" if run.objective == "clm" else "roberta"],
    }
    measured = {metric["name"]: metric["value"] for metric in results["metrics"]}
    assert measured["loss"] == last["eval_loss"]
    assert f"# tiny_{run.objective}\n" in text
    assert f'("{PROMPTS[run.objective]}"' in text


def table_of(card: str, title: str) -> dict[str, str]:
    """Return the rows of two cells below a heading of a card."""
    section = card.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", section, re.MULTILINE))


# Every number in the card is recomputed here from weights, tokens, metrics and settings, not from
# what the card is made of.


def card_of(run: Run) -> str:
    return (run.directory / "final" / "README.md").read_text()


def parameters_of(run: Run) -> int:
    tensors = load_file(run.directory / "final" / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def test_the_cards_numbers_of_the_model_are_those_of_its_weights(run: Run) -> None:
    config = load(run.directory)
    shape = json.loads((run.directory / "final" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run.directory / "final")
    ids = set(tokenizer.get_vocab().values())
    rows, rest = shape["vocab_size"], shape["vocab_size"] - len(ids)
    positions = config.model.max_sequence_length
    model = table_of(card_of(run), "Model")
    assert model["Parameters"] == f"{parameters_of(run):,}"
    assert model["Size"] == "2 layers, 2 heads, hidden size 32"
    assert model["Context length"] == f"{positions:,} tokens"
    assert model["Vocabulary"] == (
        f"{len(ids)} tokens; {rows} rows of the embedding, {rest} of them unused"
        if rest
        else f"{rows} tokens"
    )


def test_the_cards_numbers_of_the_data_are_those_of_the_corpus_and_its_tokens(run: Run) -> None:
    config = load(run.directory)
    prepared = prepare(config, run.directory)
    pieces = list(read_corpus(config.data, cache_root(config.data)))
    data = table_of(card_of(run), "Data")
    for name, held_out, mixture in (
        ("For training", False, prepared.train),
        ("Held out", True, prepared.heldout),
    ):
        documents = sum(piece.ends for piece in pieces if piece.held_out == held_out)
        (samples,) = mixture.sources
        windows = [samples[index].tokens for index in range(len(samples))]
        # Of causal samples the last token of each is the first of the next.
        tokens = sum(len(window) for window in windows)
        if run.objective == "clm":
            tokens -= len(windows) - 1
        expected = f"{documents:,} documents, {tokens:,} tokens in {len(windows):,} samples"
        if left_out := len(samples.store.tokens) - tokens:
            expected += f"; {left_out:,} tokens more are in none"
        assert data[name] == expected
    assert data["Sequence length"] == f"{SEQUENCE_LENGTH} tokens"


def test_the_cards_numbers_of_the_training_are_those_of_its_settings(run: Run) -> None:
    card, config = card_of(run), load(run.directory)
    seen = STEPS * SAMPLES_A_STEP
    training = table_of(card, "Training")
    tokens = seen * SEQUENCE_LENGTH
    samples_per_epoch = prepare(config, run.directory).samples_per_epoch
    assert training["Seen"] == f"{seen} samples, {tokens:,} tokens, {STEPS} steps"
    assert training["Epochs"] == f"{seen / samples_per_epoch:.2g}"
    assert training["Batch"] == f"{SAMPLES_A_STEP} samples"
    rate = f"{config.trainer.learning_rate:g} at its peak"
    assert training["Learning rate"].startswith(f"{rate}, {config.trainer.lr_scheduler}")
    assert training["Weight decay"] == f"{config.trainer.weight_decay:g}"
    assert training["Gradient norm"] == f"at most {config.trainer.max_grad_norm:g}"
    assert training["Strategy"].endswith(" on 2 rank(s)")
    assert training["Seed"] == str(config.seed)
    assert f"that is {tokens / parameters_of(run):.2g} tokens per parameter" in card


def test_the_cards_losses_are_those_of_the_metrics(run: Run) -> None:
    card, metrics = card_of(run), metrics_of(run.directory)
    trained = [line for line in metrics if "loss" in line]
    evaluated = [line for line in metrics if "eval_loss" in line]
    measured = table_of(card, "On held-out documents")
    last = evaluated[-1]
    assert last["step"] == STEPS
    del measured["metric"]
    assert measured == {
        name.removeprefix("eval_").replace("_", " "): f"{value:.4f}"
        for name, value in last.items()
        if name in METRICS
    }
    for title, lines, key in (
        ("training loss", trained, "loss"),
        ("evaluation loss", evaluated, "eval_loss"),
    ):
        values = [(line[key], line["step"]) for line in lines]
        losses = (f"{loss:.4f} at step {step}" for loss, step in (values[-1], min(values)))
        assert f"| {title} | {' | '.join(losses)} |" in card
    by_step = {line["step"]: line["eval_loss"] for line in evaluated}
    for line in trained:
        evaluation = f"{by_step[line['step']]:.4f}" if line["step"] in by_step else ""
        cells = [str(line["step"]), f"{line['tokens']:,}", f"{line['loss']:.4f}", evaluation]
        assert re.search(r" *\| *".join(map(re.escape, ["", *cells, ""])), card), cells


# Runs what a card shows, with its placeholder replaced, and fails where transformers says anything.
# Greedily: after a few steps a model still draws the token for padding now and then, of which
# transformers warns.
EXAMPLE = """
import logging, re, sys
from pathlib import Path

said = []

class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

directory = Path(sys.argv[1])
(code,) = re.findall("```python\\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
*lines, call = code.replace("PATH_OR_NAME", str(directory)).splitlines()
import transformers
logging.getLogger("transformers").addHandler(Kept())
exec("\\n".join(lines))
answer = eval(call.replace("do_sample=True", "do_sample=False"))[0]
print(answer["generated_text"] if "generated_text" in answer else answer["sequence"])
assert not said, said
ours = {"shardwright", "deepspeed"} & {name.partition(".")[0] for name in sys.modules}
assert not ours, ours
"""


def test_transformers_alone_runs_the_cards_example_and_says_nothing_but_the_text(run: Run) -> None:
    prompt = PROMPTS[run.objective]
    ended = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", EXAMPLE, str(run.directory / "final")],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(prompt.removesuffix(" <mask>"))
    assert "<mask>" not in ended.stdout


def test_sample_generates_or_fills(run: Run) -> None:
    prompt = PROMPTS[run.objective]
    ended = shardwright(
        *("sample", str(run.directory), "--prompt", prompt, "--top", "3", "--new-tokens", "5"),
        cwd=run.directory.parent,
    )
    assert ended.returncode == 0, ended.stderr
    assert prompt in ended.stdout
    if run.objective == "mlm":
        assert len(re.findall(r"\(\d+%\)", ended.stdout)) == 3


@pytest.mark.wide
@pytest.mark.parametrize("run", ["clm"], indirect=True)
def test_torchrun_by_hand_on_the_frozen_config_does_the_same(run: Run, tmp_path: Path) -> None:
    tree = yaml.safe_load((run.directory / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    older = "train"  # as in job scripts of older runs
    ended = finish(start_python(*torchrun, "-m", older, str(tmp_path), cwd=tmp_path))
    assert ended.returncode == 0, ended.stderr

    def losses(directory: Path) -> list[float]:
        return [x["loss" if "loss" in x else "eval_loss"] for x in metrics_of(directory)]

    assert losses(tmp_path) == losses(run.directory)
    by_hand = load_file(tmp_path / "final" / "model.safetensors")
    launched = load_file(run.directory / "final" / "model.safetensors")
    torch.testing.assert_close(by_hand, launched, rtol=0, atol=0)
    assert list(processes(tmp_path)) == []


# --- what trackers write into it ---------------------------------------------------------------


@pytest.mark.parametrize("run", ["clm"], indirect=True)
def test_tensorboard_gets_what_metrics_get(run: Run) -> None:
    directory = run.directory / "tensorboard"
    assert f"tensorboard --logdir {directory}\n" in run.ended.stdout
    lines = [json.loads(x) for x in (run.directory / "metrics.jsonl").read_text().splitlines()]
    values = expected(lines, "time")
    assert of_tensorboard(directory) == {k: pytest.approx(v) for k, v in values.items()}


@pytest.mark.wide
@pytest.mark.parametrize("run", ["mlm"], indirect=True)
def test_wandb_writes_offline_and_says_how_to_send_it(run: Run) -> None:
    (offline,) = (run.directory / "wandb").glob("offline-run-*")
    assert f"wandb offline; later: wandb sync {offline}\n" in run.ended.stdout
    lines = [json.loads(x) for x in (run.directory / "metrics.jsonl").read_text().splitlines()]
    history, config, _ = of_wandb(offline)
    assert history == expected(lines)
    assert config["strategy"]["kind"] == "zero"


# --- what is recovered from its checkpoints ----------------------------------------------------

# As on a machine with neither this project nor deepspeed: -I leaves the working directory and
# PYTHONPATH out, and what may be installed is not found.
ELSEWHERE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in ("shardwright", "deepspeed")
        return None if missing else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in ("shardwright", "deepspeed"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is here")
task, model, prompt = sys.argv[1:]
from transformers import pipeline
answer = pipeline(task, model=model)(prompt)[0]
print(answer["generated_text"] if task == "text-generation" else answer["sequence"])
"""


def test_the_last_checkpoint_is_final_bit_for_bit_and_loads_anywhere(
    run: Run, tmp_path: Path
) -> None:
    ended = shardwright("recover", str(run.directory), "out", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("importing libraries\n")
    assert "warning" not in ended.stderr
    assert "checkpoints/checkpoint-4\n" in ended.stdout
    assert "out: " in ended.stdout.splitlines()[-1]

    final, out = run.directory / "final", tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {path.name for path in final.iterdir()}
    generation = ["generation_config.json"] if run.objective == "clm" else []
    for name in ("model.safetensors", "config.json", "tokenizer.json", *generation):
        assert (out / name).read_bytes() == (final / name).read_bytes(), name

    prompt = PROMPTS[run.objective]
    task = "text-generation" if run.objective == "clm" else "fill-mask"
    spoken = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, task, str(out), prompt],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.startswith(prompt.removesuffix(" <mask>"))
    assert "<mask>" not in spoken.stdout
    assert len(spoken.stdout) > len(prompt.removesuffix("<mask>"))


@pytest.mark.wide
@pytest.mark.parametrize("run", ["mlm"], indirect=True)
def test_another_step_in_another_dtype(run: Run, tmp_path: Path) -> None:
    arguments = ("recover", str(run.directory), "out", "--step", "3", "--dtype", "bf16")
    ended = shardwright(*arguments, "--max-shard-size", "20kB", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "checkpoint-3\n" in ended.stdout
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 1
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
