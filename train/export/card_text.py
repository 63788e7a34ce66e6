"""The words of a model card, made of facts: what is known is told, and nothing else.

Pure, and imports no torch.
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwright.train.config import OPTIMIZERS, RunConfig, ScratchModel
from shardwright.train.config.model import NOT_QUANTIZED, quantization_of
from shardwright.train.config.positions import GLOBAL, LOCAL, longest_sample, rotary_bases
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.source import code
from shardwright.train.export import curve
from shardwright.train.paths import is_hub_name
from shardwright.train.run_directory.metrics import NO_CURVE, Curve
from shardwright.train.units import counted, duration

PICTURE = "loss.svg"
MODEL_PLACEHOLDER = "PATH_OR_NAME"
"""Stands for the model's directory, or its name on a hub: a card cannot know where it will lie."""
COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022, arXiv 2203.15556."""
EXAMPLE_TOKENS = 40
"""How far the example continues its prompt."""
MANY_EPOCHS = 4
"""Up to about here repeated text is worth nearly as much as new: arXiv 2305.16264."""


@dataclass(frozen=True)
class Facts:
    """Everything that a card tells. None is what is not known, and the card says so."""

    config_json: Mapping[str, Any]
    """The model's own config."""
    dtype: str
    """Of the weights as written: fp32, bf16 or fp16."""
    origin: str | None = None
    """The checkpoint that the weights were taken out of; None for the result of a training."""
    parameters: int | None = None
    """Tied ones once."""
    trained: int | None = None
    """How many of the parameters that there were in training were trained; None: not known."""
    step: int | None = None
    samples: int | None = None
    tokens: int | None = None
    world_size: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was evaluated with these very weights."""
    averaged: str | None = None
    """Of what steps' weights they are an average, in a phrase; None for those of a single step."""
    run: RunConfig | None = None
    base_model: str | None = None
    """Name on a hub of the weights that the training began with; None for local ones or none."""
    base_title: str | None = None
    """What their own card calls them."""
    base_config: Mapping[str, Any] = field(default_factory=dict)
    """Their own config.json."""
    drawn_anew: Sequence[str] = ()
    """The parameters of the head that they did not have."""
    tokenizer_tokens: int | None = None
    """Different ids that the tokenizer gives."""
    tokenizer_class: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The model's own generation settings."""
    corpus: Mapping[str, Any] = field(default_factory=dict)
    """data.json."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """That of the run's last start."""
    resumes: int = 0
    """How often the run has been resumed from a checkpoint."""
    curve: Curve = NO_CURVE


def readme_of(facts: Facts, *, has_picture: bool) -> str:
    """Return README.md with the hub's metadata header; it refers to the picture if there is one."""
    sections = [
        _introduction(facts),
        _table("Model", _model_rows(facts)),
        _use(facts),
        _table("Data", _data_rows(facts)),
        _table("Training", _training_rows(facts)),
        _results(facts, has_picture=has_picture),
        _table("Hardware and software", _machine_rows(facts)),
        "\n".join(["## Limits", "", *(f"- {limit}" for limit in _limits(facts))]),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_header(facts)}\n---\n\n{body}\n"


def _header(facts: Facts) -> str:
    """Return the metadata that the hub reads, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    run, task = facts.run, _task(facts)
    measured = _measured(facts)
    source = source_of(run.data) if run is not None else None
    data_set = source.data_set if source is not None else None
    name_on_hub = data_set.name if data_set else None
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=name_on_hub or run.data.kind,
            dataset_name=f"{name_on_hub or run.data.kind}, held-out documents",
            dataset_config=data_set.config if data_set else None,
            dataset_revision=data_set.revision if data_set else None,
            metric_type="accuracy" if name == "masked accuracy" else name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in measured.items()
        if run is not None
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        language=list(source.languages) if source and source.languages else None,
        base_model=facts.base_model,
        datasets=[name_on_hub] if name_on_hub else None,
        tags=[
            "shardwright",
            *filter(None, [facts.config_json.get("model_type")]),
            *(source.tags if source is not None else ()),
        ],
        model_name=_name(facts) if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _introduction(facts: Facts) -> str:
    run = facts.run
    if run is None:
        how = (
            "Only the weights and the model's config are known: the checkpoint does not say "
            "what it was trained on, or how."
        )
    elif run.model.kind != "pretrained":
        how = "Trained from scratch with Shardwright."
    else:
        how = f"Trained with Shardwright from {_base(facts)}."
        if facts.drawn_anew:
            count = f"{counted(len(facts.drawn_anew), 'parameter')}"
            names = ", ".join(code(name) for name in facts.drawn_anew[:3])
            more = ", ..." if len(facts.drawn_anew) > 3 else ""
            how += (
                f" These had no weights of the head: its {count} ({names}{more}) started from "
                "random values."
            )
    if facts.averaged is not None:
        how += f" These weights are {facts.averaged}."
    if facts.origin is not None:
        how = f"Recovered with Shardwright from {facts.origin}. {how}"
    return f"# {_name(facts)}\n\n{how}"


def _base(facts: Facts) -> str:
    """Return what the weights were that the training began with; of local ones not where they lay.

    The last part of a path says nothing: that of each run's result is "final".
    """
    if facts.base_model is not None:
        return code(facts.base_model)
    architecture = " ".join(facts.config_json.get("architectures") or ["model"])
    if facts.base_title is None:
        return f"the weights of another {code(architecture)}"
    return f"the weights of {code(facts.base_title)}, a {code(architecture)}"


def _model_rows(facts: Facts) -> Iterator[tuple[str, str | None]]:
    config, run = facts.config_json, facts.run
    yield "Architecture", " ".join(config.get("architectures") or [config.get("model_type", "")])
    yield "Parameters", _count(facts.parameters)
    yield "Weights", facts.dtype
    layers, width, heads = (
        next((config[name] for name in names if name in config), None)
        for names in (
            ("num_hidden_layers", "n_layer"),
            ("hidden_size", "n_embd"),
            ("num_attention_heads", "n_head"),
        )
    )
    if layers and width and heads:
        yield "Size", f"{layers} layers, {heads} heads, hidden size {width:,}"
    positions = _positions(facts)
    yield "Context length", f"{positions:,} tokens" if positions else None
    yield "Rotary base", _rotary(facts)
    yield "Vocabulary", _vocabulary(facts)
    if run is not None:
        yield "Tokenizer", _tokenizer(facts, run)
        yield "Objective", _objective(run)


def _positions(facts: Facts) -> int | None:
    """Return how many tokens the model takes, None where nothing bounds them or says so."""
    if facts.run is not None and isinstance(facts.run.model, ScratchModel):
        return facts.run.model.max_sequence_length
    return longest_sample(facts.config_json)


def _rotary(facts: Facts) -> str | None:
    """Return the bases of the rotary frequencies, and what they were where training began."""
    bases, before = rotary_bases(facts.config_json), rotary_bases(facts.base_config)
    differ = len({(base, before.get(kind, base)) for kind, base in bases.items()}) > 1
    texts = [
        f"{base:,.10g}"
        + (f" in layers that attend to {_ATTENDS.get(kind, kind)}" if differ else "")
        + (f", changed from {before[kind]:,.10g}" if before.get(kind, base) != base else "")
        for kind, base in bases.items()
    ]
    return "; ".join(texts if differ else texts[:1]) or None


_ATTENDS = {GLOBAL: "all of a sample", LOCAL: "a window"}


def _vocabulary(facts: Facts) -> str | None:
    """Return the tokens that the tokenizer has, and the rows of the embedding where they differ."""
    rows, tokens = facts.config_json.get("vocab_size"), facts.tokenizer_tokens
    if rows is None or tokens is None:
        return f"{rows:,} rows of the embedding" if rows else None
    if rows == tokens:
        return f"{tokens:,} tokens"
    return f"{tokens:,} tokens; {rows:,} rows of the embedding, {rows - tokens:,} of them unused"


def _tokenizer(facts: Facts, run: RunConfig) -> str:
    if run.tokenizer.kind != "pretrained":
        return f"{run.tokenizer.described}, trained on the same documents"
    if run.model.kind == "pretrained" and run.tokenizer.name == run.model.name:
        return f"that of {_base(facts)}"
    if is_hub_name(run.tokenizer.name):
        return f"that of {code(run.tokenizer.name)}"
    kind = f" ({code(facts.tokenizer_class)})" if facts.tokenizer_class else ""
    return f"made elsewhere, read from local files{kind}"


def _objective(run: RunConfig) -> str:
    if run.objective.kind == "clm":
        return "causal: the next token"
    if run.objective.kind == "diffusion":
        least = run.objective.least_masking_rate
        return (
            f"masked diffusion: in each sample a share of the tokens of its own, from {least:.2g} "
            "to all of them"
        )
    if run.objective.kind == "span_corruption":
        share, span = run.objective.noise_density, run.objective.mean_span_length
        return (
            f"span corruption: {share:.0%} of the tokens, in spans of {span:g} on average, are "
            "taken from what the encoder reads and written by the decoder"
        )
    unit = "whole words" if run.objective.whole_word else "tokens"
    first, last = run.objective.masking_rate, run.objective.masking_rate_final
    if last is None:
        return f"masked: {first:.0%} of the {unit}"
    schedule = run.objective.masking_rate_schedule
    how = "at once" if schedule == "step" else f"along a {schedule} schedule"
    if schedule == "step":
        how += f" after {run.objective.masking_rate_step_at:.0%} of the run"
    return f"masked: {first:.0%} of the {unit} where training began, {last:.0%} in the end, {how}"


def _use(facts: Facts) -> str:
    task = _task(facts)
    if task is None:
        return ""
    trusted = ", trust_remote_code=True" if facts.config_json.get("auto_map") else ""
    prompts = facts.run.objective.prompts if facts.run is not None else ()
    prompts = tuple(prompt for prompt in prompts if "```" not in prompt)
    lines = ["from transformers import pipeline", ""]
    is_diffusion = facts.run is not None and facts.run.objective.kind == "diffusion"
    if is_diffusion:  # the pipeline fills one mask
        prompts = ()
    if task == "fill-mask":
        lines += [f'fill = pipeline("fill-mask", model="{MODEL_PLACEHOLDER}"{trusted})']
        prompt = json.dumps(prompts[0], ensure_ascii=False) if prompts else None
        lines += [f"fill({prompt or 'fill.tokenizer.mask_token'})"]
    elif task == _WRITES_SPANS:
        lines = _use_of_spans(prompts, trusted)
    else:
        prompt = prompts[0] if prompts else "The"
        shown = json.dumps(prompt, ensure_ascii=False)
        lines += [f'generate = pipeline("text-generation", model="{MODEL_PLACEHOLDER}"{trusted})']
        lines += [f"generate({shown}, {_length(facts, prompt)}, do_sample=True)"]
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _use_of_spans(prompts: Sequence[str], trusted: str) -> list[str]:
    """Return how an encoder-decoder is asked for spans, for which there is no pipeline."""
    shown = json.dumps(prompts[0] if prompts else "The <extra_id_0>", ensure_ascii=False)
    names = ("AutoModelForSeq2SeqLM", "AutoTokenizer")
    loads = [f'{name}.from_pretrained("{MODEL_PLACEHOLDER}"{trusted})' for name in names]
    return [
        f"from transformers import {', '.join(names)}",
        "",
        f"model, tokenizer = (\n    {loads[0]},\n    {loads[1]},\n)",
        f'inputs = tokenizer({shown}, return_tensors="pt")',
        f"written = model.generate(**inputs, max_new_tokens={EXAMPLE_TOKENS})",
        "tokenizer.decode(written[0])  # each span behind its <extra_id_...>",
    ]


def _length(facts: Facts, prompt: str) -> str:
    """Return how long the example's text may become, within the model's positions.

    In the setting that the model's own generation settings use: transformers warns of the other
    beside it.
    """
    positions = _positions(facts)
    # There are at most as many tokens as bytes.
    room = len(prompt.encode()) + EXAMPLE_TOKENS
    if facts.generation.get("max_length") is not None:
        return f"max_length={min(room, positions or room)}"
    new = EXAMPLE_TOKENS
    if positions is not None:
        new = max(1, min(new, positions - (room - new)))
    return f"max_new_tokens={new}"


def _data_rows(facts: Facts) -> Iterator[tuple[str, str | None]]:
    run = facts.run
    if run is None:
        return
    data, counts, source = run.data, facts.corpus, source_of(run.data)
    yield "Corpus", source.title()
    yield from source.details(facts.provenance)
    yield "Licence", source.licence
    yield "How to cite", source.citation
    for name, part in (("For training", "training"), ("Held out", "heldout")):
        if part in counts:
            yield name, _counted(counts[part])
    if data.max_documents:
        yield "Taken", f"the first {data.max_documents:,} documents"
    yield "Sequence length", f"{data.tokens_per_sample:,} tokens{_written(run)}"
    for number, stage in enumerate(data.stages, start=1):
        length = stage.sequence_length or data.tokens_per_sample
        until = f"for {stage.tokens:,} tokens" if stage.tokens else "to the end"
        yield f"Stage {number}", f"samples of {length:,} tokens, {until}"


def _written(run: RunConfig) -> str:
    """Return what a decoder writes of a sample, in words; nothing where there is none."""
    written = run.tokens_per_sample - run.data.tokens_per_sample
    return f" read by the encoder, {written:,} written by the decoder" if written else ""


def _counted(part: Mapping[str, Any]) -> str:
    """Return what data.json counts of training or held-out documents, in words."""
    documents, tokens = part["documents"], part["tokens"]
    if not documents:
        return "nothing"
    text = f"{documents:,} documents, {tokens:,} tokens"
    if samples := part.get("samples"):
        text += f" in {samples:,} samples"
    if left_out := part.get("tokens_left_out"):
        text += f"; {left_out:,} tokens more are in none"
    return text


def _training_rows(facts: Facts) -> Iterator[tuple[str, str | None]]:
    run, step = facts.run, facts.step
    if facts.samples is not None and facts.tokens is not None and step is not None:
        yield "Seen", f"{facts.samples:,} samples, {facts.tokens:,} tokens, {step:,} steps"
        yield "Epochs", f"{epochs:.2g}" if (epochs := _epochs(facts)) else None
    elif step is not None:
        yield "Steps", f"{step:,}"
    if run is None:
        return
    trainer, precision = run.trainer, run.precision
    first, over = trainer.batch_warmup_from, trainer.batch_warmup_samples
    grown = "" if first is None else f", grown from {first:,} over the first {over:,} samples"
    yield "Batch", f"{trainer.global_batch_size:,} samples{grown}"
    yield "Adapter", _adapter(facts, run)
    yield "Optimizer", _optimizer(run)
    warmup = f", warm-up of {trainer.warmup_steps:,} steps" if trainer.warmup_steps else ""
    if trainer.warmup_fraction:
        warmup = f", warm-up over {100 * trainer.warmup_fraction:.2g}% of the steps"
    falls = trainer.decay_shape != "cosine" and trainer.decay_fraction > 0
    shape = f" ({trainer.decay_shape} decay)" if falls else ""
    floor = trainer.min_learning_rate_ratio
    end = f" down to {floor * trainer.learning_rate:g}" if floor else ""
    yield (
        "Learning rate",
        f"{trainer.learning_rate:g} at its peak, {trainer.lr_scheduler}{shape}{end}{warmup}",
    )
    yield "Weight decay", f"{trainer.weight_decay:g}"
    yield "Gradient norm", f"at most {trainer.max_grad_norm:g}" if trainer.max_grad_norm else None
    fp8 = f" with matrix products in fp8 ({precision.fp8_recipe})" if precision.fp8_recipe else ""
    yield (
        "Precision",
        f"{precision.compute_dtype} compute{fp8}, {precision.reduce_dtype} reduction, "
        f"{precision.master_dtype} master weights and moments",
    )
    ranks = facts.world_size or facts.provenance.get("world_size")
    yield "Strategy", run.strategy.description + (f" on {ranks} rank(s)" if ranks else "")
    yield "Seed", str(run.seed)
    yield "Resumed", f"{facts.resumes} time(s)" if facts.resumes else None
    yield "Time", _times(facts)


def _adapter(facts: Facts, run: RunConfig) -> str | None:
    """Return what was trained beside the weights; None where they were trained themselves."""
    section = run.adapter
    if section.trains_all:
        return None
    words = {"peft_type": "IA3" if section.kind == "ia3" else "LORA"}
    rank, alpha = getattr(section, "rank", None), getattr(section, "alpha", None)
    text = adapter_in_words(
        {**words, "use_dora": section.kind == "dora", "r": rank, "lora_alpha": alpha}
    )
    count = f" ({facts.trained:,} parameters)" if facts.trained else ""
    bits = quantization_of(run.model)
    if bits == NOT_QUANTIZED:
        return f"{text}{count}, merged into the weights"
    packed = f"beside weights in {bits.removesuffix('bit')} bits"
    return f"{text}{count}, trained {packed}, merged into them as they were before"


def _measured_packed(run: RunConfig) -> str:
    bits = quantization_of(run.model).removesuffix("bit")
    return (
        f"Measured in training, beside weights in {bits} bits. Those here are not packed, and give "
        "somewhat other values."
    )


def adapter_in_words(settings: Mapping[str, Any]) -> str:
    """Return what an adapter is, by its config as peft has it. Pure."""
    if settings.get("peft_type") != "LORA":
        return str(settings.get("peft_type"))
    kind = "DoRA" if settings.get("use_dora") else "LoRA"
    return f"{kind} of rank {settings.get('r')}, alpha {settings.get('lora_alpha'):g}"


def _optimizer(run: RunConfig) -> str:
    trainer = run.trainer
    if trainer.custom_class is not None:
        return code(trainer.custom_class.rpartition(":")[2])
    if not OPTIMIZERS[trainer.optimizer].runs_adamw:
        return trainer.optimizer
    betas = f"betas {trainer.adam_beta1:g} and {trainer.adam_beta2:g}"
    return f"{trainer.optimizer}, {betas}, epsilon {trainer.adam_epsilon:g}"


def _times(facts: Facts) -> str | None:
    """Return how long the training took, and the whole of it where nothing interrupted it."""
    training, ended = facts.curve.training_seconds, facts.curve.last_logged_at
    if training is None or ended is None:
        return None
    text = f"{duration(training)} of training"
    try:
        started = datetime.datetime.fromisoformat(facts.provenance["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return text
    whole = ended - started
    if facts.resumes or whole < training:
        return text
    return f"{text}, {duration(whole)} with start, evaluations and saves"


def _results(facts: Facts, *, has_picture: bool) -> str:
    points = facts.curve.points
    lines = []
    if measured := _measured(facts):
        lines += ["## On held-out documents", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in measured.items()]
        if facts.run is not None and quantization_of(facts.run.model) != NOT_QUANTIZED:
            lines += ["", _measured_packed(facts.run)]
        lines += [""]
    losses = {
        "training loss": [(p.loss, p.step) for p in points if p.loss is not None],
        "evaluation loss": [(p.eval_loss, p.step) for p in points if p.eval_loss is not None],
    }
    if any(losses.values()):
        lines += ["## Losses", ""]
        lines += ["| | last | lowest |", "|---|---|---|"]
        for name, values in losses.items():
            if values:
                cells = [f"{loss:.4f} at step {step:,}" for loss, step in (values[-1], min(values))]
                lines += [f"| {name} | {' | '.join(cells)} |"]
        lines += [""]
        if has_picture:
            lines += [f"![Loss over the steps of the training]({PICTURE})", ""]
        lines += ["| step | tokens | training loss | evaluation loss |", "|--:|--:|--:|--:|"]
        lines += [f"| {' | '.join(row)} |" for row in curve.table(points)]
    return "\n".join(lines).rstrip()


def _machine_rows(facts: Facts) -> Iterator[tuple[str, str | None]]:
    hardware = facts.provenance.get("hardware", {})
    if hardware:
        gpus = Counter(hardware.get("gpus", []))
        nodes = facts.run.launcher.nodes if facts.run is not None else 1
        yield "Nodes", f"{nodes:,}, of which one is" if nodes > 1 else None
        yield "GPUs", ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none"
        yield "CPU cores", str(hardware.get("cores", "")) or None
        memory = hardware.get("memory_bytes")
        yield "Memory", f"{memory / 2**30:.0f} GiB" if memory else None
        yield "CUDA", hardware.get("cuda")
    versions = facts.provenance.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "Versions", named or None
    yield "Commit", facts.provenance.get("commit")


# --- limits: what follows from the facts, no more -------------------------------------------------


def _limits(facts: Facts) -> Iterator[str]:
    run, task = facts.run, _task(facts)
    if task == "text-generation":
        yield (
            "A base model: it continues text. It is not tuned to follow instructions or to hold "
            "a conversation, and nothing prevents false or harmful statements."
        )
    elif run is not None and run.objective.kind == "diffusion":
        yield (
            "A base model of masked diffusion: it fills any masks of a text, and writes by filling "
            "masks only. It is not tuned to follow instructions, and nothing prevents false or "
            "harmful statements."
        )
        if _measured(facts):
            yield (
                "Its loss on held-out documents is an estimate of an upper bound of the negative "
                "log-likelihood of a token, and the perplexity that of such a bound."
            )
    elif task == _WRITES_SPANS:
        yield (
            "A base model of span corruption: it writes what is missing in a text at <extra_id_0> "
            "and so on. It is not tuned for any task, and nothing prevents false or harmful "
            "statements."
        )
    elif task == "fill-mask":
        yield "A masked model: it fills single masks and gives representations; it does not write."
    if run is None:
        yield (
            "It is not known what it was trained on, so its languages, its biases, the licence "
            "of its data and its quality are not known either."
        )
        return
    yield from _limits_of_size(facts)
    yield source_of(run.data).limits()
    if positions := _untrained_positions(run):
        yield positions
    if _measured(facts):
        yield (
            "It was evaluated on documents of the same corpus alone, chosen by a hash of their "
            "text, and on no benchmark of any task."
        )
    else:
        yield "These weights were not evaluated on text that they were not trained on."
    if facts.dtype != "fp32":
        yield f"The weights are rounded to {facts.dtype}; training kept them in a higher precision."
    allow = "its data and the weights it began with allow" if facts.base_model else "its data allow"
    yield f"No licence is given for it: anyone who publishes it has to choose one that {allow}."


def _limits_of_size(facts: Facts) -> Iterator[str]:
    run = facts.run
    assert run is not None
    if run.model.kind != "pretrained" and facts.parameters and facts.tokens:
        sizes = f"{_rounded(facts.parameters)} parameters and {_rounded(facts.tokens)} tokens"
        ratio = facts.tokens / facts.parameters
        if ratio < COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER:
            yield (
                f"{sizes}: that is {ratio:.2g} tokens per parameter, where about "
                f"{COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER} are the best use of the same compute "
                "(arXiv 2203.15556). It has seen too little to know much."
            )
        else:
            yield f"{sizes}: it has learned from no more than that."
    if (epochs := _epochs(facts)) and epochs >= MANY_EPOCHS:
        yield (
            f"It has seen its corpus {epochs:.1f} times, and may repeat passages of it verbatim."
        )


def _untrained_positions(run: RunConfig) -> str | None:
    """Return what to say where samples were shorter than the positions that the model has."""
    positions = run.model.max_sequence_length
    if run.model.kind == "pretrained" or positions is None:
        return None
    if run.data.longest_sample >= positions:
        return None
    return (
        f"It was trained on samples of {run.data.longest_sample:,} tokens; its positions from "
        f"there to {positions:,} are untrained."
    )


# --- words ----------------------------------------------------------------------------------------


def _name(facts: Facts) -> str:
    if facts.run is not None:
        return facts.run.name
    return f"{facts.config_json.get('model_type', 'language')} model"


_WRITES_SPANS = "text2text-generation"


def _task(facts: Facts) -> str | None:
    """Return the hub's name of what the model does; None for an architecture of another kind."""
    if facts.run is not None and facts.run.objective.is_encoder_decoder:
        return _WRITES_SPANS
    if facts.run is not None:
        return "fill-mask" if facts.run.objective.is_masked else "text-generation"
    names = [str(name) for name in facts.config_json.get("architectures") or []]
    if any(name.endswith("ForMaskedLM") for name in names):
        return "fill-mask"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "text-generation"
    if facts.config_json.get("is_encoder_decoder"):
        return _WRITES_SPANS
    return None


_EVALUATED = ("eval_loss", "eval_perplexity", "eval_masked_accuracy", "eval_own_loss")


def _measured(facts: Facts) -> dict[str, float]:
    """Return what was evaluated with these weights; of a step without a note, what was logged."""
    metrics = facts.metrics
    if not metrics and facts.averaged is None:
        logged = {p.step: p.eval_loss for p in facts.curve.points if p.eval_loss is not None}
        metrics = {"eval_loss": logged[facts.step]} if facts.step in logged else {}
    return {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in metrics.items()
        if name in _EVALUATED and math.isfinite(value)
    }


def _epochs(facts: Facts) -> float | None:
    """Return how often each sample was seen, where all were seen equally often."""
    if facts.run is not None and (
        facts.run.data.stages or any(w != 1 for w in source_of(facts.run.data).weights)
    ):
        return None
    an_epoch = facts.corpus.get("training", {}).get("samples_per_epoch")
    return facts.samples / an_epoch if facts.samples and an_epoch else None


def _table(title: str, rows: Iterator[tuple[str, str | None]]) -> str:
    known = [(name, _cell(value)) for name, value in rows if value]
    if not known:
        return f"## {title}\n\nNot known."
    return "\n".join(
        [
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in known),
        ]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _rounded(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
