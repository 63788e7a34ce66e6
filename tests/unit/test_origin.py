"""What a run keeps of its pretrained model is all that a resume needs of it but the weights."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from shardwright.train.config import PretrainedModel
from shardwright.train.errors import UserError
from shardwright.train.model import origin
from shardwright.train.model.origin import keep
from tests import own_code

GPT2 = GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=1, n_positions=16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    GPT2LMHeadModel(GPT2).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def section(source: Path, **values: Any) -> PretrainedModel:
    return PretrainedModel(kind="pretrained", name=str(source), **values)


def test_ranks_that_come_together_keep_one_copy(source: Path, run_dir: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda _: keep(section(source), "clm", run_dir, None), range(4)))
    assert {kept.directory for kept in every} == {run_dir / "model"}
    assert [path.name for path in run_dir.iterdir()] == ["model"]
    ours = json.loads((run_dir / "model" / "config.json").read_text())
    assert ours == json.loads((source / "config.json").read_text())


def test_settings_are_kept_but_for_those_that_transformers_refuses(
    source: Path, run_dir: Path
) -> None:
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": 3, "max_length": 12}
    (source / "generation_config.json").write_text(json.dumps(settings))
    kept = keep(section(source), "clm", run_dir, None)
    assert kept.refused == {"temperature": 0.6}
    found = json.loads((kept.directory / "generation_config.json").read_text())
    del settings["temperature"]
    assert found | settings == found
    assert "temperature" not in found
    # Another rank, or a resume, reads what was found then.
    assert keep(section(source), "clm", run_dir, None) == kept


def test_settings_of_an_older_model_are_those_among_its_config(source: Path, run_dir: Path) -> None:
    (source / "generation_config.json").unlink()
    tree = json.loads((source / "config.json").read_text()) | {"eos_token_id": 7}
    (source / "config.json").write_text(json.dumps(tree))
    kept = keep(section(source), "clm", run_dir, None)
    assert json.loads((kept.directory / "generation_config.json").read_text())["eos_token_id"] == 7


def test_settings_that_are_no_settings_are_refused(source: Path, run_dir: Path) -> None:
    (source / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config.json cannot be read \(.*remove it"):
        keep(section(source), "clm", run_dir, None)


def test_code_is_kept_only_where_it_may_run(tmp_path: Path, run_dir: Path) -> None:
    own = own_code.write(tmp_path / "own")
    with pytest.raises(UserError, match="set model.trust_remote_code=true") as told:
        keep(section(own), "clm", run_dir, None)
    assert "\n" not in str(told.value)
    assert not (run_dir / "model").exists()
    kept = keep(section(own, trust_remote_code=True), "clm", run_dir, None)
    assert set(origin.code_in(kept.directory)) == set(own_code.FILES)
    # One that transformers has too is built by its own class, and names no code then.
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    other = run_dir / "other"
    other.mkdir()
    kept = keep(section(own), "clm", other, None)
    assert not origin.code_in(kept.directory)
    assert "auto_map" not in json.loads((kept.directory / "config.json").read_text())


def test_code_that_is_not_there_is_named(tmp_path: Path, run_dir: Path) -> None:
    own = own_code.write(tmp_path / "own")
    (own / "modeling_own.py").unlink()
    with pytest.raises(UserError, match=r"names the code file modeling_own.py, which cannot be fo"):
        keep(section(own, trust_remote_code=True), "clm", run_dir, None)


def test_a_run_that_kept_nothing_takes_its_checkpoints(
    source: Path, run_dir: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(GPT2.to_json_string())
    gone = section(tmp_path / "gone")
    kept = keep(gone, "clm", run_dir, checkpoint)
    assert (kept.directory / "config.json").read_text() == GPT2.to_json_string()
    # Where its code does not lie there, the source has to have it.
    own = own_code.write(tmp_path / "own")
    (checkpoint / "config.json").write_bytes((own / "config.json").read_bytes())
    other = run_dir / "other"
    other.mkdir()
    trusted = section(own, trust_remote_code=True)
    assert set(origin.code_in(keep(trusted, "clm", other, checkpoint).directory)) == set(
        own_code.FILES
    )


@pytest.mark.parametrize(
    ("readme", "title"),
    [
        ("---\ntags: [x]\n# no heading\n---\n\n# small  code\n\n# Use\n", "small code"),
        ("# Model Card for Model ID\n", None),
        ("No heading.\n", None),
        (None, None),
    ],
)
def test_a_model_is_called_what_its_own_card_says(
    readme: str | None, title: str | None, source: Path, run_dir: Path
) -> None:
    if readme is not None:
        (source / "README.md").write_text(readme)
    kept = keep(section(source), "clm", run_dir, None)
    origin.note(kept.directory, drawn_anew=["lm_head.weight"])
    assert json.loads((kept.directory / origin.NOTE).read_text()) == {
        "refused": {},
        "title": title,
        "drawn_anew": ["lm_head.weight"],
    }
