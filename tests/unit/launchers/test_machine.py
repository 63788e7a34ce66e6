"""What `auto` comes to on a machine, and which GPUs CUDA would show."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from huggingface_hub import try_to_load_from_cache

from shardwright.launchers.machine import names
from shardwright.launchers.machine.facts import Machine, detect, hidden_size, resolve, visible
from shardwright.launchers.messages import header
from shardwright.train.config import from_tree, run, to_yaml
from shardwright.train.data.sources.registry import source_of
from shardwright.train.errors import UserError
from shardwright.train.strategy import engine_settings
from tests.checkpoints import write_checkpoint
from tests.unit.launchers.configs import TREE, config


@pytest.mark.parametrize("micro_batch_size", [4, None])
def test_what_is_resolved_is_validated_once(
    micro_batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {"max_steps": 10, "global_batch_size": 64, "micro_batch_size": micro_batch_size}
    asked = config(trainer=trainer)
    counted = mock.Mock(side_effect=run.contradictions)
    monkeypatch.setattr(run, "contradictions", counted)
    resolved = resolve(asked, Machine(compute_capabilities=(9.0,) * 8), "/runs/a")
    assert resolved.trainer.micro_batch_size == (8 if micro_batch_size is None else 4)
    assert counted.call_count == 1


def test_a_batch_that_ranks_cannot_share_is_said_with_all_else_that_is_wrong() -> None:
    asked = config(
        trainer={"max_steps": 10, "global_batch_size": 64},
        strategy={"kind": "fsdp", "replicas": 3},
        launcher={"kind": "torchrun", "device": "cuda"},
    )
    with pytest.raises(UserError) as raised:
        resolve(asked, Machine(compute_capabilities=(9.0,) * 5), "/runs/a")
    replicas, batch = str(raised.value).splitlines()
    assert "strategy.replicas=3 does not divide the 5 rank(s)" in replicas
    assert "global_batch_size=64 cannot be divided evenly among 5 rank(s)" in batch


def test_auto_is_one_rank_for_each_gpu() -> None:
    resolved = resolve(config(), Machine(compute_capabilities=(9.0, 9.0)), "/runs/a")
    assert resolved.launcher.device == "cuda"
    assert resolved.launcher.world_size == 2
    assert resolved.run_dir == "/runs/a"


def test_auto_is_one_rank_on_a_cpu() -> None:
    resolved = resolve(config(), Machine(cores=64), "/runs/a")
    assert (resolved.launcher.device, resolved.launcher.world_size) == ("cpu", 1)


def test_auto_is_one_rank_under_strategy_single() -> None:
    single = config(strategy={"kind": "single"})
    resolved = resolve(single, Machine(compute_capabilities=(9.0, 9.0)), "/runs/a")
    assert (resolved.launcher.device, resolved.launcher.world_size) == ("cuda", 1)


def test_auto_takes_the_cpu_where_torch_has_no_cuda() -> None:
    here = Machine(compute_capabilities=(9.0,), torch_has_cuda=False)
    assert resolve(config(), here, "/runs/a").launcher.device == "cpu"


def test_batch_is_checked_once_the_ranks_are_known() -> None:
    three = Machine(compute_capabilities=(9.0, 9.0, 9.0))
    with pytest.raises(UserError, match=r"not a multiple of trainer.micro_batch_size=8 x 3 rank"):
        resolve(config(), three, "/runs/a")


GPU = Machine(compute_capabilities=(9.0,))
MASKED = {"model": {**TREE["model"], "kind": "bert"}, "objective": {"kind": "mlm"}}
IN_BF16 = {"precision": {"compute_dtype": "bf16"}}
WITHOUT_DROPOUT = {"model": {**TREE["model"], "attention_dropout": 0.0}}


@pytest.mark.parametrize(
    ("sections", "data", "here", "apart", "unpadded"),
    [
        (MASKED, {}, Machine(), True, False),
        (MASKED, {}, GPU, True, False),
        ({}, {}, Machine(), False, False),
        (IN_BF16, {}, GPU, False, False),
        (IN_BF16, {}, replace(GPU, has_flash_attn=True), True, False),
        (WITHOUT_DROPOUT, {}, GPU, False, False),
        (WITHOUT_DROPOUT | IN_BF16, {}, GPU, True, False),
        (WITHOUT_DROPOUT | IN_BF16, {}, replace(GPU, has_varlen=False), False, False),
        (WITHOUT_DROPOUT | IN_BF16, {}, Machine(compute_capabilities=(7.5,)), False, False),
        ({}, {"document_attention": True}, Machine(), True, False),
        (MASKED, {"document_attention": False}, Machine(), False, False),
        ({}, {"line_by_line": True}, Machine(), True, True),
        (MASKED, {"line_by_line": True, "unpad": False}, Machine(), True, False),
        (
            {"model": {**TREE["model"], "attention": "eager"}},
            {"line_by_line": True},
            Machine(),
            True,
            False,
        ),
    ],
)
def test_documents_are_told_apart_where_it_costs_nothing(
    sections: dict[str, Any], data: dict[str, Any], here: Machine, apart: bool, unpadded: bool
) -> None:
    asked = config(
        **sections,
        data={**TREE["data"], **data},
        launcher={"kind": "torchrun", "nproc_per_node": 1},
    )
    found = resolve(asked, here, "/runs/a").data
    assert (found.documents_are_kept_apart, found.is_unpadded) == (apart, unpadded)


@pytest.mark.parametrize(
    ("config_json", "apart"),
    [
        ({"model_type": "bert"}, True),
        ({"model_type": "deberta-v2"}, False),
        (None, False),
    ],
)
def test_a_pretrained_model_is_told_of_documents_where_it_is_known_how(
    config_json: dict[str, Any] | None, apart: bool, tmp_path: Path
) -> None:
    if config_json is not None:
        (tmp_path / "config.json").write_text(json.dumps(config_json))
    asked = config(
        model={"kind": "pretrained", "name": str(tmp_path)},
        tokenizer={"kind": "byte_bpe", "vocab_size": 300},
        objective={"kind": "mlm"},
    )
    assert resolve(asked, Machine(), "/runs/a").data.document_attention is apart


@pytest.mark.parametrize(
    ("has_key", "said", "mode"),
    [
        (True, None, "online"),
        (False, None, "offline"),
        (True, "offline", "offline"),
        (True, "disabled", "disabled"),
        (False, "online", "online"),
    ],
)
def test_wandb_does_what_the_environment_says_and_is_offline_where_there_is_no_key(
    has_key: bool, said: str | None, mode: str
) -> None:
    tracked = config(tracking={"kind": "wandb"})
    resolved = resolve(tracked, Machine(has_wandb_key=has_key, wandb_mode=said), "/runs/a")
    assert resolved.tracking.kind == "wandb"
    assert resolved.tracking.mode == mode


GPUS: list[tuple[str, float | None]] = [("GPU-aaaa", 9.0), ("GPU-bbbb", 8.0), ("GPU-cccc", 7.5)]


@pytest.mark.parametrize(
    ("variable", "seen"),
    [
        (None, (9.0, 8.0, 7.5)),
        ("", ()),
        ("-1", ()),
        ("2,0", (7.5, 9.0)),
        ("1", (8.0,)),
        ("0,7,1", (9.0,)),
        ("0,-1,1", (9.0,)),
        ("GPU-b", (8.0,)),
        ("MIG-1234", (None,)),
    ],
)
def test_cuda_visible_devices_is_honoured(
    variable: str | None, seen: tuple[float | None, ...]
) -> None:
    assert visible(GPUS, variable) == seen


def test_detect_looks_at_this_machine() -> None:
    here = detect({"CUDA_VISIBLE_DEVICES": "", "WANDB_API_KEY": "a key"})
    assert here.gpus == 0
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.has_wandb_key


def test_relative_paths_are_frozen_as_absolute_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = {"kind": "text", "sequence_length": 64, "paths": ["corpus/*.txt"], "cache_dir": "cache"}
    data = source_of(resolve(config(data=text), Machine(cores=2), "/runs/a").data).located()
    assert data.paths == (str(tmp_path / "corpus/*.txt"),)
    assert data.cache_dir == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("config_json", "length"),
    [
        ({"model_type": "gpt2", "n_positions": 128}, 128),
        ({"model_type": "llama", "max_position_embeddings": 4096}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 130, "pad_token_id": 1}, 128),
        ({"model_type": "roberta", "max_position_embeddings": 130}, 128),
        ({"model_type": "vlm", "text_config": {"max_position_embeddings": 64}}, 64),
        ({"model_type": "bloom"}, 512),
        (None, 512),
    ],
)
@pytest.mark.parametrize("where", ["directory", "cache"])
def test_samples_are_no_longer_than_a_pretrained_model_takes(
    config_json: dict[str, object] | None,
    length: int,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    name = "org/model"
    cached = tmp_path / "hf" / "hub" / "models--org--model"
    directory = cached / "snapshots" / "abc" if where == "cache" else tmp_path / name
    directory.mkdir(parents=True)
    (cached / "refs").mkdir(parents=True, exist_ok=True)
    (cached / "refs" / "main").write_text("abc")
    if config_json is not None:
        (directory / "config.json").write_text(json.dumps(config_json))
    pretrained = config(
        model={"kind": "pretrained", "name": name},
        tokenizer={"kind": "pretrained", "name": "org/tokenizer"},
        data={"kind": "stdlib"},
    )
    assert resolve(pretrained, Machine(), "/runs/a").data.sequence_length == length


def test_the_launcher_looks_where_huggingface_hub_keeps_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, commit = tmp_path / "hub", "0" * 40
    snapshot = cache / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "models--org--model" / "refs").mkdir()
    (cache / "models--org--model" / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    found = try_to_load_from_cache("org/model", "config.json", cache_dir=cache)
    assert found == str(snapshot / "config.json")
    assert names.config_json("org/model", None, {"HF_HUB_CACHE": str(cache)}) == {}
    assert names.config_json("org/model", commit, {"HF_HUB_CACHE": str(cache)}) == {}


@pytest.mark.parametrize(
    ("found", "size"),
    [
        ({"hidden_size": 64}, 64),
        ({"n_embd": 32, "model_type": "gpt2"}, 32),
        ({"hidden_size": 8, "text_config": {"d_model": 16}}, 16),
        ({"hidden_size": "wide"}, None),
        ({}, None),
    ],
)
def test_the_width_of_a_model_is_read_off_its_config(
    found: dict[str, object], size: int | None
) -> None:
    assert hidden_size(found) == size


def test_buckets_of_pretrained_weights_follow_their_width(tmp_path: Path) -> None:
    """As in a dry run; what is not here yet is found out by the ranks."""
    (tmp_path / "config.json").write_text('{"n_embd": 12288}')

    def buckets(name: str) -> dict[str, object]:
        tree = {
            **TREE,
            "model": {"kind": "pretrained", "name": name},
            "tokenizer": {"kind": "pretrained", "name": name},
            "strategy": {"kind": "zero", "stage": 3},
        }
        config = resolve(from_tree(tree), Machine(), "/runs/a")
        section: dict[str, object] = engine_settings(config)["zero_optimization"]
        return section

    assert buckets(str(tmp_path))["reduce_bucket_size"] == 12_288**2
    assert buckets(str(tmp_path))["stage3_prefetch_bucket_size"] == int(0.9 * 12_288**2)
    assert buckets(str(tmp_path))["stage3_param_persistence_threshold"] == 10 * 12_288
    assert buckets("nobody/nothing")["reduce_bucket_size"] == 10**8


def test_a_model_and_a_tokenizer_that_lie_here_are_frozen_as_absolute_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "base").mkdir(parents=True)

    def names(name: str) -> set[str]:
        section = {"kind": "pretrained", "name": name}
        found = resolve(config(model=section, tokenizer=section), Machine(cores=2), "/runs/a")
        assert found.model.kind == found.tokenizer.kind == "pretrained"
        return {found.model.name, found.tokenizer.name}

    for name in ("models/base", "./models/base/", "~/models/base", str(tmp_path / "models/base")):
        assert names(name) == {str(tmp_path / "models" / "base")}
    # As transformers does, what is no directory here is taken for a name on the hub.
    assert names("org/base") == {"org/base"}


def pretrained(name: str) -> tuple[str, str]:
    section = {"kind": "pretrained", "name": name}
    found = resolve(config(model=section, tokenizer=section), Machine(cores=2), "/runs/a")
    return found.model.name, found.tokenizer.name  # type: ignore[union-attr]


def test_a_run_stands_for_its_model_and_its_tokenizer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config()))
    words = str(run / "tokenizer")
    with pytest.raises(UserError, match=rf"model.name={run} is a run that has no final/ and no"):
        pretrained(str(run))
    saved = [
        write_checkpoint(run / "checkpoints", step, metrics={"eval_loss": loss})
        for step, loss in ((3, 2.0), (6, 1.0), (9, 1.5))
    ]
    assert pretrained(str(run)) == (str(saved[2]), words), "the newest"
    assert pretrained(str(saved[0])) == (str(saved[0]), words)
    assert names.model(str(run), "best") == str(saved[1])
    assert names.model(str(run), 3) == str(saved[0])
    (saved[2] / "rng-0.pt").unlink()
    assert pretrained(str(run)) == (str(saved[1]), words), "the newest that is whole"
    (run / "final").mkdir()
    assert pretrained(str(run)) == (str(run / "final"), words)
    assert names.model(str(run), "latest") == str(saved[1])
    again = pretrained(str(run / "final"))
    assert again == (str(run / "final"), str(run / "final"))


def test_a_checkpoint_to_start_from_is_there_and_whole(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for directory in (run, other):
        directory.mkdir()
        (directory / "config.yaml").write_text(to_yaml(config()))
    whole, damaged = (write_checkpoint(run / "checkpoints", step) for step in (3, 6))
    (damaged / "rng-0.pt").unlink()
    for step, message in (
        (6, "model.step=6: checkpoint-6 of .*run is not whole; it has 3"),
        (7, "model.step=7: checkpoint-7 of .*run is not there; it has 3"),
        ("best", "no checkpoint of .* was evaluated by eval_loss, so none is the best; set model"),
    ):
        with pytest.raises(UserError, match=message):
            names.model(str(run), step)
    with pytest.raises(UserError, match="model.step=3 chooses among .* is not a run directory; le"):
        names.model(str(whole), 3)
    with pytest.raises(UserError, match="model.step=best chooses among the checkpoints of a run"):
        names.model("gpt2", "best")
    assert names.unusable_checkpoint(str(whole)) is None
    assert names.unusable_checkpoint("gpt2") is None
    said = names.unusable_checkpoint(str(damaged))
    assert said
    assert "-6 is not whole: rng-0.pt is missing; restore it from a copy, or give" in said
    part = write_checkpoint(other / "checkpoints", 3, part=0, parts=2)
    said = names.unusable_checkpoint(str(part))
    assert said
    assert "is part 1 of 2, as each node kept what its ranks wrote" in said
    (damaged / "manifest.json").unlink()
    said = names.unusable_checkpoint(str(damaged))
    assert said
    assert "-6 is not whole: it has no manifest; restore it" in said
    with pytest.raises(UserError, match="tokenizer.name=.* a run that has no tokenizer/ yet"):
        names.tokenizer(str(run))


def test_a_resume_does_not_look_at_the_other_run_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "tokenizer").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config()))
    first = write_checkpoint(run / "checkpoints", 3)
    section = {"kind": "pretrained", "name": str(run)}
    found = resolve(config(model=section, tokenizer=section), Machine(cores=2), "/runs/a")
    write_checkpoint(run / "checkpoints", 6)
    for _ in range(2):
        found = resolve(found, Machine(cores=2), "/runs/a")
        assert found.model.name == str(first)  # type: ignore[union-attr]
        assert found.model.step is None  # type: ignore[union-attr]
        assert f"  weights   {first}\n" in header(found, {}, Machine(), {})
        shutil.rmtree(run, ignore_errors=True)
