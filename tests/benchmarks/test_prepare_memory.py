"""The benchmark of a preparation's memory runs, and writes files of the sizes that it says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import prepare_memory
from benchmarks.prepare_memory import KINDS, growth, shown


def test_growth_is_the_largest_sizes_peak_over_the_smallests() -> None:
    peaks = {"100": 200, "1000": 300, "500": 900}  # by number, and not by the letters
    found = {size: {"peak_memory_bytes": peak} for size, peak in peaks.items()}
    assert growth(found) == 1.5
    assert growth({**found, "2000": {"error": "no"}}) is None
    assert growth({"100": {"peak_memory_bytes": 200}}) is None


def test_a_line_has_a_size_its_time_and_both_peaks() -> None:
    figures = {
        "seconds": 2.25,
        "peak_memory_bytes": 3 * 2**20,
        "peak_memory_of_all_bytes": 2**32,
    }
    assert shown("csv", 1000, figures).split() == ["csv", "1,000", "MB", "2.2", "s", "3", "4,096"]
    assert shown("csv", 1, {"error": "no"}) == "csv               1 MB failed: no"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_about_as_large_as_it_is_to_be(kind: str, tmp_path: Path) -> None:
    """Or its contents are, where they are compressed."""
    documents = [f"{number} the light dove, cleaving the air\n" * 40 for number in range(5)]
    sizes = []
    for times in (2, 6):
        path = tmp_path / f"{times}.{kind}"
        KINDS[kind](path, documents, times * 10**5)
        sizes.append(path.stat().st_size)
    assert sizes[1] == pytest.approx(3 * sizes[0], rel=0.25)
    if kind == "jsonl.gz":
        content = gzip.decompress((tmp_path / "6.jsonl.gz").read_bytes())
        assert len(content) == pytest.approx(6 * 10**5, rel=0.2)
        assert {json.loads(line)["text"] for line in content.splitlines()} == set(documents)


@pytest.mark.slow
def test_it_measures_each_kind_and_leaves_its_figures_alone(
    tmp_path: Path,
) -> None:
    file = tmp_path / "figures.json"
    kinds = ["--megabytes", "1", "2", "--kinds", "jsonl", "csv", "--long", "0"]
    where = ["--directory", str(tmp_path), "--json", str(file)]
    assert prepare_memory.main([*kinds, *where]) == 0
    results = json.loads(file.read_text())
    assert results["long"] == {}
    assert results["growth"].keys() == results["kinds"].keys() == {"jsonl", "csv"}
    for kind, found in results["kinds"].items():
        assert found.keys() == {"1", "2"}
        assert all(each["peak_memory_bytes"] > 10 * 2**20 for each in found.values())
        assert results["growth"][kind] == growth(found)
    assert not [path for path in tmp_path.iterdir() if path != file]
