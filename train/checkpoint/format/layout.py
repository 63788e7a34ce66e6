"""A checkpoint directory: temporary name, manifest last, one rename; and whether it is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shardwright.train.checkpoint.format.junk import is_junk
from shardwright.train.config import Progress
from shardwright.train.durable import flush, publish

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NOT_FINITE = "its weights are not finite"
_OWN_HASH = "manifest_xxh3_128"
VERIFY_THREADS = 8
"""Enough to keep a parallel file system or an NVMe disk busy; reading and hashing free the GIL."""
_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")


def hash_file(path: Path, advance: Callable[[int], object] = lambda read_bytes: None) -> str:
    """Return the xxh3-128 of a file's bytes, in hexadecimal, reading 1 MiB at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def hash_tree(manifest: dict[str, Any]) -> str:
    """Return the xxh3-128 of a manifest's values, its own hash left out, in hexadecimal."""
    values = {name: value for name, value in manifest.items() if name != _OWN_HASH}
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def files_of(directory: Path) -> list[Path]:
    """Return every file below a directory but the manifest, sorted."""
    # Unlike rglob, os.walk bears that another process deletes what it walks through.
    found = (Path(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return sorted(p for p in found if p != directory / MANIFEST and p.is_file())


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the file that makes a checkpoint whole; call it when every other file is flushed."""
    path = directory / MANIFEST
    tree = {"format_version": FORMAT_VERSION, **manifest}
    # No newline at the end, so that not one byte can be cut off unnoticed.
    path.write_text(json.dumps({**tree, _OWN_HASH: hash_tree(tree)}, indent=1))
    flush(path)
    for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        flush(folder)


def publish_checkpoint(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name; one of the same step is replaced only by then.

    Between the two renames the older one lies under the name of `set_aside`, from which
    `retention.remove_leftovers` brings it back.
    """
    old = set_aside(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    publish(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(final: Path) -> Path:
    """Return where a checkpoint lies while another takes its name."""
    return final.with_name(f".{final.name}.old")


# --- reading back -------------------------------------------------------------------------------


class _Part(BaseModel):
    """A part of a manifest; what is not needed here is skipped."""

    model_config = ConfigDict(frozen=True, strict=True)


class FileEntry(_Part):
    bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")


class ScheduleEntry(_Part):
    """Where the schedule of the learning rate has come to."""

    samples: int = Field(ge=0)
    """Samples of the steps that it has counted: in fp16 one that overflows does not count."""
    samples_per_step: float = Field(gt=0)
    """The batch that the run began with."""


class AverageEntry(_Part):
    """The average of the weights that is kept beside them."""

    kind: str
    """As trainer.average_weights calls it, or trainer.optimizer, where that keeps its own."""
    taken: int = Field(ge=1)
    """How often weights were taken."""
    replaces_weights: bool = False
    """Whether it, and not the weights, is what the run has learned."""


class AdapterEntry(_Part):
    """The adapter that is trained beside the weights of another model."""

    config: dict[str, Any]
    """As peft's adapter_config.json has it."""
    scaling: float = 1.0
    """By which the product of LoRA's matrices is multiplied."""
    transposed: list[str] = []
    """The layers whose weight has a row for each input, as transformers' Conv1D has."""
    feedforward: list[str] = []
    """The layers whose inputs IA3 multiplies, not their outputs."""

    @property
    def base(self) -> str:
        """The model whose weights it was trained beside."""
        return str(self.config.get("base_model_name_or_path") or "")


class BaseEntry(_Part):
    """The model whose weights a checkpoint leaves out, as they were quantised for training."""

    name: str
    """Its directory, or what the hub calls it."""
    revision: str | None = None
    seed: int = 0
    """From which is drawn what its files lack."""
    digest: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Of its values in fp32."""


class ParameterEntry(_Part):
    name: str
    """By which the model has it first; tied ones have no entry of their own."""


class Manifest(_Part):
    """What finding, checking and keeping a checkpoint needs of its manifest.json."""

    step: int = Field(ge=0)
    files: dict[str, FileEntry]
    """By path relative to the checkpoint. On node-local storage, those on this node's disk."""
    parameters: list[ParameterEntry] = []
    strategy: dict[str, Any] = {}
    world_size: int = Field(default=1, ge=1)
    samples: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    """Samples of a step of the run that wrote it; older ones do not say it."""
    schedule: ScheduleEntry | None = None
    """Likewise."""
    average: AverageEntry | None = None
    """None where no average was kept, or none had begun."""
    adapter: AdapterEntry | None = None
    """None where all weights are trained."""
    base: BaseEntry | None = None
    """None where the checkpoint holds all weights."""
    metrics: dict[str, float] = {}
    """What was evaluated at this step: eval_loss and so on."""
    finite: bool | None = None
    """Whether no weight is NaN or infinite; None where nobody has looked, in earlier versions."""
    save_id: str = ""
    """The same for all parts of one save, another for every other save."""
    part: int = Field(default=0, ge=0)
    """Which of ``parts`` this is, where each node keeps its files on its own disk."""
    parts: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _files_lie_inside(self) -> Manifest:
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} is not a path inside the checkpoint")
        if self.part >= self.parts:
            raise ValueError(f"part {self.part} of {self.parts}")
        return self

    def progress(self, scheduled_steps: int | None = None) -> Progress:
        """Return where a run stands that is resumed from it.

        ``scheduled_steps`` are those that the schedule has counted, where they are known; without
        them they follow from the samples. An older manifest has neither batch nor schedule: they
        are then those of a run whose batch has never changed.
        """
        if not self.step:
            return Progress()
        mean_batch = self.samples / self.step
        batch_size = self.batch_size or mean_batch
        steps, samples, per_step = scheduled_steps, self.samples, mean_batch
        if self.schedule is not None:
            samples, per_step = self.schedule.samples, self.schedule.samples_per_step
            if steps is None:
                steps = self.step - round((self.samples - samples) / batch_size)
        elif steps is not None:
            samples = round(steps * mean_batch)
        return Progress(
            step=self.step,
            samples=self.samples,
            batch_size=batch_size,
            scheduled_steps=self.step if steps is None else steps,
            scheduled_samples=samples,
            samples_per_scheduled_step=int(per_step) if per_step.is_integer() else per_step,
        )


class NotWhole(ValueError):
    """A directory is no whole checkpoint; the message says why, as in "<path>: <message>"."""


class NotFinite(NotWhole):
    """A checkpoint is as it was written, but its weights are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__(NOT_FINITE)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest alone. Raises NotWhole."""
    try:
        tree = json.loads((checkpoint / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise NotWhole("it has no manifest") from None
    except (OSError, ValueError, RecursionError) as error:
        raise NotWhole(f"its manifest cannot be read ({error})") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if type(version) is not int:
        raise NotWhole("its manifest cannot be read (it names no version of a format)")
    if version != FORMAT_VERSION:
        raise NotWhole(f"its format is version {version}, and this program reads {FORMAT_VERSION}")
    if tree.get(_OWN_HASH) != hash_tree(tree):
        raise NotWhole("its manifest is damaged: its values do not have the hash that it names")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise NotWhole(f"its manifest cannot be read ({problem})") from None
    if step_of(checkpoint) not in (manifest.step, None):
        raise NotWhole(f"its manifest is that of step {manifest.step}")
    return manifest


def step_of(path: Path) -> int | None:
    """Return the step that a directory is named for, or None where it is named otherwise."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def check_sizes(checkpoint: Path) -> Manifest:
    """Return the manifest, once every file that it names is there in its size, and no other.

    Reads the manifest and the directories only. Raises NotWhole, and NotFinite where the manifest
    says so: neither counts for anything.
    """
    manifest = read_manifest(checkpoint)
    if problems := _misplaced(checkpoint, manifest, manifest.files):
        raise NotWhole(next(iter(problems.values())))
    if unknown := list(_unknown(checkpoint, manifest)):
        raise NotWhole(_not_listed(unknown))
    if manifest.finite is False:
        raise NotFinite
    return manifest


def verify(
    checkpoint: Path,
    *,
    share: tuple[int, int] = (0, 1),
    only: Collection[str] | None = None,
    advance: Callable[[int], object] = lambda read_bytes: None,
) -> list[str]:
    """Return what is wrong with each file: missing, unknown, of another size, of another hash.

    Every file is read, on a few threads. ``share`` = (i, n) looks at every n-th file from the i-th
    on, for n ranks that share the work; the first of them also for unknown ones. ``only`` looks at
    the files of these names. ``advance`` is called with the number of bytes just read, from any
    thread.
    """
    try:
        manifest = read_manifest(checkpoint)
    except NotWhole as error:
        return [str(error)]
    index, count = share
    mine = sorted(manifest.files if only is None else only)[index::count]
    if foreign := [name for name in mine if name not in manifest.files]:
        return [f"{name} is not in its manifest" for name in foreign]
    misplaced = _misplaced(checkpoint, manifest, mine)
    if index == 0 and only is None:
        misplaced |= _unknown(checkpoint, manifest)
    names = [name for name in mine if name not in misplaced]

    stopped = threading.Event()

    def count_bytes(read_bytes: int) -> None:
        if stopped.is_set():  # by Ctrl-C, which reaches the main thread only
            raise InterruptedError
        advance(read_bytes)

    def wrong_hash(name: str) -> str | None:
        try:
            found = hash_file(checkpoint / name, count_bytes)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        expected = manifest.files[name].xxh3_128
        return None if found == expected else f"{name} has the hash {found} instead of {expected}"

    with ThreadPoolExecutor(VERIFY_THREADS) as threads:
        try:
            return [*misplaced.values(), *filter(None, threads.map(wrong_hash, names))]
        finally:
            stopped.set()


def _misplaced(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, str]:
    """Return which of some files are missing or of another size."""
    problems = {}
    for name in names:
        entry = manifest.files[name]
        try:
            status = (checkpoint / name).stat()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            problems[name] = f"{name} is missing" if gone else f"{name} cannot be read ({error})"
            continue
        if not stat.S_ISREG(status.st_mode):
            problems[name] = f"{name} is not a file"
        elif status.st_size != entry.bytes:
            problems[name] = f"{name} has {status.st_size} bytes instead of {entry.bytes}"
    return problems


def _unknown(checkpoint: Path, manifest: Manifest) -> dict[str, str]:
    """Return the files that are not in the manifest.

    Shards are found by glob and engines told by their files, so that one more can change what is
    loaded. Only what has one of the names of junk.py may be added: no engine takes it for its own.
    """
    names = (path.relative_to(checkpoint) for path in files_of(checkpoint))
    return {
        name.as_posix(): _not_listed([name.as_posix()])
        for name in names
        if name.as_posix() not in manifest.files and not is_junk(name)
    }


def _not_listed(names: Sequence[str]) -> str:
    return f"{_few(names)} {'is' if len(names) == 1 else 'are'} not in its manifest"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def to_remove(problems: Iterable[str]) -> str | None:
    """Return which files to remove, where nothing but unknown ones is wrong, else None. Pure.

    ``problems`` are those of `verify`, or what `what_is_wrong` has found.
    """
    found = [re.fullmatch(r"(.+) (?:is|are) not in its manifest", text) for text in problems]
    names = [match[1] for match in found if match]
    return _few(names) if names and len(names) == len(found) else None


def remedy(problems: Iterable[str]) -> str:
    """Return what makes a checkpoint whole in which these are wrong. Pure."""
    if names := to_remove(problems):
        return f"remove {names}, which no save has put there"
    return "restore it from a copy"


def whole_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint that `check_sizes` finds whole, oldest first."""
    return [(step, path) for step, path in named(directory) if what_is_wrong(path) is None]


def named(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all that is named as a checkpoint, whole or not, oldest first."""
    try:
        found = [(step_of(path), path) for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((step, path) for step, path in found if step is not None)


def what_is_wrong(checkpoint: Path) -> str | None:
    """Return why `check_sizes` finds a directory to be no whole checkpoint, or None."""
    try:
        check_sizes(checkpoint)
    except NotWhole as error:
        return str(error)
    return None


LOSS_SCALE = "loss_scale.json"
"""In fp16: the scale that the losses had come to."""


TRAINER_STATE = "trainer_state.json"


PARAMETER_ORDER = "parameter_order.json"
"""Beside a checkpoint that this program wrote: names as the optimizer counts them."""
