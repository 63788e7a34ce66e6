"""A kind of data is a section, an option, a module and a line of the registry, and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from shardwright.launchers.composition.compose import CONF
from shardwright.train.config import DataConfig, from_tree
from shardwright.train.config.data import DataSection
from shardwright.train.data import prepare
from shardwright.train.data.sources import registry
from shardwright.train.data.sources.corpus import (
    check_corpus,
    corpus_identity,
    read_corpus,
    source_weights,
)
from shardwright.train.data.sources.files.pieces import Text
from shardwright.train.data.sources.registry import SOURCES, source_of
from shardwright.train.data.sources.source import DataSet, Reading, Source
from shardwright.train.errors import UserError
from shardwright.train.export.card_text import Facts, readme_of
from tests.fixtures import TreeOf

ROOT = Path(__file__).resolve().parents[3]
UNION, *_ = get_args(DataConfig)
SECTIONS: tuple[type[DataSection], ...] = get_args(UNION)


class Letters(DataSection):
    """Two alphabets, one letter a document."""

    kind: Literal["letters"] = "letters"
    count: int = 26


class Alphabets(Source[Letters]):
    def check(self) -> None:
        if self.data.count > 26:
            raise UserError(f"data.count={self.data.count} is more than there are; give 26 or less")

    def texts(self, cache_dir: Path, reading: Reading) -> Iterator[Iterable[Text]]:
        for first in "aA":
            yield (Text(chr(ord(first) + i) * 40) for i in range(self.data.count))

    def identity(self, cache_dir: Path) -> Mapping[str, Any]:
        return {"letters": self.data.count}

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0, 2.0)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("data=letters: small ones", "data=letters: capitals")

    def title(self) -> str:
        return "the alphabet, twice"

    def details(self, provenance: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
        yield "Typeface", provenance.get("typeface")

    @property
    def licence(self) -> str:
        return "nobody's"

    @property
    def citation(self) -> str:
        return "The Phoenicians, c. 1050 BC"

    @property
    def languages(self) -> list[str]:
        return ["la"]

    @property
    def tags(self) -> list[str]:
        return ["letters"]

    @property
    def data_set(self) -> DataSet:
        return DataSet("org/letters", "latin", "v1")


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[type[DataSection], type[Source[Any]]] = {Letters: Alphabets}
    monkeypatch.setattr(registry, "SOURCES", SOURCES | more)


@pytest.mark.usefixtures("letters")
def test_a_line_of_the_registry_is_all_that_reading_needs(tmp_path: Path) -> None:
    data: Any = Letters(count=2, eval_fraction=0)
    check_corpus(data)
    found = [(piece.text[0], piece.source) for piece in read_corpus(data, tmp_path)]
    assert found == [("a", 0), ("b", 0), ("A", 1), ("B", 1)]
    assert source_weights(data) == (1.0, 2.0)
    assert corpus_identity(data, tmp_path)["letters"] == 2
    assert corpus_identity(data, tmp_path)["kind"] == "letters"
    with pytest.raises(UserError, match="more than there are"):
        check_corpus(data.model_copy(update={"count": 27}))


@pytest.mark.usefixtures("letters")
def test_a_run_is_prepared_of_it_and_its_card_tells_of_it(
    tiny_tree: TreeOf, tmp_path: Path
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"global_batch_size": 2, "micro_batch_size": 1}
    config = from_tree(tree)
    data = Letters(
        sequence_length=8,
        document_attention=False,
        eval_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )
    config = config.model_copy(update={"data": data})
    (tmp_path / "run").mkdir()
    prepared = prepare(config, tmp_path / "run")
    assert [part.documents for part in (prepared.training, prepared.held_out)] == [52, 0]
    assert len(prepared.train.sources) == 2

    known = {"typeface": "Fraktur"}
    told = Facts({"model_type": "gpt2"}, "fp32", run=config, provenance=known, samples=9, step=1)
    readme = readme_of(told, has_picture=False)
    for line in (
        *("language:\n- la", "datasets:\n- org/letters", "tags:\n- shardwright\n- gpt2\n- letters"),
        *("| Corpus | the alphabet, twice |\n| Typeface | Fraktur |", "| Licence | nobody's |"),
        *("| How to cite | The Phoenicians, c. 1050 BC |", "text in the alphabet, twice can"),
    ):
        assert line in readme
    assert "Epochs" not in readme, "not all samples are seen equally often"


@pytest.mark.usefixtures("letters")
def test_a_part_without_a_sample_is_called_what_its_source_calls_it(
    tiny_tree: TreeOf, tmp_path: Path
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"global_batch_size": 2, "micro_batch_size": 1}
    data = Letters(
        sequence_length=8,
        document_attention=False,
        eval_fraction=0,
        max_documents=26,
        cache_dir=str(tmp_path / "cache"),
    )
    config = from_tree(tree).model_copy(update={"data": data})
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="data=letters: capitals would give nothing"):
        prepare(config, tmp_path / "run")


def test_every_section_has_its_line_and_its_option() -> None:
    assert set(SOURCES) == set(SECTIONS)
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in SECTIONS}
    assert {path.stem for path in (CONF / "data").glob("*.yaml")} == kinds


def test_what_a_kind_need_not_say_is_left_out() -> None:
    data = SECTIONS[0].model_validate({"kind": "stdlib"})
    source = source_of(data)
    assert source.located() == data
    assert (source.parts, source.tags, source.citation, source.data_set) == ((), (), None, None)
    assert list(source.misplaced()) == []


def test_nobody_asks_which_kind_of_data_it_is() -> None:
    """Whoever has to know asks the source; only the sources know their own sections."""
    names = {section.__name__ for section in SECTIONS}
    own = (ROOT / "train" / "config" / "data.py", ROOT / "train" / "data" / "sources")
    found = []
    for path in (
        p for room in ("train", "launchers", "benchmarks") for p in (ROOT / room).rglob("*.py")
    ):
        if any(path.is_relative_to(place) for place in own):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare | ast.Name | ast.alias):
                continue
            asks = isinstance(node, ast.Compare) and "data.kind" in ast.unparse(node)
            if asks or (isinstance(node, ast.Name | ast.alias) and _name(node) in names):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def _name(node: ast.Name | ast.alias) -> str:
    return node.id if isinstance(node, ast.Name) else node.name
