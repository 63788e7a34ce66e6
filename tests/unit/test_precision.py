"""What is known of a dtype or a recipe for fp8 is said once, where the precision is configured."""

from __future__ import annotations

import typing

import pytest
import torch
import yaml

from shardwright.train.config import PrecisionConfig
from shardwright.train.config.precision import DTYPES, FP8_RECIPES
from tests.unit.constants import ROOT, files_with


def choices(field: str) -> set[str]:
    """Return the values, null left out, that a field of the section may have."""
    hint = typing.get_type_hints(PrecisionConfig)[field]
    parts = typing.get_args(hint)
    if type(None) in parts:
        (hint,) = (part for part in parts if part is not type(None))
    return set(typing.get_args(hint))


def test_the_section_offers_what_is_known() -> None:
    assert choices("compute_dtype") == set(DTYPES)
    assert choices("fp8_recipe") == set(FP8_RECIPES)
    for field in ("reduce_dtype", "master_dtype", "moments_dtype"):
        assert choices(field) <= set(DTYPES)


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_is_torchs(name: str) -> None:
    dtype = DTYPES[name]
    torchs = getattr(torch, dtype.torch_name)
    assert dtype.size_bytes == torchs.itemsize
    assert dtype.largest_weight <= torch.finfo(torchs).max


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_a_recipe_is_known_by_name_where_it_is_configured_alone(name: str) -> None:
    found = files_with(name)
    assert found == {"train/config/precision.py"}
    options = (ROOT / "conf" / "precision").glob("*.yaml")
    named = [path.stem for path in options if name in path.read_text(encoding="utf-8")]
    chosen = [
        path.stem
        for path in (ROOT / "conf" / "precision").glob("*.yaml")
        if yaml.safe_load(path.read_text(encoding="utf-8"))["fp8_recipe"] == name
    ]
    assert named == chosen
