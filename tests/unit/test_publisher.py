"""What a run publishes while it trains: each save once, tried again, and what it needs for that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from shardwright.train.config import CheckpointConfig, RunConfig, from_tree
from shardwright.train.config.checkpoint import without_pushes
from shardwright.train.errors import UserError
from shardwright.train.publishing.publisher import Publisher, read
from shardwright.train.publishing.requirements import problems
from tests.checkpoints import write_checkpoint
from tests.unit.launchers.hub import TOKEN, Hub, Repository, running
from tests.unit.trees import TREE


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def config_of(**settings: Any) -> RunConfig:
    return from_tree({**TREE, "checkpoint": {"push_to": "ada/small", **settings}})


def test_each_checkpoint_replaces_the_one_before(tmp_path: Path, hub: Hub) -> None:
    said: list[str] = []
    publisher = Publisher(tmp_path, config_of(push_every="checkpoints"), said.append)
    publisher.look()
    assert (said, hub.requests) == ([], []), "there is nothing yet"
    first = write_checkpoint(tmp_path / "checkpoints", 2)
    publisher.look()
    publisher.look()
    files = hub.repositories["ada/small"].branches["main"]
    assert set(files) == {
        f"checkpoints/checkpoint-2/{path.relative_to(first)}"
        for path in first.rglob("*")
        if path.is_file()
    }
    write_checkpoint(tmp_path / "checkpoints", 4)
    shutil.rmtree(first)
    publisher.look()
    assert {name.split("/")[1] for name in files} == {"checkpoint-4"}
    assert hub.repositories["ada/small"].messages == ["run: checkpoint-2", "run: checkpoint-4"]
    # A resumed run does not push it again.
    Publisher(tmp_path, config_of(push_every="checkpoints"), said.append).look()
    assert [entry["what"] for entry in read(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert [text.split(" in ")[0] for text in said] == [
        f"pushed checkpoint-{step} to {hub.url}/ada/small" for step in (2, 4)
    ]


def test_what_fails_is_told_and_tried_again_at_the_next_save(tmp_path: Path, hub: Hub) -> None:
    said: list[str] = []
    publisher = Publisher(tmp_path, config_of(push_every="checkpoints"), said.append)
    hub.repositories["ada/small"] = Repository(private=False)
    write_checkpoint(tmp_path / "checkpoints", 2)
    publisher.look()
    publisher.look()
    (text,) = said
    assert text.startswith("warning: checkpoint.push_to=ada/small: checkpoint-2 is not pushed (ada")
    assert "set checkpoint.push_private=true to push to a private" not in text
    assert text.endswith("; the next save tries again")
    assert "set checkpoint.push_private=false" in text
    hub.repositories["ada/small"] = Repository(private=True)
    write_checkpoint(tmp_path / "checkpoints", 4)
    publisher.look()
    assert ["error" in entry for entry in read(tmp_path)] == [True, False]
    assert not (tmp_path / ".publishing").exists()


def test_an_end_without_a_model_is_no_success(tmp_path: Path, hub: Hub) -> None:
    said: list[str] = []
    publisher = Publisher(tmp_path, config_of(), said.append)
    write_checkpoint(tmp_path / "checkpoints", 2)
    publisher.look()
    assert publisher.finish("stopped") is False
    assert (said, hub.requests) == ([], [])
    assert publisher.finish("done") is True
    assert "final is not pushed (the run has no final/); the model is in final/" in said[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_every": "save"}, "push_every=save is read where a run is pushed, and push_to=null"),
        ({"push_private": False}, "push_private=False is read where a run is pushed"),
        ({"push_to": "a/b/c"}, "push_to=a/b/c is not a repository's name on a hub"),
        (
            {"push_to": "a/b", "push_revision": "step"},
            "push_revision=step gives each save a branch, and push_every=final pushes none",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_tree({**TREE, "checkpoint": settings})


def test_a_run_that_pushes_nothing_has_the_defaults() -> None:
    assert CheckpointConfig(**without_pushes()) == CheckpointConfig()


def test_what_a_push_needs_is_said() -> None:
    pushed = CheckpointConfig(push_to="small")
    assert list(problems(CheckpointConfig(), {"HF_HUB_OFFLINE": "1"}, has_token=False)) == []
    assert list(problems(pushed, {"HF_HUB_OFFLINE": "0"}, has_token=True)) == []
    (offline,) = problems(pushed, {"HF_HUB_OFFLINE": "1"}, has_token=False)
    assert offline.startswith("checkpoint.push_to=small needs the network, and HF_HUB_OFFLINE=1 is")
    (without,) = problems(pushed, {}, has_token=False)
    assert without == (
        "checkpoint.push_to=small: no token was found: run `hf auth login`, or set HF_TOKEN, to "
        "one with write access"
    )
