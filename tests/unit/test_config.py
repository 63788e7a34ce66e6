"""RunConfig: its rules, what it says about wrong keys and values, and its round trip."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers.__main__ import COMMANDS
from shardwright.train.config import (
    RankLayout,
    TrainerConfig,
    accumulation_steps,
    from_tree,
    known_keys,
    largest_micro_batch,
    load,
    nearest_key,
    to_yaml,
    unknown_key_message,
)
from shardwright.train.config.messages import ALIASES
from shardwright.train.errors import UserError

TREE: dict[str, Any] = {
    "run_dir": "/runs/a",
    "model": {
        "kind": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    },
    "objective": {"kind": "clm", "prompts": ["def f(", "'quoted': # no comment"]},
    "data": {"kind": "text", "paths": ["a/**/*.txt"], "sequence_length": 64},
    "tokenizer": {"kind": "byte_bpe"},
    "strategy": {"kind": "zero", "stage": 2},
    "precision": {},
    "trainer": {"max_steps": 10, "adam_epsilon": 1e-8},
    "checkpoint": {},
    "tracking": {"kind": "wandb"},
    "launcher": {"kind": "torchrun", "nproc_per_node": 2},
}


def changed(**values: Any) -> dict[str, Any]:
    """Return the tree with values put at dotted keys, written with two underscores for a dot."""
    tree = copy.deepcopy(TREE)
    for key, value in values.items():
        *sections, leaf = key.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    return tree


def problem(**values: Any) -> str:
    with pytest.raises(UserError) as raised:
        from_tree(changed(**values))
    return str(raised.value)


def test_round_trip(tmp_path: Path) -> None:
    run = from_tree({**TREE, "run_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
    assert load(tmp_path) == run


def test_a_run_directory_that_was_moved_is_where_it_lies_now(tmp_path: Path) -> None:
    run = from_tree({**TREE, "run_dir": "/where/it/was"})
    (tmp_path / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
    assert load(tmp_path).run_dir == str(tmp_path)


@pytest.mark.parametrize("by_line", [False, True])
def test_a_run_that_began_before_documents_were_told_apart_keeps_its_meaning(
    by_line: bool, tmp_path: Path
) -> None:
    tree = from_tree({**TREE, "data": {**TREE["data"], "line_by_line": by_line}}).model_dump()
    del tree["data"]["document_attention"], tree["data"]["unpad"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    data = load(tmp_path).data
    assert (data.documents_are_kept_apart, data.is_unpadded) == (by_line, False)
    assert not data.has_bounds


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        from_tree(TREE).seed = 3  # type: ignore[misc]


def test_load_names_a_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory: cannot read"):
        load(tmp_path)


def test_load_names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config.yaml is damaged"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="not a mapping of sections"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "one"}, "seed=one: must be a whole number"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 2**32}, "seed=4294967296: must be less than 4294967296"),
        ({"data__paths": "a.txt"}, "data.paths=a.txt: must be a list, such as [a, b]"),
        ({"data__paths": []}, "data.paths=[]: must be a list of at least 1"),
        ({"data__weights": [1.0, 2.0]}, "data: weights has 2 values and paths has 1"),
        ({"data__sequence_length": None}, "data.sequence_length=null: must be a whole number"),
        ({"strategy__stage": 4}, "strategy.stage=4: must be 0, 1, 2 or 3"),
        ({"strategy": "zero2"}, "strategy=zero2: strategy is a section, not a value"),
        ({"strategy": {}}, "strategy.kind is not set (there are single, ddp, zero, fsdp, auto)"),
        ({"launcher__nproc_per_node": 1.5}, "nproc_per_node=1.5: must be a whole number or auto"),
        ({"tracking__mode": "of"}, "tracking.mode=of: must be auto, online, offline or disabled"),
        ({"trainer__learning_rate": float("inf")}, "trainer.learning_rate=Infinity: must be a fin"),
        ({"trainer__warmup_steps": 11}, "warmup_steps=11 is more than max_steps=10"),
        ({"objective": {"kind": "mlm"}}, "objective=mlm does not fit model.kind=llama"),
        (
            {"objective": {"kind": "diffusion"}},
            "objective=diffusion does not fit model.kind=llama, which is trained with "
            "objective=clm; choose objective=clm or another model",
        ),
        (
            {"data__line_by_line": True, "data__document_attention": False},
            "data.line_by_line=true makes each line a sample that sees nothing else, but "
            "data.document_attention=false; leave one of them out",
        ),
        ({"data__unpad": True}, "data.unpad=true, but documents that are packed back to back have"),
        (
            {
                "data__unpad": True,
                "data__line_by_line": True,
                "precision": {"compute_dtype": "bf16", "fp8_recipe": "rowwise"},
            },
            "data.unpad=true makes each micro-batch as long as its lines are, but "
            "precision.fp8_recipe=rowwise takes multiples of 16 tokens; set data.unpad=false, or "
            "choose precision=bf16",
        ),
        ({"model__num_key_value_heads": 3}, "is not a multiple of model.num_key_value_heads=3"),
        ({"model__hidden_size": 66}, "model.hidden_size=66 is not a multiple of"),
        ({"tokenizer__vocab_size": 999}, "tokenizer.vocab_size=999 is more than model.vocab_size"),
        ({"strategy": {"kind": "single"}}, "strategy=single runs one rank, but launcher.nproc_per"),
        ({"trainer__lr": 1.0}, "unknown key trainer.lr: use trainer.learning_rate"),
        ({"trainer__keep_checkpoints": 3}, "trainer.keep_checkpoints: use checkpoint.keep_last"),
        ({"trainer__early_stopping_threshold": 0.1}, "is read with early_stopping_patience only"),
        (
            {"trainer__debug": {"largest_magnitude": 1e4}},
            "largest_magnitude=10000 is read with numerics=watch only, which is off",
        ),
        (
            {
                "trainer__debug": {
                    "numerics": "watch",
                    "largest_magnitude": 1.0,
                    "smallest_magnitude": 2.0,
                }
            },
            "smallest_magnitude=2 is more than largest_magnitude=1, so that nothing is within both",
        ),
        (
            {"trainer__compile": True, "trainer__debug": {"numerics": "watch"}},
            "compile=true and debug.numerics=watch contradict each other: compiled blocks have no "
            "modules to look into; set compile=false, or auto, which then compiles nothing",
        ),
        (
            {"trainer__compile": True, "trainer__debug": {"trace_batches": [3]}},
            "compile=true and debug.trace_batches contradict each other",
        ),
        (
            {
                "strategy": {
                    "kind": "zero",
                    "stage": 3,
                    "offload_optimizer": "nvme",
                    "nvme_path": "/disk",
                },
                "trainer__debug": {"statistics_every_steps": 5},
            },
            "trainer.debug.statistics_every_steps=5 reads all master weights and gradients, which "
            "strategy=zero keeps on a disk",
        ),
        ({"checkpoint__best_metric": "loss"}, "must be eval_loss, eval_perplexity, eval_masked"),
        (
            {"strategy__bucket_size_bytes": 1},
            "strategy.bucket_size_bytes is not a setting of strategy.kind=zero",
        ),
    ],
)
def test_wrong_values_are_named_with_the_remedy(values: dict[str, Any], message: str) -> None:
    text = problem(**values)
    assert message in text
    assert "\n" not in text


def test_an_unquoted_off_is_off() -> None:
    assert yaml.safe_load("numerics: off") == {"numerics": False}
    tree = changed(trainer__debug={"numerics": False, "trace_batches": [3, 4]})
    debug = from_tree(tree).trainer.debug
    assert (debug.numerics, debug.trace_batches) == ("off", (3, 4))


def test_each_problem_has_a_line_of_its_own() -> None:
    lines = problem(seed=-1, trainer__max_steps=0, data__path=["a"]).splitlines()
    assert lines == [
        "seed=-1: must be at least 0",
        "unknown key data.path: did you mean data.paths?",
        "trainer.max_steps=0: must be at least 1",
    ]


def test_a_section_that_is_left_out_is_named() -> None:
    tree = changed()
    del tree["model"]
    with pytest.raises(UserError, match="model is not set; choose an option with model=NAME"):
        from_tree(tree)


def test_long_values_are_cut() -> None:
    assert len(problem(trainer__max_steps="x" * 1000)) < 150


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.max_step", "trainer.max_steps"),
        ("max_steps", "trainer.max_steps"),
        ("trainer.sequence_length", "data.sequence_length"),
        ("modle.hidden_size", "model.hidden_size"),
        ("model.hiden_size", "model.hidden_size"),
        ("stategy", "strategy"),
        ("launcher.nproc", "launcher.nproc_per_node"),
        ("qqqq", None),
    ],
)
def test_nearest_key(key: str, nearest: str | None) -> None:
    assert nearest_key(key) == nearest


def test_aliases_lead_to_keys_and_groups_that_exist() -> None:
    known = set(known_keys())
    for alias, remedy in ALIASES.items():
        assert alias not in {key.rpartition(".")[2] for key in known}
        named = re.findall(r"\b([a-z_]+(?:\.[a-z_]+)?)\b(?==|\b)", remedy.partition(":")[0])
        command = re.match(r"`shardwright (\w+)", remedy)
        is_command = command is not None and command[1] in COMMANDS
        assert known & set(named) or is_command, f"{alias}: {remedy}"
        for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", remedy):
            assert key in known, f"{alias}: {remedy}"


def test_unknown_key_without_a_likeness_says_where_to_look() -> None:
    assert unknown_key_message("qqqq") == (
        "unknown key qqqq: `shardwright train --cfg job` lists the known ones"
    )


def test_accumulation_follows_from_the_batch() -> None:
    trainer = TrainerConfig(max_steps=1, global_batch_size=64, micro_batch_size=4)
    assert accumulation_steps(trainer, RankLayout(replicas=8)) == 2
    with pytest.raises(UserError, match=r"global_batch_size=64 is not a multiple of .* 3 rank"):
        accumulation_steps(trainer, RankLayout(shards=3))
    with pytest.raises(UserError, match=r"set trainer.global_batch_size=128"):
        accumulation_steps(trainer, RankLayout(replicas=2, shards=16))
    # Ranks that divide samples or matrices have none of their own.
    assert accumulation_steps(trainer, RankLayout(2, 4, sequence=2, tensor=8)) == 2


@pytest.mark.parametrize(
    ("batch", "sizes", "limit", "size"),
    [
        (256, [1], 8, 8),
        (8, [2], 8, 4),
        (14, [2], 8, 7),
        (26, [2], 8, 1),
        (24, [1, 2, 3, 4], 8, 2),
        (12, [2], 5, 3),
        (96, [2], 64, 48),
        (6, [6], 8, 1),
    ],
)
def test_the_largest_micro_batch_divides_each_ranks_part(
    batch: int, sizes: list[int], limit: int, size: int
) -> None:
    layouts = [RankLayout(replicas=size) for size in sizes]
    assert largest_micro_batch(batch, layouts, limit) == size
    apart = [RankLayout(shards=size, sequence=3, tensor=5) for size in sizes]
    assert largest_micro_batch(batch, apart, limit) == size


@pytest.mark.parametrize(("batch", "remedy"), [(10, "9 or 12"), (2, "3")])
def test_a_batch_that_ranks_cannot_share_names_those_that_they_can(batch: int, remedy: str) -> None:
    with pytest.raises(UserError) as raised:
        largest_micro_batch(batch, [RankLayout(), RankLayout(shards=3)])
    assert str(raised.value) == (
        f"trainer.global_batch_size={batch} cannot be divided evenly among 3 rank(s); "
        f"set trainer.global_batch_size={remedy}"
    )


def test_a_number_that_is_still_open_is_named() -> None:
    run = from_tree(changed(data__sequence_length="auto"))
    with pytest.raises(UserError, match="write a number for data.sequence_length"):
        _ = run.data.tokens_per_sample
    with pytest.raises(UserError, match="write a number for trainer.micro_batch_size"):
        _ = run.trainer.eval_samples_per_pass


def test_importing_the_config_needs_no_torch() -> None:
    check = "import sys, shardwright.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_evaluating_without_held_out_documents_is_a_contradiction() -> None:
    tree = changed(data__eval_fraction=0.0, trainer__eval_every_steps=5)
    with pytest.raises(
        UserError, match="eval_every_steps=5 needs held-out documents, but data.eva"
    ):
        from_tree(tree)


@pytest.mark.parametrize(
    ("trainer", "checkpoint", "message"),
    [
        (
            {},
            {"keep_every_steps": 5},
            "checkpoint.keep_every_steps=5 keeps some checkpoints permanently, but "
            "trainer.save_every_steps=null writes one, at the end; set "
            "trainer.save_every_steps=5 or checkpoint.keep_every_steps=null",
        ),
        (
            {"save_every_steps": 4},
            {"keep_every_steps": 6},
            "checkpoint.keep_every_steps=6 is not a multiple of trainer.save_every_steps=4, so "
            "that most of these steps are never saved; set checkpoint.keep_every_steps=8",
        ),
        (
            {"save_every_steps": 2},
            {"keep_best": 1},
            "checkpoint.keep_best=1 needs evaluations during training, but "
            "trainer.eval_every_steps=null; set trainer.eval_every_steps",
        ),
        (
            {"early_stopping_patience": 3},
            {},
            "trainer.early_stopping_patience=3 needs evaluations during training, but "
            "trainer.eval_every_steps=null; set trainer.eval_every_steps",
        ),
        (
            {"eval_every_steps": 2},
            {"keep_best": 1},
            "checkpoint.keep_best=1 chooses among checkpoints, but trainer.save_every_steps=null "
            "writes one, at the end; set trainer.save_every_steps or checkpoint.keep_best=0",
        ),
        (
            {"eval_every_steps": 3, "save_every_steps": 4},
            {"keep_best": 1},
            "checkpoint.keep_best=1 needs checkpoints of steps that are evaluated, but "
            "trainer.save_every_steps=4 and trainer.eval_every_steps=3 first meet at step 12, and "
            "trainer.max_steps=10; set trainer.save_every_steps to a multiple of 3",
        ),
        (
            {"eval_every_steps": 2, "save_every_steps": 2},
            {"keep_best": 1, "best_metric": "eval_masked_accuracy"},
            "checkpoint.best_metric=eval_masked_accuracy is measured with objective=mlm, but it is "
            "clm; set checkpoint.best_metric=eval_loss",
        ),
        (
            {"eval_every_steps": 2, "save_every_steps": 2},
            {"export": "best"},
            "checkpoint.export=best takes the best checkpoint that is kept, but "
            "checkpoint.keep_best=0 keeps none; set checkpoint.keep_best=1",
        ),
        (
            {"eval_every_steps": 2},
            {"best_metric": "eval_perplexity"},
            "checkpoint.best_metric=eval_perplexity is read by checkpoint.keep_best and "
            "trainer.early_stopping_patience, but neither is set; set one or leave "
            "checkpoint.best_metric out",
        ),
    ],
)
def test_what_is_kept_and_when_to_stop_must_fit_the_cadence(
    trainer: dict[str, Any], checkpoint: dict[str, Any], message: str
) -> None:
    tree = changed(checkpoint=checkpoint)
    tree["trainer"] |= trainer
    with pytest.raises(UserError) as raised:
        from_tree(tree)
    assert str(raised.value) == message


def test_stopping_early_without_held_out_documents_is_a_contradiction() -> None:
    text = problem(data__eval_fraction=0.0, trainer__early_stopping_patience=1)
    assert text == (
        "trainer.early_stopping_patience=1 needs evaluations during training, but "
        "trainer.eval_every_steps=null and data.eval_fraction=0, which holds out none; set "
        "trainer.eval_every_steps and the fraction"
    )


def test_the_best_cannot_be_read_from_several_nodes_disks() -> None:
    tree = changed(checkpoint={"keep_best": 1, "export": "best"})
    tree["trainer"] |= {"eval_every_steps": 2, "save_every_steps": 2}
    tree["strategy"]["node_local_checkpoints"] = True
    with pytest.raises(UserError, match="export=best reads a whole checkpoint, but strategy.node"):
        from_tree(tree)


def test_cadences_that_meet_are_fine() -> None:
    tree = changed(checkpoint={"keep_best": 2, "keep_every_steps": 8})
    tree["trainer"] |= {"eval_every_steps": 4, "save_every_steps": 2, "early_stopping_patience": 2}
    assert from_tree(tree).checkpoint.keep_best == 2


def test_async_is_a_key_although_it_is_a_keyword_of_python() -> None:
    run = from_tree({**TREE, "checkpoint": {"async": True, "on_save_error": "stop"}})
    assert run.checkpoint.asynchronous
    text = to_yaml(run)
    assert "\n  async: true\n" in text
    assert from_tree(yaml.safe_load(text)) == run
    assert "checkpoint.async" in known_keys()
    assert "checkpoint.asynchronous" not in known_keys()


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("asynch", "did you mean checkpoint.async?"),
        ("asynchronous", "use checkpoint.async"),
        ("on_error", "did you mean checkpoint.on_save_error?"),
    ],
)
def test_a_wrong_key_of_checkpoints_names_the_right_one(key: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"unknown key checkpoint\.{key}: {re.escape(hint)}"):
        from_tree({**TREE, "checkpoint": {key: True}})


def test_state_on_nvme_is_not_saved_in_the_background() -> None:
    nvme = {"kind": "zero", "stage": 3, "offload_optimizer": "nvme", "nvme_path": "/disk"}
    tree = {**TREE, "strategy": nvme}
    from_tree(tree)
    with pytest.raises(
        UserError, match=r"checkpoint\.async=true .*strategy\.offload_optimizer=nvme keeps"
    ):
        from_tree({**tree, "checkpoint": {"async": True}})
