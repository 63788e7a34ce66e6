"""What a rank does not import."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.fixtures import RanksOf

pytestmark = pytest.mark.distributed


def has_mlflow() -> tuple[bool, bool]:
    """Return what deepspeed's tuner found of mlflow, and whether a tracker still finds it."""
    from deepspeed.autotuning import autotuner

    return autotuner.has_mlflow, importlib.import_module("mlflow") is sys.modules["mlflow"]


def test_deepspeed_is_imported_without_mlflow_which_a_tracker_finds_all_the_same(
    ranks: RanksOf,
) -> None:
    """The processes of a pool have imported it as an engine does."""
    assert ranks(1)(has_mlflow) == [(False, True)]
