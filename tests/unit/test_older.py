"""What is exported is read by transformers 4 as well, and as the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from shardwright.train.config import from_tree
from shardwright.train.data.tokens.tokenizer import ensure_tokenizer
from shardwright.train.model import older
from tests.unit.trees import TREE

OLDER = "transformers==4.57.3"
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BASES: Any = {
    "full_attention": {"rope_type": "default", "rope_theta": 80_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
}
LAYERS = ["full_attention", "sliding_attention"] * 2
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "modernbert": ModernBertConfig(
        **SIZES, rope_parameters=BASES, layer_types=LAYERS, local_attention=8
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    trainer = BpeTrainer(special_tokens=["<s>", "<pad>", "</s>"], vocab_size=290)
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(["def main():\n    return main()\n"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )


def test_a_base_of_rotary_positions_has_its_older_name() -> None:
    assert older.older_fields(json.loads(CONFIGS["llama"].to_json_string())) == {"rope_theta": 5e5}
    assert older.older_fields(json.loads(CONFIGS["llama3"].to_json_string())) == {
        "rope_theta": 5e5,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
    }
    assert older.older_fields(json.loads(CONFIGS["modernbert"].to_json_string())) == {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 80_000.0,
        "local_rope_theta": 5_000.0,
    }
    assert older.older_fields({"model_type": "gpt2", "n_embd": 8}) == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_version_that_wrote_it_reads_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(older.config_text(CONFIGS[name]), "utf-8")
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == CONFIGS[name].rope_parameters
    assert getattr(again, "layer_types", None) == getattr(CONFIGS[name], "layer_types", None)


def test_a_tokenizer_has_a_class_that_both_versions_know(tmp_path: Path) -> None:
    saved = tokenizer()
    older.save_tokenizer(saved, tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    assert vocabulary.items() <= saved.get_vocab().items()
    assert (tmp_path / "merges.txt").read_text("utf-8").startswith("#version")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(saved)
    assert again.get_vocab() == saved.get_vocab()
    assert again("def main():").input_ids == saved("def main():").input_ids


READ = """
import json, sys, torch
from transformers import AutoTokenizer, AutoModelForCausalLM, AutoModelForMaskedLM, __version__
assert __version__ == "4.57.3"
kind = AutoModelForMaskedLM if sys.argv[2] == "modernbert" else AutoModelForCausalLM
model = kind.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(torch.arange(3, 43)[None]).logits
ids = AutoTokenizer.from_pretrained(sys.argv[1])("def main():").input_ids
print(json.dumps({"logits": logits.flatten().tolist(), "ids": ids}))
"""


@pytest.fixture(scope="module")
def of_older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an interpreter with transformers 4 of its own, and torch and the rest of this one."""
    place = tmp_path_factory.mktemp("older")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", OLDER], check=True)
    (found,) = place.glob("lib/python*/site-packages")
    # Behind its own, so that these win.
    (found / "zz_torch.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return python


def _saved(config: PreTrainedConfig, directory: Path) -> Any:
    torch.manual_seed(0)
    is_masked = config.model_type == "modernbert"
    kind = AutoModelForMaskedLM if is_masked else AutoModelForCausalLM
    model: Any = kind.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(directory)
    (directory / "config.json").write_text(older.config_text(model.config), "utf-8")
    older.save_tokenizer(tokenizer(), directory)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_4_gives_the_same_logits_and_ids(
    name: str, of_older: Path, tmp_path: Path
) -> None:
    model = _saved(CONFIGS[name], tmp_path)
    with torch.no_grad():
        expected = model(torch.arange(3, 43)[None]).logits.flatten()
    done = subprocess.run(
        [of_older, "-c", READ, tmp_path, name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-5)
    assert found["ids"] == tokenizer()("def main():").input_ids


READ_IDS = """
import json, sys
from transformers import AutoTokenizer, __version__
assert __version__ == "4.57.3"
loaded = AutoTokenizer.from_pretrained(sys.argv[1])
text = sys.argv[2].replace("MASK", loaded.mask_token)
print(json.dumps({"ids": loaded(text).input_ids, "special": loaded.all_special_ids}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_transformers_4_reads_what_was_trained(kind: str, of_older: Path, tmp_path: Path) -> None:
    text = "Pure reason, and the MASK of 1781: understanding é."
    (tmp_path / "corpus.txt").write_text(f"{text} {text.lower()}\n" * 50, encoding="utf-8")
    files = {"kind": "text", "paths": [str(tmp_path / "corpus.txt")], "eval_fraction": 0.0}
    tree = {
        "model": {**TREE["model"], "kind": "bert"},
        "objective": {"kind": "mlm"},
        "data": {**TREE["data"], **files, "cache_dir": str(tmp_path / "cache")},
        "tokenizer": {"kind": kind},
    }
    saved = tmp_path / "tokenizer"
    made = ensure_tokenizer(from_tree({**TREE, **tree}), saved, {"corpus": "of the test"})
    # As in final/, where version 4 chooses a class by the model beside it.
    (saved / "config.json").write_text(json.dumps({"model_type": "bert"}), "utf-8")
    done = subprocess.run(
        [of_older, "-c", READ_IDS, saved, text],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == made(text.replace("MASK", str(made.mask_token))).input_ids
    assert sorted(found["special"]) == sorted(made.all_special_ids)
