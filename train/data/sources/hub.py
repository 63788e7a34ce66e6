"""Data sets of the Hugging Face hub, with or without a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwright.train.config.data import HubData
from shardwright.train.data.sources import filtering
from shardwright.train.data.sources.files.errors import column_missing, no_text
from shardwright.train.data.sources.files.fields import others
from shardwright.train.data.sources.files.pieces import Row, Text, pieces
from shardwright.train.data.sources.files.reading import identity as file_identity
from shardwright.train.data.sources.source import DataSet, Reading, Source, code
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute_if_here, is_hub_name, not_a_directory

PROBE_TIMEOUT_SECONDS = 20.0


class Hub(Source[HubData]):
    """A document is a row."""

    def located(self) -> HubData:
        return self.data.model_copy(update={"name": absolute_if_here(self.data.name)})

    def misplaced(self) -> Iterator[str]:
        yield from not_a_directory("data.name", self.data.name, "the data set")

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        wanted = filtering.takes_fields(self.data.filter)
        yield (piece for row in rows(self.data, with_fields=wanted) for piece in pieces(*row))

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        return {"sources": identity(self.data)}

    def title(self) -> str:
        name = self.data.name
        if is_hub_name(name):
            return f"[{name}](https://huggingface.co/datasets/{name})"
        return code(Path(name).name)

    def details(self, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        yield "Configuration", self.data.config
        yield "Split", self.data.split
        yield "Revision", self.data.revision

    @property
    def licence(self) -> str:
        return "see the data set's own card"

    @property
    def data_set(self) -> DataSet:
        name = self.data.name if is_hub_name(self.data.name) else None
        return DataSet(name, self.data.config, self.data.revision)


def rows(data: HubData, *, with_fields: bool = False) -> Iterator[Row]:
    """Yield the text column of a data set, row by row; raise UserError where it is not there."""
    for number, row in enumerate(_read(data)):
        if data.text_field not in row:
            raise column_missing(f"data.name={data.name}", data.text_field, row)
        text = row[data.text_field]
        if text is None:
            continue
        if not isinstance(text, str):
            where = f"row {number} of data.name={data.name}"
            raise no_text(where, data.text_field, type(text).__name__)
        yield Row(text, others(row, data.text_field) if with_fields else None)


def _read(data: HubData) -> Iterator[Any]:
    """Yield the rows of a data set; raise UserError where its files cannot be read."""
    import datasets
    import pyarrow

    loaded = _load(data)
    try:
        yield from loaded
    except (
        *(OSError, ValueError, RuntimeError),
        *(pyarrow.ArrowException, datasets.exceptions.DatasetsError),
    ) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"data.name={data.name} (config {data.config}, split {data.split}): its files cannot "
            f"be read ({reason}); correct them, or choose another data set"
        ) from None


def identity(data: HubData) -> list[Any]:
    """Return name, split and the commit (or, without network, the cached copy's fingerprint)."""
    what: list[Any] = [data.name, data.config, data.split, data.text_field]
    local = Path(data.name)
    if local.is_dir():
        return [*what, [file_identity(p) for p in sorted(local.rglob("*")) if p.is_file()]]
    commit = _commit(data)
    return [*what, commit or _load(data)._fingerprint]


def _commit(data: HubData) -> str | None:
    """Return the commit that ``revision`` names now, or None where the hub does not answer.

    Asked first because it fails at once, where loading tries again for half a minute.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(
            data.name, revision=data.revision, timeout=PROBE_TIMEOUT_SECONDS
        )
    except Exception as error:  # the HTTP client's errors share no base class
        if data.streaming:
            raise _not_there(data, error) from None
        return None
    return info.sha


def _load(data: HubData) -> Any:
    import datasets

    if any(Path(data.name, name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(data)
    try:
        return datasets.load_dataset(
            data.name,
            data.config,
            split=data.split,
            streaming=data.streaming,
            revision=data.revision,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _not_there(data, error) from None


def _saved(data: HubData) -> Any:
    """Return what `save_to_disk` wrote to a directory, which `load_dataset` does not read."""
    import datasets

    try:
        found = datasets.load_from_disk(data.name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"data.name={data.name} cannot be read as `save_to_disk` writes it ({reason}); save it "
            "again"
        ) from None
    if not isinstance(found, datasets.DatasetDict):
        return found
    if data.split not in found:
        raise UserError(
            f"data.split={data.split}: {data.name} has no such split (it has: "
            f"{', '.join(found)}); set data.split to one of them"
        )
    return found[data.split]


def _not_there(data: HubData, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"data.name={data.name} (config {data.config}, split {data.split}): cannot load it from "
        f"the hub ({reason}); correct the name. Without a network use local files with data=text "
        "data.paths=[...], or run once with data.streaming=false where there is one, copy its "
        "HF_HOME directory here, and set HF_HUB_OFFLINE=1 and data.streaming=false"
    )
