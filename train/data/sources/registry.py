"""Which module reads which kind of data: a line for each, found by the section of the config."""

from __future__ import annotations

from typing import Any

from shardwright.train.config.data import (
    DataSection,
    HubData,
    KantData,
    PythonData,
    StdlibData,
    TextData,
    TokensData,
)
from shardwright.train.data.sources.hub import Hub
from shardwright.train.data.sources.kant import Books
from shardwright.train.data.sources.python import PythonSource
from shardwright.train.data.sources.source import Source
from shardwright.train.data.sources.stdlib import Stdlib
from shardwright.train.data.sources.text import LocalFiles
from shardwright.train.data.sources.tokens import TokenFiles

SOURCES: dict[type[DataSection], type[Source[Any]]] = {
    StdlibData: Stdlib,
    TextData: LocalFiles,
    TokensData: TokenFiles,
    HubData: Hub,
    KantData: Books,
    PythonData: PythonSource,
}


def source_of(data: DataSection) -> Source[Any]:
    """Return what the section "data" of a config describes."""
    return SOURCES[type(data)](data)
