"""The model card tells what is known of a run, no more, and its header is one that a hub takes."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from shardwright.train.checkpoint.format.layout import Manifest
from shardwright.train.config import from_tree
from shardwright.train.export import curve
from shardwright.train.export.card import card_of, recovered_card
from shardwright.train.export.card_text import Facts
from shardwright.train.run_directory import metrics
from tests.fixtures import TreeOf
from tests.unit.trees import PACKED

GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "n_positions": 66,
    "vocab_size": 384,
}
ROBERTA = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "vocab_size": 384}

Tree = TreeOf


def facts(tree: dict[str, Any], **values: Any) -> Facts:
    return Facts(config_json=GPT2, dtype="fp32", run=from_tree(tree), **values)


def header(readme: str) -> dict[str, Any]:
    """Return the header as the hub's own library reads it, evaluation results checked."""
    return ModelCard(readme).data.to_dict()


@pytest.fixture
def run_dir(tiny_tree: Tree, tmp_path: Path) -> Path:
    """Return a run of 60 steps, evaluated at 20 and 40, and killed while it wrote a line."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tiny_tree("clm"), "name": "small"}))
    counts = {"documents": 90, "tokens": 4000, "samples": 125, "tokens_left_out": 31}
    tree = {
        "tokens": "abc",
        "tokenizer": {"tokens": 300},
        "training": {**counts, "samples_per_epoch": 125},
        "heldout": {"documents": 0, "tokens": 0},
    }
    (tmp_path / "data.json").write_text(json.dumps(tree))
    provenance = {
        "started": "2026-01-31T12:00:00Z",
        "versions": {"torch": "2.13.0", "deepspeed": None},
        "world_size": 2,
        "hardware": {
            "host": "node-17.corp",
            "cores": 8,
            "memory_bytes": 2**35,
            "gpus": ["H200"] * 2,
        },
    }
    (tmp_path / "provenance.json").write_text(json.dumps(provenance))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(5, 65, 5):
            line = {"step": step, "tokens": step * 512, "time": 1769860810.0 + step}
            loss = {"loss": 6 - step / 20, "tokens_per_second": 512.0}
            file.write(json.dumps(line | loss) + "\n")
            if step in (20, 40):
                file.write(json.dumps(line | {"eval_loss": 7 - step / 20}) + "\n")
        file.write('{"step": 65, "tok')
    return tmp_path


SEVERAL_NODES = {
    "torchrun": {"head_address": "node1", "head_port": 29501},
    "accelerate": {"head_address": "node1", "head_port": 29501},
    "slurm": {},
}


@pytest.mark.parametrize("kind", SEVERAL_NODES)
def test_a_machine_is_one_of_several_whatever_started_them(
    kind: str, run_dir: Path, tiny_tree: Tree
) -> None:
    launcher = {"kind": kind, "device": "cpu", "nproc_per_node": 1, "nodes": 2}
    tree = {**tiny_tree("clm"), "launcher": launcher | SEVERAL_NODES[kind]}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    card = recovered_card(GPT2, "a checkpoint", 40, run_dir, None, "fp32", 30_000)
    assert "| Nodes | 2, of which one is |" in card.readme


def test_the_card_of_a_recovered_checkpoint(run_dir: Path) -> None:
    manifest = Manifest(
        step=40,
        files={},
        world_size=4,
        samples=640,
        tokens=20480,
        metrics={"eval_loss": 5.0, "eval_perplexity": 148.41},
    )
    card = recovered_card(
        GPT2, "checkpoint-40 of a Shardwright run", 40, run_dir, manifest, "fp32", 30_000
    )
    assert header(card.readme) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["shardwright", "gpt2"],
        "model-index": [
            {
                "name": "small",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "text", "name": "text, held-out documents"},
                        "metrics": [
                            {"type": "loss", "value": 5.0, "name": "loss"},
                            {"type": "perplexity", "value": 148.41, "name": "perplexity"},
                        ],
                    }
                ],
            }
        ],
    }
    for line in (
        "# small",
        "Recovered with Shardwright from checkpoint-40 of a Shardwright run. "
        "Trained from scratch with Shardwright.",
        "| Parameters | 30,000 |",
        "| Context length | 66 tokens |",
        "| Corpus | local files, `corpus.jsonl` |",
        "| Licence | not known |",
        "| Vocabulary | 300 tokens; 384 rows of the embedding, 84 of them unused |",
        "| For training | 90 documents, 4,000 tokens in 125 samples; 31 tokens more are in none |",
        "| Held out | nothing |",
        "| Seen | 640 samples, 20,480 tokens, 40 steps |",
        "| Epochs | 5.1 |",
        "| Strategy | DDP on 4 rank(s) |",
        "| Time | 40 s of training, 50 s with start, evaluations and saves |",
        "| loss | 5.0000 |",
        "| training loss | 4.0000 at step 40 | 4.0000 at step 40 |",
        "| evaluation loss | 5.0000 at step 40 | 5.0000 at step 40 |",
        "| 20 | 10,240 | 5.0000 | 6.0000 |",
        "| GPUs | 2 x H200 |",
        "| Versions | torch 2.13.0 |",
        'generate = pipeline("text-generation", model="PATH_OR_NAME")',
        "![Loss over the steps of the training](loss.svg)",
        "- 30 thousand parameters and 20.5 thousand tokens: that is 0.68 tokens per parameter, "
        "where about 20 are the best use of the same compute (arXiv 2203.15556). It has seen "
        "too little to know much.",
        "- It has seen its corpus 5.1 times, and may repeat passages of it verbatim.",
        "- It was trained on samples of 32 tokens; its positions from there to 66 are untrained.",
    ):
        assert line in card.readme.splitlines(), line
    assert "| 45 |" not in card.readme, "these weights have not come that far"
    # A card is public: neither the host nor a directory of its own is in it.
    assert "corp" not in card.readme.replace("corpus", "")
    assert str(run_dir.parent) not in card.readme


def test_a_foreign_checkpoint_says_what_is_not_known() -> None:
    card = recovered_card(ROBERTA, "a checkpoint of DeepSpeed", None, None, None, "bf16")
    assert header(card.readme) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["shardwright", "roberta"],
    }
    assert card.picture is None
    assert "loss.svg" not in card.readme
    assert "## Data\n\nNot known.\n" in card.readme
    assert "## Training\n\nNot known.\n" in card.readme
    assert "It is not known what it was trained on" in card.readme
    assert "| Weights | bf16 |" in card.readme
    assert "fill(fill.tokenizer.mask_token)" in card.readme
    assert "None" not in card.readme


def test_an_architecture_without_a_head_for_language_gets_no_task() -> None:
    card = recovered_card({"architectures": ["T5Model"]}, "a checkpoint", 3, None, None, "fp32")
    assert "pipeline" not in card.readme
    assert "| Steps | 3 |" in card.readme


def test_a_run_directory_that_cannot_be_read_is_as_good_as_none(tmp_path: Path) -> None:
    assert recovered_card(GPT2, "x", 3, tmp_path, None, "fp32") == recovered_card(
        GPT2, "x", 3, None, None, "fp32"
    )


def test_data_of_a_hub_and_weights_to_go_on_from_are_linked(tiny_tree: Tree) -> None:
    tree = tiny_tree("clm") | {
        "data": {"kind": "hub", "name": "org/books", "config": "en", "sequence_length": 32},
        "model": {"kind": "pretrained", "name": "org/base"},
        "tokenizer": {"kind": "pretrained", "name": "/home/me/secret/words"},
    }
    readme = card_of(
        facts(
            tree,
            base_model="org/base",
            metrics={"eval_loss": 2.5},
            tokenizer_class="LlamaTokenizer",
        )
    ).readme
    found = header(readme)
    assert (found["datasets"], found["base_model"]) == (["org/books"], "org/base")
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {
        "type": "org/books",
        "name": "org/books, held-out documents",
        "config": "en",
    }
    assert "Trained with Shardwright from `org/base`." in readme
    assert "| Licence | see the data set's own card |" in readme
    assert "| Tokenizer | made elsewhere, read from local files (`LlamaTokenizer`) |" in readme
    assert "words" not in readme


@pytest.mark.parametrize(
    ("data", "language", "licence", "limit"),
    [
        ("stdlib", ["code", "en"], "Python Software Foundation License", "It knows Python as"),
        ("kant", ["en"], "public domain in the USA", "repeats the views of its author"),
    ],
)
def test_languages_and_licences_where_they_are_known(
    tiny_tree: Tree, data: str, language: list[str], licence: str, limit: str
) -> None:
    section: dict[str, Any] = {"kind": data, "sequence_length": 32}
    if data == "kant":
        section["urls"] = ["https://www.gutenberg.org/cache/epub/4280/pg4280.txt"]
    readme = card_of(facts(tiny_tree("clm") | {"data": section})).readme
    assert header(readme)["language"] == language
    assert f"| Licence | {licence}" in readme
    assert limit in readme


def test_a_prompt_and_a_path_cannot_break_out_of_their_places(tiny_tree: Tree) -> None:
    tree = tiny_tree("clm")
    tree["objective"]["prompts"] = ['say "hi"', "```\n# not ours"]
    tree["data"]["paths"] = ["a|b`c.txt"]
    readme = card_of(facts(tree)).readme
    assert 'generate("say \\"hi\\"", max_new_tokens=40, do_sample=True)' in readme
    assert "| Corpus | local files, `a\\|bc.txt` |" in readme
    assert "not ours" not in readme


def test_a_batch_that_grew_and_how_the_rate_fell_are_told(tiny_tree: Tree) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"batch_warmup_from": 8, "batch_warmup_samples": 1000}
    tree["trainer"] |= {"lr_scheduler": "warmup_stable_decay", "decay_shape": "sqrt"}
    readme = card_of(facts(tree)).readme
    assert "| Batch | 16 samples, grown from 8 over the first 1,000 samples |" in readme
    assert "| Learning rate | 0.001 at its peak, warmup_stable_decay (sqrt decay) |" in readme
    tree["trainer"] |= {"decay_fraction": 0.0, "warmup_fraction": 0.00174}
    line = "0.001 at its peak, warmup_stable_decay, warm-up over 0.17% of the steps |"
    assert line in card_of(facts(tree)).readme


@pytest.mark.parametrize(
    ("base", "local", "before", "text"),
    [
        (10_000, None, {}, "10,000"),
        (5e5, None, {"rope_theta": 10000.0}, "500,000, changed from 10,000"),
        (10_000, 10_000, {}, "10,000"),
        (
            10_000,
            10_000,
            {"global_rope_theta": 7},
            "10,000 in layers that attend to all of a "
            "sample, changed from 7; 10,000 in layers that attend to a window",
        ),
        (
            160_000,
            10_000,
            {},
            "160,000 in layers that attend to all of a sample; 10,000 in layers "
            "that attend to a window",
        ),
    ],
)
def test_the_bases_of_rotary_embeddings_are_told(
    base: float, local: float | None, before: dict[str, float], text: str
) -> None:
    parameters: dict[str, Any] = {"rope_theta": base}
    if local is not None:
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_theta": local}}
    config = {"model_type": "modernbert", "rope_parameters": parameters}
    readme = card_of(Facts(config_json=config, dtype="fp32", base_config=before)).readme
    assert f"| Rotary base | {text} |" in readme


def facts_of(points: Sequence[metrics.Point]) -> Facts:
    return Facts(config_json=GPT2, dtype="fp32", curve=metrics.Curve(tuple(points), None, None))


def test_the_picture_shows_both_losses(run_dir: Path) -> None:
    card = card_of(facts_of(metrics.read(run_dir / "metrics.jsonl").points))
    assert "](loss.svg)" in card.readme
    assert card.picture is not None
    svg = ET.fromstring(card.picture)
    words = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"training loss", "evaluation loss", "step", "loss"} <= set(words)
    paths = [element.get("d", "") for element in svg.iter("{http://www.w3.org/2000/svg}path")]
    drawn = {path.count("L") for path in paths}
    assert {11, 1} <= drawn, "a line through 12 points, and one through 2"


def test_a_long_run_is_drawn_and_tabled_in_bounded_size() -> None:
    points = [metrics.Point(step, step * 10, loss=1.0) for step in range(1, 50_001)]
    card = card_of(facts_of(points))
    assert card.picture is not None
    assert len(card.picture) < 70_000
    assert len(curve.table(points)) == curve.TABLE_ROWS
    assert [row[0] for row in curve.table(points)][:: curve.TABLE_ROWS - 1] == ["1", "50,000"]


def test_nothing_is_drawn_of_one_point() -> None:
    for points in ([metrics.Point(1, 10, loss=2.0)], []):
        card = card_of(facts_of(points))
        assert card.picture is None
        assert "loss.svg" not in card.readme


def test_a_card_without_its_picture_is_a_card(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    card = card_of(facts_of(metrics.read(run_dir / "metrics.jsonl").points))
    assert card.picture is None
    assert "loss.svg" not in card.readme
    assert "the process that draws ended with 1: it says nothing" in caplog.text


@pytest.mark.parametrize(
    ("samples", "an_epoch", "line"),
    [
        (125, 125, "| Epochs | 1 |"),
        (250, 125, "| Epochs | 2 |"),
        (130, 125, "| Epochs | 1 |"),
        (65, 125, "| Epochs | 0.52 |"),
        (640, None, None),
    ],
)
def test_epochs_are_the_samples_seen_against_those_of_an_epoch(
    samples: int, an_epoch: int | None, line: str | None, tiny_tree: Tree
) -> None:
    training = {"documents": 9, "tokens": 99, "samples_per_epoch": an_epoch}
    values = {
        "samples": samples,
        "tokens": samples * 9,
        "step": 3,
        "corpus": {"training": training},
    }
    readme = card_of(facts(tiny_tree("clm"), **values)).readme
    assert (line in readme.splitlines()) if line else ("Epochs" not in readme)


def test_an_epoch_of_weighted_sources_is_not_told(tiny_tree: Tree) -> None:
    tree = tiny_tree("clm")
    tree["data"] |= {"paths": ["a.txt", "b.txt"], "weights": [1, 2]}
    corpus = {"training": {"documents": 9, "tokens": 99, "samples_per_epoch": 10}}
    assert "Epochs" not in card_of(facts(tree, samples=10, tokens=90, step=1, corpus=corpus)).readme


def from_weights(tree: dict[str, Any], name: str, **values: Any) -> str:
    tree = tree | {
        "model": {"kind": "pretrained", "name": name},
        "tokenizer": {"kind": "pretrained", "name": name},
    }
    return card_of(facts(tree, **values)).readme


def test_local_weights_are_called_what_their_card_says_or_their_architecture(
    tiny_tree: Tree,
) -> None:
    tree = tiny_tree("clm")
    named = from_weights(tree, "/home/me/runs/a/final", base_title="small")
    assert "Trained with Shardwright from the weights of `small`, a `GPT2LMHeadModel`.\n" in named
    assert "| Tokenizer | that of the weights of `small`, a `GPT2LMHeadModel` |" in named
    unnamed = from_weights(tree, "/home/me/runs/a/final")
    assert "from the weights of another `GPT2LMHeadModel`.\n" in unnamed
    assert "final" not in named + unnamed
    anew = from_weights(tree, "/x/final", drawn_anew=["lm_head.a", "lm_head.b"])
    assert (
        "These had no weights of the head: its 2 parameters (`lm_head.a`, `lm_head.b`) started "
        "from random values." in anew
    )


@pytest.mark.parametrize(
    ("vocabulary", "line"),
    [
        (384, "| Vocabulary | 384 tokens |"),
        (None, "| Vocabulary | 384 rows of the embedding |"),
        (300, "| Vocabulary | 300 tokens; 384 rows of the embedding, 84 of them unused |"),
    ],
)
def test_a_vocabulary_is_the_tokenizers(vocabulary: int | None, line: str, tiny_tree: Tree) -> None:
    readme = card_of(facts(tiny_tree("clm"), tokenizer_tokens=vocabulary)).readme
    assert line in readme.splitlines()


def test_tokens_of_an_earlier_run_are_counted_in_its_tokenizer(run_dir: Path) -> None:
    tree = json.loads((run_dir / "data.json").read_text())
    del tree["tokenizer"]
    (run_dir / "data.json").write_text(json.dumps(tree))
    (run_dir / "tokenizer").mkdir()
    vocabulary = {"a": 0, "b": 1, "c": 4}
    added = [{"id": 4, "content": "c"}, {"id": 7, "content": "<pad>"}]
    (run_dir / "tokenizer" / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added})
    )
    readme = recovered_card(GPT2, "a checkpoint", 40, run_dir, None, "fp32").readme
    assert "| Vocabulary | 4 tokens; 384 rows of the embedding, 380 of them unused |" in readme


def test_positions_before_the_first_token_are_not_counted(tiny_tree: Tree) -> None:
    tree = tiny_tree("mlm") | {"model": {"kind": "pretrained", "name": "org/base"}}
    tree["tokenizer"] = {"kind": "pretrained", "name": "org/base"}
    config = ROBERTA | {"max_position_embeddings": 514, "pad_token_id": 1}
    readme = card_of(Facts(config_json=config, dtype="fp32", run=from_tree(tree))).readme
    assert "| Context length | 512 tokens |" in readme


@pytest.mark.parametrize(
    ("generation", "prompt", "length"),
    [
        ({}, "def f(", "max_new_tokens=40"),
        # transformers warns of either beside the other.
        ({"max_length": 66}, "def f(", "max_length=46"),
        ({"max_length": 20}, "def f(", "max_length=46"),
        # The positions end before.
        ({"max_length": 66}, "x" * 50, "max_length=66"),
        ({}, "x" * 50, "max_new_tokens=16"),
    ],
)
def test_the_example_continues_within_the_models_positions(
    generation: dict[str, Any], prompt: str, length: str, tiny_tree: Tree
) -> None:
    tree = tiny_tree("clm")
    tree["objective"]["prompts"] = [prompt]
    readme = card_of(facts(tree, generation=generation)).readme
    assert f'generate("{prompt}", {length}, do_sample=True)' in readme


def test_the_example_of_a_model_with_code_lets_it_run(tiny_tree: Tree) -> None:
    config = GPT2 | {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    run = from_tree(tiny_tree("clm"))
    readme = card_of(Facts(config_json=config, dtype="fp32", run=run)).readme
    assert 'pipeline("text-generation", model="PATH_OR_NAME", trust_remote_code=True)' in readme


def test_the_objective_is_told(tiny_tree: Tree) -> None:
    def card(**objective: Any) -> str:
        tree = tiny_tree("mlm")
        tree["objective"] = objective
        return card_of(facts(tree, metrics={"eval_loss": 3.0})).readme

    assert "masked: 30% of the tokens |" in card(kind="mlm", masking_rate=0.3)
    falls = {"kind": "mlm", "masking_rate": 0.3, "masking_rate_final": 0.15}
    assert "masked: 30% of the tokens where training began, 15% in the end, along a linear" in card(
        **falls
    )
    at_once = card(**falls, masking_rate_schedule="step", masking_rate_step_at=0.9)
    assert "15% in the end, at once after 90% of the run" in at_once
    diffusion = card(kind="diffusion", prompts=["def f("])
    assert "masked diffusion: in each sample a share of the tokens of its own, from 0.001" in (
        diffusion
    )
    assert "is an estimate of an upper bound of the negative log-likelihood" in diffusion
    assert "fill(fill.tokenizer.mask_token)" in diffusion


def test_an_encoder_decoder_is_told_by_what_it_reads_and_writes(tiny_tree: Tree) -> None:
    tree = tiny_tree("span_corruption")
    tree["objective"]["prompts"] = ["a <extra_id_0> b"]
    readme = card_of(facts(tree, metrics={"eval_loss": 3.0})).readme
    assert "pipeline_tag: text2text-generation" in readme
    assert "span corruption: 15% of the tokens, in spans of 3 on average, are taken" in readme
    assert "32 tokens read by the encoder, 8 written by the decoder" in readme
    assert "it writes what is missing in a text at <extra_id_0>" in readme
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    compile(example, "example", "exec")
    assert 'tokenizer("a <extra_id_0> b", return_tensors="pt")' in example
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in example


def test_what_was_measured_beside_packed_weights_is_not_said_of_whole_ones() -> None:
    said = "Measured in training, beside weights in 4 bits. Those here are not packed"
    measured = {"eval_loss": 3.0}
    assert said in card_of(facts(PACKED, metrics=measured)).readme
    whole = {**PACKED, "model": {"kind": "pretrained", "name": "some/model"}}
    assert "Measured in training" not in card_of(facts(whole, metrics=measured)).readme
