"""What a shell says of other programs' ranks and engines decides nothing of a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.launchers import messages
from shardwright.launchers.ranks import child
from shardwright.train.errors import UserError
from shardwright.train.process import inherited
from shardwright.train.process.rank import Rank, rank_from_environment
from tests.unit.environments import OF_A_RANK, OF_AN_ENGINE, THE_USERS

ROOT = Path(__file__).resolve().parents[2]


def test_a_launcher_hands_on_what_is_the_users() -> None:
    assert child.handed_on(OF_A_RANK | OF_AN_ENGINE | THE_USERS) == THE_USERS


@pytest.mark.parametrize(
    "what", ["start.run", "start.replace", "start.run(relay)"], ids=["run", "replace", "relay"]
)
def test_what_a_launcher_starts_sees_nothing_of_it(what: str, tmp_path: Path) -> None:
    """Only a job's own relay hands on what the job has set for torchrun."""
    show = "import json, os; json.dump(dict(os.environ), open('seen', 'w'))"
    call = {
        "start.run": "child.run([sys.executable, '-c', show], {'ADDED': '1'})",
        "start.replace": "child.replace([sys.executable, '-c', show], {'ADDED': '1'})",
        "start.run(relay)": "relay.main([sys.executable, '-c', show])",
    }[what]
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from shardwright.launchers import relay; "
            "from shardwright.launchers.ranks import child; "
            f"{show=}; {call}",
        ],
        cwd=tmp_path,
        env=os.environ | OF_A_RANK | OF_AN_ENGINE | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    seen = json.loads((tmp_path / "seen").read_text())
    if what == "start.run(relay)":
        assert seen.items() >= OF_A_RANK.items()
    else:
        assert not seen.keys() & (OF_A_RANK | OF_AN_ENGINE).keys()
        assert seen["ADDED"] == "1"


def test_the_header_says_what_is_ignored() -> None:
    line = messages.ignored(THE_USERS | {"RANK": "1", "ACCELERATE_USE_FSDP": "true"})
    assert line == "  ignored   ACCELERATE_USE_FSDP, RANK, set in the environment\n"
    assert messages.ignored(THE_USERS) == ""


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).read_text()


def test_every_name_by_which_accelerate_knows_ranks_and_engines_is_known() -> None:
    """accelerate 1.15: of each it takes the first that is set."""
    text = "".join(
        map(_source, ("accelerate.state", "accelerate.accelerator", "accelerate.utils.environment"))
    )
    ranks = set(re.findall(r'"((?:PMIX?|OMPI|MV2|MPI|PALS)_\w+)"', text))
    assert {"PMI_RANK", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"} <= ranks
    assert set(inherited.of_ranks(ranks)) == ranks
    engine = set(re.findall(r'"((?:ACCELERATE|FSDP)_\w+)"', text))
    assert {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} <= engine
    assert engine - set(inherited.of_engine(engine)) == {"ACCELERATE_DEBUG_MODE"}


def test_a_rank_forgets_an_engine_and_tells_of_what_asked_for_one() -> None:
    by_accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    environment = {**by_accelerate, "FSDP_VERSION": "2", **THE_USERS}
    assert inherited.forget_engine(environment) == ["FSDP_VERSION=2"]
    assert environment == THE_USERS
    assert inherited.said(["FSDP_VERSION=2"]).startswith("FSDP_VERSION=2 in the environment: ign")
    assert inherited.said([]) == ""


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*OF_A_RANK, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # for it to be taken back: the function sets some
        monkeypatch.delenv(name)
    return monkeypatch


def test_mpis_ranks_are_nobody_unless_the_launcher_says_so(clean: pytest.MonkeyPatch) -> None:
    for name, value in {"OMPI_COMM_WORLD_RANK": "5", "PMI_SIZE": "8", "SLURM_PROCID": "3"}.items():
        clean.setenv(name, value)
    assert rank_from_environment() == Rank(0, 0, 1)
    assert "PMI_SIZE" not in os.environ, "accelerate would take it"


def test_a_launchers_names_are_stronger_than_what_the_shell_says(
    clean: pytest.MonkeyPatch,
) -> None:
    theirs = {
        "SHARDWRIGHT_RANKS_OF": "openmpi",
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "8",
        "RANK": "0",
    }
    for name, value in theirs.items():
        clean.setenv(name, value)
    assert rank_from_environment() == Rank(index=5, local_index=1, world_size=8)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1, LOCAL_RANK=1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first, WORLD_SIZE=2"),
    ],
)
def test_variables_that_fit_no_rank_are_refused(
    variables: dict[str, str], said: str, clean: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    with pytest.raises(
        UserError, match=f"no rank is determined by {said} in the environment; unset"
    ):
        rank_from_environment()


@pytest.mark.parametrize(("asked", "allowed"), [("1", False), ("0", True)])
def test_tf32_is_not_decided_behind_torch(asked: str, allowed: bool) -> None:
    with pytest.raises(UserError, match=f"NVIDIA_TF32_OVERRIDE={asked} .*allow_tf32=.*unset it"):
        inherited.check_tf32({"NVIDIA_TF32_OVERRIDE": asked}, allowed=allowed)
    inherited.check_tf32({"NVIDIA_TF32_OVERRIDE": asked}, allowed=not allowed)
    inherited.check_tf32({}, allowed=allowed)
