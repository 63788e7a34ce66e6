"""The story of a recovery: a checkpoint of any engine becomes a Hugging Face model directory."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedModel

from shardwright.train.checkpoint.choose import Chosen, Step, choose
from shardwright.train.checkpoint.format import damage
from shardwright.train.checkpoint.format.layout import MANIFEST
from shardwright.train.checkpoint.format.lazy import LazyTensor, Unreadable, describe
from shardwright.train.checkpoint.read import merged
from shardwright.train.console import progress
from shardwright.train.durable import atomic_directory, temporary_of
from shardwright.train.errors import UserError
from shardwright.train.export import adapter_files
from shardwright.train.export import safetensors as whole
from shardwright.train.export.card import Card, average_in_words, recovered_card
from shardwright.train.export.card_text import adapter_in_words
from shardwright.train.export.contents import DTYPES, Contents, contents
from shardwright.train.model import adapter_base, generation, remote_code
from shardwright.train.model.directory import (
    CONFIG,
    GENERATION_CONFIG,
    architecture,
    auto_class,
    check_loads,
    on_meta,
    parsed_config,
)
from shardwright.train.model.user_modules import import_for
from shardwright.train.process.cores import usable_cores
from shardwright.train.process.memory import peak_resident_bytes, resident_bytes
from shardwright.train.run_directory.names import TOKENIZER_FOLDER
from shardwright.train.units import counted, size

MAX_MEMORY_BYTES = 2**29

# What transformers' tokenizers are read from: one of the first, and what may lie beside it.
_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_BESIDE_VOCABULARIES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Options:
    """What a user may ask for."""

    source: Path
    """A checkpoint of any kind, or a directory of checkpoints."""
    out: Path
    step: Step = None
    section: str | None = None
    """The keys that lead to the weights in another program's files, such as trainer.model."""
    dtype: str = "fp32"
    adapter: bool = False
    """Write the adapter of a run by itself, as peft keeps it; else it is merged."""
    base: Path | None = None
    """Where the model lies now beside which an adapter was trained, if its checkpoints lack it."""
    ema: bool = False
    """Take the moving average of the weights."""
    allow_upcast: bool = False
    """Write fp32 even where the checkpoint has 16 bits only."""
    allow_nan: bool = False
    max_shard_bytes: int = whole.MAX_SHARD_BYTES
    max_memory_bytes: int = MAX_MEMORY_BYTES
    """Above what the interpreter's imports take."""
    config: Path | None = None
    """A config.json, or the directory of one."""
    tokenizer: Path | None = None
    """A directory of a tokenizer, or a tokenizer.json."""
    trusts_code: bool = False
    """Run Python code that the model brings along."""
    imports: tuple[str, ...] = ()
    """Modules that register the model's classes, besides those that its run names."""
    dry_run: bool = False


def recover(options: Options, out: TextIO, err: TextIO) -> None:
    """Write the model directory ``options.out``, or with ``dry_run`` say what would be written.

    What is done goes to ``out``, warnings and progress bars to ``err``. Raises UserError, before
    the first byte wherever that can be known; nothing is left of the directory then.
    """
    began, memory = time.monotonic(), _Memory()
    _check_out(options.out)
    budget = _budget(options.max_memory_bytes)
    chosen = _chosen(options, err)
    _check_apart(options.out, chosen.path)
    if options.adapter and options.base is not None:
        raise UserError(f"--adapter reads nothing of --base={options.base}; leave one of them out")
    if options.adapter:
        _write_adapter(options, chosen, out)
        return
    config_path = _config_path(options, chosen)
    with memory.of_imports():
        import_for(chosen.run_dir, options.imports)
        model_class = architecture(config_path, trusts_code=options.trusts_code)
    model = on_meta(model_class, config_path, trusts_code=options.trusts_code)
    found = _contents(options, chosen, model)
    tokenizer = _tokenizer_files(options, chosen)
    for note in [*found.notes, *([] if tokenizer else [_NO_TOKENIZER])]:
        print(f"warning: {note}", file=err)
    plan = whole.plan(found.outputs, options.max_shard_bytes, found.places)
    free_bytes = _free_bytes(options.out)
    print(_summary(options, chosen, model, found, plan, budget, free_bytes), file=out, flush=True)
    _check_disk(options.out, plan.bytes, free_bytes)
    if options.dry_run:
        return

    beside = _beside_the_weights(options, chosen, found, config_path, tokenizer, err)
    with _writing(options.out) as directory:
        writer = whole.Writer(directory, plan, allow_nan=options.allow_nan, past_cache=True)
        with _bar("writing", err, plan.tensor_bytes) as advance:
            whole.stream(found.tensors, writer, budget, advance)
        writer.flush()
        beside.write(directory)
        loader = auto_class(model_class, beside.config)
        check_loads(directory, loader, trusts_code=options.trusts_code)
    seconds = time.monotonic() - began
    print(
        f"{options.out}: {found.parameters:,} parameters, {size(plan.bytes)} in {seconds:.1f} s, "
        f"peak memory {_mebibytes(memory.peak_bytes())} above the imports' "
        f"{_mebibytes(memory.imports_bytes)}",
        file=out,
    )


# --- what can be known before the first byte ----------------------------------------------------


def _chosen(options: Options, err: TextIO) -> Chosen:
    """Return the checkpoint to take, read as far as its hashes tell that it is whole."""
    with _bar("checking hashes", err) as advance, _naming_damage(options.source):
        return choose(
            options.source,
            options.step,
            lambda text: progress.write(text, err),
            advance,
            options.section,
        )


def _contents(options: Options, chosen: Chosen, model: PreTrainedModel) -> Contents:
    """Return what of the checkpoint goes into the model directory; its files are long enough."""
    state = chosen.state
    if chosen.manifest is not None:
        if options.base is not None and chosen.manifest.base is None:
            raise UserError(
                f"--base: {chosen.path} holds all weights and reads none of {options.base}; leave "
                "it out"
            )
        state = adapter_base.completed(state, chosen.manifest, model, chosen.path, options.base)
    if chosen.manifest is not None and chosen.manifest.adapter is not None:
        state = merged.merged(state, chosen.manifest.adapter)
    try:
        check_extents([*state.weights.values(), *state.buffers.values(), *state.ema.values()])
    except Unreadable as error:
        raise UserError(str(error)) from None
    return contents(
        model,
        state,
        DTYPES[options.dtype],
        ema=_takes_average(options, chosen),
        allow_upcast=options.allow_upcast,
    )


def _check_out(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    raise UserError(f"{path} exists already; give a directory that does not, or remove it")


@contextmanager
def _naming_damage(source: Path) -> Iterator[None]:
    """Where a directory of whole weights cannot be read, say which file is damaged, and how."""
    try:
        yield
    except UserError:
        is_foreign = source.is_file() or (source.is_dir() and not (source / MANIFEST).is_file())
        if is_foreign and (problem := next(damage.problems(source), None)):
            raise UserError(problem) from None
        raise


def _check_apart(out: Path, checkpoint: Path) -> None:
    """Raise UserError where the output would lie in a checkpoint, which is whole as it is."""
    if Path(os.path.abspath(out)).is_relative_to(checkpoint):
        raise UserError(f"{out} is inside the checkpoint {checkpoint} itself; choose another place")


def _budget(max_memory_bytes: int) -> whole.Budget:
    if max_memory_bytes < whole.LEAST_MEMORY_BYTES:
        raise UserError(
            f"--max-memory={max_memory_bytes} bytes are too few; give at least "
            f"{-(-whole.LEAST_MEMORY_BYTES // 2**20)}MiB"
        )
    return whole.budget(max_memory_bytes, len(usable_cores()))


def _config_path(options: Options, chosen: Chosen) -> Path:
    if options.config is not None:
        path = options.config / CONFIG if options.config.is_dir() else options.config
        if not path.is_file():
            raise UserError(f"--config={options.config}: {path} does not exist")
        return path
    places = [chosen.path / CONFIG, chosen.path.parent / CONFIG]
    for path in places:
        if path.is_file():
            return path
    raise UserError(
        f"{chosen.path} does not say which model it holds: neither {places[0]} nor {places[1]} "
        "is there; give the model's config.json, or its directory, with --config"
    )


def _config_as_written(path: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the model's config with the dtype that its weights are to have, and its code."""
    config = {**parsed_config(path), "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)  # its name before transformers 5
    code = remote_code.beside(path.parent, config)
    there = {
        key: reference
        for key, reference in remote_code.own(config).items()
        if f"{reference.partition('.')[0]}.py" in code
    }
    config.pop(remote_code.AUTO_MAP, None)
    return {**config, remote_code.AUTO_MAP: there} if there else config, code


def _generation_config(
    config_path: Path, say: Callable[[str], object]
) -> tuple[str | None, dict[str, Any]]:
    """Return what to write of the settings beside a config, and the settings themselves.

    As they are, unless transformers refuses some of them, which are left out.
    """
    path = config_path.with_name(GENERATION_CONFIG)
    if not path.is_file():
        return None, {}
    try:
        settings, refused = generation.read(path)
    except ValueError as error:
        say(f"warning: {path} cannot be read ({error}), so none is written")
        return None, {}
    if not refused:
        return path.read_text(encoding="utf-8"), settings.to_diff_dict()
    say(generation.left_out(refused, str(path.parent)))
    return settings.to_json_string(), settings.to_diff_dict()


_NO_TOKENIZER = (
    "there is no tokenizer with the checkpoint, so none is written; add one with --tokenizer"
)


def _tokenizer_files(options: Options, chosen: Chosen) -> list[Path]:
    """Return the files of the tokenizer to copy, none where there is none."""
    if options.tokenizer is not None:
        if options.tokenizer.is_file():
            if problem := damage.problem(options.tokenizer):
                raise UserError(f"--tokenizer: {problem}")
            return [options.tokenizer]
        if files := _tokenizer_in(options.tokenizer):
            return files
        raise UserError(
            f"--tokenizer={options.tokenizer} holds no tokenizer; looked for "
            f"{', '.join(_VOCABULARIES)}"
        )
    of_run = [chosen.run_dir / TOKENIZER_FOLDER] if chosen.run_dir is not None else []
    for directory in (*of_run, chosen.path, chosen.path.parent):
        if files := _tokenizer_in(directory):
            return files
    return []


def _tokenizer_in(directory: Path) -> list[Path]:
    names = (*_VOCABULARIES, *_BESIDE_VOCABULARIES)
    files = [directory / name for name in names if (directory / name).is_file()]
    if not any(file.name in _VOCABULARIES for file in files):
        return []
    if problem := next(filter(None, map(damage.problem, files)), None):
        raise UserError(f"{problem}; or give another tokenizer with --tokenizer")
    return files


def check_extents(tensors: Iterable[LazyTensor]) -> None:
    """Raise UserError where a file ends before what is to be read from it."""
    ends: dict[Path, int] = {}
    for tensor in tensors:
        for fragment in tensor.fragments:
            end = fragment.offset_bytes + fragment.length * tensor.dtype.itemsize
            ends[fragment.path] = max(end, ends.get(fragment.path, 0))
    for path, end in ends.items():
        if (there := path.stat().st_size) < end:
            raise UserError(f"{path} is truncated: it has {there} bytes of at least {end}")


def _free_bytes(out: Path) -> int:
    """Return the free space where ``out`` is to lie, with what an interrupted recovery has left."""
    parent = next(path for path in Path(os.path.abspath(out)).parents if path.is_dir())
    status = os.statvfs(parent)
    left = temporary_of(out)
    stale = sum(path.stat().st_blocks * 512 for path in left.glob("*")) if left.is_dir() else 0
    return status.f_bavail * status.f_frsize + stale


def _check_disk(out: Path, needed_bytes: int, free_bytes: int) -> None:
    if needed_bytes > free_bytes:
        raise UserError(
            f"{out} takes {size(needed_bytes)}, and {size(free_bytes)} are free on its disk; "
            "free some space, choose another place or a narrower --dtype"
        )


def _write_adapter(options: Options, chosen: Chosen, out: TextIO) -> None:
    """Write the adapter of a checkpoint of a run, or with ``dry_run`` say what it is."""
    manifest = chosen.manifest
    if manifest is None or manifest.adapter is None:
        raise UserError(
            f"--adapter: {chosen.path} holds no adapter of a run (adapter=lora, dora or ia3), but "
            "whole weights alone; leave it out"
        )
    words = adapter_in_words(manifest.adapter.config)
    tensors = merged.adapters_tensors(chosen.state)
    what = f"{words}, {len(tensors)} tensors, {sum(t.numel for t in tensors.values()):,} parameters"
    print(f"  from    {chosen.path}\n  to      {options.out}: {what}", file=out, flush=True)
    if not options.dry_run:
        with _writing(options.out) as directory:
            adapter_files.write_files(directory, manifest.adapter, chosen.state)


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Beside:
    """All that a model directory has beside the weights."""

    config: dict[str, Any]
    code: dict[str, Path]
    """Files to copy, by their names in the directory."""
    tokenizer: list[Path]
    generation_text: str | None
    card: Card

    def write(self, directory: Path) -> None:
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (directory / CONFIG).write_text(text, encoding="utf-8")
        for name, file in self.code.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / name)
        for file in self.tokenizer:
            shutil.copyfile(file, directory / file.name)
        if self.generation_text is not None:
            (directory / GENERATION_CONFIG).write_text(self.generation_text, encoding="utf-8")
        self.card.write(directory)


def _beside_the_weights(
    options: Options,
    chosen: Chosen,
    found: Contents,
    config_path: Path,
    tokenizer: list[Path],
    err: TextIO,
) -> _Beside:
    """Return what to write beside the weights; what of it is left out is said."""
    config, code = _config_as_written(config_path, DTYPES[options.dtype])
    generation_text, settings = _generation_config(config_path, lambda t: print(t, file=err))
    card = recovered_card(
        config,
        chosen.origin,
        chosen.step,
        chosen.run_dir,
        chosen.manifest,
        options.dtype,
        found.parameters,
        settings,
        _averaged(options, chosen),
    )
    return _Beside(config, code, tokenizer, generation_text, card)


def _takes_average(options: Options, chosen: Chosen) -> bool:
    """Whether it is asked for, or is what the run has learned."""
    kept = chosen.manifest.average if chosen.manifest is not None else None
    return options.ema or (kept is not None and kept.replaces_weights)


def _averaged(options: Options, chosen: Chosen) -> str | None:
    """Return what a card says of an average; None of weights that are none."""
    kept = chosen.manifest.average if chosen.manifest is not None else None
    if not _takes_average(options, chosen):
        return None
    return "a moving average" if kept is None else average_in_words(kept.kind, kept.taken)


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """Give a directory that becomes ``out`` when the block ends well, and is gone when it does not.

    A file lock keeps two recoveries from writing one; the kernel takes it away with the process.
    """
    try:
        with (
            _locked(temporary_of(out), out),
            atomic_directory(out) as directory,
            _locked(directory, out),
        ):
            yield directory
    except OverflowError as error:
        raise UserError(f"{error}; choose a wider --dtype. {out} is not written") from None
    except FloatingPointError as error:
        raise UserError(f"{error}; --allow-nan writes it anyway. {out} is not written") from None
    except Unreadable as error:
        raise UserError(f"{error}; {out} is not written") from None
    except OSError as error:
        raise UserError(f"{out} is not written: {error}") from None


@contextmanager
def _locked(directory: Path, out: Path) -> Iterator[None]:
    """Hold a directory for this process, where it exists."""
    if not directory.is_dir():
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another recovery is writing {out} now; wait until it has ended") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


# --- what is said -------------------------------------------------------------------------------


def _summary(
    options: Options,
    chosen: Chosen,
    model: PreTrainedModel,
    found: Contents,
    plan: whole.Plan,
    budget: whole.Budget,
    free_bytes: int,
) -> str:
    """Return what is read and what is, or would be, written. Pure."""
    files = counted(len(plan.files), "file")
    step = f", step {chosen.step}" if chosen.step is not None else ""
    average = "average of the weights, " if _takes_average(options, chosen) else ""
    rows = {
        "from": f"{chosen.path}",
        "": f"{chosen.state.origin or 'checkpoint'}{step}",
        "model": f"{type(model).__name__}, {found.parameters:,} parameters",
        "to": f"{options.out}: {average}{options.dtype}, {len(plan.outputs)} tensors in {files}, "
        f"{size(plan.bytes)}",
        "disk": f"{size(free_bytes)} free",
        "memory": f"at most {_mebibytes(options.max_memory_bytes)} above the imports: "
        f"{budget.threads} threads, slices of {_mebibytes(budget.slice_bytes)}",
    }
    return "\n".join(f"  {name:<8}{text}" for name, text in rows.items())


@contextmanager
def _bar(
    what: str, err: TextIO, total_bytes: int | None = None
) -> Iterator[Callable[[int], object]]:
    """Give a function that counts bytes, from any thread."""
    shown = {"total": total_bytes, "unit": "B", "comes_again": True, "console": err}
    with progress.phase(what, **shown) as phase:
        yield phase.advance


class _Memory:
    """The most that this process has had, and how much of it is imported code."""

    def __init__(self) -> None:
        # torch imports more the first time that it saves or loads.
        buffer = io.BytesIO()
        torch.save({}, buffer)
        buffer.seek(0)
        describe(buffer)
        self.imports_bytes = resident_bytes()

    @contextmanager
    def of_imports(self) -> Iterator[None]:
        """Count what the block adds as imports."""
        before = resident_bytes()
        yield
        self.imports_bytes += resident_bytes() - before

    def peak_bytes(self) -> int:
        """Return the peak above the imports."""
        return max(0, peak_resident_bytes() - self.imports_bytes)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
