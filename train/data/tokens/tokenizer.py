"""The run's tokenizer: trained on its corpus, or a fast one from the hub; saved with the run."""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from shardwright.train.config import (
    ByteBpeTokenizer,
    PretrainedTokenizer,
    RunConfig,
    SpanCorruptionObjective,
)
from shardwright.train.data.sources.corpus import read_corpus
from shardwright.train.data.tokens import sentinels
from shardwright.train.data.tokens.cache import build_once, cache_root, fingerprint, flush
from shardwright.train.data.tokens.pretrained import TOKENIZER_CONFIG, pretrained
from shardwright.train.data.tokens.spelling import Trained
from shardwright.train.data.tokens.training import LONGEST_IN_WORDPIECE, LONGEST_WORD, train
from shardwright.train.errors import UserError
from shardwright.train.model.vocabulary import vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TRAINING_FORMAT = 3
log = logging.getLogger(__name__)


class SpecialIds(NamedTuple):
    """Ids that frame a sample."""

    begin: int
    """Put before a masked sample: CLS, or else BOS."""
    end: int
    """Ends a document, and a masked sample: SEP for mlm, EOS for clm."""
    pad: int
    mask: int | None


def ensure_tokenizer(
    config: RunConfig, directory: Path, identity: dict[str, Any]
) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in ``directory``, putting it there first if it is not.

    ``identity`` is the corpus's, under which a trained one is cached. What trains is always what
    was saved. Raises UserError where the tokenizer does not fit the objective or the model.
    """
    if not directory.exists():
        settings = config.tokenizer
        if isinstance(settings, PretrainedTokenizer):
            tokenizer = pretrained(settings)
        else:
            tokenizer = _wrap(_trained(config, settings, identity), config, settings)
        check_fits(tokenizer, config)
        for line in unused(tokenizer, config):
            log.warning(line)
        _publish(tokenizer, directory)
    return load_tokenizer(config, directory)


def load_tokenizer(config: RunConfig, directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a run directory holds."""
    if config.tokenizer.kind != "pretrained":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(directory)
    # The one place that loads torch: AutoTokenizer knows models.
    from transformers import AutoTokenizer

    from shardwright.train.model import remote_code

    trusted = config.tokenizer.trust_remote_code
    with remote_code.one_at_a_time() if trusted else nullcontext():
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
    assert tokenizer.is_fast, "none else is saved"
    return cast("PreTrainedTokenizerFast", tokenizer)


def content_hash(directory: Path) -> str:
    """Return a hash of what a saved tokenizer does, whatever the order of its JSON keys."""
    return fingerprint(json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")))


def special_ids(tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> SpecialIds:
    """Return the ids that frame samples; raise UserError where the tokenizer lacks one."""
    masked = config.objective.is_masked
    first = [tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    last = [tokenizer.sep_token_id, tokenizer.eos_token_id]
    end = _first_of(last if masked else last[::-1])
    if end is None:
        raise UserError(
            f"tokenizer={_name(config)}: it has neither an EOS nor a SEP token to end documents "
            f"with; {_name_an_end(tokenizer, config)}, or choose another tokenizer"
        )
    if masked and tokenizer.mask_token_id is None:
        raise UserError(
            f"tokenizer={_name(config)}: it has no mask token, which "
            f"objective={config.objective.kind} needs; choose a tokenizer of a masked model, one "
            "that is trained, such as tokenizer=byte_bpe, or objective=clm"
        )
    begin, pad = _first_of(first), tokenizer.pad_token_id
    return SpecialIds(
        begin=end if begin is None else begin,
        end=end,
        pad=end if pad is None else pad,
        mask=tokenizer.mask_token_id,
    )


def _name_an_end(tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> str:
    """Return where to say which token ends a document: tokenizer.json alone does not."""
    path = Path(_name(config)) / TOKENIZER_CONFIG
    if not path.parent.is_dir():
        return f"save it in a directory, whose {TOKENIZER_CONFIG} can name one as eos_token"
    verb = "add to" if path.is_file() else "write into"
    special = [
        added.content
        for _, added in sorted(tokenizer.backend_tokenizer.get_added_tokens_decoder().items())
        if added.special
    ]
    ends = [token for token in special if re.search(r"end|eo[std]|</s>|sep", token, re.IGNORECASE)]
    known = f" (its special tokens are {', '.join(special[:8])})" if special else ""
    value = json.dumps({"eos_token": ends[0] if ends else "..."}, ensure_ascii=False)
    return f"{verb} {path} which of its tokens does{known}, as {value}"


class Frame(NamedTuple):
    """What surrounds each document in the stream of tokens."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    note: str
    """Says so in words."""


def document_frame(tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> Frame:
    """Return what the tokenizer's own post-processor puts around a text, so that documents begin
    as prompts do; where it puts nothing after it, documents end with the declared end.

    For mlm each sample has its frame, and documents in it are set apart by the end alone.
    """
    ids = special_ids(tokenizer, config)
    before, after = _put_around(tokenizer.backend_tokenizer)

    def framed(what: str, first: tuple[int, ...], last: tuple[int, ...]) -> str:
        names = [tokenizer.convert_ids_to_tokens(list(part)) for part in (first, last)]
        return " + ".join([*names[0], what, *names[1]])

    if config.objective.is_masked:
        note = f"each sample is {framed('tokens', (ids.begin,), (ids.end,))}"
        if not config.data.line_by_line:
            note += f", and a document in it ends with {tokenizer.convert_ids_to_tokens(ids.end)}"
        if (before, after) != ((ids.begin,), (ids.end,)):
            note += (
                f"; in use the tokenizer itself makes {framed('text', before, after)} of a text, "
                "which is not what the model is trained on"
            )
        return Frame((), (ids.end,), note)
    note = f"each document is {framed('text', before, after or (ids.end,))}"
    if not after:
        note += " (the tokenizer itself puts nothing after a text)"
    elif ids.end not in after:
        end = tokenizer.convert_ids_to_tokens(ids.end)
        note += f"; none ends with {end}, at which generation stops"
    if isinstance(config.objective, SpanCorruptionObjective):
        counts = config.objective.counts(config.data.tokens_per_sample)
        note += (
            f"; a sample is {counts.window:,} tokens of these, {counts.noise:,} of them in "
            f"{counts.spans:,} spans to be predicted"
        )
    return Frame(before, after or (ids.end,), note)


def _put_around(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a post-processor puts before and after a text."""
    from tokenizers import AddedToken

    copy = whole_texts(backend)
    # Any text would do that is one token at least, which no ordinary one is to every tokenizer.
    probe = secrets.token_hex(16)
    copy.add_tokens([AddedToken(probe, normalized=False)])
    encoding = copy.encode(probe)
    inside = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    return tuple(encoding.ids[: inside[0]]), tuple(encoding.ids[inside[-1] + 1 :])


def whole_texts(backend: Tokenizer) -> Tokenizer:
    """Return a copy that neither pads nor cuts: a saved tokenizer may have been told to."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def control_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids that mean something to a model and that no text may spell, sorted."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    return tuple(sorted(special | set(tokenizer.all_special_ids)))


def check_fits(tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> None:
    """Raise UserError where the tokenizer cannot serve the objective or the model's embedding."""
    special_ids(tokenizer, config)
    sentinels.check(tokenizer, config, _name(config))
    _check_unknown(tokenizer, config)
    rows, wanted = config.model.rows_asked_for, vocabulary_size(tokenizer)
    if rows is None:
        # The embedding comes with the weights, or with a config; whoever reads them compares.
        return
    if wanted > rows:
        raise UserError(
            f"tokenizer={_name(config)} has ids up to {wanted - 1}, but model.vocab_size="
            f"{config.model.vocabulary} gives the embedding {rows} rows; "
            f"set model.vocab_size={wanted} or choose a smaller tokenizer"
        )


def _check_unknown(tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> None:
    """Raise UserError where the tokenizer stops at what its vocabulary does not have."""
    try:
        # For private use, so that it is in no vocabulary.
        tokenizer.backend_tokenizer.encode("a\ue000b \ue001")
    except Exception as error:  # tokenizers raises nothing else
        raise UserError(
            f"tokenizer={_name(config)}: it has no token for unknown text ({error}); give its "
            "model an unk_token that is in its vocabulary, or choose another tokenizer"
        ) from None


def unused(tokenizer: PreTrainedTokenizerFast, config: RunConfig) -> Iterator[str]:
    """Yield what was asked for and will not be used: tokens, and rows of the embedding. Pure."""
    found = len(set(tokenizer.get_vocab().values()))
    if config.tokenizer.kind != "pretrained":
        wanted = wanted_vocabulary(config, config.tokenizer)
        few = getattr(config.tokenizer, "min_frequency", None)
        what = f"pairs that occur tokenizer.min_frequency={few} times" if few else "parts of words"
        if found < wanted:
            yield (
                f"tokenizer={_name(config)} has {found:,} tokens instead of {wanted:,}: the "
                f"training documents hold no more {what}"
            )
    rows = config.model.vocabulary
    if rows is not None and found < rows:
        yield (
            f"model.vocab_size={rows} gives the embedding {rows - found:,} rows that no token "
            f"uses; model.vocab_size={vocabulary_size(tokenizer)} is enough for tokenizer="
            f"{_name(config)}"
        )


def wanted_vocabulary(config: RunConfig, settings: Trained) -> int:
    """Return how many tokens a tokenizer is to have; raise UserError at too few."""
    marks = len(sentinels.added_to(config))
    smallest = settings.smallest_vocabulary + marks
    if settings.vocab_size is not None:
        if marks and settings.vocab_size < smallest:
            raise UserError(
                f"tokenizer.vocab_size={settings.vocab_size}, but {_needed(settings, marks)} need "
                f"{smallest}; raise it"
            )
        return settings.vocab_size
    wanted = config.model.vocabulary
    if wanted is None:
        raise UserError(
            "tokenizer.vocab_size=null takes the model's vocabulary, which the config.json of "
            f"model.name={getattr(config.model, 'name', None)} does not say here; set "
            "model.vocab_size or tokenizer.vocab_size"
        )
    if wanted < smallest:
        raise UserError(
            f"tokenizer.vocab_size=null takes model.vocab_size={wanted}, but "
            f"{_needed(settings, marks)} need {smallest}; raise model.vocab_size"
        )
    return wanted


def _needed(settings: Trained, marks: int) -> str:
    """Return in words what a vocabulary holds before anything is learned. Pure."""
    parts = [
        *(["256 bytes"] if settings.needs_bytes else []),
        *([f"{marks} sentinels"] if marks else []),
        "the special tokens",
    ]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _trained(config: RunConfig, settings: Trained, identity: dict[str, Any]) -> Path:
    """Return the cached tokenizer.json, training it where there is none."""
    vocab_size = wanted_vocabulary(config, settings) - len(sentinels.added_to(config))

    def build(directory: Path) -> dict[str, Any]:
        texts = (p.text for p in read_corpus(config.data, root) if not p.held_out)
        counts: Counter[str] = Counter()
        first = _first_bytes(texts, settings.max_training_bytes)
        trained = train(settings, first, vocab_size, counts)
        if counts["cut"]:
            log.warning(
                "the tokenizer was trained with %s words cut that are longer than %s "
                "characters: text without spaces would take hours; the model is given them whole",
                f"{counts['cut']:,}",
                f"{LONGEST_WORD:,}",
            )
        if counts["unknown"]:
            log.warning(
                "%s words are longer than %s characters, which tokenizer=wordpiece takes for "
                "unknown ones",
                f"{counts['unknown']:,}",
                LONGEST_IN_WORDPIECE,
            )
        trained.save(str(directory / "tokenizer.json"))
        return {"tokens": trained.get_vocab_size()}

    root = cache_root(config.data)
    what = {
        "format": TRAINING_FORMAT,
        "corpus": identity,
        "vocab_size": vocab_size,
        "settings": settings.model_dump(mode="json", exclude={"vocab_size"}),
        "trained_by": {name: version(name) for name in settings.trained_by},
    }
    return build_once(root / "tokenizers", fingerprint(what), build).path / "tokenizer.json"


def _first_bytes(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    left = limit_bytes
    for text in texts:
        encoded = text.encode()
        if len(encoded) >= left:
            yield encoded[:left].decode(errors="ignore")
            return
        left -= len(encoded)
        yield text


def _wrap(path: Path, config: RunConfig, settings: Trained) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(path))
    begin, pad, end, unknown, mask = settings.special_tokens
    masked, marks = config.objective.is_masked, sentinels.added_to(config)
    ends = config.objective.is_encoder_decoder
    if (around := _post_processor(settings, frames=masked, ends=ends)) is not None:
        tokenizer.post_processor = around
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        cls_token=begin,
        pad_token=pad,
        eos_token=end,
        sep_token=end,
        unk_token=unknown,
        mask_token=mask,
        **({"extra_special_tokens": list(marks)} if marks else {}),
        model_max_length=config.model.max_sequence_length or config.data.longest_sample,
        # Token types would reach GPT-2's word embedding, and ModernBERT knows none.
        model_input_names=["input_ids", "attention_mask"],
        # Prompts of different lengths have to end together to be continued together.
        padding_side="right" if masked or ends else "left",
        clean_up_tokenization_spaces=False,
    )


def _post_processor(settings: Trained, *, frames: bool, ends: bool) -> Any:
    """Return what is put around a text in use: as around a sample of a masked model, or nothing.

    A causal model's prompt is the beginning of a document, and documents are trained on so. What an
    encoder reads before a decoder writes has an end alone.
    """
    from tokenizers import processors

    begin, _, end, *_ = settings.special_tokens
    first, last = settings.special_tokens.index(begin), settings.special_tokens.index(end)
    is_bytes = isinstance(settings, ByteBpeTokenizer)
    if ends:
        return processors.TemplateProcessing(single=["$A", end], special_tokens=[(end, last)])
    if not frames:
        return processors.ByteLevel(trim_offsets=True) if is_bytes else None
    if is_bytes:
        return processors.RobertaProcessing((end, last), (begin, first), add_prefix_space=False)
    return processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, "$B:1", f"{end}:1"],
        special_tokens=[(begin, first), (end, last)],
    )


def _publish(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save under a temporary name, then rename; where another rank was first, keep its copy."""
    from shardwright.train.model import older

    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    try:
        older.save_tokenizer(tokenizer, temporary)
        for path in temporary.iterdir():
            flush(path)
        temporary.rename(directory)
    except OSError:
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a kill has left of copies of a tokenizer; for one rank, once all have theirs."""
    for path in directory.parent.glob(f".{directory.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _first_of(ids: list[int | None]) -> int | None:
    return next((i for i in ids if i is not None), None)


def _name(config: RunConfig) -> str:
    return getattr(config.tokenizer, "name", config.tokenizer.kind)
