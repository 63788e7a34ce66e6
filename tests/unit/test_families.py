"""A family of models is a section, transformers' config for it and presets, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from shardwright.train.config import ModelConfig, ScratchModel
from shardwright.train.config.messages import OPTIONS
from shardwright.train.model.configs import MODEL_CLASSES

ROOT = Path(__file__).resolve().parents[2]
UNION, *_ = get_args(ModelConfig)
FAMILIES = {
    get_args(section.model_fields["kind"].annotation)[0]: section
    for section in get_args(UNION)
    if issubclass(section, ScratchModel)
}
SIZES = {
    **{"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "intermediate_size": 64,
}


def test_every_family_can_be_built_and_has_options() -> None:
    assert FAMILIES.keys() == MODEL_CLASSES.keys()
    presets = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    named = [option for options in OPTIONS["model"].values() for option in options]
    assert sorted(named) == sorted(presets)


def test_a_family_that_counts_nothing_has_no_known_number_of_parameters() -> None:
    class Plain(ScratchModel):
        pass

    model = Plain.model_validate(SIZES)
    assert model.parameters is None
    assert not list(model.contradictions())


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_width_that_its_heads_cannot_share_is_refused_by_each(kind: str) -> None:
    sizes = SIZES | {"num_attention_heads": 5}
    if "num_key_value_heads" in FAMILIES[kind].model_fields:
        sizes |= {"num_key_value_heads": 5}
    if "max_position_embeddings" in FAMILIES[kind].model_fields:
        sizes |= {"max_position_embeddings": 64}
    (problem,) = FAMILIES[kind].model_validate(sizes | {"kind": kind}).contradictions()
    assert problem == (
        "model.hidden_size=32 is not a multiple of model.num_attention_heads=5; change one of them"
    )


def test_nothing_else_knows_a_family_by_its_section() -> None:
    names = {section.__name__ for section in FAMILIES.values()}
    own = {"train/config/model.py", "train/model/configs.py"}
    found = {
        str(path.relative_to(ROOT))
        for room in ("train", "launchers", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id in names)
        or (isinstance(node, ast.alias) and node.name in names)
    }
    assert found == own
