from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from shardwright.train.charts import charts, drawing
from shardwright.train.charts.series import Series

TRAINING = Series([1, 2, 3], [8, 16, 24], [1.0, 2.0, 3.0], [3.0, None, 2.0])


def test_charts_are_drawn_as_pictures_without_a_browser_or_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a node of a cluster."""
    for name in ("HOME", "XDG_CACHE_HOME", "DISPLAY", "PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    spec = charts.losses(TRAINING, None)
    assert spec is not None
    svg, (png,) = drawing.svg(spec), drawing.pngs([spec])
    assert svg.startswith("<svg")
    assert ">training loss</text>" in svg
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) > (1_200, 500)
    assert os.listdir(tmp_path) == []


def test_the_script_for_a_page_is_whole_and_can_stand_in_one() -> None:
    script = drawing.javascript()
    assert "window.vegaEmbed=" in script
    # In vl-convert 1.9 Vega itself is there under no name of its own.
    assert "window.vega=__default;" in script
    assert "__default=null" in script
    assert "</script" not in script.lower()


def test_a_child_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(drawing.CannotDraw, match="ended with 1: .*conversion failed: TypeError"):
        drawing.svg({"mark": "no mark of Vega's"})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(drawing.CannotDraw, match="the process that draws: .*/nowhere/python"):
        drawing.svg({})


def test_no_picture_is_made_of_less_than_a_line() -> None:
    assert charts.losses(None, None) is None
    assert charts.losses(Series([1], [8], [1.0], [3.0]), Series([], [], [], [])) is None
    assert charts.losses(Series([1, 2], [8, 9], [1.0, 2.0], [3.0, None]), None) is None
