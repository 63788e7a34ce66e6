"""How much memory a preparation takes, by the kind of its files and by how large they are.

For each kind the same documents are repeated to each size, so that nothing but the size differs;
besides, one document and one line of --long megabytes. There is no peer: it is ours at a hundred
megabytes against ours at a thousand.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import tempfile
import time
import zipfile
from bz2 import compress as bz2_compress
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import frozen
from benchmarks.prepare import (
    VOCABULARY,
    measure,
    measured_in,
    overrides,
    scratch,
    trained_tokenizer,
    write_corpora,
)
from benchmarks.report import Figures
from benchmarks.train_gpu import versions
from shardwright.launchers.machine.facts import Machine
from shardwright.train.errors import FAILED

MB = 10**6
Documents = list[str]


def _lines(documents: Documents) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)


def _separated(documents: Documents, delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([text] for text in documents)
    return out.getvalue().encode()


def _repeated(path: Path, block: bytes, size: int, begin: bytes = b"", end: bytes = b"") -> None:
    """Write a block until as many bytes are there; streams of compressors may be repeated too."""
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.write(end)


def _json_array(path: Path, documents: Documents, size: int) -> None:
    rows = ",\n".join(json.dumps({"text": text}) for text in documents).encode()
    with path.open("wb") as file:
        file.write(b"[" + rows)
        for _ in range(size // len(rows) - 1):
            file.write(b",\n" + rows)
        file.write(b"]")


def _compressed(compress: Callable[[bytes], bytes]) -> Callable[[Path, Documents, int], None]:
    """Return what writes lines below a compression; the size is that of what is in it."""

    def write(path: Path, documents: Documents, size: int) -> None:
        block = _lines(documents)
        packed = compress(block)
        _repeated(path, packed, size * len(packed) // len(block))

    return write


def _zstd(block: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(block, "zstd", asbytes=True))


def _table(format: str) -> Callable[[Path, Documents, int], None]:
    def write(path: Path, documents: Documents, size: int) -> None:
        import pyarrow as pa
        from pyarrow import feather, parquet

        table = pa.table({"text": documents})
        times = max(1, size // table.nbytes)
        if format == "parquet":
            with parquet.ParquetWriter(path, table.schema, compression="none") as file:
                for _ in range(times):
                    file.write_table(table, row_group_size=100)
        elif format == "arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
                for _ in range(times):
                    out.write_table(table, max_chunksize=100)
        else:
            feather.write_feather(pa.concat_tables([table] * times), str(path), chunksize=100)

    return write


def _tar(path: Path, documents: Documents, size: int) -> None:
    with tarfile.open(path, "w") as file:
        for number, text in enumerate(_again(documents, size)):
            member = tarfile.TarInfo(f"{number:08}.txt")
            member.size = len(content := text.encode())
            file.addfile(member, io.BytesIO(content))


def _zip(path: Path, documents: Documents, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for number, text in enumerate(_again(documents, size)):
            file.writestr(f"{number:08}.txt", text)


def _again(documents: Documents, size: int) -> Iterator[str]:
    written = 0
    while written < size:
        for text in documents:
            yield text
            written += len(text)


KINDS: dict[str, Callable[[Path, Documents, int], None]] = {
    "txt": lambda path, documents, size: _repeated(path, "".join(documents).encode(), size),
    "jsonl": lambda path, documents, size: _repeated(path, _lines(documents), size),
    "json": _json_array,
    "csv": lambda path, d, size: _repeated(path, _separated(d, ","), size, b"text\r\n"),
    "tsv": lambda path, d, size: _repeated(path, _separated(d, "\t"), size, b"text\r\n"),
    "parquet": _table("parquet"),
    "arrow": _table("arrow"),
    "feather": _table("feather"),
    "tar": _tar,
    "zip": _zip,
    "jsonl.gz": _compressed(lambda block: gzip.compress(block, 1)),
    "jsonl.bz2": _compressed(lambda block: bz2_compress(block, 1)),
    "jsonl.xz": _compressed(lambda block: lzma.compress(block, preset=0)),
    "jsonl.zst": _compressed(_zstd),
}
MASKED = ("objective=mlm", "model=roberta_tiny", f"model.vocab_size={VOCABULARY}")
LONG = {
    "jsonl": False,
    "jsonl with emoji": False,
    "txt": False,
    "txt by line": True,
    "parquet": False,
    "csv": False,
}
"""Where there is one document as long as may be, and whether lines are documents.

Python keeps a string that has a character beyond U+FFFF at four bytes a character.
"""


def peak(corpus: Path, tokenizer: Path, here: Machine, *words: str) -> Figures:
    """Prepare a corpus in an empty cache; return its seconds and the peak of its processes."""
    with scratch(corpus.parent) as place:
        composed = [*overrides(corpus, tokenizer, place / "cache"), *words]
        frozen.freeze(composed, here, place / "run")
        return measure(["ours", str(place / "run")], here.cores, place)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--long", type=int, metavar="MEGABYTES", default=200)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "none"], default=[*KINDS])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args(argv)


def shown(name: str, size: int, figures: Figures) -> str:
    """Return a line for a terminal. Pure."""
    if "error" in figures:
        return f"{name:12} {size:6,} MB failed: {figures['error']}"
    largest = figures["peak_memory_bytes"] / 2**20
    together = figures["peak_memory_of_all_bytes"] / 2**20
    return f"{name:12} {size:6,} MB {figures['seconds']:7.1f} s {largest:7,.0f} {together:7,.0f}"


def growth(peaks: Figures) -> float | None:
    """Return the peak of the largest process at the largest size over that at the smallest. Pure.

    None where one has failed, or there is one size alone.
    """
    found = [(int(size), each.get("peak_memory_bytes")) for size, each in peaks.items()]
    if len(found) < 2 or None in [peak for _, peak in found]:
        return None
    return float(max(found)[1] / min(found)[1])


def run(options: argparse.Namespace, directory: Path, here: Machine) -> Figures:
    """Measure all kinds; the JSON file is rewritten after each figure."""
    embedded = write_corpora(directory, None, quick=False)["embedded"]
    with embedded.open() as file:
        documents: Documents = [json.loads(line)["text"] for line in file]
    tokenizer = trained_tokenizer(directory, embedded, here)
    results: Figures = {
        "benchmark": "prepare_memory",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {"device": "CPU", "cores": here.cores},
        "versions": versions(),
        "kinds": {},
        "long": {},
        "growth": {},
    }

    def note(part: str, name: str, size: int, figures: Figures) -> None:
        results[part].setdefault(name, {})[str(size)] = figures
        results["growth"] = {kind: growth(found) for kind, found in results["kinds"].items()}
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
        print(shown(name, size, figures), flush=True)

    print("kind            size        s     MiB: largest process, all", flush=True)
    for kind in options.kinds if options.kinds != ["none"] else []:
        for size in options.megabytes:
            corpus = directory / f"corpus.{kind}"
            KINDS[kind](corpus, documents, size * MB)
            note("kinds", kind, size, peak(corpus, tokenizer, here))
            corpus.unlink()
    with_emoji = "".join(documents)
    for name, by_line in LONG.items() if options.long else ():
        corpus = directory / f"long.{name.partition(' ')[0]}"
        whole = with_emoji
        if "emoji" not in name:
            whole = whole.encode("ascii", "ignore").decode()
        text = (whole * (1 + options.long * MB // len(whole)))[: options.long * MB]
        if by_line:  # of one line there is one sample, which is no run's
            text = text.replace("\n", " ") + "\n" + whole
        KINDS[corpus.suffix[1:]](corpus, [text], 1)
        lines = [*MASKED, "data.line_by_line=true", "data.max_cut_fraction=1"] if by_line else []
        note("long", name, options.long, peak(corpus, tokenizer, here, *lines))
        corpus.unlink()
    return results


def main(argv: list[str]) -> int:
    options = parse(argv)

    def all_of_it(directory: Path, here: Machine) -> int:
        results = run(options, directory, here)
        print("largest process, largest size over smallest:", json.dumps(results["growth"]))
        every = [*results["kinds"].values(), *results["long"].values()]
        failed = any("error" in figures for found in every for figures in found.values())
        return FAILED if failed else 0

    return measured_in(options.directory, all_of_it)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
