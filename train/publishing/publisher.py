"""What a run publishes while it trains: its newest save and its end, each once, tried again."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwright.train.checkpoint.format import layout
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.publishing.upload import Pushed, Target, is_weights, upload, why_failed
from shardwright.train.run_directory import final, metrics
from shardwright.train.run_directory.names import CHECKPOINTS, FINAL, PUBLISHING_FOLDER, PUSHES

IN_REPOSITORY = "checkpoints"
"""The folder of a repository in which a checkpoint lies as it is."""


class Publisher:
    """Pushes of one start of a run; what an earlier one has pushed is not pushed again."""

    def __init__(self, run_dir: Path, config: RunConfig, say: Callable[[str], object]) -> None:
        assert config.checkpoint.push_to is not None
        self._run_dir, self._config, self._say = run_dir, config, say
        self._settings = config.checkpoint
        self._repo = config.checkpoint.push_to
        self._tried = {str(entry["what"]) for entry in read(run_dir) if "commit" in entry}

    def look(self) -> None:
        """Push the newest save, where each is to be; one that fails is tried at the next save."""
        if self._settings.push_every == "final":
            return
        whole = layout.whole_checkpoints(self._run_dir / CHECKPOINTS)
        if not whole or (newest := whole[-1][1]).name in self._tried:
            return
        self._tried.add(newest.name)
        self._push(newest.name, lambda: self._push_save(newest))

    def finish(self, outcome: str) -> bool:
        """Push the model with which a run has ended; return whether the last push has failed."""
        if outcome != "done":
            return False
        return not self._push(FINAL, self._push_final)

    def _push(self, what: str, push: Callable[[], Pushed]) -> bool:
        """Push, note what came of it, and say so; return whether it is there."""
        began = time.time()
        try:
            pushed = push()
        except Exception as error:  # whatever a hub, a network or a disk raises
            why = str(error) if isinstance(error, UserError) else why_failed(error, self._repo)
            text = " ".join((why or f"{type(error).__name__}: {error}").split())
            append(self._run_dir, {"time": began, "what": what, "error": text})
            again = "the next save tries again" if what != FINAL else "the model is in final/"
            self._say(
                f"warning: checkpoint.push_to={self._repo}: {what} is not pushed ({text}); {again}"
            )
            return False
        seconds = round(time.time() - began, 1)
        entry = {"time": began, "what": what, "url": pushed.url, "commit": pushed.commit}
        append(self._run_dir, {**entry, "seconds": seconds})
        self._say(f"pushed {what} to {pushed.url} in {seconds:.1f} s")
        return True

    def _push_save(self, checkpoint: Path) -> Pushed:
        with _kept(self._run_dir, checkpoint) as kept:
            if self._settings.push_every == "checkpoints":
                files = {
                    f"{IN_REPOSITORY}/{kept.name}/{path.relative_to(kept)}": path
                    for path in [*layout.files_of(kept), kept / layout.MANIFEST]
                }
                return upload(
                    self._target(kept.name),
                    files,
                    is_stale=lambda name: name.startswith(f"{IN_REPOSITORY}/"),
                    say=lambda text: None,
                )
            return self._push_model(self._made_of(kept), kept.name)

    def _made_of(self, checkpoint: Path) -> Path:
        """Return a model directory made of a checkpoint, with its card, beside it."""
        from shardwright.train.export.recover import Options, recover

        out = checkpoint.with_name(f"model-{checkpoint.name}")
        trusts = self._config.model.trusts_code
        recover(Options(checkpoint, out, trusts_code=trusts), sys.stderr, sys.stderr)
        return out

    def _push_final(self) -> Pushed:
        directory = final.of(self._run_dir)
        if directory is None:
            raise UserError("the run has no final/")
        return self._push_model(directory, FINAL)

    def _push_model(self, directory: Path, what: str) -> Pushed:
        from shardwright.train.model import user_modules
        from shardwright.train.publishing.contents import check, choose

        user_modules.import_for(directory, self._config.model.imports)
        chosen = choose(directory)
        check(directory, chosen, trusts_code=self._config.model.trusts_code)
        files = {path.name: path for path in chosen.files}
        return upload(self._target(what), files, is_weights, say=lambda text: None)

    def _target(self, what: str) -> Target:
        """Return where a save or the end goes. Pure."""
        by_step = self._settings.push_revision == "step" and what != FINAL
        return Target(
            self._repo,
            message=f"{self._config.name}: {what}",
            public=not self._settings.push_private,
            revision=what.replace("checkpoint-", "step-") if by_step else None,
            key="checkpoint.push_to",
            ways=("set checkpoint.push_private=true", "set checkpoint.push_private=false"),
        )


@contextmanager
def _kept(run_dir: Path, checkpoint: Path) -> Iterator[Path]:
    """Yield a checkpoint by names of its own, so that the run may delete it meanwhile.

    They cost no space where the disk has hard links; where it has none, the files are copied.
    """
    folder = run_dir / PUBLISHING_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    kept = folder / checkpoint.name

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except PermissionError:
            shutil.copy2(source, target)
        return target

    try:
        shutil.copytree(checkpoint, kept, copy_function=link)
        yield kept
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- pushes.jsonl ---------------------------------------------------------------------------------


def append(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Note what came of a push."""
    with (run_dir / PUSHES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run has pushed or could not push; a line that a crash cut is left out."""
    return metrics.lines(run_dir / PUSHES)
