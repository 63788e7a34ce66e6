"""`shardwright push`: what it uploads, what it leaves out, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from shardwright.train.export.card import recovered_card
from shardwright.train.publishing.contents import card_warnings
from tests import own_code
from tests.unit.launchers.fakes import Shardwright, make_shardwright
from tests.unit.launchers.hub import TOKEN, Hub, Repository, running

shardwright = pytest.fixture(make_shardwright)

MODEL = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
NOT_OF_A_MODEL = {
    ".env": "no part",
    "optimizer.pt": "no part",
    "training_args.bin": "no part",
    "model-00001-of-00003.safetensors": "of another time",
    "model.safetensors.tmp": "half",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model in two shards with its card, beside things that are no part of it."""
    directory = tmp_path_factory.mktemp("models") / "small"
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64))
    model.save_pretrained(directory, max_shard_size="40kB")
    config = json.loads((directory / "config.json").read_text())
    recovered_card(config, "checkpoint-7", 7, None, None, "fp32", 1000).write(directory)
    for name, text in NOT_OF_A_MODEL.items():
        (directory / name).write_text(text)
    (directory / "checkpoint-7").mkdir()
    (directory / "checkpoint-7" / "model.safetensors").write_text("an engine's")
    return directory


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of it to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "small"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Return a stand-in for the hub that huggingface_hub talks to in this process."""
    with running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_the_hub_gets_the_directory_bit_for_bit(
    shardwright: Shardwright, whole: Path, hub: Hub
) -> None:
    outcome = shardwright("push", str(whole), "small")
    assert outcome.code == 0, outcome.err
    repository = hub.repositories["ada/small"]
    assert repository.private
    assert repository.messages == ["Upload small"]
    arrived = repository.branches["main"]
    assert set(arrived) == MODEL
    for name in MODEL - {"README.md"}:
        assert arrived[name] == (whole / name).read_bytes(), name
    # Only now is it known what the model is called.
    card = (whole / "README.md").read_text()
    assert 'model="PATH_OR_NAME"' in card
    assert arrived["README.md"].decode() == card.replace("PATH_OR_NAME", "ada/small")
    for name in (*NOT_OF_A_MODEL, "checkpoint-7"):
        assert f"  left out  {name}: " in outcome.out
    assert f"done\n  private   {hub.url}/ada/small\n" in outcome.out
    assert TOKEN not in outcome.out + outcome.err


def test_dry_run_shows_files_and_card_and_touches_no_network(
    shardwright: Shardwright, model: Path, hub: Hub
) -> None:
    outcome = shardwright("push", str(model), "engines/small", "--dry-run", "--public")
    assert outcome.code == 0
    assert hub.requests == []
    assert f"would push {model} to engines/small\n" in outcome.out
    size = (model / "config.json").stat().st_size
    assert f"  {f'{size} B' if size < 1000 else f'{size / 1000:.1f} kB':>8}  config.json\n" in (
        outcome.out
    )
    assert "as a public model" in outcome.out
    assert (model / "README.md").read_text() in outcome.out
    assert "warning: README.md names no license: add `license:` to its header" in outcome.err


def test_a_second_push_takes_away_the_weights_of_the_first(
    shardwright: Shardwright, model: Path, hub: Hub
) -> None:
    asked = ("push", str(model), "engines/small", "--public", "--revision", "v2", "--message", "m")
    assert shardwright(*asked).code == 0
    shards = sorted(model.glob("model-*-of-00002.safetensors"))
    tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    for path in model.glob("model*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outcome = shardwright(*asked)
    assert outcome.code == 0, outcome.err
    repository = hub.repositories["engines/small"]
    assert not repository.private
    assert repository.messages == ["m", "m"]
    assert repository.branches["main"] == {}
    assert {name for name in repository.branches["v2"] if name.startswith("model")} == {
        "model.safetensors"
    }
    assert "deletes   model-00001-of-00002.safetensors: weights of an older model" in outcome.out


def test_a_tag_names_the_commit_and_never_another_one(
    shardwright: Shardwright, model: Path, hub: Hub
) -> None:
    asked = ("push", str(model), "small", "--tag", "v1", "--tag", "paper")
    outcome = shardwright(*asked)
    assert outcome.code == 0, outcome.err
    assert hub.repositories["ada/small"].tags == {"v1": "c" * 40, "paper": "c" * 40}
    assert outcome.out.endswith("\n  tag       v1\n  tag       paper\n")
    sent = len(hub.repositories["ada/small"].messages)
    outcome = shardwright(*asked)
    assert outcome.code == 2
    assert (
        "ada/small has a tag paper already, which stays with what it names; choose another --tag"
        in outcome.err
    )
    assert len(hub.repositories["ada/small"].messages) == sent, "nothing is sent"


def test_the_final_of_a_run_is_meant_by_the_run(
    shardwright: Shardwright, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    model.rename(tmp_path / "run" / "final")
    outcome = shardwright("push", str(tmp_path / "run"), "small", "--dry-run")
    assert f"would push {tmp_path}/run/final to small\n" in outcome.out


# --- what is refused before anything is sent ----------------------------------------------------


def drop_a_shard(model: Path) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()


def cut_a_shard(model: Path) -> None:
    path = model / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_tensor(model: Path) -> None:
    path = model / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    del tensors[next(iter(tensors))]
    save_file(tensors, path, metadata={"format": "pt"})


def drop_all_weights(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()


def keep_old_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"of another time")


def break_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[]")


def drop_the_card(model: Path) -> None:
    (model / "README.md").unlink()


def drop_the_header(model: Path) -> None:
    (model / "README.md").write_text("# small\n")


def break_the_header(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: [mit\n---\n# small\n")


def put_a_list_for_the_task(model: Path) -> None:
    (model / "README.md").write_text("---\npipeline_tag: [a, b]\n---\n# small\n")


def leave_a_token(model: Path) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": f"use {TOKEN}"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_shard, "names model-00002-of-00002.safetensors, which is missing; `shardwright"),
        (cut_a_shard, "`from_pretrained` does not load it: "),
        (lose_a_tensor, "`from_pretrained` does not load it: "),
        (drop_all_weights, "has no weights: neither model.safetensors nor model.safetensors.index"),
        (keep_old_weights, "has both model.safetensors and model.safetensors.index.json"),
        (break_the_index, "model.safetensors.index.json cannot be read"),
        (drop_the_card, "README.md is missing: without a card"),
        (drop_the_header, "its header, between two lines of ---, is missing"),
        (break_the_header, "its header, between two lines of ---, cannot be read ("),
        (put_a_list_for_the_task, "has pipeline_tag: ['a', 'b'], which is not text"),
        (leave_a_token, "generation_config.json holds what looks like a Hugging Face token"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    shardwright: Shardwright,
    model: Path,
    hub: Hub,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(model)
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 2
    assert message in outcome.err
    assert TOKEN not in outcome.err
    assert hub.requests == []


def test_what_an_interrupted_write_left_is_refused(
    shardwright: Shardwright, model: Path, tmp_path: Path
) -> None:
    model.rename(tmp_path / ".final.tmp")
    outcome = shardwright("push", str(tmp_path / ".final.tmp"), "small", "--dry-run")
    assert outcome.code == 2
    assert "is left from an interrupted write" in outcome.err


@pytest.mark.parametrize("repo", ["a/b/c", "a b", "-x"])
def test_a_name_that_no_hub_takes_is_refused(shardwright: Shardwright, repo: str) -> None:
    outcome = shardwright("push", "nowhere", "--", repo)
    assert outcome.code == 2
    assert f"REPO={repo} is not a valid name on a hub" in outcome.err


def test_a_placeholder_is_worth_a_warning() -> None:
    readme = "---\nlicense: mit\n---\n# small\n[More Information Needed]\n"
    (problem,) = card_warnings(readme)
    assert problem == "still has the placeholder '[More Information Needed]'; fill it in"


# --- what the hub has to say --------------------------------------------------------------------


def test_no_token(
    shardwright: Shardwright, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 2
    assert "no token was found: run `hf auth login`, or set HF_TOKEN" in outcome.err


def test_a_token_that_the_hub_does_not_take(
    shardwright: Shardwright, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 2
    assert f"{hub.url} does not accept the token: it is invalid or has expired" in outcome.err
    assert "hf_expired" not in outcome.err


def test_a_repository_of_somebody_else(shardwright: Shardwright, model: Path, hub: Hub) -> None:
    outcome = shardwright("push", str(model), "grace/small")
    assert outcome.code == 2
    assert (
        "REPO=grace/small belongs to grace, and this token belongs to ada, a member of engines; "
        "push to ada/small, or use a token of grace" in outcome.err
    )


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_a_token_that_may_not_write(
    shardwright: Shardwright, model: Path, hub: Hub, where: str
) -> None:
    hub.refused[where] = 403
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 2
    assert "the token has no write access to " in outcome.err
    assert "create one that has" in outcome.err


def test_a_public_repository_does_not_get_what_is_private(
    shardwright: Shardwright, model: Path, hub: Hub
) -> None:
    hub.repositories["ada/small"] = Repository(private=False)
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 2
    assert "ada/small exists and is public, but private was requested" in outcome.err
    assert "add --public, choose another name, or make it private in its settings" in outcome.err
    hub.repositories["ada/small"].private = True
    outcome = shardwright("push", str(model), "small", "--public")
    assert outcome.code == 2
    assert "exists and is private, but public was requested" in outcome.err
    assert hub.repositories["ada/small"].branches == {"main": {}}


def test_a_hub_that_fails(shardwright: Shardwright, model: Path, hub: Hub) -> None:
    hub.refused["/commit/"] = 500
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 1
    assert f"error: {hub.url} fails (500: " in outcome.err
    assert "push again: what has arrived is not sent again" in outcome.err


def test_no_network(
    shardwright: Shardwright, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 1
    assert "error: http://127.0.0.1:9 cannot be reached (" in outcome.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome = shardwright("push", str(model), "small")
    assert outcome.code == 2
    assert "HF_HUB_OFFLINE is set, and a push needs the network; unset it" in outcome.err


def test_a_model_with_code_of_its_own_is_pushed_whole_once_that_may_run(
    shardwright: Shardwright, tmp_path: Path
) -> None:
    model = own_code.write(tmp_path / "own")
    recovered_card(own_code.CONFIG, "checkpoint-7", 7, None, None, "fp32", 1000).write(model)
    arguments = ("push", str(model), "small", "--dry-run")
    refused = shardwright(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        f"checking {model}\nerror: {model} holds OwnForCausalLM, a model with Python code of its "
        "own (configuration_own.py, modeling_own.py), which is not run by default; read it, "
        "then add --trust-remote-code\n"
    )
    pushed = shardwright(*arguments, "--trust-remote-code")
    assert pushed.code == 0, pushed.err
    for name in own_code.FILES:  # what the named files import among them
        assert f" {name}\n" in pushed.out
    assert "left out" not in pushed.out
