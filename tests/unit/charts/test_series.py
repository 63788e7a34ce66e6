from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwright.train.charts import series


def line(step: int, **values: Any) -> str:
    return json.dumps(
        {"step": step, "samples": step, "tokens": step * 8, "time": 100.0 + step} | values
    )


def test_metrics_are_series_over_steps_tokens_and_time() -> None:
    found = series.parsed(
        [line(1, loss=3.0), line(2, loss=2.0, grad_norm=1), line(2, **{"eval_loss/wiki": 2.5})]
    )
    assert found == {
        "loss": series.Series([1, 2], [8, 16], [101.0, 102.0], [3.0, 2.0]),
        "grad_norm": series.Series([2], [16], [102.0], [1]),
        "eval_loss/wiki": series.Series([2], [16], [102.0], [2.5]),
    }


def test_what_is_not_finite_is_a_gap_that_is_known_of() -> None:
    nan = line(2).replace("}", ', "loss": NaN}')
    huge = line(4).replace("}", ', "loss": 1e999}')
    endless = line(5).replace("}", f', "loss": {"9" * 400}' + "}")
    found = series.parsed([line(1, loss=3.0), nan, line(3, loss=None), huge, endless])["loss"]
    assert found.values == [3.0, None, None, None, None]
    assert found.not_finite == [2, 3, 4, 5]
    assert found.finite == [(1, 3.0)]


def test_what_is_no_measurement_is_left_out() -> None:
    assert (
        series.parsed(
            [
                line(1, stopped_early=True, note="<b>"),
                line(2).replace("2", "null", 1),
                '{"loss": 1.0}',
                "[1, 2]",
                "3",
                '{"step": 3, "tok',
            ]
        )
        == {}
    )


def test_a_line_without_its_place_does_not_hide_the_others() -> None:
    lost = line(2, loss=9.0).replace('"step": 2', '"step": null')
    assert series.parsed([line(1, loss=3.0), lost, line(3, loss=1.0)])["loss"].steps == [1, 3]


def test_steps_are_in_order_and_the_later_value_of_one_counts() -> None:
    found = series.parsed(
        [line(1, loss=3.0), line(5, loss=2.0), line(3, loss=1.0), line(5, loss=9.0)]
    )
    assert (list(found["loss"].steps), list(found["loss"].values)) == ([1, 3, 5], [3.0, 1.0, 9.0])


def unreadable(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "nothing"
    yield tmp_path
    (tmp_path / "device").symlink_to("/dev/zero")
    yield tmp_path / "device"


@pytest.mark.parametrize("which", range(3))
def test_a_file_that_is_none_has_no_series(which: int, tmp_path: Path) -> None:
    assert series.read(list(unreadable(tmp_path))[which]) == {}
