"""Token ids that others have stored: each format, written here as its own program writes it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from numpy.typing import NDArray

from shardwright.train.config.data import TokensData
from shardwright.train.data import prepare
from shardwright.train.data.sources.registry import source_of
from shardwright.train.data.sources.source import Reading
from shardwright.train.data.sources.stores import ids as stored
from shardwright.train.data.tokens.encoding import Packing
from shardwright.train.data.tokens.ready import pack_given
from shardwright.train.data.tokens.store import TokenStore
from shardwright.train.errors import UserError
from tests.unit.data.conftest import MakeConfig

BEGIN, END = 1, 2
DOCUMENTS = [[5, 6, 7], [8], [9] * 40, [10, 11]]
LONG = list(range(3, 203)) * 1000


def megatron(
    path: Path, documents: list[list[int]], code: int = 8, dtype: str = "uint16", split: int = 2
) -> None:
    """Write documents as sequences, of which the first one has several."""
    sequences = [documents[0][:split], documents[0][split:], *documents[1:]]
    bounds = [0, 2, *range(3, len(sequences) + 1)]
    lengths = np.array([len(s) for s in sequences], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    flat = np.concatenate([np.array(s, dtype) for s in sequences])
    path.with_suffix(".bin").write_bytes(flat.tobytes())
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
        + lengths.tobytes()
        + (starts * flat.itemsize).tobytes()
        + np.array(bounds, np.int64).tobytes()
    )


def datatrove(path: Path, documents: list[list[int]], dtype: str) -> None:
    path.write_bytes(np.concatenate([np.array(d, dtype) for d in documents]).tobytes())
    ends = np.cumsum([len(d) for d in documents])
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{path}.metadata").write_text("gpt2|2\n46\n46 tokens")


def joined(documents: list[list[int]], dtype: str) -> NDArray[Any]:
    return np.array([i for d in documents for i in [*d, END]], dtype)


def parquet(path: Path, documents: list[list[int]]) -> None:
    columns = {"input_ids": [*documents[:1], None, *documents[1:]], "n": range(len(documents) + 1)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def arrow(path: Path, documents: list[list[int]]) -> None:
    kind = pyarrow.list_(pyarrow.int32())
    pyarrow.feather.write_feather(
        pyarrow.table({"input_ids": pyarrow.array(documents, kind)}), path
    )


KINDS: dict[str, tuple[str, Callable[[Path, list[list[int]]], Any], str]] = {
    "megatron": ("a.bin", megatron, "auto"),
    "megatron by its index": ("a.idx", megatron, "auto"),
    "megatron int32": ("a.bin", lambda p, d: megatron(p, d, 4, "int32"), "auto"),
    "datatrove": ("a.ds", lambda p, d: datatrove(p, d, "uint16"), "auto"),
    "datatrove uint32": ("a.ds", lambda p, d: datatrove(p, d, "uint32"), "auto"),
    "numpy": ("a.npy", lambda p, d: np.save(p, joined(d, "uint32")), "auto"),
    "raw": ("a.bin", lambda p, d: p.write_bytes(joined(d, "uint16").tobytes()), "uint16"),
    "parquet": ("a.parquet", parquet, "auto"),
    "feather": ("a.feather", arrow, "auto"),
}


def packed(
    path: Path, directory: Path, prefix: tuple[int, ...] = (), size: int = 300, **settings: Any
) -> tuple[list[int], list[int], dict[str, int]]:
    """Return the tokens that come of it, where documents end, and the counts."""
    data = TokensData(kind="tokens", paths=(str(path),), eval_fraction=0.0, **settings)
    source_of(data).check()
    packing = Packing(size, prefix, (END,), (), words=False, by_line=False, documents=True)
    directory.mkdir(exist_ok=True)
    counts = pack_given(data, packing, directory)
    assert counts is not None
    store = TokenStore(directory, "train-0")
    assert store.document_ends is not None
    return store.tokens.tolist(), store.document_ends.tolist(), counts


@pytest.mark.parametrize(
    "documents", [DOCUMENTS, [LONG, [5], LONG[:65_536]]], ids=["short", "long"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_documents(
    kind: str, documents: list[list[int]], tmp_path: Path
) -> None:
    name, write, dtype = KINDS[kind]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name, documents)
    expected = [i for d in documents for i in [BEGIN, *d, END]]
    found = packed(tmp_path / "in" / name, tmp_path / "out", (BEGIN,), dtype=dtype)
    assert found[0] == expected
    assert found[1] == np.cumsum([len(d) + 2 for d in documents]).tolist()
    assert found[2] == {
        "documents": len(documents),
        "tokens": len(expected),
        "heldout_documents": 0,
        "heldout_tokens": 0,
    }
    # A directory stands for its stores, and each of them for all its files.
    assert packed(tmp_path / "in", tmp_path / "again", (BEGIN,), dtype=dtype) == found


def test_a_frame_is_there_once(tmp_path: Path) -> None:
    framed = [[BEGIN, *d, END] for d in DOCUMENTS] + [[BEGIN, END], []]
    datatrove(tmp_path / "a.ds", framed, "uint16")
    tokens, ends, _ = packed(tmp_path / "a.ds", tmp_path / "out", (BEGIN,))
    assert tokens == [i for d in framed[:-2] for i in d]
    assert len(ends) == len(DOCUMENTS), "what has nothing in its frame is left out"


def test_rows_of_an_array_are_put_together_again(tmp_path: Path) -> None:
    flat = joined(DOCUMENTS, "int64")
    np.save(tmp_path / "a.npy", flat[:48].reshape(4, 12))
    tokens, _, _ = packed(tmp_path / "a.npy", tmp_path / "out")
    assert tokens[:48] == flat[:48].tolist()


def test_separators_at_the_edges_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE_IDS", 4)
    for text in ([5, 6, 7, END, 8], [5, 6, 7, 8, END], [END], [5] * 8, [5] * 8 + [END], []):
        documents: list[list[int]] = []
        is_open = False
        for piece in stored.split(np.array(text, np.uint16), END):
            assert piece.begins != is_open
            if piece.begins:
                documents.append([])
            documents[-1] += piece.ids.tolist()
            is_open = not piece.ends
        assert not is_open
        assert [i for d in documents for i in d] == text
        assert all(END not in d[:-1] for d in documents)


@pytest.mark.parametrize("size", [7, 10, 11])
def test_an_id_that_the_tokenizer_does_not_have_is_refused(size: int, tmp_path: Path) -> None:
    megatron(tmp_path / "a", DOCUMENTS)
    first = {7: (1, 7), 10: (4, 11), 11: (4, 11)}[size]
    with pytest.raises(
        UserError,
        match=rf"a\.bin, in document {first[0]} of its path, is the id {first[1]}, and those of "
        rf"the tokenizer are 0 to {size - 1}; give the tokenizer",
    ):
        packed(tmp_path / "a.bin", tmp_path / "out", size=size)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.bin", b"\0" * 4, r"a\.bin has no \.idx beside it, .* set data\.dtype"),
        ("a.ds", b"\0" * 4, r"a\.ds has no a\.ds\.index beside it, .* set data\.dtype"),
        ("a.npy", b"no array", r"cannot read .*a\.npy"),
        ("a.txt", b"text", r"a\.txt does not end in one of \.bin, .*or read texts with data=text"),
        ("a.npy", b"", r"cannot read .*a\.npy"),
    ],
)
def test_what_is_no_store_is_refused(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        packed(tmp_path / name, tmp_path / "out")


def test_a_store_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/none does not exist \(looked in .*correct the path"):
        packed(tmp_path / "none", tmp_path / "out")


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    megatron(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match=r"a\.bin .it is not as long as its \.idx says"):
        packed(tmp_path / "a.bin", tmp_path / "out")
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:50])
    with pytest.raises(UserError, match=r"a\.bin .its \.idx ends early"):
        packed(tmp_path / "a.bin", tmp_path / "out")
    (tmp_path / "a.idx").write_bytes(b"TNTIDX\0\0" + bytes(100))
    with pytest.raises(UserError, match=r"a\.bin .its \.idx begins with b'TNTIDX"):
        packed(tmp_path / "a.bin", tmp_path / "out")
    datatrove(tmp_path / "b.ds", DOCUMENTS, "uint16")
    (tmp_path / "b.ds").write_bytes(bytes(90))
    with pytest.raises(UserError, match=r"b\.ds .its index tells of 46 tokens, and it has 90 b"):
        packed(tmp_path / "b.ds", tmp_path / "out")
    pyarrow.parquet.write_table(
        pyarrow.table({"input_ids": [1.5], "x": ["y"]}), tmp_path / "c.parquet"
    )
    with pytest.raises(UserError, match=r"data\.ids_field=input_ids: .*c\.parquet holds double"):
        packed(tmp_path / "c.parquet", tmp_path / "out")
    with pytest.raises(UserError, match=r"data\.ids_field=y: .*has no such column .it has: inp"):
        packed(tmp_path / "c.parquet", tmp_path / "out", ids_field="y")
    with pytest.raises(UserError, match=r"s3://a/b\.bin: stores of tokens are mapped into memory"):
        source_of(TokensData(kind="tokens", paths=("s3://a/b.bin",))).check()


def test_what_needs_text_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    tokens = {"kind": "tokens", "paths": [str(tmp_path / "a.bin")], "document_attention": False}
    with pytest.raises(UserError, match=r"data=tokens has no text to train a tokenizer on"):
        make_config(data=tokens)
    pretrained = {"kind": "pretrained", "name": str(tmp_path)}
    with pytest.raises(UserError, match=r"line_by_line=true needs text, and data=tokens has"):
        make_config(data={**tokens, "line_by_line": True}, tokenizer=pretrained)
    with pytest.raises(UserError, match=r"objective\.whole_word=true needs text, which"):
        make_config(
            mlm=True,
            data=tokens,
            tokenizer=pretrained,
            objective={"kind": "mlm", "whole_word": True},
        )
    with pytest.raises(UserError, match=r"filter=a\.py:f reads text, and data=tokens has none"):
        make_config(data={**tokens, "filter": "a.py:f"}, tokenizer=pretrained)
    source = source_of(make_config(data=tokens, tokenizer=pretrained).data)
    with pytest.raises(UserError, match=r"data=tokens has no text .*; set tokenizer=pretrained"):
        next(iter(source.texts(tmp_path, Reading())))


def test_a_run_on_stored_ids_sees_what_one_on_their_texts_does(
    corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path
) -> None:
    of_text = prepare(make_config(), run_dir)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizer = of_text.tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    megatron(tmp_path / "a", ids)
    config = make_config(
        data={
            "kind": "tokens",
            "paths": [str(tmp_path / "a.bin")],
            "document_attention": False,
            "unpad": False,
        },
        tokenizer={"kind": "pretrained", "name": str(run_dir / "tokenizer")},
    )
    (tmp_path / "other").mkdir()
    of_ids = prepare(config, tmp_path / "other")
    stores = [*of_ids.train.sources, *of_ids.heldout.sources]
    found = [
        document
        for each in stores
        for document in _documents(each.store.tokens.tolist(), tokenizer.eos_token_id)
    ]
    assert of_ids.training.documents + of_ids.held_out.documents == len(texts)
    assert of_ids.held_out.documents > 0
    assert sorted(found) == sorted(ids)


def _documents(tokens: list[int], end: int) -> list[list[int]]:
    """Return tokens as documents, each without its end."""
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    assert not found[-1]
    return found[:-1]
