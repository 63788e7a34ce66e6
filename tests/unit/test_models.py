"""Size presets and pretrained names become the models that they say."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    ViTConfig,
    pipeline,
)
from transformers.activations import ACT2FN

from shardwright.train.config import PretrainedModel, RunConfig, from_tree
from shardwright.train.errors import UserError
from shardwright.train.model import activation_checkpointing, activations
from shardwright.train.model.blocks import (
    blocks,
    check_blocks_are_not_skipped,
    parameter_count,
)
from shardwright.train.model.build import build, fitted
from shardwright.train.model.compilation import compile_blocks
from shardwright.train.model.configs import transformers_config
from shardwright.train.model.first_values import materialize
from shardwright.train.model.pretrained import check_before_data

CONF = Path(__file__).parents[2] / "conf"
PRESETS = sorted(
    path.stem
    for path in (CONF / "model").glob("*.yaml")
    if path.stem not in ("pretrained", "from_config")
)
SHRUNK = (
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "model.max_position_embeddings=34",
)
BLOCK_CLASSES = {
    "bert_base": "BertLayer",
    "gpt2_tiny": "GPT2Block",
    "llama_tiny": "LlamaDecoderLayer",
    "modernbert_base": "ModernBertEncoderLayer",
    "roberta_tiny": "RobertaLayer",
}


@pytest.fixture(scope="module", autouse=True)
def _conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base=None):
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """All bytes and the five special tokens, in the order that the trained tokenizer has them."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [])),
        **dict(
            zip(
                ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"),
                special,
                strict=True,
            )
        ),
        cls_token="<s>",
        sep_token="</s>",
    )


def objective_of(model: str) -> str:
    if model.startswith("t5"):
        return "span_corruption"
    return "clm" if model.startswith(("gpt2", "llama")) else "mlm"


def composed(model: str, *overrides: str, objective: str | None = None) -> RunConfig:
    objective = objective or objective_of(model)
    words = 361 if objective == "span_corruption" else 261
    tree = compose(
        "config",
        [
            f"model={model}",
            f"objective={objective}",
            f"tokenizer.vocab_size={words}",
            "data.sequence_length=32",
            "data.document_attention=false",
            "data.unpad=false",
            *overrides,
        ],
    )
    values = OmegaConf.to_container(tree, throw_on_missing=True)
    assert isinstance(values, dict)
    return from_tree({str(key): value for key, value in values.items()})


def on_meta(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model, _ = build(config, tokenizer)
    return model


def whole(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model, values = build(config, tokenizer)
    materialize(model, values)
    return model


# --- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_as_many_parameters_as_its_first_line_says(
    preset: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    first_line = (CONF / "model" / f"{preset}.yaml").read_text().splitlines()[0]
    found = re.fullmatch(r"# .+: ([\d,]+) parameters\.", first_line)
    assert found, first_line
    model = on_meta(composed(preset), tokenizer)
    assert f"{parameter_count(model):,}" == found[1]


@pytest.mark.parametrize("preset", [*PRESETS, "pretrained"])
def test_preset_spells_out_every_key_so_that_each_can_be_overridden(preset: str) -> None:
    overrides = [] if preset != "pretrained" else ["model.name=some/name"]
    objective = f"objective={objective_of(preset)}"
    tree = compose("config", [f"model={preset}", objective, *overrides])
    section = composed(preset, *overrides).model
    fields = type(section).model_fields
    assert set(tree.model) == {field.alias or name for name, field in fields.items()}


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("roberta_base", 124_697_433),
        ("roberta_large", 355_412_057),
        ("bert_base", 109_514_298),
        ("modernbert_base", 149_655_232),
        ("gpt2_small", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
        ("llama_1b", 1_235_814_400),
        ("llama_3b", 3_212_749_824),
        ("llama_8b", 8_030_261_248),
        ("llama_70b", 70_553_706_496),
        ("t5_small", 60_506_624),
        ("t5_base", 222_903_552),
        ("t5_large", 737_668_096),
    ],
)
def test_preset_has_the_published_size(
    preset: str, published: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert parameter_count(on_meta(composed(preset), tokenizer)) == published


def test_kantaibert_is_the_published_one(tokenizer: PreTrainedTokenizerFast) -> None:
    config = composed("kantaibert")
    model = on_meta(config, tokenizer)
    assert parameter_count(model) == 83_504_416
    assert len(list(model.parameters())) == 106
    assert config.model.pad_vocab_to_multiple is None  # type: ignore[union-attr]
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (52_000, 514)


@pytest.mark.parametrize(
    ("override", "rows"),
    [("model.pad_vocab_to_multiple=null", 50_257), ("model.pad_vocab_to_multiple=64", 50_304)],
)
def test_vocabulary_is_padded_only_where_asked(
    override: str, rows: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = on_meta(composed("gpt2_small", override), tokenizer)
    assert model.get_input_embeddings().weight.shape == (rows, 768)


def test_dropout_and_special_tokens_reach_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    section = composed("gpt2_tiny", "model.dropout=0.3", "model.attention_dropout=0.2").model
    config = transformers_config(section, tokenizer)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.3, 0.3, 0.2)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert transformers_config(composed("roberta_tiny").model, tokenizer).mask_token_id == 4


def test_llama_never_takes_the_end_token_for_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    padded_with_end = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>"
    )
    section = composed("llama_tiny").model
    assert transformers_config(section, padded_with_end).pad_token_id is None
    assert transformers_config(section, tokenizer).pad_token_id == tokenizer.pad_token_id


def test_modernbert_attends_globally_in_every_third_layer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = transformers_config(composed("modernbert_base").model, tokenizer)
    assert config.layer_types[:4] == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]


# --- weights ------------------------------------------------------------------------------------


def test_weights_are_a_function_of_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    first = whole(composed("gpt2_tiny", *SHRUNK, "seed=7"), tokenizer).state_dict()
    torch.manual_seed(2)
    again = whole(composed("gpt2_tiny", *SHRUNK, "seed=7"), tokenizer).state_dict()
    other = whole(composed("gpt2_tiny", *SHRUNK, "seed=8"), tokenizer).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(first[name], other[name])


def test_building_draws_nothing_from_the_callers_generator(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    whole(composed("llama_tiny", *SHRUNK), tokenizer)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("preset", BLOCK_CLASSES)
def test_model_is_fp32_and_in_training_mode(
    preset: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = whole(composed(preset, *SHRUNK), tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    assert not model.config.use_cache


def test_generation_ends_at_the_last_position(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = whole(composed("gpt2_tiny", *SHRUNK), tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # Left alone, the pipeline would go on for 256 tokens, beyond the learned positions.
    generator = pipeline("text-generation", str(tmp_path))
    assert generator("def", eos_token_id=None)[0]["generated_text"].startswith("def")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6]])
    tokens = loaded.generate(prompt, eos_token_id=None)  # type: ignore[misc]
    assert isinstance(tokens, torch.Tensor)
    assert tokens.shape == (1, 34)
    assert loaded.generation_config.use_cache


# --- activations --------------------------------------------------------------------------------


def gradients_of(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    tokens = torch.randint(5, 261, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_gpt2s_gelu_is_one_kernel_and_the_same_function(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """An earlier version's checkpoint has no such word in its config, and gelu_new in its files."""
    fused = whole(composed("gpt2_tiny", *SHRUNK), tokenizer)
    earlier = whole(composed("gpt2_tiny", *SHRUNK, "model.fused_gelu=false"), tokenizer)
    assert (activations.unfused(fused), activations.unfused(earlier)) == (0, 3)
    assert earlier.config.activation_function == "gelu_new"
    assert fused.config.activation_function == "gelu_pytorch_tanh"
    torch.testing.assert_close(gradients_of(fused), gradients_of(earlier), rtol=1e-5, atol=1e-7)
    fused.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    tokens = torch.arange(5, 21).view(1, -1)
    torch.testing.assert_close(loaded(tokens).logits, fused.eval()(tokens).logits)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_a_pretrained_models_gelu_is_one_kernel_and_its_config_stays(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = GPT2Config(**TINY_GPT2.to_diff_dict() | {"activation_function": name})
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    fused = whole(from_directory(tmp_path, "clm"), tokenizer)
    plain = whole(from_directory(tmp_path, "clm", "model.fused_gelu=false"), tokenizer)
    assert (activations.unfused(fused), activations.unfused(plain)) == (0, 2)
    assert fused.config.activation_function == name
    for model in (fused, plain):
        model.eval()
    torch.testing.assert_close(gradients_of(fused), gradients_of(plain), rtol=1e-5, atol=1e-7)


def test_another_gelu_is_left_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """quick_gelu is another function, and gelu is one kernel already."""
    for name in ("quick_gelu", "gelu"):
        config = GPT2Config(**TINY_GPT2.to_diff_dict() | {"activation_function": name})
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        model: Any = whole(from_directory(tmp_path / name, "clm"), tokenizer)
        assert type(model.transformer.h[0].mlp.act) is type(ACT2FN[name])


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "block_class"), BLOCK_CLASSES.items())
def test_blocks_are_the_layers(
    preset: str, block_class: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = blocks(on_meta(composed(preset, *SHRUNK), tokenizer))
    assert [type(block).__name__ for block in found] == [block_class] * 3


def test_model_without_blocks_is_an_error() -> None:
    class Flat(PreTrainedModel):
        config_class = BertConfig

        def __init__(self) -> None:
            super().__init__(BertConfig())
            self.head = torch.nn.Linear(2, 2)

    with pytest.raises(UserError, match="Flat has no list of equal transformer blocks"):
        blocks(Flat())


@pytest.mark.parametrize("preset", BLOCK_CLASSES)
@pytest.mark.parametrize(("every_blocks", "recomputed"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
@pytest.mark.parametrize("offload", [False, True])
def test_the_asked_blocks_recompute_and_keep_the_gradients(
    preset: str,
    every_blocks: int,
    recomputed: list[int],
    offload: bool,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # Dropout is on: the recomputed forward has to repeat its masks.
    config = composed(preset, *SHRUNK, "model.attention_dropout=0.1")
    tokens = torch.randint(5, 261, (2, 16), generator=torch.Generator().manual_seed(0))

    def trained_once(recompute: bool) -> tuple[list[int], dict[str, torch.Tensor | None]]:
        model = whole(config, tokenizer)
        if recompute:
            activation_checkpointing.enable(model, every_blocks, offload=offload)
        forwards: list[int] = []
        for i, block in enumerate(blocks(model)):
            # Hooks of the block itself stay outside of what is recomputed.
            inner = next(block.children())
            inner.register_forward_pre_hook(lambda *_, i=i: forwards.append(i))
        torch.manual_seed(0)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return forwards, {name: p.grad for name, p in model.named_parameters()}

    forwards, gradients = trained_once(recompute=False)
    forwards_recomputing, gradients_recomputing = trained_once(recompute=True)
    assert forwards == [0, 1, 2]
    assert forwards_recomputing == [0, 1, 2, *reversed(recomputed)]
    torch.testing.assert_close(gradients_recomputing, gradients)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_same_gradients_and_names(
    recompute: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = composed("gpt2_tiny", *SHRUNK)
    tokens = torch.randint(5, 261, (2, 16))
    plain, compiled = whole(config, tokenizer), whole(config, tokenizer)
    if recompute:
        activation_checkpointing.enable(compiled, 2, offload=False)
    compile_blocks(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for model in (plain, compiled):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(
        [p.grad for p in compiled.parameters()], [p.grad for p in plain.parameters()]
    )


@pytest.mark.slow
def test_compiled_blocks_repeat_their_dropout_when_they_recompute(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = composed("gpt2_tiny", *SHRUNK, "model.dropout=0.2", "model.attention_dropout=0.2")
    tokens = torch.randint(5, 261, (2, 16))

    def gradients(every_blocks: int | None) -> list[torch.Tensor | None]:
        torch._dynamo.reset()
        model = whole(config, tokenizer)
        if every_blocks is not None:
            activation_checkpointing.enable(model, every_blocks, offload=False)
        compile_blocks(model)
        torch.manual_seed(0)
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [p.grad for p in model.parameters()]

    kept = gradients(None)
    torch.testing.assert_close(gradients(1), kept)
    torch.testing.assert_close(gradients(2), kept)


# --- pretrained ---------------------------------------------------------------------------------


TINY_GPT2 = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def from_directory(directory: Path, objective: str, *overrides: str) -> RunConfig:
    return composed("pretrained", f"model.name={directory}", *overrides, objective=objective)


def test_pretrained_weights_are_loaded_in_fp32(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    saved = GPT2LMHeadModel(TINY_GPT2).bfloat16()
    saved.save_pretrained(tmp_path)
    model = whole(from_directory(tmp_path, "clm"), tokenizer)
    assert model.training
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.float())


def test_weights_that_cannot_be_streamed_are_loaded_whole_and_the_log_says_so(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = GPT2LMHeadModel(TINY_GPT2)
    saved.config.save_pretrained(tmp_path)
    torch.save(
        saved.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    with caplog.at_level(logging.WARNING, "shardwright.train"):
        model, values = build(from_directory(tmp_path, "clm"), tokenizer)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("shardwright.train.")]
    assert message.startswith(
        f"model.name={tmp_path} is loaded whole on every rank, not one tensor"
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    materialize(model, values)
    for name, parameter in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("own", [True, False])
def test_generation_settings_of_a_pretrained_model_are_kept(
    own: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    saved = GPT2LMHeadModel(TINY_GPT2)
    saved.generation_config.do_sample = True
    saved.generation_config.top_k = 7
    saved.save_pretrained(tmp_path)
    if not own:
        (tmp_path / "generation_config.json").unlink()
    expected = GPT2LMHeadModel.from_pretrained(tmp_path).generation_config
    assert expected.top_k == (7 if own else None)
    found = on_meta(from_directory(tmp_path, "clm"), tokenizer).generation_config
    assert found.to_diff_dict() == expected.to_diff_dict()


def test_unknown_name_says_what_to_do_without_network(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = composed("pretrained", "model.name=nobody/nothing", objective="clm")
    with pytest.raises(UserError, match=r"model\.name=nobody/nothing cannot be loaded") as error:
        whole(config, tokenizer)
    assert "hf download nobody/nothing --local-dir DIR" in str(error.value)


def test_directory_without_weights_is_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    TINY_GPT2.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a complete model directory"):
        whole(from_directory(tmp_path, "clm"), tokenizer)


def test_code_that_comes_with_weights_is_not_run_unasked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'
    )
    with pytest.raises(UserError, match=r"set model\.trust_remote_code=true"):
        whole(from_directory(tmp_path, "clm"), tokenizer)


@pytest.mark.parametrize(
    ("saved", "objective", "message"),
    [
        (GPT2Config(), "mlm", "architecture gpt2, which has no head for objective=mlm; .*=clm"),
        (BertConfig(), "clm", "architecture bert, which has no head for objective=clm; .*=mlm"),
        (BertConfig(is_decoder=True), "mlm", "no head for objective=mlm; choose objective=clm"),
        (T5Config(), "clm", "architecture t5, an encoder-decoder, which fits objective=span_corr"),
        (
            BartConfig(),
            "mlm",
            "bart, an encoder-decoder, which fits no objective here, and not .*mlm",
        ),
        (BartConfig(), "span_corruption", "trains those of the T5 family .mt5, t5, umt5.: others"),
        (GPT2Config(), "span_corruption", "no encoder-decoder, as .* needs; choose objective=clm,"),
        (RobertaConfig(), "span_corruption", "is no encoder-decoder, .* choose objective=mlm, or"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_architecture_without_the_objectives_head_is_an_error(
    saved: GPT2Config | BertConfig | T5Config,
    objective: str,
    message: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    saved.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        whole(from_directory(tmp_path, objective), tokenizer)


def test_model_of_another_kind_is_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"architecture vit, which has no head .* another model$"):
        whole(from_directory(tmp_path, "mlm"), tokenizer)


def test_samples_longer_than_the_weights_positions_are_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=66,
        )
    ).save_pretrained(tmp_path)
    assert whole(from_directory(tmp_path, "mlm", "data.sequence_length=64"), tokenizer)
    with pytest.raises(UserError, match=r"data\.sequence_length=65 .* set .*=64 or less"):
        whole(from_directory(tmp_path, "mlm", "data.sequence_length=65"), tokenizer)


def test_tokenizer_with_more_tokens_than_the_embedding_is_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    GPT2Config(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"up to 260 .* only 100 rows; choose the tokenizer that"):
        whole(from_directory(tmp_path, "clm"), tokenizer)


def test_a_tokenizers_highest_id_counts_and_not_its_length(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "reason": 299}
    holes = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    )
    GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ids go up to 299 .* only 100 rows; choose the tokenizer"):
        build(from_directory(tmp_path, "clm"), holes)
    config = composed("gpt2_tiny", "model.vocab_size=299", *SHRUNK[1:])
    with pytest.raises(UserError, match=r"only 299 rows; set model\.vocab_size=300"):
        build(config, holes)


# --- other bad input ----------------------------------------------------------------------------


def test_foreign_tokenizer_larger_than_the_preset_names_the_size_to_set(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = composed("gpt2_tiny", "tokenizer.vocab_size=null", "model.vocab_size=260", *SHRUNK[1:])
    with pytest.raises(UserError, match=r"set model\.vocab_size=261"):
        whole(config, tokenizer)


def test_roberta_needs_a_padding_token(tokenizer: PreTrainedTokenizerFast) -> None:
    unpadded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match=r"model\.kind=roberta counts positions from its padding"):
        whole(composed("roberta_tiny"), unpadded)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be installed here")
def without_sdpa(directory: Path) -> Path:
    """Save a model of an architecture that has no scaled dot-product attention."""
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
    )
    Gemma2ForCausalLM(config).save_pretrained(directory)
    return directory


def test_by_default_a_model_gets_the_attention_that_it_has(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert composed("gpt2_tiny").model.attention == "auto"
    assert whole(composed("gpt2_tiny", *SHRUNK), tokenizer).config._attn_implementation == "sdpa"
    model = whole(from_directory(without_sdpa(tmp_path), "clm"), tokenizer)
    assert model.config._attn_implementation == "eager"


def test_attention_and_positions_that_a_model_lacks_are_refused_before_its_data(
    tmp_path: Path,
) -> None:
    def check(directory: Path, *overrides: str) -> None:
        config = from_directory(directory, "clm", *overrides)
        assert isinstance(config.model, PretrainedModel)
        check_before_data(config.model, config.objective)

    without_sdpa(tmp_path / "gemma")
    GPT2LMHeadModel(TINY_GPT2).save_pretrained(tmp_path / "gpt2")
    for fits in (("gemma",), ("gemma", "model.attention=eager"), ("gpt2", "model.attention=sdpa")):
        check(tmp_path / fits[0], *fits[1:])
    with pytest.raises(UserError, match=r"=sdpa, .*gemma2\) does not have it; set .*=auto"):
        check(tmp_path / "gemma", "model.attention=sdpa")
    # So are positions that it cannot have.
    check(tmp_path / "gemma", "model.rope_theta=1e6")
    with pytest.raises(UserError, match=r"model\.rope_theta=1e\+06: .* has no rotary embeddings"):
        check(tmp_path / "gpt2", "model.rope_theta=1e6")


def test_what_only_the_weights_know_is_in_the_config_of_their_rank(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    GPT2LMHeadModel(TINY_GPT2).save_pretrained(tmp_path)
    config = from_directory(tmp_path, "clm")
    model = whole(config, tokenizer)
    assert config.model.parameters is None
    known = fitted(config, model).model
    assert getattr(known, "hidden_size", None) == 32
    assert known.parameters == sum(p.numel() for p in model.parameters())
    said = from_directory(tmp_path, "clm", "model.hidden_size=64")
    with pytest.raises(UserError, match=r"hidden_size=64, but model.name=.* has 32; leave it out"):
        fitted(said, model)
    scratch = composed("gpt2_tiny", *SHRUNK)
    assert fitted(scratch, model).model is scratch.model


def test_flash_attention_on_a_cpu_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    config = composed("gpt2_tiny", "model.attention=flash_attention_2", "precision=bf16")
    with pytest.raises(UserError, match=r"choose model\.attention=sdpa"):
        whole(config, tokenizer)


def test_architecture_that_cannot_recompute_is_an_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = on_meta(composed("gpt2_tiny"), tokenizer)
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"every_blocks=1: GPT2LMHeadModel does not support it"):
        activation_checkpointing.enable(model, 1, offload=False)


def test_more_blocks_between_two_than_there_are_is_an_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = on_meta(composed("gpt2_tiny", *SHRUNK), tokenizer)
    with pytest.raises(UserError, match="every_blocks=4 is more than the 3 blocks of GPT2LMHead"):
        activation_checkpointing.enable(model, 4, offload=False)


@pytest.mark.parametrize(
    ("recomputed", "every_blocks"),
    [
        ([False, False, False], None),
        ([True, True, True], 1),
        ([True, False, True, False, True], 2),
        ([True, False, False, True], 3),
        ([True, False, False], 3),
        ([False, True, True], "only blocks [1, 2]"),
    ],
)
def test_the_interval_is_read_off_the_blocks(
    recomputed: list[bool], every_blocks: int | str | None
) -> None:
    assert activation_checkpointing.every_blocks(recomputed) == every_blocks


def test_a_flash_attention_that_cannot_be_told_to_repeat_is_an_error(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is a stand-in, as old ones are: its function has no such argument."""
    installed: Any = ModuleType("flash_attn")
    installed.flash_attn_func = lambda q, k, v: q
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    monkeypatch.setattr("shardwright.train.model.build.is_flash_attn_2_available", lambda: True)
    wanted = ("model.attention=flash_attention_2", "precision=bf16", "trainer.deterministic=true")
    with pytest.raises(UserError, match=r"needs flash-attn 2\.4\.1 or later; update it, or choose"):
        build(composed("gpt2_tiny", *wanted), tokenizer)


def test_several_ranks_refuse_a_model_that_skips_blocks_at_random() -> None:
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=16, layerdrop=0.1,
        )
    )  # fmt: skip
    check_blocks_are_not_skipped(model, ranks=1)
    with pytest.raises(UserError) as refused:
        check_blocks_are_not_skipped(model, ranks=2)
    assert str(refused.value) == (
        "this opt skips whole blocks at random (layerdrop=0.1 in its config.json), and 2 ranks "
        "would wait for each other's; set what names layerdrop in its config.json to 0, or train "
        "it on one rank"
    )
    model.model.decoder.layerdrop = 0.0
    check_blocks_are_not_skipped(model, ranks=2)
