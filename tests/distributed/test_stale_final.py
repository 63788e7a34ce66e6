"""final/ is the model of a run's end: a run that trains past it has none until it ends again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers import runs
from shardwright.train.errors import UserError
from shardwright.train.sampling import sample
from tests.distributed.jobs import trained, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed


def resumed_for(run_dir: Path, max_steps: int) -> None:
    """Write down, as `shardwright resume` does, that the run is to have so many steps."""
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    tree["trainer"]["max_steps"] = max_steps
    folder = run_dir / "resumes"
    folder.mkdir(exist_ok=True)
    (folder / f"{len(list(folder.iterdir())) + 1}.yaml").write_text(yaml.safe_dump(tree))


def nothing(trainer: Any) -> None:
    """Look at nothing: the run is cut short after its last step, before it saves and exports."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_goes_past_its_final_model_has_none(
    world_size: int,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["launcher"]["nproc_per_node"] = world_size
    tree["trainer"]["max_steps"] = 2
    run_dir = frozen_run(tree)
    ranks(world_size)(whole_run, run_dir)
    final = run_dir / "final"
    first = (final / "model.safetensors").read_bytes()
    assert runs.of(run_dir).state == "done"

    # Resumed with the same steps, nothing is trained: it stays what it is.
    ranks(world_size)(trained, run_dir, nothing)
    assert (final / "model.safetensors").read_bytes() == first

    resumed_for(run_dir, 4)
    assert runs.of(run_dir).state != "done", "more is asked for than there is"
    ranks(world_size)(trained, run_dir, nothing)
    assert not final.exists()
    earlier = run_dir / "final-earlier"
    assert (earlier / "model.safetensors").read_bytes() == first
    assert runs.of(run_dir).state != "done"
    with pytest.raises(UserError, match="was resumed after its model was made and has not "):
        sample.model_directory(run_dir)
    with pytest.raises(UserError, match=f"the earlier one is {earlier}: give that to use it"):
        sample.model_directory(final)
    assert sample.model_directory(earlier) == earlier

    # Cut short once more: the earlier model is not lost.
    ranks(world_size)(trained, run_dir, nothing)
    assert (earlier / "model.safetensors").read_bytes() == first

    ranks(world_size)(whole_run, run_dir)
    assert runs.of(run_dir).state == "done"
    assert (final / "model.safetensors").read_bytes() != first
    assert not earlier.exists()
