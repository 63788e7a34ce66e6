"""Save a running training as one checkpoint: engine state, schedule, RNG of each rank, manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import random
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import torch

from shardwright.train.checkpoint import retention
from shardwright.train.checkpoint.discovery import Part, parts_in, together
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.hashed import HashedFolder
from shardwright.train.checkpoint.format.layout import LOSS_SCALE
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.checkpoint.read import average as average_files
from shardwright.train.config import CheckpointConfig
from shardwright.train.loop.saving.peers import Peers, SaveFailed
from shardwright.train.model import adapter, adapter_base, origin, quantised
from shardwright.train.model.directory import config_texts
from shardwright.train.run_directory.names import CHECKPOINTS, MODEL_FOLDER
from shardwright.train.strategy.loss_scale import loss_scale_state

if TYPE_CHECKING:
    from shardwright.train.strategy.state.host_memory import HostMemory
    from shardwright.train.strategy.training import EngineState, Training


@dataclass
class Draft:
    """A checkpoint of which nothing is on the disk yet."""

    directory: Path
    step: int
    engine: EngineState
    texts: dict[str, bytes]
    """This rank's other files by their names."""
    manifest: dict[str, Any]
    """All but the files."""
    rule: CheckpointConfig
    """What to keep of the older ones."""
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    """This rank's part of the average of the weights; empty where there is none."""

    @property
    def path(self) -> Path:
        return self.directory / f"checkpoint-{self.step}"


def save(trainer: Training) -> Path:
    """Write checkpoint-<step> of the trainer's run and return its path. Collective.

    Raises SaveFailed, on all ranks alike, where one of them could not write.
    """
    peers = peers_of(trainer)
    return write(draft(trainer, peers), peers)


def peers_of(trainer: Training) -> Peers:
    """Return the ranks of a training on a group for its checkpoints. Collective."""
    node_local = getattr(trainer.config.strategy, "node_local_checkpoints", False)
    return Peers(trainer.args.process_index, node_local=node_local)


def draft(trainer: Training, peers: Peers, into: HostMemory | None = None) -> Draft:
    """Collect the state of a run, copied ``into`` memory where later steps come before its end.

    Collective; touches no disk. Raises Diverged where the step or the weights are not finite: none
    of that is saved.
    """
    trainer.check_finite(weights=True)
    scheduler: Any = trainer.lr_scheduler
    texts = {f"rng-{peers.rank}.pt": _torch_bytes(_rng_state() | _unlogged_loss(trainer))}
    if peers.is_first:
        texts["scheduler.pt"] = _torch_bytes(scheduler.state_dict())
        state = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True)
        texts[layout.TRAINER_STATE] = f"{state}\n".encode()
        texts |= config_texts(trainer.model, origin.code_in(trainer.run_dir / MODEL_FOLDER))
        texts |= {name: text.encode() for name, text in trainer.own_files().items()}
        if scale := loss_scale_state(trainer):
            texts[LOSS_SCALE] = json.dumps(scale).encode()
    return Draft(
        directory=trainer.run_dir / CHECKPOINTS,
        step=trainer.state.global_step,
        engine=trainer.engine.save_state(trainer, is_first=peers.is_first, into=into),
        texts=texts,
        average=_average(trainer, copied=into is not None),
        manifest={
            "strategy": trainer.config.strategy.model_dump(mode="json"),
            "world_size": trainer.args.world_size,
            "step": trainer.state.global_step,
            "samples": trainer.samples_seen,
            "tokens": trainer.tokens_seen,
            "batch_size": trainer.batch_size,
            "schedule": {
                "samples": trainer.schedule.samples(scheduler.last_epoch),
                "samples_per_step": trainer.schedule.samples_per_step,
            },
            # JSON has no NaN, and NaN is never the best.
            "metrics": {
                k: v for k, v in trainer.evaluation_of_this_step().items() if math.isfinite(v)
            },
            "finite": True,
            "parameters": _parameters(trainer),
            **_described_adapter(trainer),
            **_described_base(trainer),
            **_described_average(trainer),
        },
        rule=trainer.config.checkpoint,
    )


def write(draft: Draft, peers: Peers) -> Path:
    """Write a draft under a temporary name, publish it and return its path. Collective.

    Where each node has a disk of its own, each gets a checkpoint of what its ranks have written.
    Raises SaveFailed, on all ranks alike, where one of them could not write; what was there before
    is as it was then. No collective comes between a rank's first and its last byte: a rank that
    fails joins the others at the end of each of the three parts.
    """
    temporary = draft.directory / f".{draft.path.name}.tmp"
    folder = HashedFolder(temporary)
    try:
        _publish(draft, peers, folder)
    except SaveFailed:
        if peers.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            # What a full disk has no room for may be on it already, of no use.
            with contextlib.suppress(OSError):
                retention.remove_leftovers(draft.directory)
        raise
    _retain(draft, peers, written=folder.files)
    return draft.path


@dataclass(frozen=True)
class _Written:
    """What one rank has written of a checkpoint."""

    of_engine: Any
    files: dict[str, Any]


def _publish(draft: Draft, peers: Peers, folder: HashedFolder) -> None:
    """Write a draft into a folder and give that its name, once it is whole. Collective."""

    def prepare() -> None:
        if peers.is_first:
            draft.directory.mkdir(exist_ok=True)
            shutil.rmtree(folder.path, ignore_errors=True)  # left by a save that was killed
            folder.path.mkdir()

    def write_part() -> _Written:
        of_engine = draft.engine.write(folder)
        if draft.average:
            with folder.create(average_files.file_of(peers.rank)) as stream:
                torch.save(draft.average, cast("IO[bytes]", stream))
        for name, data in draft.texts.items():
            folder.write(name, data)
        return _Written(of_engine, folder.files)

    peers.attempt(prepare)
    # Of a part only who writes the manifest needs to know: at hundreds of ranks it is large.
    on_disk = peers.collect(write_part)
    save_id = peers.of_each_disk(secrets.token_hex(8))[0]

    def finish() -> None:
        if peers.is_first:
            draft.engine.finish(folder, [part.of_engine for part in on_disk])
            described = {"save_id": save_id, "part": peers.disk, "parts": peers.disks}
            manifest = _manifest({**draft.manifest, **described}, on_disk, folder.files)
            layout.write_manifest(folder.path, manifest)
            layout.publish_checkpoint(folder.path, draft.path)

    peers.attempt(finish)


def _manifest(
    described: dict[str, Any], parts: list[_Written], files: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest of what ranks wrote to a disk, with ``files`` of its first one. Pure."""
    on_disk = dict(files)
    for part in parts:
        on_disk |= part.files
    return {**described, "files": dict(sorted(on_disk.items()))}


def _retain(draft: Draft, peers: Peers, *, written: dict[str, Any]) -> None:
    """Read back what was written, and delete what is not to be kept beside it. Collective."""
    listing: Listing | None = None

    def look() -> tuple[list[str], dict[int, Part]]:
        nonlocal listing
        # Each rank reads back what it has written itself.
        wrong = layout.verify(draft.path, only=written)
        if not peers.is_first:
            return wrong, {}
        listing = Listing(draft.directory)
        return wrong, parts_in(listing)

    on_disk = peers.collect(look)
    wrong_here = [problem for problems, _ in on_disk for problem in problems]
    seen = peers.of_each_disk((wrong_here, on_disk[0][1] if on_disk else {}))

    def retain() -> None:
        if peers.is_first:
            # Only one checkpoint is written at a time, so none of what is there is in flight.
            retention.remove_leftovers(draft.directory, listing=listing)
            whole, _ = together([found for _, found in seen if found])
            wrong = [problem for problems, _ in seen for problem in problems]
            retention.retain(
                draft.directory,
                draft.rule,
                newest=draft.step,
                wrong=wrong,
                among=whole,
                listing=listing,
            )

    peers.attempt(retain)


def _average(trainer: Training, *, copied: bool) -> dict[str, torch.Tensor]:
    return {} if trainer.average is None else trainer.average.state(copied=copied)


def _described_average(trainer: Training) -> dict[str, Any]:
    """Return what a manifest says of the average of the weights; nothing where there is none."""
    if trainer.average is None or not trainer.average.taken:
        return {}
    average = trainer.average
    described = {"kind": average.kind, "taken": average.taken}
    return {"average": {**described, "replaces_weights": average.replaces_weights}}


def _described_adapter(trainer: Training) -> dict[str, Any]:
    """Return what a manifest says of the model's adapter; nothing where there is none."""
    found = adapter.entry(trainer.model)
    return {} if found is None else {"adapter": found.model_dump(mode="json")}


def _described_base(trainer: Training) -> dict[str, Any]:
    """Return what a manifest says of weights that are not there; nothing where all of them are."""
    digest = quantised.digest_of(trainer.model)
    if digest is None:
        return {}
    return {
        "base": adapter_base.entry(trainer.config, trainer.model, digest).model_dump(mode="json")
    }


def _parameters(trainer: Training) -> list[dict[str, Any]]:
    """Return name, whole shape, dtype and tied aliases of each parameter."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return [
        {
            "name": aliases[0],
            # ZeRO-3 leaves an empty tensor behind and notes the whole shape beside it.
            "shape": list(getattr(parameters[key], "ds_shape", parameters[key].shape)),
            "dtype": str(parameters[key].dtype).removeprefix("torch."),
            "tied": aliases[1:],
        }
        for key, aliases in names.items()
    ]


def _unlogged_loss(trainer: Training) -> dict[str, Any]:
    """Return what this rank's next logged loss, a mean over steps, has of those done already."""
    return {
        "unlogged_loss": float(trainer._tr_loss),
        "logged_step": trainer._globalstep_last_logged,
        **(
            {"unlogged_auxiliary_loss": float(trainer.auxiliary_loss)}
            if trainer.auxiliary_loss is not None
            else {}
        ),
    }


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps(
            np.random.get_state(legacy=False), default=lambda array: array.tolist()
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def _torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
