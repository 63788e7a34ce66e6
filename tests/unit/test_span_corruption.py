"""What span corruption is refused with, and what is told of a run that trains by it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from shardwright.train.config import RunConfig, from_tree
from shardwright.train.data.batches import first_batch
from shardwright.train.errors import UserError
from shardwright.train.model import head_loss
from shardwright.train.model.blocks import blocks, parameter_count
from shardwright.train.model.build import build, check_decoder_start, fitted
from shardwright.train.model.compilation import compile_blocks
from shardwright.train.model.first_values import materialize
from shardwright.train.model.flops import flops_per_token
from shardwright.train.plan.model import stand_in
from shardwright.train.plan.trace import traced
from shardwright.train.sampling.sample import check_can_be_divided, objective_of, smaller
from shardwright.train.sampling.spans import check, completed, spans_of
from tests.unit.trees import FSDP, TREE

T5: dict[str, Any] = {
    **{"kind": "t5", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "intermediate_size": 256},
}
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "decoder_start_token_id": 0,
}
"""Of a config.json."""


def tree(**changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(TREE) | {"model": dict(T5), "objective": {"kind": "span_corruption"}}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            found[section][field] = value
        else:
            found[section] = value
    return found


def config(**changes: Any) -> RunConfig:
    return from_tree(tree(**changes))


LORA = {
    "adapter": {"kind": "lora"},
    "model": {"kind": "pretrained", "name": "t5"},
    "tokenizer": {"kind": "pretrained", "name": "t5"},
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": {"kind": "clm"}},
            "objective=clm does not fit model.kind=t5, which is trained with "
            "objective=span_corruption; choose objective=span_corruption or another model",
        ),
        (
            {"objective": {"kind": "mlm"}},
            "objective=mlm does not fit model.kind=t5, which is trained with "
            "objective=span_corruption; choose objective=span_corruption or another model",
        ),
        (
            {"model": TREE["model"]},
            "objective=span_corruption does not fit model.kind=gpt2, which is trained with "
            "objective=clm; choose objective=clm or another model",
        ),
        (
            {"data__document_attention": True},
            "objective=span_corruption takes documents back to back, as T5 does: a span may reach "
            "from one into the next, and then has no document that it could see alone; set "
            "data.document_attention=false",
        ),
        (
            {"data__line_by_line": True, "data__document_attention": True},
            "objective=span_corruption takes windows of as many tokens as fill inputs and targets, "
            "without padding, but data.line_by_line=true makes each line a sample; set it to false",
        ),
        (
            {"data__packing": "best_fit"},
            "objective=span_corruption takes windows of as many tokens as fill inputs and targets, "
            "without padding, which data.packing=best_fit leaves; set data.packing=concatenate",
        ),
        (
            {"data__stages": [{"tokens": 1024}, {}]},
            "objective=span_corruption has windows of one length, and data.stages have samples of "
            "their own; set data.stages=[]",
        ),
        (
            LORA,
            "objective=span_corruption trains all weights: an adapter's targets are chosen, merged "
            "and saved for models of one stack; set adapter=none instead of adapter=lora",
        ),
        (
            {"precision": {"compute_dtype": "bf16", "fp8_recipe": "rowwise"}},
            "objective=span_corruption has rows of several lengths in a step, those of the encoder "
            "and of the decoder, and precision.fp8_recipe=rowwise was tried with one; choose "
            "precision=bf16",
        ),
        (
            {"objective__neftune_noise_alpha": 5.0},
            "objective=span_corruption embeds inputs and targets by one matrix, and "
            "objective.neftune_noise_alpha=5 adds its noise to inputs alone; set it to 0",
        ),
        (
            {
                "trainer__offload_activations": True,
                "trainer__checkpoint_activations_every_blocks": 1,
            },
            "objective=span_corruption gives each block more than its input, biases of positions "
            "and what the encoder has read, which trainer.offload_activations=true would copy anew "
            "for each; set it to false",
        ),
        (
            {"data__sequence_length": 2048},
            "objective=span_corruption has 114 spans in a sample of data.sequence_length=2048 "
            "(objective.noise_density=0.15, objective.mean_span_length=3), and tokenizer=byte_bpe "
            "has 100 sentinels to stand for them; shorten the samples or lengthen the spans",
        ),
        (
            {"objective__noise_density": 0.6, "objective__mean_span_length": 1.0},
            "noise_density=0.6 with mean_span_length=1 leaves fewer tokens than there are spans to "
            "be kept apart by them; lower the density or lengthen the spans",
        ),
        (
            {"model__attention": "flash_attention_2", "precision": {"compute_dtype": "bf16"}},
            "model.attention=flash_attention_2 knows no bias of positions, which model.kind=t5 "
            "adds to attention; set model.attention=auto",
        ),
        (
            {"checkpoint": {"best_metric": "eval_masked_accuracy", "keep_best": 1}},
            "checkpoint.best_metric=eval_masked_accuracy is measured with objective=mlm, but it is "
            "span_corruption; set checkpoint.best_metric=eval_loss",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**values)
    assert message in str(refused.value).splitlines()[0] or message in str(refused.value)


def test_a_trained_vocabulary_has_room_for_sentinels() -> None:
    from shardwright.train.data.tokens.tokenizer import wanted_vocabulary

    few = config(model__vocab_size=360)
    with pytest.raises(UserError) as refused:
        wanted_vocabulary(few, few.tokenizer)  # type: ignore[arg-type]
    assert str(refused.value) == (
        "tokenizer.vocab_size=null takes model.vocab_size=360, but 256 bytes, 100 sentinels and "
        "the special tokens need 361; raise model.vocab_size"
    )
    few = config(tokenizer={"kind": "byte_bpe", "vocab_size": 300})
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=300, but 256 bytes, 100 sent"):
        wanted_vocabulary(few, few.tokenizer)  # type: ignore[arg-type]
    enough = config(model__vocab_size=361)
    assert wanted_vocabulary(enough, enough.tokenizer) == 361  # type: ignore[arg-type]


def test_tokens_are_those_that_are_read_and_those_that_are_written() -> None:
    assert config(data__sequence_length=512).tokens_per_sample == 512 + 114
    assert from_tree(TREE).tokens_per_sample == 64


def built(found: RunConfig) -> PreTrainedModel:
    model, values = build(found, stand_in())
    materialize(model, values)
    return model


def test_blocks_are_those_of_both_stacks_and_the_loss_is_fused() -> None:
    found = config(model__feed_forward="gated_gelu")
    model = built(found)
    assert [block.is_decoder for block in blocks(model)] == [False, False, True, True]
    assert parameter_count(model) == found.model.parameters
    assert head_loss.why_not(model) is None
    assert fitted(found, model).trainer.fused_loss is True
    assert not any(m.config.use_cache for m in model.modules() if isinstance(m, PreTrainedModel))
    assert {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__} == {"GELUTanh"}


def test_every_block_of_both_stacks_recomputes_to_the_same_gradients() -> None:
    ids = torch.arange(5, 25).view(2, 10)

    def gradients(found: RunConfig) -> dict[str, torch.Tensor]:
        model = built(found)
        model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients(config(model__dropout=0.0))
    again = gradients(config(model__dropout=0.0, trainer__checkpoint_activations_every_blocks=1))
    assert plain.keys() == again.keys() == dict(built(config()).named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients() -> None:
    ids = torch.arange(5, 25).view(2, 10)
    plain, compiled = (built(config(model__dropout=0.0)) for _ in range(2))
    compile_blocks(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for model in (plain, compiled):
        model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits.square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        difference = (one.grad - other.grad).abs().max() / one.grad.abs().max()
        assert difference < 1e-5, name


def test_a_token_costs_what_the_counted_arithmetic_of_a_sample_comes_to() -> None:
    """torch's own counter agrees, norms and the causal half of a decoder's attention apart."""
    from torch.utils.flop_counter import FlopCounterMode

    found = config(model__dropout=0.0, model__attention="eager")
    model = built(found)
    read = found.data.tokens_per_sample
    written = found.tokens_per_sample - read
    batch = {
        "input_ids": torch.zeros((1, read), dtype=torch.int64),
        "decoder_input_ids": torch.zeros((1, written), dtype=torch.int64),
    }
    with FlopCounterMode(display=False) as counter:
        model(**batch).logits.sum().backward()
    per_token = flops_per_token(model, found)
    assert per_token is not None
    assert per_token * (read + written) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_micro_batch_is_traced_with_what_the_decoder_writes() -> None:
    found = traced(config(strategy=FSDP, model__num_hidden_layers=12), autocast=False)
    shallow = traced(config(strategy=FSDP, model__num_hidden_layers=6), autocast=False)
    assert 1.5 * shallow.flops < found.flops < 2 * shallow.flops
    assert found.kept_by_blocks > shallow.kept_by_blocks > 0
    assert found.forward_of_loss > 0


def of_version_1_1(directory: Path) -> None:
    """Write what the published files of T5 1.1 are: a head of its own, and a config that says so.

    transformers (5.23) ties each config's head, and lets one be that the files have otherwise.
    """
    model = T5ForConditionalGeneration(T5Config(**SIZES, feed_forward_proj="gated-gelu"))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 16))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory)
    kept = {n: t for n, t in state.items() if not n.endswith("coder.embed_tokens.weight")}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())
    text.pop("scale_decoder_outputs")
    (directory / "config.json").write_text(json.dumps(text | {"tie_word_embeddings": False}))


@pytest.mark.parametrize(
    "save",
    [
        T5ForConditionalGeneration(T5Config(**SIZES)).save_pretrained,
        MT5ForConditionalGeneration(MT5Config(**SIZES)).save_pretrained,
        UMT5ForConditionalGeneration(UMT5Config(**SIZES)).save_pretrained,
        of_version_1_1,
    ],
    ids=["t5", "mt5", "umt5", "t5 1.1"],
)
def test_weights_of_the_family_are_loaded_as_transformers_loads_them(
    save: Callable[[Path], object], tmp_path: Path
) -> None:
    save(tmp_path)
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    name = {"kind": "pretrained", "name": str(tmp_path)}
    model = built(config(model=name, tokenizer=name))
    assert type(model) is type(saved)
    assert objective_of(tmp_path) == "span_corruption"
    assert len(blocks(model)) == 4
    is_tied = save is not of_version_1_1
    assert (
        model.get_parameter("lm_head.weight") is model.get_parameter("shared.weight")
    ) == is_tied
    assert head_loss.why_not(model) is None
    ids = torch.arange(5, 17).view(2, 6)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    found, expected = (m.eval()(**batch).logits for m in (model, saved))
    torch.testing.assert_close(found, expected)

    # As a run writes it in the end.
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(**batch).logits, expected)


def test_a_decoder_that_sees_pictures_is_no_encoder_decoder(tmp_path: Path) -> None:
    tree = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert objective_of(tmp_path) == "clm"
    assert "--strategy fsdp" in smaller(tmp_path)[0]
    (tmp_path / "config.json").write_text(json.dumps({**tree, "is_encoder_decoder": True}))
    assert smaller(tmp_path) == ("fewer --new-tokens",)


def test_any_of_the_family_begins_from_its_config_alone(tmp_path: Path) -> None:
    UMT5Config(**SIZES).save_pretrained(tmp_path)
    name = {"kind": "from_config", "name": str(tmp_path), "vocab_size": 400}
    model = built(config(model=name))
    assert type(model) is UMT5ForConditionalGeneration
    assert model.shared.num_embeddings == 400
    # Of the run's tokenizer.
    assert (model.config.decoder_start_token_id, model.config.eos_token_id) == (1, 2)
    assert model.generation_config.decoder_start_token_id == 1


def test_a_decoder_that_begins_otherwise_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(**SIZES))
    with pytest.raises(UserError) as refused:
        check_decoder_start(model, stand_in())
    assert str(refused.value) == (
        "the decoder of the model begins with token 0 (decoder_start_token_id in its config.json), "
        "and the tokenizer's padding, with which it is trained to begin, is 1; choose the "
        "tokenizer that belongs to the model"
    )
    model.config.decoder_start_token_id = 1
    check_decoder_start(model, stand_in())


def test_the_first_batch_is_held_to_both_lengths() -> None:
    batch = {
        "input_ids": torch.zeros((2, 64), dtype=torch.int64),
        "decoder_input_ids": torch.zeros((2, 15), dtype=torch.int64),
        "labels": torch.zeros((2, 15), dtype=torch.int64),
    }
    asked: dict[str, Any] = {"sizes": [2], "sequence_length": 64, "embedding_rows": 9, "logits": 9}
    first_batch.check([batch], **asked, targets=15)
    with pytest.raises(UserError, match=r"decoder_input_ids .* and \(2, 16\) are wanted"):
        first_batch.check([batch], **asked, targets=16)
    batch["decoder_input_ids"][0, 0] = 9
    with pytest.raises(UserError, match="has the token id 9 in decoder_input_ids, and the model's"):
        first_batch.check([batch], **asked, targets=15)


def test_ranks_do_not_sample_together_from_an_encoder_decoder(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5Config(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        check_can_be_divided(tmp_path, "zero3")
    assert str(refused.value) == (
        "--strategy=zero3 gathers weights for the forward pass of a whole model, and who generates "
        f"with an encoder-decoder, as {tmp_path} holds one, calls its encoder by itself; leave "
        "--strategy out: one process holds the model then"
    )


# --- filling spans ------------------------------------------------------------------------------


def test_what_is_written_is_taken_apart_at_sentinels() -> None:
    marks = [99, 98, 97]
    assert spans_of([5, 99, 6, 7, 98, 97, 8, 99, 9], marks) == {0: [6, 7], 1: [], 2: [8]}
    assert spans_of([5, 6], marks) == {}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "def f():",
            "prompt 'def f():' has no span to fill; write <extra_id_0> where the first one is "
            "missing, <extra_id_1> for the second, and so on",
        ),
        (
            "a <extra_id_1> b <extra_id_0>",
            "has the spans <extra_id_1>, <extra_id_0>; number them from <extra_id_0> on, in their "
            "order, each once",
        ),
        (
            "<extra_id_0> <extra_id_1> <extra_id_2>",
            "has 3 spans, and the model has 2 sentinels for them; leave some out",
        ),
    ],
)
def test_prompts_without_spans_in_order_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        check(prompt, repr(prompt), known=2)
    assert message in str(refused.value)


def test_spans_are_filled_in_their_places() -> None:
    words = stand_in()
    words.add_tokens(["red", "blue"])
    words.add_special_tokens({"extra_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    ids = dict(words.get_vocab())
    written = [ids[t] for t in ("<extra_id_0>", "red", "<extra_id_1>", "blue", "</s>", "<pad>")]
    text = completed("a <extra_id_0> or <extra_id_1>.", words, lambda inputs: written)
    assert text == "a red or blue."
    assert completed("a <extra_id_0>.", words, lambda inputs: []) == "a ."
