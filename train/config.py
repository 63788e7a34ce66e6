"""RunConfig: every setting of a run with its type, unit, default and rules.

Imports no torch, so the launcher validates in a tenth of a second, and reads no file but its own
``config.yaml``.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from train.errors import UserError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists, frozen sections need tuples.
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Floats = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]


class Section(BaseModel):
    """A frozen part of the config that refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


# --- model --------------------------------------------------------------------------------------


class ScratchModel(Section):
    """What every architecture that is initialised from scratch has."""

    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    pad_vocab_to_multiple: PositiveInt | None = None
    """Round ``vocab_size`` up to a multiple of this (64 suits tensor cores); null never pads."""
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    max_position_embeddings: PositiveInt
    """Longest sequence in tokens (RoBERTa spends two of these on its padding offset)."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = True
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_to_multiple or 1
        return -(-self.vocab_size // multiple) * multiple

    @property
    def max_sequence_length(self) -> int | None:
        """Longest input in tokens, or None where only the weights' own config knows."""
        return self.max_position_embeddings

    @property
    def causal(self) -> bool | None:
        """Whether the architecture predicts the next token; None where it is not known yet."""
        return False


class BertModel(ScratchModel):
    kind: Literal["bert"]
    type_vocab_size: PositiveInt = 2
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-12


class RobertaModel(ScratchModel):
    kind: Literal["roberta"]
    type_vocab_size: PositiveInt = 1
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-5

    @property
    def max_sequence_length(self) -> int:
        # Positions start at padding_idx + 1 = 2.
        return self.max_position_embeddings - 2


class ModernBertModel(ScratchModel):
    kind: Literal["modernbert"]
    global_attention_every_layers: PositiveInt = 3
    """Every n-th layer attends to the whole sequence, the others to a window."""
    local_attention_window: PositiveInt = 128
    """Window of the local layers in tokens."""
    dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    layer_norm_epsilon: PositiveFloat = 1e-5


class Gpt2Model(ScratchModel):
    kind: Literal["gpt2"]
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.1
    layer_norm_epsilon: PositiveFloat = 1e-5

    @property
    def causal(self) -> bool:
        return True


class LlamaModel(ScratchModel):
    kind: Literal["llama"]
    num_key_value_heads: PositiveInt
    """Heads of keys and values; fewer than ``num_attention_heads`` is grouped-query attention."""
    head_dim: PositiveInt | None = None
    """Size of one head; null is hidden_size / num_attention_heads."""
    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary frequencies."""
    rms_norm_epsilon: PositiveFloat = 1e-5
    attention_dropout: Fraction = 0.0

    @property
    def causal(self) -> bool:
        return True


class PretrainedModel(Section):
    """Weights to go on from: a hub name or a local directory, any MLM or CLM architecture."""

    kind: Literal["pretrained"]
    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    trust_remote_code: bool = False
    """Run Python code that comes with the weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @property
    def max_sequence_length(self) -> int | None:
        return None

    @property
    def causal(self) -> bool | None:
        return None


ModelConfig = Annotated[
    BertModel | RobertaModel | ModernBertModel | Gpt2Model | LlamaModel | PretrainedModel,
    Field(discriminator="kind"),
]


# --- objective ----------------------------------------------------------------------------------


class MlmObjective(Section):
    """Masked language modelling."""

    kind: Literal["mlm"]
    masking_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of tokens to predict."""
    mask_token_share: Fraction = 0.8
    """Of these, replaced by the mask token."""
    random_token_share: Fraction = 0.1
    """Of these, replaced by a random token; the rest stay as they are."""
    whole_word: bool = False
    """Mask all tokens of a word together."""
    prompts: Strings = ()
    """Sentences with <mask>, filled by the trained model when the run ends."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MlmObjective:
        total = self.mask_token_share + self.random_token_share
        if total > 1 + 1e-9:
            raise ValueError(
                f"mask_token_share={self.mask_token_share} and "
                f"random_token_share={self.random_token_share} add up to {total:g}; "
                "lower one so that they reach at most 1"
            )
        return self


class ClmObjective(Section):
    """Causal language modelling: predict the next token."""

    kind: Literal["clm"]
    prompts: Strings = ()
    """Texts that the trained model continues when the run ends."""


ObjectiveConfig = Annotated[MlmObjective | ClmObjective, Field(discriminator="kind")]


# --- data ---------------------------------------------------------------------------------------


class DataSection(Section):
    """What every corpus has."""

    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in one sample."""
    line_by_line: bool = False
    """One line is one (padded, cut) sample, instead of documents packed back to back."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents held out, chosen by a hash of their text; 0 holds out none."""
    max_documents: PositiveInt | None = None
    """Read only the first so many documents; null reads all."""
    cache_dir: str | None = None
    """Where packed tokens are cached; null is shardwright/ in the user's cache directory."""


class StdlibData(DataSection):
    """The Python sources of the interpreter's own standard library."""

    kind: Literal["stdlib"]


class TextData(DataSection):
    """Local files: .txt, .jsonl, .csv, .parquet, also compressed as .gz where text."""

    kind: Literal["text"]
    paths: Annotated[Strings, Field(min_length=1)]
    """Files or globs; ``**`` descends."""
    weights: Floats | None = None
    """For each path, how often an epoch sees its samples (0.5: half of them); null: once."""
    text_field: str = "text"
    """Column of .jsonl, .csv and .parquet files that holds the text."""

    @model_validator(mode="after")
    def _one_weight_for_each_path(self) -> TextData:
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise ValueError(
                f"weights has {len(self.weights)} values and paths has {len(self.paths)}; "
                "give one weight for each path, or none at all"
            )
        return self


class HubData(DataSection):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    name: Annotated[str, Field(min_length=1)]
    config: str | None = None
    split: str = "train"
    streaming: bool = True
    """Read over the network while tokenising, instead of downloading the data set first."""
    text_field: str = "text"
    revision: str | None = None


class KantData(DataSection):
    """Books by URL as plain text, a paragraph a document; Project Gutenberg's frame is cut off."""

    kind: Literal["kant"]
    urls: Annotated[Strings, Field(min_length=1)]


DataConfig = Annotated[StdlibData | TextData | HubData | KantData, Field(discriminator="kind")]


# --- tokenizer ----------------------------------------------------------------------------------


class ByteBpeTokenizer(Section):
    """A byte-level BPE trained on the run's own training documents."""

    kind: Literal["byte_bpe"]
    vocab_size: Annotated[int, Field(ge=261)] | None = None
    """Tokens, 256 bytes and the special ones included; null is the model's vocabulary."""
    min_frequency: PositiveInt = 2
    """Pairs seen less often are not merged."""
    special_tokens: Annotated[Strings, Field(min_length=5, max_length=5)] = (
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
    )
    """Beginning, padding, end, unknown, mask; they get the first ids in this order."""
    max_training_bytes: PositiveInt = 2**30
    """Train on the first so many bytes of text."""

    @model_validator(mode="after")
    def _special_tokens_differ(self) -> ByteBpeTokenizer:
        if len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(
                f"special_tokens={list(self.special_tokens)} has one token twice; "
                "give each its own name"
            )
        return self


class PretrainedTokenizer(Section):
    """A fast tokenizer from the hub or a local directory."""

    kind: Literal["pretrained"]
    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    trust_remote_code: bool = False


TokenizerConfig = Annotated[ByteBpeTokenizer | PretrainedTokenizer, Field(discriminator="kind")]


# --- strategy -----------------------------------------------------------------------------------


class SingleStrategy(Section):
    """One rank, no process group."""

    kind: Literal["single"]


class DdpStrategy(Section):
    """Each rank holds everything; gradients are all-reduced."""

    kind: Literal["ddp"]
    bucket_size_bytes: PositiveInt = 25 * 2**20
    """Gradients are all-reduced in buckets of about this many bytes."""


class AsyncIo(Section):
    """How ZeRO-Infinity reads and writes its files (libaio)."""

    block_size_bytes: PositiveInt = 2**20
    """Size of one request."""
    queue_depth: PositiveInt = 8
    """Requests in flight on one thread."""
    threads: PositiveInt = 1
    """Threads that share one transfer."""
    single_submit: bool = False
    """Submit requests one by one instead of as many as fit the queue."""
    overlap_events: bool = True
    """Overlap submitting requests with waiting for others."""


class ZeroStrategy(Section):
    """DeepSpeed ZeRO. Sizes are counted in elements, as DeepSpeed counts them."""

    kind: Literal["zero"]
    stage: Literal[0, 1, 2, 3]
    """Sharded over ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and moments live and are updated (stages 1 to 3; nvme: stage 3)."""
    cpu_adam: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW updates what is offloaded; deepspeed's is compiled on its first use."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards of the parameters wait for their use (stage 3)."""
    pin_memory: bool = True
    """Page-lock host memory, for faster copies between host and GPU; GPU runs only."""
    nvme_path: str | None = None
    """Existing directory on a fast local disk, for nvme; a run's folder there goes when it ends."""
    nvme_buffer_count: PositiveInt = 5
    """Parameter buffers in host memory between disk and GPU."""
    nvme_buffer_elements: PositiveInt = 100_000_000
    """Elements of each; at least those of the largest parameter."""
    max_elements_in_cpu: NonNegativeInt = 1_000_000_000
    """Parameter elements kept in host memory when parameters live on nvme."""
    aio: AsyncIo = AsyncIo()

    reduce_bucket_elements: PositiveInt | Literal["auto"] = "auto"
    """Gradients reduced at once; auto is hidden_size squared, at least 1,048,576."""
    allgather_bucket_elements: PositiveInt | Literal["auto"] = "auto"
    """Updated parameters gathered at once (stages 1 and 2); auto as above."""
    overlap_communication: bool = False
    """Reduce gradients while the backward pass goes on; takes a second bucket of memory."""
    reduce_scatter: bool = True
    """Reduce-scatter gradients instead of reducing each to its owner (stages 1 and 2)."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come: no fragments, one copy more."""
    round_robin_gradients: bool = False
    """Spread gradients over ranks more finely, to copy them to the CPU in parallel (1 and 2)."""
    prefetch_elements: NonNegativeInt | Literal["auto"] = "auto"
    """Parameters gathered ahead of their use (stage 3); auto is 0.9 x hidden_size squared."""
    persistence_elements: NonNegativeInt | Literal["auto"] = "auto"
    """Parameters smaller than this are never sharded (stage 3); auto is 10 x hidden_size."""
    max_live_elements: NonNegativeInt = 1_000_000_000
    """Gathered parameters on one GPU before the least needed are released (stage 3)."""
    max_reuse_distance_elements: NonNegativeInt = 1_000_000_000
    """Keep a parameter that is used again within so many others (stage 3)."""
    sub_group_elements: PositiveInt = 1_000_000_000
    """Parameters updated at once (stage 3); smaller needs less memory where offloaded."""
    gather_16bit_weights_on_save: bool = False
    """Also gather 16-bit weights for DeepSpeed's own save; final/ needs none of it."""
    node_local_checkpoints: bool = False
    """Each node keeps its ranks' files on its own disk, instead of a shared file system."""

    hierarchical_partition_ranks: PositiveInt = 1
    """ZeRO++: keep a second copy of the shards within so many ranks (of one node), for backward."""
    quantized_weights: bool = False
    """ZeRO++: gather parameters in int8; changes the numerics."""
    quantized_gradients: bool = False
    """ZeRO++: reduce gradients in int4; changes the numerics."""

    extra: dict[str, Any] = {}
    """DeepSpeed keys that have no field of their own, as in its JSON; unknown ones are refused."""


class FsdpStrategy(Section):
    """PyTorch FSDP2."""

    kind: Literal["fsdp"]
    reshard_after_forward: bool = True
    """Free gathered parameters after each forward (full shard); false keeps them (grad-op)."""
    replicas: PositiveInt = 1
    """Hybrid: so many copies of the sharded model; each is sharded over world size / replicas."""
    offload: bool = False
    """Keep shards, gradients and optimizer state in host memory; the optimizer runs on the CPU."""
    pin_memory: bool = True
    """Page-lock host memory where offloaded; GPU runs only."""
    wrap: Literal["transformer", "size", "none"] = "transformer"
    """Units: each transformer block; modules of at least min_unit_parameters; the whole model."""
    block_class: str | None = None
    """Class to wrap under wrap=transformer; null infers it from the model."""
    min_unit_parameters: PositiveInt = 1_000_000
    """Smallest unit under wrap=size."""
    reduce_each_micro_batch: bool = True
    """Reduce after each micro-batch and keep gradients sharded; false: once a step, kept whole."""
    prefetch_units: NonNegativeInt = 1
    """Units gathered ahead of their use, forward and backward."""


StrategyConfig = Annotated[
    SingleStrategy | DdpStrategy | ZeroStrategy | FsdpStrategy, Field(discriminator="kind")
]


# --- precision, trainer, checkpoint, tracking, launcher -----------------------------------------


class PrecisionConfig(Section):
    """Which number goes in which dtype; the defaults mean the same under every engine."""

    compute_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Parameters and activations in the forward and backward pass."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients while they are summed over ranks."""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """Weights that the optimizer updates."""
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """The optimizer's running averages."""
    allow_tf32: bool = False
    """Let fp32 matrix products run in TF32 on GPUs that have it."""
    fp8_recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Matrix products of the blocks' linear layers in fp8 (torchao, with compute_dtype=bf16):
    scaled by tensor (fastest), by row, or by row with the weights' gradients in bf16 (most
    precise); null does none. It gains speed only with trainer.compile=true."""
    initial_loss_scale: PositiveFloat = 65536.0
    """fp16: first factor on the loss, a power of two; it halves on overflow."""
    loss_scale_growth_steps: PositiveInt = 1000
    """fp16: steps without overflow after which the factor doubles."""

    @model_validator(mode="after")
    def _dtypes_fit(self) -> PrecisionConfig:
        if self.master_dtype == "bf16" and self.compute_dtype != "bf16":
            raise ValueError(
                f"master_dtype=bf16 cannot serve compute_dtype={self.compute_dtype}, which is more "
                "precise; set master_dtype=fp32 or compute_dtype=bf16"
            )
        if self.moments_dtype != self.master_dtype:
            raise ValueError(
                f"moments_dtype={self.moments_dtype} differs from "
                f"master_dtype={self.master_dtype}, but the optimizers keep their moments in the "
                "dtype of the weights that they update; set both to the same"
            )
        if self.master_dtype == "bf16" and self.reduce_dtype != "bf16":
            raise ValueError(
                f"reduce_dtype={self.reduce_dtype} with master_dtype=bf16: the gradients of bf16 "
                "weights are bf16; set reduce_dtype=bf16 or master_dtype=fp32"
            )
        if self.compute_dtype == "fp32" and self.reduce_dtype == "bf16":
            raise ValueError(
                "reduce_dtype=bf16 would round the gradients of compute_dtype=fp32; "
                "set reduce_dtype=fp32 or compute_dtype=bf16"
            )
        if self.compute_dtype == "fp16" and self.reduce_dtype == "bf16":
            raise ValueError(
                "reduce_dtype=bf16 would round the gradients of compute_dtype=fp16; "
                "set reduce_dtype=fp32"
            )
        if self.fp8_recipe is not None and self.compute_dtype != "bf16":
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe} takes and gives bf16, but "
                f"compute_dtype={self.compute_dtype}; set compute_dtype=bf16 or fp8_recipe=null"
            )
        if math.log2(self.initial_loss_scale) % 1:
            raise ValueError(
                f"initial_loss_scale={self.initial_loss_scale:g} is not a power of two; "
                f"set it to {2 ** round(math.log2(self.initial_loss_scale))}"
            )
        return self


class TrainerConfig(Section):
    """The loop: how much, how fast, and how often something happens besides."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. Give exactly one of max_steps, max_epochs and max_tokens."""
    max_epochs: PositiveFloat | None = None
    """Passes over the training samples."""
    max_tokens: PositiveInt | None = None
    """Tokens to train on, rounded up to a whole step."""
    global_batch_size: PositiveInt = 256
    """Samples in one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 8
    """Samples in one forward pass of one rank; accumulation steps follow from it."""
    eval_micro_batch_size: PositiveInt | None = None
    """Samples in one forward pass of one rank in evaluation; null is micro_batch_size."""

    optimizer: Literal["adamw", "adafactor", "muon", "adamw_8bit"] = "adamw"
    """What updates the weights; adamw_8bit keeps the moments of large tensors in 8 bits."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate; adafactor multiplies it by the RMS of each tensor."""
    lr_scheduler: Literal["linear", "cosine", "constant", "warmup_stable_decay", "inverse_sqrt"] = (
        "cosine"
    )
    """Course after the linear warm-up; linear, cosine and warmup_stable_decay end at 0."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up. Give this or warmup_fraction."""
    warmup_fraction: Fraction = 0.0
    """Warm-up as a share of all steps, rounded up to whole steps."""
    decay_fraction: Fraction = 0.1
    """warmup_stable_decay: share of all steps, at the end, in which the rate falls to 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay, times the learning rate; biases and norms are spared."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """adamw, adamw_8bit, and what muon leaves to AdamW: decay of the mean gradient in a step."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """The same of the mean squared gradient."""
    adam_epsilon: PositiveFloat = 1e-8
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the matrices; null is learning_rate, which AdamW's part always has."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean gradient in a step (Nesterov)."""
    muon_newton_schulz_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Iterations that make a matrix' update orthogonal."""
    muon_learning_rate_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the rate for a matrix of A x B: 0.2 sqrt(max(A, B)), which gives updates the RMS of
    AdamW's (arXiv 2502.16982), or sqrt(max(1, A / B)), which wants muon_learning_rate near 0.02."""
    adafactor_beta2_decay: Annotated[float, Field(le=0, allow_inf_nan=False)] = -0.8
    """Exponent c: at step t the mean squared gradient moves by t**c of the way."""
    adafactor_clip_threshold: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Largest RMS of a tensor's update before learning_rate and the tensor's RMS multiply it."""
    adafactor_epsilon1: Annotated[float, Field(ge=1e-18, allow_inf_nan=False)] = 1e-15
    """Root mean squared gradients below this count as this."""
    adafactor_epsilon2: PositiveFloat = 1e-3
    """RMS of a tensor below this count as this, so that zeros can grow."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""

    log_every_steps: PositiveInt = 10
    eval_every_steps: PositiveInt | None = None
    """Evaluate so often; null evaluates once, at the end."""
    eval_max_samples: PositiveInt | None = None
    """Evaluate on the first so many held-out samples; null takes all."""
    save_every_steps: PositiveInt | None = None
    """Write a checkpoint so often; null writes one, at the end."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without an improvement of checkpoint.best_metric;
    null never stops early."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """What counts as an improvement: more than this, in the metric's own unit."""

    checkpoint_activations_every_blocks: PositiveInt | None = None
    """Recompute activations in the backward pass, of every n-th transformer block: 1 of all (least
    memory, about a third more time), 2 of every second; null keeps all of them."""
    offload_activations: bool = False
    """Keep the inputs of recomputed blocks in host memory: still less on the GPU, slower."""
    compile: bool = False
    """torch.compile each transformer block."""
    dataloader_workers: NonNegativeInt = 0
    """Processes of each rank that assemble batches; 0 does it in the rank."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainerConfig:
        given = {k: getattr(self, k) for k in ("max_steps", "max_epochs", "max_tokens")}
        given = {k: v for k, v in given.items() if v is not None}
        if len(given) != 1:
            found = ", ".join(f"{k}={v}" for k, v in given.items()) or "none of them"
            raise ValueError(
                f"give exactly one of max_steps, max_epochs and max_tokens (got {found}); "
                "set the others to null"
            )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} "
                "contradict each other; set one of them to 0"
            )
        for name, field in type(self).model_fields.items():
            owner, value = name.partition("_")[0], getattr(self, name)
            unread = owner in ("muon", "adafactor") and owner != self.optimizer
            if unread and value != field.default:
                raise ValueError(
                    f"{name}={value} is read by optimizer={owner} only, but it is "
                    f"{self.optimizer}; choose optimizer={owner} or leave {name} out"
                )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold={self.early_stopping_threshold:g} is read with "
                "early_stopping_patience only, which is null; set early_stopping_patience to a "
                "number of evaluations or leave early_stopping_threshold out"
            )
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than max_steps={self.max_steps}; "
                "warm up for fewer steps or train for more"
            )
        return self


class CheckpointConfig(Section):
    """How checkpoints are written, and what is kept of those that trainer.save_every_steps asks."""

    asynchronous: bool = Field(default=False, alias="async")
    """``checkpoint.async``: copy the state to host memory (as much as the files hold) and write it
    while training goes on; a checkpoint is there once it is written."""
    on_save_error: Literal["warn", "stop"] = "warn"
    """Where the disk is full, read-only or gone: warn, train on and try again at the next save, or
    stop the run. The save at the end of a run always stops it."""

    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; older ones go once the newest is verified."""
    keep_every_steps: PositiveInt | None = None
    """Keep for ever each checkpoint whose step is a multiple of this; null keeps none for ever."""
    keep_best: NonNegativeInt = 0
    """Also keep so many with the best best_metric, of those evaluated at their step; 0 keeps none
    for that."""
    best_metric: Literal["eval_loss", "eval_perplexity", "eval_masked_accuracy"] = "eval_loss"
    """What "best" means to keep_best and to early stopping: low loss or perplexity, high accuracy
    (of masked tokens)."""
    export: Literal["last", "best"] = "last"
    """Whose weights final/ gets: the last step's, or the best checkpoint's that is kept."""

    @property
    def higher_is_better(self) -> bool:
        return self.best_metric == "eval_masked_accuracy"


class NoTracking(Section):
    """Only metrics.jsonl."""

    kind: Literal["none"]


class TensorboardTracking(Section):
    """TensorBoard event files under the run directory."""

    kind: Literal["tensorboard"]


class WandbTracking(Section):
    """Weights & Biases."""

    kind: Literal["wandb"]
    project: str = "shardwright"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto is online where an API key is found, else offline, and says which."""
    tags: Strings = ()


TrackingConfig = Annotated[
    NoTracking | TensorboardTracking | WandbTracking, Field(discriminator="kind")
]


class LauncherSection(Section):
    """What every launcher has."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where this machine has a GPU; resolved before config.yaml is written."""
    grace_seconds: PositiveFloat = 30.0
    """Seconds from a signal to stop until the ranks are killed: SLURM's KillWait, Kubernetes'
    terminationGracePeriodSeconds or the time that --signal gives. A last checkpoint that would not
    fit is not begun."""


class LocalLauncher(LauncherSection):
    """One rank in one process on this machine."""

    kind: Literal["local"]

    @property
    def nodes(self) -> int:
        return 1

    @property
    def ranks_per_node(self) -> int:
        return 1

    @property
    def world_size(self) -> int:
        return 1

    @property
    def world_sizes(self) -> tuple[int, ...]:
        return (1,)


class SeveralRanks(LauncherSection):
    """What launchers have that start several ranks, on one node or more."""

    nproc_per_node: PositiveInt | Literal["auto"] = "auto"
    """Ranks on each node; auto is one for each GPU (of the job's, under SLURM), or 1 on a CPU."""
    nodes: PositiveInt = 1

    @property
    def ranks_per_node(self) -> int:
        """``nproc_per_node``, once the launcher has resolved it."""
        assert self.nproc_per_node != "auto", "resolved before the config is frozen"
        return self.nproc_per_node

    @property
    def world_size(self) -> int:
        """Ranks of the run, the most where nodes may come and go."""
        return self.ranks_per_node * self.nodes

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """All numbers of ranks with which it may run."""
        return (self.world_size,)


class MeetingRanks(SeveralRanks):
    """What launchers have whose nodes are told where they meet."""

    head_address: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]+$")] | None = None
    """Name or address of the first node, where the ranks meet; null where there is one node."""
    head_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where they meet; null takes a port that is free on the machine that starts the run."""

    @model_validator(mode="after")
    def _nodes_meet_somewhere(self) -> Self:
        if self.nodes > 1 and self.head_address is None:
            raise ValueError(
                f"nodes={self.nodes} have to meet, but head_address is not given; set it to the "
                "first node's name or address"
            )
        return self


class TorchrunLauncher(MeetingRanks):
    """torchrun, on each node; the others than the first are started by `shardwright join`."""

    kind: Literal["torchrun"]
    rendezvous: Literal["c10d", "static"] = "c10d"
    """c10d: nodes come in any order and may be lost and come back; static: each has its rank."""
    min_nodes: PositiveInt | None = None
    """Start with, and go on with, as few nodes as these; null waits for all of ``nodes``."""
    max_restarts: NonNegativeInt = 0
    """How often all ranks are started again, from the newest whole checkpoint, after one of them
    has failed or a node was lost."""
    bind: Literal["none", "cores", "numa"] = "none"
    """cores: each rank gets an equal part of its node's cores; numa: those near its GPU."""

    @property
    def world_sizes(self) -> tuple[int, ...]:
        fewest = self.min_nodes or self.nodes
        return tuple(self.ranks_per_node * nodes for nodes in range(fewest, self.nodes + 1))

    @model_validator(mode="after")
    def _is_elastic(self) -> TorchrunLauncher:
        if self.min_nodes is None or self.min_nodes == self.nodes:
            return self
        if self.min_nodes > self.nodes:
            raise ValueError(
                f"min_nodes={self.min_nodes} is more than nodes={self.nodes}; nodes is the most"
            )
        if self.rendezvous == "static":
            raise ValueError(
                f"min_nodes={self.min_nodes} lets nodes come and go, but rendezvous=static fixes "
                "their ranks; set rendezvous=c10d"
            )
        if self.max_restarts == 0:
            raise ValueError(
                f"min_nodes={self.min_nodes} goes on without a lost node by starting all ranks "
                "again, but max_restarts=0 allows no such start; set max_restarts=3"
            )
        return self

    @model_validator(mode="after")
    def _numa_is_that_of_gpus(self) -> TorchrunLauncher:
        if self.bind == "numa" and self.device == "cpu":
            raise ValueError(
                "bind=numa asks which memory is near each rank's GPU, but device=cpu; set "
                "bind=cores"
            )
        return self


class DeepspeedLauncher(MeetingRanks):
    """DeepSpeed's own command, on one node or over a hostfile."""

    kind: Literal["deepspeed"]
    hostfile: str | None = None
    """Lines of "host slots=N"; null is this machine alone. It decides nodes and nproc_per_node."""
    include: str | None = None
    """Of the hostfile only these: host1@host2:0,1."""
    exclude: str | None = None
    """Of the hostfile all but these."""
    backend: Literal["pdsh", "openmpi", "mpich", "slurm"] = "pdsh"
    """What starts the other nodes' processes."""
    backend_arguments: str = ""
    """Further arguments of pdsh, mpirun or srun, as in a shell."""
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    bind_cores_to_rank: bool = False
    """Give each rank an equal part of its node's cores (needs numactl)."""

    @model_validator(mode="after")
    def _filters_have_a_hostfile(self) -> DeepspeedLauncher:
        for name, value in (("include", self.include), ("exclude", self.exclude)):
            if value is not None and self.hostfile is None:
                raise ValueError(
                    f"{name}={_shown(value)} chooses among the hosts of a hostfile, but "
                    "hostfile=null; give one or leave it out"
                )
        if self.include is not None and self.exclude is not None:
            raise ValueError(
                f"include={_shown(self.include)} and exclude={_shown(self.exclude)} exclude each "
                "other; give one of them"
            )
        if self.nodes > 1 and self.hostfile is None:
            raise ValueError(
                f"nodes={self.nodes}, but hostfile=null: DeepSpeed starts other nodes over a "
                "hostfile; give one, or set launcher=torchrun"
            )
        return self


class AccelerateLauncher(MeetingRanks):
    """`accelerate launch` with a YAML that is written into the run's directory."""

    kind: Literal["accelerate"]


def _slurm_word(value: str) -> str:
    """Refuse what would not reach SLURM as it is written: a directive has no quoting to rely on."""
    if not re.fullmatch(r"[^\s\"'\\\\#\x00-\x1f\x7f]+", value):
        raise ValueError(
            f"{_shown(value)} has to be one word: SLURM would misread a blank, a quote, a "
            "backslash, # or an empty text in a job script; leave it out"
        )
    return value


SlurmWord = Annotated[str, AfterValidator(_slurm_word)]

# Flags that a field decides, or that the launcher itself needs, and the field.
_DECIDED_FLAGS = {
    "account": "launcher.account",
    "array": "-m with several runs, and launcher.array_limit",
    "chdir": "run_dir",
    "constraint": "launcher.constraint",
    "cpus-per-task": "launcher.cpus_per_rank",
    "dependency": "launcher.dependency",
    "error": "run_dir, which holds the log",
    "exclusive": "launcher.exclusive",
    "gpus-per-node": "launcher.gpus_per_node",
    "gres": "launcher.gpus_per_node and launcher.gpu_type",
    "job-name": "name",
    "mail-type": "launcher.mail_type",
    "mail-user": "launcher.mail_user",
    "mem": "launcher.memory_per_node",
    "no-requeue": "launcher.requeue",
    "nodes": "launcher.nodes",
    "ntasks": "launcher.nodes and launcher.nproc_per_node",
    "ntasks-per-node": "launcher.nproc_per_node",
    "open-mode": "nothing: a log is always appended to",
    "output": "run_dir, which holds the log",
    "parsable": "nothing: the launcher reads what sbatch prints",
    "partition": "launcher.partition",
    "qos": "launcher.qos",
    "requeue": "launcher.requeue",
    "signal": "launcher.grace_seconds",
    "time": "launcher.time_limit",
    "wait": "launcher.wait",
    "wrap": "nothing: the job script is the launcher's",
}


def _sbatch_line(line: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.+)?", line, re.DOTALL):
        raise ValueError(
            f"{_shown(line)} is not a whole flag of sbatch; write each as --flag=value"
        )
    _slurm_word(line)
    flag = line[2:].partition("=")[0]
    if (field := _DECIDED_FLAGS.get(flag)) is not None:
        raise ValueError(f"--{flag} is decided by {field}; leave it out here")
    return line


def _slurm_time(limit: int | str) -> int | str:
    if isinstance(limit, str) and not re.fullmatch(r"(\d+-)?\d{1,2}:[0-5]\d:[0-5]\d", limit):
        raise ValueError(
            f"{_shown(limit)} is read differently by SLURM and by people; write minutes as a "
            "whole number, or hours:minutes:seconds or days-hours:minutes:seconds"
        )
    # What YAML makes of 12:00:00 without quotes, a number to the base of 60.
    if isinstance(limit, int) and limit >= 3600:
        raise ValueError(
            f"{limit} minutes may be a time of day that YAML has read as one number; write so "
            'long a limit in quotes as "days-hours:minutes:seconds", '
            f'such as "{limit // 1440}-{limit // 60 % 24:02}:{limit % 60:02}:00"'
        )
    return limit


def _slurm_memory(memory: str) -> str:
    if memory != "all" and not re.fullmatch(r"[1-9]\d*[KMGT]", memory):
        raise ValueError(
            f"{_shown(memory)} needs a unit, since SLURM takes a plain number for megabytes; "
            "write a whole number and K, M, G or T, such as 64G, or all"
        )
    return memory


def _slurm_dependency(text: str) -> str:
    if not re.fullmatch(r"(singleton|after\w*:[\d_+:]+|[,?])+", _slurm_word(text)):
        raise ValueError(
            f"{_shown(text)} is no dependency that SLURM knows; write one such as "
            "afterok:1234, afterany:1234:1235 or singleton"
        )
    return text


class SlurmLauncher(SeveralRanks):
    """A job of a SLURM cluster; its script is made out of slurm/job.sbatch."""

    kind: Literal["slurm"]
    starts: Literal["ranks", "torchrun", "deepspeed"] = "ranks"
    """What a task of srun is. ranks: a rank, which gets its signals from SLURM itself; torchrun,
    deepspeed: a node's launcher, behind a parent that passes signals on to its ranks."""

    gpus_per_node: NonNegativeInt = 0
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "gres"
    """The flag that asks for GPUs; none asks for none where a partition brings its own."""
    gpu_type: SlurmWord | None = None
    """As the cluster calls it (a100); null takes any."""
    cpus_per_rank: PositiveInt | None = None
    """CPU cores of each rank; null is SLURM's own default, mostly one."""
    memory_per_node: Annotated[str, AfterValidator(_slurm_memory)] | None = None
    """Host memory with its unit, such as 64G, or all; null is the partition's default."""
    time_limit: Annotated[PositiveInt | str, AfterValidator(_slurm_time)] | None = None
    """Minutes, "hours:minutes:seconds" or "days-hours:minutes:seconds"; null: the partition's."""
    partition: SlurmWord | None = None
    account: SlurmWord | None = None
    qos: SlurmWord | None = None
    constraint: SlurmWord | None = None
    """Features that the nodes must have, such as a100|h100."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    dependency: Annotated[str, AfterValidator(_slurm_dependency)] | None = None
    """Jobs to wait for, such as afterok:1234."""
    array_limit: PositiveInt | None = None
    """Of the runs of a sweep (-m), which are one job array, so many at once; null: all."""
    mail_user: SlurmWord | None = None
    mail_type: Annotated[
        tuple[
            Literal[
                "ALL",
                "ARRAY_TASKS",
                "BEGIN",
                "END",
                "FAIL",
                "INVALID_DEPEND",
                "NONE",
                "REQUEUE",
                "STAGE_OUT",
                "TIME_LIMIT",
                "TIME_LIMIT_50",
                "TIME_LIMIT_80",
                "TIME_LIMIT_90",
            ],
            ...,
        ],
        Field(strict=False),
    ] = ()
    """Events that SLURM writes a mail about."""
    extra_sbatch: Annotated[
        tuple[Annotated[str, AfterValidator(_sbatch_line)], ...], Field(strict=False)
    ] = ()
    """Further flags, each whole: --reservation=lab."""

    grace_seconds: Annotated[PositiveFloat, Field(le=65535)] = 120.0
    """Seconds before the time limit at which the ranks are told to save and stop (SLURM may be a
    minute early). A last checkpoint that would not fit is not begun."""
    requeue: bool = True
    """Put the job back into the queue when it was stopped, preempted or lost a node."""
    max_requeues: NonNegativeInt = 20
    """Starts after the first one that the job asks for by itself."""
    wait: bool = False
    """Wait until the job has ended and return its exit code, instead of coming back at once."""
    site: str | None = None
    """Shell file with the cluster's own settings; null is slurm/site.sh where there is one."""

    @model_validator(mode="after")
    def _gpus_are_asked_for(self) -> SlurmLauncher:
        if self.device == "cuda" and not self.gpus_per_node:
            raise ValueError(
                "device=cuda needs GPUs, but gpus_per_node=0 asks for none; set gpus_per_node "
                "(with gpu_request=none where the partition brings them) or device=cpu"
            )
        if (
            self.device == "cuda"
            and self.nproc_per_node != "auto"
            and self.nproc_per_node > self.gpus_per_node
        ):
            raise ValueError(
                f"nproc_per_node={self.nproc_per_node} ranks need as many GPUs, but "
                f"gpus_per_node={self.gpus_per_node}; change one of them or set device=cpu"
            )
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError(
                f"gpu_type={self.gpu_type} says which GPUs, but gpus_per_node=0 asks for none; "
                "set gpus_per_node or leave gpu_type out"
            )
        if self.gpu_type is not None and self.gpu_request == "none":
            raise ValueError(
                f"gpu_type={self.gpu_type} is part of a request, but gpu_request=none makes none; "
                "set gpu_request=gres or leave gpu_type out (launcher.constraint chooses nodes)"
            )
        return self


LauncherConfig = Annotated[
    LocalLauncher | TorchrunLauncher | DeepspeedLauncher | AccelerateLauncher | SlurmLauncher,
    Field(discriminator="kind"),
]


# --- the run ------------------------------------------------------------------------------------


class RunConfig(Section):
    """One run, whole. It round-trips through ``config.yaml``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Names the run directory and the run in the tracker."""
    run_dir: str | None = None
    """Directory to create for the run; null is runs/<name>-<time>."""
    sweep_dir: str | None = None
    """With -m: the directory that holds one run directory for each job."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes initial weights, data order, masking and dropout."""

    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    strategy: StrategyConfig
    precision: PrecisionConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig
    launcher: LauncherConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _contradictions(config: RunConfig) -> Iterator[str]:
    """Yield a message for each pair of values that cannot both be meant."""
    model, objective, data = config.model, config.objective, config.data

    if model.causal is not None and model.causal != (objective.kind == "clm"):
        fit = "clm" if model.causal else "mlm"
        yield (
            f"objective={objective.kind} does not fit model.kind={model.kind}, which is trained "
            f"with objective={fit}; choose objective={fit} or another model"
        )
    limit = model.max_sequence_length
    if limit is not None and data.sequence_length > limit:
        yield (
            f"data.sequence_length={data.sequence_length} is longer than the {limit} positions of "
            f"the model (model.max_position_embeddings={model.max_position_embeddings}); "  # type: ignore[union-attr]
            "shorten the samples or lengthen the model"
        )
    if isinstance(model, ScratchModel):
        if (
            model.hidden_size % model.num_attention_heads
            and getattr(model, "head_dim", None) is None
        ):
            yield (
                f"model.hidden_size={model.hidden_size} is not a multiple of "
                f"model.num_attention_heads={model.num_attention_heads}; change one of them"
            )
        wanted = getattr(config.tokenizer, "vocab_size", None)
        if wanted is not None and wanted > model.padded_vocab_size:
            yield (
                f"tokenizer.vocab_size={wanted} is more than model.vocab_size={model.vocab_size}; "
                "raise the model's or lower the tokenizer's"
            )
    if isinstance(model, LlamaModel) and model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} is not a multiple of "
            f"model.num_key_value_heads={model.num_key_value_heads}; change one of them"
        )
    if (
        model.kind == "pretrained"
        and config.tokenizer.kind == "byte_bpe"
        and config.tokenizer.vocab_size is None
    ):
        yield (
            "tokenizer.vocab_size=null takes the model's vocabulary, but model=pretrained brings "
            "its own with its weights; choose tokenizer=pretrained or set tokenizer.vocab_size"
        )

    if config.trainer.eval_every_steps is not None and data.eval_fraction == 0:
        yield (
            f"trainer.eval_every_steps={config.trainer.eval_every_steps} needs held-out documents, "
            f"but data.eval_fraction={data.eval_fraction} holds out none; raise it or set "
            "trainer.eval_every_steps=null"
        )
    yield from _checkpoint_contradictions(config)

    if config.trainer.optimizer == "adafactor" and config.precision.master_dtype == "bf16":
        yield (
            "trainer.optimizer=adafactor with precision.master_dtype=bf16: its averages come to "
            "move by less than bf16 can hold; set precision=bf16 (fp32 masters) or "
            "trainer.optimizer=adamw"
        )

    every = config.trainer.checkpoint_activations_every_blocks
    layers = getattr(model, "num_hidden_layers", None)
    if every is not None and layers is not None and every > layers:
        yield (
            f"trainer.checkpoint_activations_every_blocks={every} is more than "
            f"model.num_hidden_layers={layers}; set it to at most {layers}"
        )
    if config.trainer.offload_activations and every is None:
        yield (
            "trainer.offload_activations=true keeps the inputs of recomputed blocks in host "
            "memory, but trainer.checkpoint_activations_every_blocks=null recomputes none; set "
            "that to 1 or leave offload_activations=false"
        )
    if config.trainer.offload_activations and config.trainer.compile:
        yield (
            "trainer.offload_activations=true copies between GPU and host within each block, which "
            "trainer.compile=true cannot trace; set one of them to false"
        )

    if model.attention == "flash_attention_2" and config.precision.compute_dtype == "fp32":
        yield (
            "model.attention=flash_attention_2 computes in 16 bits only, but "
            "precision.compute_dtype=fp32; choose precision=bf16 or model.attention=sdpa"
        )
    yield from _fp8_contradictions(config)

    # The engines know what they can do; they import this module, hence here and not above.
    from train.strategy import engine_of

    launcher = config.launcher
    known = isinstance(launcher, LocalLauncher) or launcher.nproc_per_node != "auto"
    for world_size in launcher.world_sizes if known else (None,):
        yield from engine_of(config).contradictions(config, world_size)
        if world_size is not None:
            try:
                accumulation_steps(config.trainer, world_size)
            except UserError as error:
                yield str(error)


def _checkpoint_contradictions(config: RunConfig) -> Iterator[str]:
    trainer, checkpoint = config.trainer, config.checkpoint
    save_every, eval_every = trainer.save_every_steps, trainer.eval_every_steps
    keep_every, patience = checkpoint.keep_every_steps, trainer.early_stopping_patience

    if keep_every is not None and save_every is None:
        yield (
            f"checkpoint.keep_every_steps={keep_every} keeps some checkpoints for ever, but "
            "trainer.save_every_steps=null writes one, at the end; set trainer.save_every_steps="
            f"{keep_every} or checkpoint.keep_every_steps=null"
        )
    elif keep_every is not None and save_every is not None and keep_every % save_every:
        fitting = max(1, round(keep_every / save_every)) * save_every
        yield (
            f"checkpoint.keep_every_steps={keep_every} is not a multiple of "
            f"trainer.save_every_steps={save_every}, so that most of these steps are never saved; "
            f"set checkpoint.keep_every_steps={fitting}"
        )

    wants_metric = {
        f"checkpoint.keep_best={checkpoint.keep_best}": checkpoint.keep_best > 0,
        f"trainer.early_stopping_patience={patience}": patience is not None,
    }
    readers = [setting for setting, wanted in wants_metric.items() if wanted]
    if readers and eval_every is None:
        lacking = "trainer.eval_every_steps=null"
        if config.data.eval_fraction == 0:
            lacking += " and data.eval_fraction=0, which holds out none"
        yield (
            f"{' and '.join(readers)} needs evaluations during training, but {lacking}; set "
            f"trainer.eval_every_steps{'' if config.data.eval_fraction else ' and the fraction'}"
        )
    if checkpoint.keep_best and save_every is None:
        yield (
            f"checkpoint.keep_best={checkpoint.keep_best} chooses among checkpoints, but "
            "trainer.save_every_steps=null writes one, at the end; set trainer.save_every_steps "
            "or checkpoint.keep_best=0"
        )
    elif checkpoint.keep_best and save_every is not None and eval_every is not None:
        meets_every = math.lcm(save_every, eval_every)
        if trainer.max_steps is not None and meets_every >= trainer.max_steps > save_every:
            yield (
                f"checkpoint.keep_best={checkpoint.keep_best} needs checkpoints of steps that are "
                f"evaluated, but trainer.save_every_steps={save_every} and "
                f"trainer.eval_every_steps={eval_every} first meet at step {meets_every}, and "
                f"trainer.max_steps={trainer.max_steps}; set trainer.save_every_steps to a "
                f"multiple of {eval_every}"
            )
    if checkpoint.export == "best" and not checkpoint.keep_best:
        yield (
            "checkpoint.export=best takes the best checkpoint that is kept, but "
            "checkpoint.keep_best=0 keeps none; set checkpoint.keep_best=1"
        )
    if checkpoint.export == "best" and getattr(config.strategy, "node_local_checkpoints", False):
        yield (
            "checkpoint.export=best reads a whole checkpoint, but "
            "strategy.node_local_checkpoints=true leaves it on several nodes' disks; set one of "
            "them to the other value"
        )
    if checkpoint.best_metric == "eval_masked_accuracy" and config.objective.kind != "mlm":
        yield (
            "checkpoint.best_metric=eval_masked_accuracy is measured with objective=mlm, but it is "
            f"{config.objective.kind}; set checkpoint.best_metric=eval_loss"
        )
    if checkpoint.best_metric != "eval_loss" and not readers:
        yield (
            f"checkpoint.best_metric={checkpoint.best_metric} is read by checkpoint.keep_best and "
            "trainer.early_stopping_patience, but neither is set; set one or leave "
            "checkpoint.best_metric out"
        )


def _fp8_contradictions(config: RunConfig) -> Iterator[str]:
    recipe = config.precision.fp8_recipe
    if recipe is None:
        return
    if config.model.kind == "gpt2":
        yield (
            f"precision.fp8_recipe={recipe} converts linear layers, but the blocks of "
            "model.kind=gpt2 have none (they are transformers' Conv1D); choose precision=bf16 or "
            "a llama model"
        )
    # The gradient of a weight is a product over tokens.
    tokens = config.trainer.micro_batch_size * config.data.sequence_length
    if tokens % 16 and recipe != "rowwise_with_gw_hp":
        yield (
            f"precision.fp8_recipe={recipe} needs a multiple of 16 tokens in a micro-batch, but "
            f"trainer.micro_batch_size={config.trainer.micro_batch_size} x "
            f"data.sequence_length={config.data.sequence_length} = {tokens}; change one of them, "
            "or set precision.fp8_recipe=rowwise_with_gw_hp"
        )


def accumulation_steps(trainer: TrainerConfig, world_size: int) -> int:
    """Return micro-batches per rank and step: global batch / (micro-batch x world size).

    Raises UserError where that is not a whole number.
    """
    per_pass = trainer.micro_batch_size * world_size
    steps, rest = divmod(trainer.global_batch_size, per_pass)
    if rest or not steps:
        fitting = max(1, round(trainer.global_batch_size / per_pass)) * per_pass
        raise UserError(
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of "
            f"trainer.micro_batch_size={trainer.micro_batch_size} x {world_size} rank(s) = "
            f"{per_pass}; set trainer.global_batch_size={fitting} or another micro-batch"
        )
    return steps


# --- from and to plain trees --------------------------------------------------------------------


def from_tree(tree: Any) -> RunConfig:
    """Validate a plain tree of values; raise UserError with one line for each problem."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_problems(error.errors()))) from None


RESUMES = "resumes"
"""Folder of a run with the config of each resume, <n>.yaml; config.yaml stays as it was."""


def load(run_dir: Path) -> RunConfig:
    """Read the config that a run has now: that of its last resume, or the one frozen first.

    Its ``run_dir`` is where it lies now.
    """
    resumes = [p for p in (run_dir / RESUMES).glob("*.yaml") if p.stem.isdecimal()]
    path = max(resumes, key=lambda p: int(p.stem), default=run_dir / "config.yaml")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{run_dir} is not a run directory: cannot read {path} ({error.strerror}); "
            "give the directory that `shardwright train` printed"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, it does not parse as YAML: {error}") from None
    if isinstance(tree, dict):
        tree = {**tree, "run_dir": os.path.abspath(run_dir)}
    return from_tree(tree)


def to_yaml(config: RunConfig) -> str:
    """Return the config as YAML text that ``from_tree`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# --- what to say about a key --------------------------------------------------------------------

# Names that users of transformers, accelerate and DeepSpeed type, and what to write here.
_ALIASES = {
    "adafactor": "trainer.optimizer=adafactor",
    "activation_checkpointing": (
        "trainer.checkpoint_activations_every_blocks (1: every block, 2: every second)"
    ),
    "adam_eps": "trainer.adam_epsilon",
    "array": "launcher.array_limit: the runs of a sweep (-m) are one job array",
    "async_save": "checkpoint.async",
    "asynchronous": "checkpoint.async",
    "batch_size": "trainer.global_batch_size (all ranks) or trainer.micro_batch_size (one pass)",
    "bf16": "precision=bf16",
    "block_size": "data.sequence_length",
    "clip_grad": "trainer.max_grad_norm",
    "cpu_checkpointing": "trainer.offload_activations",
    "cpus_per_task": "launcher.cpus_per_rank",
    "dataloader_num_workers": "trainer.dataloader_workers",
    "dataset_config_name": "data=hub data.config=...",
    "dataset_name": "data=hub data.name=...",
    "deepspeed": "strategy=zero0, zero1, zero2 or zero3",
    "early_stopping": "trainer.early_stopping_patience",
    "epochs": "trainer.max_epochs",
    "eval_steps": "trainer.eval_every_steps",
    "float8": "precision=fp8",
    "fp16": "precision=fp16",
    "fp8": "precision=fp8",
    "gradient_accumulation_steps": (
        "trainer.global_batch_size: the accumulation steps follow from it, from "
        "trainer.micro_batch_size and from the number of ranks"
    ),
    "gradient_checkpointing": (
        "trainer.checkpoint_activations_every_blocks (1: every block, 2: every second)"
    ),
    "grace_period": "launcher.grace_seconds",
    "gradient_clipping": "trainer.max_grad_norm",
    "greater_is_better": "checkpoint.best_metric: its direction follows from it",
    "gres": "launcher.gpus_per_node",
    "keep_checkpoints": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.export=best",
    "logging_steps": "trainer.log_every_steps",
    "lr": "trainer.learning_rate",
    "lr_scheduler_type": "trainer.lr_scheduler",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "mem": "launcher.memory_per_node",
    "metric_for_best_model": "checkpoint.best_metric",
    "mlm_probability": "objective.masking_rate",
    "model_name_or_path": "model=pretrained model.name=...",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "n_layer": "model.num_hidden_layers",
    "nnodes": "launcher.nodes",
    "ns_steps": "trainer.muon_newton_schulz_steps",
    "ntasks_per_node": "launcher.nproc_per_node",
    "num_processes": "launcher.nproc_per_node",
    "num_train_epochs": "trainer.max_epochs",
    "num_warmup_steps": "trainer.warmup_steps",
    "optim": "trainer.optimizer",
    "output_dir": "run_dir",
    "patience": "trainer.early_stopping_patience",
    "per_device_eval_batch_size": "trainer.eval_micro_batch_size",
    "per_device_train_batch_size": "trainer.micro_batch_size",
    "report_to": "tracking=none, tensorboard or wandb",
    "run_name": "name",
    "save_steps": "trainer.save_every_steps",
    "save_top_k": "checkpoint.keep_best",
    "save_total_limit": "checkpoint.keep_last",
    "shutdown_timeout": "launcher.grace_seconds",
    "termination_grace_period_seconds": "launcher.grace_seconds",
    "tf32": "precision=tf32",
    "time": "launcher.time_limit",
    "tokenizer_name": "tokenizer=pretrained tokenizer.name=...",
    "torch_compile": "trainer.compile",
    "train_batch_size": "trainer.global_batch_size",
    "train_file": "data=text data.paths=[...]",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "warmup_ratio": "trainer.warmup_fraction",
    "zero_optimization": "strategy=zero0, zero1, zero2 or zero3",
    "zero_stage": "strategy=zero0, zero1, zero2 or zero3",
}


def known_keys() -> list[str]:
    """Return every dotted key that some config can have, sections included."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for attribute, field in section.model_fields.items():
            name = field.alias or attribute  # a key may be a Python keyword
            yield prefix + name
            for inner in _sections_of(field.annotation):
                yield from walk(inner, f"{prefix}{name}.")

    return list(dict.fromkeys(walk(RunConfig, "")))


def nearest_key(key: str) -> str | None:
    """Return the known dotted key that looks most like ``key``, or None where none does.

    A sibling comes before a key of the same or nearly the same name in another section.
    """
    known = known_keys()
    section, _, leaf = key.rpartition(".")
    by_leaf: dict[str, str] = {}
    for candidate in known:
        by_leaf.setdefault(candidate.rpartition(".")[2], candidate)
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    for names, cutoff in ((siblings, 0.7), (by_leaf, 0.8), (siblings, 0.5)):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff):
            return names[close[0]]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return close[0] if close else None


def unknown_key_message(key: str) -> str:
    """Say what to write in place of an unknown dotted key."""
    leaf = key.rpartition(".")[2]
    if leaf in _ALIASES:
        return f"unknown key {key}: use {_ALIASES[leaf]}"
    near = nearest_key(key)
    hint = f"did you mean {near}?" if near else "`shardwright train --cfg job` lists the known ones"
    return f"unknown key {key}: {hint}"


def _problems(errors: list[ErrorDetails]) -> list[str]:
    """Return one line for each problem; the branches of a union make one line together."""
    lines: list[str] = []
    wanted: dict[str, list[str]] = {}
    paths = [tuple(error["loc"]) for error in errors]
    for error, path in zip(errors, paths, strict=True):
        # A list whose items are wrong is counted without them.
        if error["type"] == "too_short" and any(p[:-1] == path for p in paths):
            continue
        key = _dotted_key(error)
        if (line := _structural_problem(key, error)) is not None:
            lines.append(line)
            continue
        if key not in wanted:
            lines.append(f"{key}={_shown(error['input'])}: must be ")
        wanted.setdefault(key, []).append(_expectation(error))
    return [
        line + " or ".join(dict.fromkeys(wanted[line.partition("=")[0]]))
        if line.endswith(": must be ")
        else line
        for line in dict.fromkeys(lines)
    ]


def _dotted_key(error: ErrorDetails) -> str:
    parts = list(error["loc"])
    # Behind a tagged union stands the tag, behind a plain one its branch ("constrained-int").
    if len(parts) > 1 and parts[0] in _TAGGED:
        del parts[1]
    if error["type"] != "extra_forbidden":
        parts = [p for p in parts if isinstance(p, int) or p.isidentifier()]
    return ".".join(str(part) for part in parts)


def _structural_problem(key: str, error: ErrorDetails) -> str | None:
    """Explain an error of the tree's shape or of a rule; None where a value is to blame."""
    group = str(error["loc"][0]) if error["loc"] else ""
    match error["type"]:
        case "extra_forbidden":
            if key in known_keys():
                return (
                    f"{key} is no setting of {group}.kind={error['loc'][1]}; "
                    f"leave it out or choose another option with {group}=NAME"
                )
            return unknown_key_message(key)
        case "missing" if key in _SECTIONS:
            return f"{key} is not set; choose an option with {key}=NAME"
        case "missing":
            return f"{key} is not set; give it with {key}=VALUE"
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = ", ".join(_TAGGED[group])
            found = error.get("ctx", {}).get("tag")
            problem = f"{key}.kind={found} is not known" if found else f"{key}.kind is not set"
            return f"{problem} (there are {kinds}); choose an option with {key}=NAME"
        case "model_type" | "model_attributes_type" | "dict_type" if key:
            return (
                f"{key}={_shown(error['input'])}: {key} is a section, not a value; choose an "
                f"option with {key}=NAME or set one of its keys"
            )
        case "model_type":
            return "the config is not a mapping of sections to their settings"
        case "value_error":
            text = error["msg"].removeprefix("Value error, ")
            return f"{key}: {text}" if key else text
    return None


def _expectation(error: ErrorDetails) -> str:
    """Return what a value has to be, in words that follow "must be"."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type":
            return "text (a number stays text in two pairs of quotes: \"'7'\")"
        case "string_too_short":
            return "text that is not empty"
        case "tuple_type":
            return "a list, such as [a, b]"
        case "too_short":
            return f"a list of at least {limits['min_length']}"
        case "too_long":
            return f"a list of at most {limits['max_length']}"
        case "greater_than_equal":
            return f"at least {limits['ge']}"
        case "greater_than":
            return f"more than {limits['gt']}"
        case "less_than_equal":
            return f"at most {limits['le']}"
        case "less_than":
            return f"less than {limits['lt']}"
        case "literal_error":
            allowed = limits["expected"].replace("'", "")
            names = allowed.replace(" or ", ", ").split(", ")
            near = difflib.get_close_matches(str(error["input"]), names, n=1, cutoff=0.7)
            return allowed + (f" (did you mean {near[0]}?)" if near else "")
        case "string_pattern_mismatch":
            return f"text of the form {limits['pattern']}"
    return error["msg"][0].lower() + error["msg"][1:]


def _shown(value: Any) -> str:
    """Return a value as it would be typed, cut to what fits a message."""
    text = str(value) if isinstance(value, str) else json.dumps(value, default=str)
    text = text if text and text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for arg in get_args(annotation) for s in _sections_of(arg)]


_SECTIONS = {
    name: sections
    for name, field in RunConfig.model_fields.items()
    if (sections := _sections_of(field.annotation))
}
# The kinds of each section that is a tagged union.
_TAGGED = {
    name: [get_args(section.model_fields["kind"].annotation)[0] for section in sections]
    for name, sections in _SECTIONS.items()
    if len(sections) > 1
}
