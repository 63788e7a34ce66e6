"""A package of the user's own that registers an architecture: trained, exported, recovered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import own_code
from tests.e2e.cli import finish, start, start_python

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

REGISTERS = """
from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_own import OwnConfig
from .modeling_own import OwnForCausalLM

AutoConfig.register("own", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""
LOADS = """
import sys
import own_models
from transformers import AutoModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
print(type(model).__name__, len(model.layers), model.num_parameters())
"""


def test_a_model_of_a_package_of_ones_own(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    (packages / "own_models").mkdir(parents=True)
    for name, text in {**own_code.FILES, "__init__.py": REGISTERS}.items():
        (packages / "own_models" / name).write_text(text)
    (tmp_path / "architecture").mkdir()
    config = {"model_type": "own", "tie_word_embeddings": True, "layers": 2}
    (tmp_path / "architecture" / "config.json").write_text(json.dumps(config))
    of_others = ("model=", "model.", "strategy=", "precision=")
    words = [
        *(word for word in tiny("clm") if not word.startswith(of_others)),
        *("model=from_config", "model.name=architecture", "model.import=own_models"),
        *("model.overrides.layers=3", "model.vocab_size=384", "strategy=fsdp", "run_dir=run"),
        *("trainer.compile=false",),
    ]

    absent = finish(start("train", *words, cwd=tmp_path))
    assert absent.returncode == 2
    assert "error: model.import=own_models: there is no such module; PYTHONPATH is" in absent.stderr
    assert "Install it, or set PYTHONPATH to the directory that holds it" in absent.stderr
    assert not (tmp_path / "run").exists()

    trained = finish(start("train", *words, cwd=tmp_path, packages=[packages]))
    assert trained.returncode == 0, trained.stderr
    final = tmp_path / "run" / "final"
    (tmp_path / "architecture" / "config.json").unlink()
    loaded = finish(start_python("-c", LOADS, str(final), cwd=tmp_path, packages=[packages]))
    assert loaded.stdout.split()[:2] == ["OwnForCausalLM", "3"], loaded.stderr

    sampled = finish(
        start("sample", "run", "--prompt", "def f(", cwd=tmp_path, packages=[packages])
    )
    assert sampled.returncode == 0, sampled.stderr
    recovered = finish(start("recover", "run", "out", cwd=tmp_path, packages=[packages]))
    assert recovered.returncode == 0, recovered.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (final / name).read_bytes()

    unknown = finish(start("recover", "run", "other", cwd=tmp_path))
    assert unknown.returncode == 2
    assert "model.import=own_models: there is no such module" in unknown.stderr
