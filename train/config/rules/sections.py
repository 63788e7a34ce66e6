"""What no two sections may say together; the pure checks behind RunConfig."""

from __future__ import annotations

import math
from collections.abc import Iterator

from shardwright.train.config.precision import FP8_RECIPES
from shardwright.train.config.rank_layout import RankLayout, rank_layout
from shardwright.train.config.rules import (
    adapter,
    fsdp,
    mps,
    noise_scale,
    optimizers,
    quantization,
    replicated,
    span_corruption,
    zero,
)
from shardwright.train.config.section import shown
from shardwright.train.config.sections import Sections
from shardwright.train.config.trainer import CADENCES, accumulation_steps, largest_micro_batch
from shardwright.train.errors import UserError


def contradictions(config: Sections) -> Iterator[str]:
    """Yield a message for each pair of values that cannot both be meant."""
    yield from _samples_contradictions(config)
    yield from span_corruption.contradictions(config)
    yield from config.model.contradictions()
    yield from adapter.contradictions(config)
    yield from quantization.contradictions(config)
    yield from _vocabulary_contradictions(config)
    yield from _evaluation_contradictions(config)
    yield from _epochs_contradictions(config)
    yield from _keep_every_contradictions(config)
    yield from _keep_best_contradictions(config)
    yield from _export_contradictions(config)
    yield from _average_contradictions(config)
    yield from _best_metric_contradictions(config)
    yield from _loss_contradictions(config)
    yield from optimizers.contradictions(config)
    yield from _activations_contradictions(config)
    yield from _statistics_contradictions(config)
    yield from _profile_contradictions(config)
    yield from _attention_contradictions(config)
    yield from _document_contradictions(config)
    yield from _stage_contradictions(config)
    yield from _fp8_contradictions(config)
    yield from mps.contradictions(config)
    yield from _engine_contradictions(config)


def _samples_contradictions(config: Sections) -> Iterator[str]:
    """Yield why the model cannot learn from the samples: their kind, or their length."""
    model, objective, length = config.model, config.objective, config.data.sequence_length
    learns = objective.is_encoder_decoder, not objective.is_masked
    found = model.is_encoder_decoder, model.causal or objective.is_encoder_decoder
    if model.causal is not None and learns != found:
        fit = "clm" if model.causal else "mlm"
        fit = "span_corruption" if model.is_encoder_decoder else fit
        yield (
            f"objective={objective.kind} does not fit model.kind={model.kind}, which is trained "
            f"with objective={fit}; choose objective={fit} or another model"
        )
    if not config.data.has_text and config.tokenizer.kind != "pretrained":
        yield (
            f"data={config.data.kind} has no text to train a tokenizer on, and ids mean nothing "
            "without theirs; set tokenizer=pretrained tokenizer.name=... to the one that made them"
        )
    if not config.data.has_text and objective.kind == "mlm" and objective.whole_word:
        yield (
            f"objective.whole_word=true needs text, which tells where words begin, and "
            f"data={config.data.kind} has none; set it to false"
        )
    limit = model.max_sequence_length
    if limit is not None and length != "auto" and length > limit:
        yield (
            f"data.sequence_length={length} is longer than the {limit} positions of "
            "the model (model.max_position_embeddings="
            f"{getattr(model, 'max_position_embeddings', None)}); "
            "shorten the samples or lengthen the model"
        )


def _vocabulary_contradictions(config: Sections) -> Iterator[str]:
    """Yield why model and tokenizer cannot share a vocabulary."""
    model, tokenizer = config.model, config.tokenizer
    wanted, rows = getattr(tokenizer, "vocab_size", None), model.rows_asked_for
    if wanted is not None and rows is not None and wanted > rows:
        yield (
            f"tokenizer.vocab_size={wanted} is more than model.vocab_size={model.vocabulary}; "
            "raise the model's or lower the tokenizer's"
        )
    is_trained = tokenizer.kind != "pretrained"
    if model.kind == "pretrained" and is_trained and wanted is None:
        yield (
            "tokenizer.vocab_size=null takes the model's vocabulary, but model=pretrained brings "
            "its own with its weights; choose tokenizer=pretrained or set tokenizer.vocab_size"
        )


def _evaluation_contradictions(config: Sections) -> Iterator[str]:
    for name, value in config.trainer.cadence("eval").items():
        if not config.data.is_evaluated:
            yield (
                f"trainer.{name}={value} needs held-out documents, but "
                f"data.eval_fraction={config.data.eval_fraction} holds out none; raise it, give "
                f"data.eval_paths or set trainer.{name}=null"
            )


def _epochs_contradictions(config: Sections) -> Iterator[str]:
    """Yield why there are no epochs by which something could happen."""
    for kind in CADENCES:
        every = getattr(config.trainer, f"{kind}_every_epochs")
        if every is not None and config.data.stages:
            yield (
                f"trainer.{kind}_every_epochs={every} counts passes over the training samples, and "
                "each of data.stages has samples of its own; give "
                f"trainer.{kind}_every_tokens or trainer.{kind}_every_steps"
            )


def _keep_every_contradictions(config: Sections) -> Iterator[str]:
    """Yield why the checkpoints that are to be kept for good are not those that are written."""
    save_every, keep_every = config.trainer.save_every_steps, config.checkpoint.keep_every_steps
    by_others = {k: v for k, v in config.trainer.cadence("save").items() if save_every is None}
    if keep_every is not None and by_others:
        ((name, value),) = by_others.items()
        yield (
            f"checkpoint.keep_every_steps={keep_every} keeps checkpoints by their step, and "
            f"trainer.{name}={value} writes them at steps that are no multiples of it; set "
            f"trainer.save_every_steps, or checkpoint.keep_every_steps=null"
        )
    elif keep_every is not None and save_every is None:
        yield (
            f"checkpoint.keep_every_steps={keep_every} keeps some checkpoints permanently, but "
            "trainer.save_every_steps=null writes one, at the end; set "
            f"trainer.save_every_steps={keep_every} or checkpoint.keep_every_steps=null"
        )
    elif keep_every is not None and save_every is not None and keep_every % save_every:
        fitting = max(1, round(keep_every / save_every)) * save_every
        yield (
            f"checkpoint.keep_every_steps={keep_every} is not a multiple of "
            f"trainer.save_every_steps={save_every}, so that most of these steps are never saved; "
            f"set checkpoint.keep_every_steps={fitting}"
        )


def _readers_of_the_metric(config: Sections) -> list[str]:
    """Return the settings that have checkpoint.best_metric compared during training."""
    best, patience = config.checkpoint.keep_best, config.trainer.early_stopping_patience
    wants_metric = {
        f"checkpoint.keep_best={best}": best > 0,
        f"trainer.early_stopping_patience={patience}": patience is not None,
    }
    return [setting for setting, wanted in wants_metric.items() if wanted]


def _keep_best_contradictions(config: Sections) -> Iterator[str]:
    """Yield why no step is both evaluated and saved, where the best one is to be found."""
    trainer, best = config.trainer, config.checkpoint.keep_best
    save_every, eval_every = trainer.save_every_steps, trainer.eval_every_steps
    readers = _readers_of_the_metric(config)
    if readers and not trainer.cadence("eval"):
        lacking = "trainer.eval_every_steps=null"
        if not config.data.is_evaluated:
            lacking += " and data.eval_fraction=0, which holds out none"
        yield (
            f"{' and '.join(readers)} needs evaluations during training, but {lacking}; set "
            f"trainer.eval_every_steps{'' if config.data.is_evaluated else ' and the fraction'}"
        )
    if best and not trainer.cadence("save"):
        yield (
            f"checkpoint.keep_best={best} chooses among checkpoints, but "
            "trainer.save_every_steps=null writes one, at the end; set trainer.save_every_steps "
            "or checkpoint.keep_best=0"
        )
    elif best and save_every is not None and eval_every is not None:
        meets_every = math.lcm(save_every, eval_every)
        if trainer.max_steps is not None and meets_every >= trainer.max_steps > save_every:
            yield (
                f"checkpoint.keep_best={best} needs checkpoints of steps that are "
                f"evaluated, but trainer.save_every_steps={save_every} and "
                f"trainer.eval_every_steps={eval_every} first meet at step {meets_every}, and "
                f"trainer.max_steps={trainer.max_steps}; set trainer.save_every_steps to a "
                f"multiple of {eval_every}"
            )


def _export_contradictions(config: Sections) -> Iterator[str]:
    """Yield why there is no best checkpoint to make final/ of, where it is to be."""
    if config.checkpoint.export == "best" and not config.checkpoint.keep_best:
        yield (
            "checkpoint.export=best takes the best checkpoint that is kept, but "
            "checkpoint.keep_best=0 keeps none; set checkpoint.keep_best=1"
        )
    node_local = getattr(config.strategy, "node_local_checkpoints", False)
    if config.checkpoint.export == "best" and node_local:
        yield (
            "checkpoint.export=best reads a whole checkpoint, but "
            "strategy.node_local_checkpoints=true leaves it on several nodes' disks; set one of "
            "them to the other value"
        )


def _average_contradictions(config: Sections) -> Iterator[str]:
    """Yield why no average of the weights can be kept, or made into final/."""
    kind, strategy = config.trainer.average_weights, config.strategy
    if config.checkpoint.export == "average" and kind is None:
        yield (
            "checkpoint.export=average takes the average of the weights, but "
            "trainer.average_weights=null keeps none; set trainer.average_weights=ema or uniform"
        )
    if config.trainer.average_evaluated and not config.data.is_evaluated:
        yield (
            "trainer.average_evaluated=true needs held-out documents, but data.eval_fraction="
            f"{config.data.eval_fraction} holds out none; raise it, give data.eval_paths or set "
            "trainer.average_evaluated=false"
        )
    if kind is not None and strategy.uses_nvme:
        yield (
            f"trainer.average_weights={kind} reads all master weights after each step, which "
            f"strategy={strategy.kind} keeps on a disk (offload_optimizer or "
            "offload_parameters=nvme); set it to null, or offload to cpu"
        )
    if kind is not None and getattr(strategy, "node_local_checkpoints", False):
        yield (
            f"trainer.average_weights={kind} divides the average among all ranks alike, but with "
            "strategy.node_local_checkpoints=true a node can read only what its own ranks wrote; "
            "set one of them to the other value"
        )


def _best_metric_contradictions(config: Sections) -> Iterator[str]:
    """Yield why the metric is not measured, or read by nothing."""
    metric = config.checkpoint.best_metric
    if metric == "eval_masked_accuracy" and config.objective.kind != "mlm":
        yield (
            "checkpoint.best_metric=eval_masked_accuracy is measured with objective=mlm, but it is "
            f"{config.objective.kind}; set checkpoint.best_metric=eval_loss"
        )
    if metric != "eval_loss" and not _readers_of_the_metric(config):
        yield (
            f"checkpoint.best_metric={metric} is read by checkpoint.keep_best and "
            "trainer.early_stopping_patience, but neither is set; set one or leave "
            "checkpoint.best_metric out"
        )


def _loss_contradictions(config: Sections) -> Iterator[str]:
    """Yield why a loss of the user's own cannot be computed, or evaluated."""
    loss = config.objective.loss
    if loss is not None and config.trainer.fused_loss is True:
        yield (
            f"trainer.fused_loss=true never has all logits at once, which objective.loss={loss} "
            "takes; set trainer.fused_loss=auto"
        )
    if loss is None and config.checkpoint.best_metric == "eval_own_loss":
        yield (
            "checkpoint.best_metric=eval_own_loss is measured with objective.loss, which is null; "
            "set checkpoint.best_metric=eval_loss"
        )


def _activations_contradictions(config: Sections) -> Iterator[str]:
    """Yield why the activations of blocks cannot be recomputed or offloaded as asked for."""
    trainer = config.trainer
    every = trainer.checkpoint_activations_every_blocks
    hooks_every_layer = config.strategy.hooks_every_layer
    layers = getattr(config.model, "num_hidden_layers", None)
    if isinstance(every, int) and layers is not None and every > layers:
        yield (
            f"trainer.checkpoint_activations_every_blocks={every} is more than "
            f"model.num_hidden_layers={layers}; set it to at most {layers}"
        )
    if trainer.recompute != "full" and every is None:
        yield (
            f"trainer.recompute={trainer.recompute} says what of a block is recomputed, but "
            "trainer.checkpoint_activations_every_blocks=null recomputes none; set that to 1 or "
            "leave recompute=full"
        )
    if trainer.recompute == "selective" and trainer.compile is True and hooks_every_layer:
        yield (
            "trainer.recompute=selective with trainer.compile=true needs whole blocks, but the "
            "hooks of strategy.stage=3 leave the compiler pieces of them; set "
            "trainer.compile=false or trainer.recompute=full"
        )
    if trainer.offload_activations and every is None:
        yield (
            "trainer.offload_activations=true keeps the inputs of recomputed blocks in host "
            "memory, but trainer.checkpoint_activations_every_blocks=null recomputes none; set "
            "that to 1 or leave offload_activations=false"
        )
    if trainer.offload_activations and trainer.compile is True:
        yield (
            "trainer.offload_activations=true copies between GPU and host within each block, which "
            "trainer.compile=true cannot trace; set one of them to false"
        )


def _statistics_contradictions(config: Sections) -> Iterator[str]:
    every = config.trainer.debug.statistics_every_steps
    if every is not None and config.strategy.uses_nvme:
        yield (
            f"trainer.debug.statistics_every_steps={every} reads all master weights and gradients, "
            f"which strategy={config.strategy.kind} keeps on a disk (offload_optimizer or "
            "offload_parameters=nvme); set it to null, or offload to cpu"
        )


def _profile_contradictions(config: Sections) -> Iterator[str]:
    """Yield why a rank that is to be profiled is never there."""
    if not config.launcher.knows_ranks:
        return
    most = max(config.launcher.world_sizes)
    if missing := [rank for rank in config.trainer.profile.ranks if rank >= most]:
        yield (
            f"trainer.profile.ranks={list(config.trainer.profile.ranks)} names rank {missing[0]}, "
            f"but there are {most} rank(s), counted from 0; name others, or start more"
        )


def _attention_contradictions(config: Sections) -> Iterator[str]:
    precision = config.precision
    if config.model.attention == "flash_attention_2" and precision.computes_in.size_bytes != 2:
        yield (
            "model.attention=flash_attention_2 computes in 16 bits only, but "
            f"precision.compute_dtype={precision.compute_dtype}; choose precision=bf16 or "
            "model.attention=sdpa"
        )


def _document_contradictions(config: Sections) -> Iterator[str]:
    data = config.data
    if data.line_by_line and data.document_attention is False:
        yield (
            "data.line_by_line=true makes each line a sample that sees nothing else, but "
            "data.document_attention=false; leave one of them out"
        )
    if data.packing == "best_fit" and data.line_by_line:
        yield (
            "data.packing=best_fit puts documents into samples together, but "
            "data.line_by_line=true makes each line a sample; leave one of them out"
        )
    if data.unpad is True and not data.line_by_line:
        yield (
            "data.unpad=true, but documents that are packed back to back have no padding; leave it "
            "out, or set data.line_by_line=true"
        )
    if data.unpad is True and config.precision.token_multiple > 1:
        yield (
            f"data.unpad=true makes each micro-batch as long as its lines are, but "
            f"precision.fp8_recipe={config.precision.fp8_recipe} takes multiples of "
            f"{config.precision.token_multiple} tokens; set data.unpad=false, or choose "
            "precision=bf16"
        )


def _stage_contradictions(config: Sections) -> Iterator[str]:
    """Yield why training cannot go through the stages that are asked for."""
    data, trainer = config.data, config.trainer
    if not data.stages:
        return
    for field, value in (("line_by_line", True), ("packing", "best_fit")):
        if getattr(data, field) == value:
            yield (
                "data.stages are views of documents that are packed back to back, but "
                f"data.{field}={shown(value)}; leave one of them out"
            )
    if trainer.max_epochs is not None:
        yield (
            f"data.stages count in tokens, but trainer.max_epochs={trainer.max_epochs} in epochs, "
            "of which each stage has its own; set trainer.max_tokens or trainer.max_steps"
        )
    if data.sequence_length == "auto":
        return
    for number, stage in enumerate(data.stages):
        length = stage.sequence_length or data.sequence_length
        if length != data.sequence_length:
            yield from _length_contradictions(config, f"data.stages[{number}]", length)


def _length_contradictions(config: Sections, stage: str, length: int) -> Iterator[str]:
    """Yield why a stage cannot have samples of a length of its own."""
    trainer, unit = config.trainer, config.data.tokens_per_sample
    limit, batch, micro = (
        config.model.max_sequence_length,
        trainer.global_batch_size,
        trainer.micro_batch_size,
    )
    if limit is not None and length > limit:
        yield (
            f"{stage}.sequence_length={length} is longer than the {limit} positions of the model; "
            "shorten the samples or lengthen the model"
        )
    if batch * unit % length:
        multiple = length // math.gcd(unit, length)
        yield (
            f"{stage}.sequence_length={length} does not divide a step, which has "
            f"trainer.global_batch_size={batch} x data.sequence_length={unit} tokens in every "
            f"stage; set trainer.global_batch_size to a multiple of {multiple}, or another length"
        )
    if isinstance(micro, int) and micro * unit < length:
        yield (
            f"{stage}.sequence_length={length} is more than a micro-batch has, "
            f"trainer.micro_batch_size={micro} x data.sequence_length={unit} tokens; set "
            f"trainer.micro_batch_size={-(-length // unit)} or more, of which a micro-batch of "
            "this stage has fewer"
        )
    if trainer.batch_warmup_from is not None:
        yield (
            f"{stage}.sequence_length={length} is not data.sequence_length={unit}, and with "
            f"trainer.batch_warmup_from={trainer.batch_warmup_from} a step may have any number of "
            "tokens, which no whole number of its samples has; leave one of them out"
        )
    if length % config.precision.token_multiple:
        yield (
            f"precision.fp8_recipe={config.precision.fp8_recipe} needs a multiple of "
            f"{config.precision.token_multiple} tokens in a micro-batch, but "
            f"{stage}.sequence_length={length}; change one of them"
        )


def _fp8_contradictions(config: Sections) -> Iterator[str]:
    recipe = config.precision.fp8_recipe
    if recipe is None:
        return
    if config.trainer.deterministic:
        yield (
            f"precision.fp8_recipe={recipe} with trainer.deterministic=true: nothing says that "
            "products in fp8 give the same bits each time; choose precision=bf16, or set "
            "trainer.deterministic=false"
        )
    if config.model.kind == "gpt2":
        yield (
            f"precision.fp8_recipe={recipe} converts linear layers, but the blocks of "
            "model.kind=gpt2 have none (they are transformers' Conv1D); choose precision=bf16 or "
            "a llama model"
        )
    batch, length = config.trainer.micro_batch_size, config.data.sequence_length
    if not isinstance(batch, int) or length == "auto":
        return
    tokens = batch * length
    multiple = FP8_RECIPES[recipe].token_multiple
    if config.trainer.batch_warmup_from is not None and length % multiple:
        yield (
            f"precision.fp8_recipe={recipe} needs a multiple of {multiple} tokens in a "
            f"micro-batch, but with trainer.batch_warmup_from={config.trainer.batch_warmup_from} "
            f"it may have any number of samples of data.sequence_length={length} tokens; set "
            f"data.sequence_length to a multiple of {multiple}, or "
            "trainer.batch_warmup_from=null"
        )
    if tokens % multiple:
        any_number = [name for name, facts in FP8_RECIPES.items() if facts.token_multiple == 1]
        yield (
            f"precision.fp8_recipe={recipe} needs a multiple of {multiple} tokens in a "
            f"micro-batch, but trainer.micro_batch_size={config.trainer.micro_batch_size} x "
            f"data.sequence_length={config.data.sequence_length} = {tokens}; change one of them, "
            f"or set precision.fp8_recipe={' or '.join(any_number)}"
        )


def _engine_contradictions(config: Sections) -> Iterator[str]:
    """Yield what the engine cannot honour, and the batch, on each number of ranks there may be."""
    engines = {"single": replicated, "ddp": replicated, "zero": zero, "fsdp": fsdp}
    launcher = config.launcher
    for world_size in launcher.world_sizes if launcher.knows_ranks else (None,):
        layout = None
        if world_size is not None:
            try:
                layout = rank_layout(config.strategy, world_size)
            except UserError as error:
                yield str(error)
        if config.strategy.kind != "auto":
            yield from engines[config.strategy.kind].contradictions(config, layout)
            yield from noise_scale.contradictions(config, layout)
        if world_size is not None:
            # However they shard, that many ranks share the batch: whoever has to choose another
            # number is told of it too.
            yield from _batch_contradictions(config, layout or RankLayout(replicas=world_size))


def _batch_contradictions(config: Sections, layout: RankLayout) -> Iterator[str]:
    try:
        if not isinstance(config.trainer.micro_batch_size, int):
            largest_micro_batch(config.trainer.global_batch_size, [layout])
        else:
            accumulation_steps(config.trainer, layout)
    except UserError as error:
        yield str(error)
