"""`shardwright data verify`: a store against its hashes, and against what a store must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardwright.launchers.__main__ import main
from shardwright.train.config import RunConfig, to_yaml
from shardwright.train.data import prepare
from shardwright.train.data.tokens.cache import INDEX, find
from shardwright.train.data.upkeep import verify as verifying
from shardwright.train.data.upkeep.target import Target, target_of, vocabulary_of
from shardwright.train.data.upkeep.verify import entries, verify

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def entry(corpus: Path, make_config: MakeConfig, run_dir: Path, tmp_path: Path) -> Path:
    """Return the tokens of a run that is prepared."""
    config = make_config(mlm=True, objective={"whole_word": True})
    (run_dir / "config.yaml").write_text(to_yaml(config))
    prepare(config, run_dir)
    return tmp_path / "cache" / "tokens" / json.loads((run_dir / "data.json").read_text())["tokens"]


def change(entry: Path, **index: Any) -> None:
    path = entry / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))


def test_what_was_written_is_whole(
    entry: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((entry / INDEX).read_text())
    assert index["hashes"].keys() == index["files"].keys()
    assert verify(entry).problems == []
    assert main(["data", "verify", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{entry}: {len(index['files'])} files, ")
    assert said.endswith(", whole, hashes checked\n")


def test_a_changed_byte_is_found_that_sizes_do_not_show(
    entry: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = entry / "train-0.words"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    assert find(entry.parent, entry.name) is not None
    assert main(["data", "verify", str(run_dir)]) == 1
    assert capsys.readouterr().out == (
        f"{entry} is not what was written:\n"
        f"  {path} differs from what was written: its hash is another one\n"
    )


@pytest.mark.parametrize("all_of_it", [False, True])
def test_files_that_are_missing_or_cut_are_named(
    entry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], all_of_it: bool
) -> None:
    (entry / "heldout-0.words").unlink()
    cut = entry / "train-0.words"
    size = cut.stat().st_size
    with cut.open("rb+") as file:
        file.truncate(5)
    arguments = ["--all", "--cache-dir", str(tmp_path / "cache")] if all_of_it else [str(entry)]
    assert main(["data", "verify", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"  {entry / 'heldout-0.words'} is missing" in lines
    assert f"  {cut} has 5 bytes instead of {size:,}" in lines
    assert len(lines) == 3 + all_of_it  # the tokenizer is whole
    assert sum("whole, hashes checked" in line for line in lines) == all_of_it


def test_of_older_entries_sizes_are_checked_and_that_is_said(
    entry: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((entry / INDEX).read_text())
    del index["hashes"], index["details"]["vocabulary_size"]
    (entry / INDEX).write_text(json.dumps(index))
    assert main(["data", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.endswith(
        "whole, sizes checked: it is from before hashes were kept\n"
    )
    # The run's tokenizer tells which ids there are.
    ids = next(entry.glob("train-0.uint*"))
    tokens = np.fromfile(ids, dtype=ids.suffix[1:])
    tokens[3] = 400
    tokens.tofile(ids)
    assert vocabulary_of(target_of(run_dir)) == 400
    assert main(["data", "verify", str(run_dir)]) == 1
    assert (
        f"  {ids} has the id 400 at token 3, and the tokenizer's highest is 399\n"
        in capsys.readouterr().out
    )


def of_arrays(folder: Path, ids: list[int], ends: list[int], words: int) -> Path:
    """Return an entry without hashes, of one store with a vocabulary of ten."""
    entry = folder / "tokens" / "made"
    entry.mkdir(parents=True)
    np.array(ids, dtype=np.uint16).tofile(entry / "train-0.uint16")
    np.array(ends, dtype=np.int64).tofile(entry / "train-0.documents")
    (entry / "train-0.words").write_bytes(bytes(words))
    files = {p.name: p.stat().st_size for p in entry.iterdir()}
    details = {"vocabulary_size": 10}
    (entry / INDEX).write_text(json.dumps({"files": files, "details": details}))
    return entry


@pytest.mark.parametrize(
    ("ids", "ends", "words", "problem"),
    [
        ([1, 2, 9], [1, 3], 3, None),
        ([1, 2, 9], [1, 1, 3], 3, None),
        ([1, 2, 10], [1, 3], 3, "train-0.uint16 has the id 10 at token 2, and the tokenizer's"),
        ([1, 2, 3, 4, 5], [1, 3, 2, 5], 5, "train-0.documents does not ascend at number 2"),
        ([1, 2, 3], [1, 4], 3, "train-0.documents ends at token 4, and there are 3"),
        ([1, 2, 3], [-1, 3], 3, "train-0.documents does not ascend at number 0"),
        ([1, 2, 3], [1, 3], 4, "train-0.words is of 4 tokens, and train-0.uint16 has 3"),
    ],
)
def test_arrays_are_what_stores_must_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ids: list[int],
    ends: list[int],
    words: int,
    problem: str | None,
) -> None:
    """Also where they are read in several parts."""
    entry = of_arrays(tmp_path, ids, ends, words)
    for at_once in (2**20, 2, 1):
        monkeypatch.setattr(verifying, "AT_ONCE", at_once)
        found = verify(entry)
        assert not found.hashed
        assert len(found.problems) == (problem is not None)
        assert all(str(problem) in text for text in found.problems)


def test_what_is_being_built_is_no_entry(tmp_path: Path) -> None:
    for name in ("a", "b.tmp-host-7", "c.shards"):
        (tmp_path / "tokens" / name).mkdir(parents=True)
    (tmp_path / "tokens" / "a.lock").touch()
    assert list(entries(tmp_path)) == [tmp_path / "tokens" / "a"]
    (problem,) = verify(tmp_path / "tokens" / "a").problems
    assert "is not in the cache (any more)" in problem
    assert vocabulary_of(Target(tmp_path, None)) is None


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def of(*arguments: str) -> str:
        assert main(["data", *arguments]) == 2
        return capsys.readouterr().err

    return of


def test_what_is_to_be_verified_has_to_be_said(errors: Callable[..., str], tmp_path: Path) -> None:
    both = "error: give run directories or entries of the cache, or --all, and not both\n"
    assert errors("verify") == both
    assert errors("verify", "--all", str(tmp_path)) == both
    assert "--cache-dir goes with --all" in errors(
        "verify", str(tmp_path), "--cache-dir", str(tmp_path)
    )
    assert f"there is no cache in {tmp_path / 'no'}; give the runs' data.cache_dir" in errors(
        "verify", "--all", "--cache-dir", str(tmp_path / "no")
    )
    assert "is neither a run directory" in errors("verify", str(tmp_path))
