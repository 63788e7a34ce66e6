"""Every shipped option composes and validates, and YAML agrees with train/config/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from launchers.compose import CONF, compose
from launchers.machine import Machine, resolve
from train.config import RunConfig, from_tree, to_yaml
from train.strategy import engine_settings

EIGHT_GPUS = Machine(compute_capabilities=(9.0,) * 8, cores=64)

OPTIONS = sorted(
    path.relative_to(CONF).with_suffix("")
    for path in CONF.glob("*/*.yaml")
    if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))

# What an option needs besides, to be a run.
COMPANIONS = {
    "data/hub": ["data.name=someone/something"],
    "data/text": ["data.paths=[corpus.txt]"],
    "model/pretrained": ["model.name=some/model", "tokenizer=pretrained", "tokenizer.name=a/b"],
    "objective/mlm": ["model=roberta_tiny"],
    "precision/fp8": ["model=llama_tiny"],
    "strategy/zero3_nvme": ["strategy.nvme_path=/disk"],
    "tokenizer/pretrained": ["tokenizer.name=some/tokenizer"],
}
MASKED = ("bert", "roberta", "modernbert", "kantaibert")


def composed(*overrides: str) -> tuple[dict[str, Any], RunConfig]:
    (job,) = compose(list(overrides))
    tree = OmegaConf.to_container(job.tree, resolve=True, throw_on_missing=True)
    assert isinstance(tree, dict)
    return tree, from_tree(tree)  # type: ignore[return-value]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_composes_and_lists_every_key_with_its_default(option: Path) -> None:
    group = option.parent.name
    overrides = ["data.sequence_length=64", *COMPANIONS.get(str(option), [])]
    if group == "model" and option.name.startswith(MASKED):
        overrides.append("objective=mlm")
    tree, run = composed(f"{group}={option.name}", *overrides)
    section = getattr(run, group)
    fields = {field.alias or name: field for name, field in type(section).model_fields.items()}
    # So that no override needs a `+`.
    assert set(tree[group]) == set(fields)

    values = yaml.safe_load((CONF / option).with_suffix(".yaml").read_text())
    if group in ("model", "precision", "strategy"):
        return  # options of one class differ in their values, that is what they are for
    for name, field in fields.items():
        if not field.is_required():
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert_same_unless_chosen(option, name, values[name], default)


def assert_same_unless_chosen(option: Path, name: str, value: object, default: object) -> None:
    if str(option) == "trainer/default" and name == "max_steps":
        assert value is not None  # a run needs a length
    else:
        assert value == default, f"conf/{option}.yaml and train/config/ disagree on {name}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_resolves_and_derives(name: str) -> None:
    _, run = composed(f"experiment={name}")
    resolved = resolve(run, EIGHT_GPUS, "/runs/a")
    assert resolved.name == name
    assert engine_settings(resolved)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_first_line_of_an_experiment_runs_it(name: str) -> None:
    first = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# shardwright train experiment={name}"


def test_overrides_win_over_experiments() -> None:
    _, run = composed("trainer.max_steps=5", "experiment=demo", "strategy=zero3")
    assert run.trainer.max_steps == 5
    assert run.strategy.kind == "zero"
    assert run.strategy.stage == 3


def test_root_keys_match_the_config() -> None:
    tree, _ = composed()
    assert set(tree) == set(RunConfig.model_fields)
    for name in ("name", "run_dir", "sweep_dir", "seed"):
        assert tree[name] == RunConfig.model_fields[name].default


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_survives_config_yaml(name: str) -> None:
    _, run = composed(f"experiment={name}")
    assert from_tree(yaml.safe_load(to_yaml(run))) == run


def test_a_tokenizers_odd_values_survive_config_yaml() -> None:
    _, run = composed(
        "name=a.b-c", "objective.prompts=['def é:', 'yes', '1e-3', \"it's: #1\"]", "seed=4294967295"
    )
    assert from_tree(yaml.safe_load(to_yaml(run))) == run
