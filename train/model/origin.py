"""RUN_DIR/model: what a run keeps of the model that it has by name.

Its config, generation settings and, where they may be run, the files of its code: with a checkpoint
a resume needs nothing else, wherever the model lay, and whatever lies there today.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

from shardwright.train.config import NamedModel, PretrainedModel
from shardwright.train.durable import flush, write_text
from shardwright.train.errors import UserError
from shardwright.train.model import generation, remote_code
from shardwright.train.model.streaming import loading
from shardwright.train.run_directory.names import MODEL_FOLDER, ORIGIN_JSON

CONFIG = "config.json"
NOTE = ORIGIN_JSON


@dataclass(frozen=True)
class Origin:
    """The kept files."""

    name: str
    """What the config calls the model."""
    directory: Path
    refused: Mapping[str, Any]
    """Generation settings that transformers does not take, which were left out."""


def keep(model: NamedModel, objective: str, run_dir: Path, checkpoint: Path | None) -> Origin:
    """Return what ``run_dir`` keeps of its model, putting it there first if it is not.

    ``checkpoint`` is where the run is resumed, None where it begins. Every rank may call it at the
    same time; the first one's files stay. Raises UserError where the model's config cannot be read.
    """
    directory = run_dir / MODEL_FOLDER
    if not directory.is_dir():
        files = _of_checkpoint(checkpoint, model) or _of_source(model, objective)
        _publish(files, directory)
    return Origin(model.name, directory, _note(directory).get("refused", {}))


def note(directory: Path, **facts: Any) -> None:
    """Add to what is known of the model, for one rank; the card tells it."""
    write_text(directory / NOTE, json.dumps(_note(directory) | facts) + "\n")


def _note(directory: Path) -> dict[str, Any]:
    try:
        tree = json.loads((directory / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def code_in(directory: Path) -> dict[str, Path]:
    """Return the kept files of a model's code by their relative paths."""
    files = sorted(path for path in directory.rglob("*.py") if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in files}


# --- what is kept -------------------------------------------------------------------------------


def _of_checkpoint(checkpoint: Path | None, model: NamedModel) -> dict[str, bytes] | None:
    """Return the files out of a checkpoint of a run that kept none; None where they do not do."""
    if checkpoint is None or not (checkpoint / CONFIG).is_file():
        return None
    tree = json.loads((checkpoint / CONFIG).read_bytes())
    code = remote_code.beside(checkpoint, tree)
    if remote_code.classes(tree) and not code and model.trust_remote_code:
        return None
    files = {name: path.read_bytes() for name, path in code.items()}
    for name in (CONFIG, generation.FILE):
        if (checkpoint / name).is_file():
            files[name] = (checkpoint / name).read_bytes()
    return files


def _of_source(model: NamedModel, objective: str) -> dict[str, bytes]:
    """Return the files out of the model's directory, or from the hub."""
    with loading(model):
        config = AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        tree, _ = PreTrainedConfig.get_config_dict(model.name, revision=model.revision)
    tree = {key: value for key, value in tree.items() if not key.startswith("_")}
    code: dict[str, Path] = {}
    if remote_code.classes(tree):
        if model.trust_remote_code:
            with remote_code.one_at_a_time():
                code = remote_code.fetched(model.name, model.revision, tree)
        # What is not run is not needed; a name without its file would only be looked for.
        references = {
            key: reference
            for key, reference in remote_code.own(tree).items()
            if f"{reference.partition('.')[0]}.py" in code
        }
        lost = remote_code.missing(code, tree, remote_code.AUTO_CLASSES[objective])
        if model.trust_remote_code and lost:
            raise UserError(
                f"model.name={model.name}: its {CONFIG} names the code file {lost}, which cannot "
                "be found; give a directory that holds it beside the weights"
            )
        tree.pop(remote_code.AUTO_MAP)
        if references:
            tree[remote_code.AUTO_MAP] = references
    files = {
        CONFIG: (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode(),
        **{name: path.read_bytes() for name, path in code.items()},
    }
    if isinstance(model, PretrainedModel):  # what is trained from scratch has a title of its own
        settings, refused = _generation(model, config)
        note = {"refused": refused, "title": _title(model, tree)}
        files[NOTE] = (json.dumps(note) + "\n").encode()
        files[generation.FILE] = settings.to_json_string(keys_to_pop=["compile_config"]).encode()
    return files


def _generation(
    model: NamedModel, config: PreTrainedConfig
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the settings that transformers takes, and the others. Raises UserError."""
    try:
        path = cached_file(model.name, generation.FILE, revision=model.revision)
    except OSError:
        path = None
    if path is None:  # older models keep theirs among their config
        older = GenerationConfig.from_model_config(config).to_diff_dict()
        return generation.accepted(older)
    try:
        return generation.read(Path(path))
    except ValueError as error:
        raise UserError(
            f"model.name={model.name}: {generation.FILE} cannot be read ({error}); correct the "
            "file, or remove it to take transformers' own settings"
        ) from None


def _title(model: NamedModel, tree: Mapping[str, Any]) -> str | None:
    """Return what the model's own card calls it; None for one of the hub, whose name says it."""
    directory = Path(model.name)
    if not directory.is_dir():
        return None
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    body = re.sub(r"\A---\s*\n.*?\n---\s*\n", "", text, flags=re.DOTALL)
    heading = re.search(r"^# +(.+?) *$", body, flags=re.MULTILINE)
    if heading is None or re.search(r"model id", heading[1], re.IGNORECASE):
        return None
    return " ".join(heading[1].split())[:80]


def _publish(files: Mapping[str, bytes], directory: Path) -> None:
    """Write under a temporary name, then rename; where another rank was first, keep its files."""
    temporary = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
    try:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            flush(path)
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
