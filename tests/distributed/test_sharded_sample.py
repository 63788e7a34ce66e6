"""Ranks that hold a model together say what one process says that holds it whole."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shardwright.launchers.commands.sample import sampling_overrides
from shardwright.launchers.composition.compose import compose, plain
from shardwright.train.config import from_tree, load, to_yaml
from shardwright.train.model import build as models
from shardwright.train.model.blocks import parameter_count
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run_directory.names import OBJECTIVE_KEY
from shardwright.train.sampling.sample import parser, show
from shardwright.train.sampling.sharded import generate
from shardwright.train.strategy import engine_of
from shardwright.train.strategy.group import join
from tests.fixtures import RanksOf
from tests.unit.saved_models import POSITIONS, TOKENS, save

pytestmark = pytest.mark.distributed

PROMPTS = {"clm": ["def ", "a", "class Foo:"], "mlm": ["import <mask>", "<mask> b"]}
PROMPTS["diffusion"] = ["def ", "a <mask> b<mask>"]


@pytest.fixture(
    scope="module", params=["clm", "mlm", pytest.param("diffusion", marks=pytest.mark.slow)]
)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of random weights, large enough that its tokens differ."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "clm":
        causal = GPT2Config(
            vocab_size=len(TOKENS), n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=2, pad_token_id=1, initializer_range=0.3,
        )  # fmt: skip
        return save(GPT2LMHeadModel(causal), directory)
    masked = RobertaConfig(
        vocab_size=len(TOKENS), max_position_embeddings=POSITIONS + 2, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    if request.param == "diffusion":
        setattr(masked, OBJECTIVE_KEY, "diffusion")
    return save(RobertaForMaskedLM(masked), directory)


def arguments_of(model_dir: Path) -> list[str]:
    (prompts,) = (PROMPTS[kind] for kind in PROMPTS if model_dir.name.startswith(kind))
    options = ["--new-tokens", "12", "--top", "3", "--seed", "3"]
    return [str(model_dir), *options, *(part for p in prompts for part in ("--prompt", p))]


def whole(model_dir: Path) -> str:
    options = parser().parse_args(arguments_of(model_dir))
    out = io.StringIO()
    show(model_dir, options.prompt, out, new_tokens=12, top=3, seed=3)
    return out.getvalue()


def spoken(directory: Path, arguments: list[str]) -> str:
    """Return what this rank says."""
    config = load(directory)
    out = io.StringIO()
    with join(config, rank_from_environment()):
        generate(engine_of(config), parser().parse_args(arguments), out)
    return out.getvalue()


def share(directory: Path, model_dir: Path) -> float:
    """Return which part of the model's elements this rank holds once it is ready to speak."""
    config = load(directory)
    with join(config, rank_from_environment()):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = engine_of(config).serve(*models.build(config, tokenizer))
        parameters: list[Any] = list(model.parameters())
        held = sum(p.to_local().numel() for p in parameters if hasattr(p, "to_local"))
        held += sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor"))
        return held / parameter_count(model)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3", "fsdp_offload", "zero3_offload"])
def test_two_ranks_say_what_one_process_says(
    strategy: str, model_dir: Path, tmp_path: Path, ranks: RanksOf
) -> None:
    (job,) = compose([*sampling_overrides(model_dir, strategy, ranks=2), "launcher.device=cpu"])
    (tmp_path / "config.yaml").write_text(to_yaml(from_tree(plain(job.tree))))
    expected = whole(model_dir)
    assert len(set(expected.split())) > 5
    assert ranks(2)(spoken, tmp_path, arguments_of(model_dir)) == [expected, expected]
    assert ranks(2)(share, tmp_path, model_dir) == pytest.approx([0.5, 0.5], abs=0.01)


def shardwright(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardwright", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_the_command_starts_the_ranks_and_prints_once(model_dir: Path) -> None:
    together = shardwright(
        "sample", *arguments_of(model_dir), "--strategy", "fsdp", "--nproc-per-node", "2"
    )
    assert (together.returncode, together.stderr) == (0, "")
    assert together.stdout == whole(model_dir)


def test_what_a_rank_refuses_is_told_once(model_dir: Path) -> None:
    refused = shardwright("sample", str(model_dir), "--prompt", "<mask>" * 65, "--strategy", "fsdp")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("error: prompt") == 1
