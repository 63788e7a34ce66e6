"""What 1,024 ranks send in a step is what the documentation says, and close to the ZeRO paper's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.collectives import PAGE, STRATEGIES, counted, of_the_paper, table

pytestmark = pytest.mark.scale

ALL_REDUCED = {"zero1": 3.0, "zero2": 5.0}
"""DeepSpeed 0.19 all-reduces what the paper reduce-scatters (stage_1_and_2.py, average_tensor)."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_sends_what_the_documentation_says(strategy: str, tmp_path: Path) -> None:
    found = counted(strategy, tmp_path)
    assert table({strategy: found}).splitlines()[-1] in PAGE.read_text()
    sent = sum(collectives.volume for collectives in found)
    assert sent == pytest.approx(ALL_REDUCED.get(strategy, of_the_paper(strategy)), rel=0.05)
