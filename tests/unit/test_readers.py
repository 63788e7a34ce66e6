"""A format of checkpoints is a module and a line of the registry, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.train.checkpoint.choose import choose
from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable, describe, lazy
from shardwright.train.checkpoint.read import plain, portable
from shardwright.train.checkpoint.read.reader import Reader
from shardwright.train.checkpoint.read.registry import READERS
from shardwright.train.errors import UserError

CRATE = "weights.crate"


def _find(path: Path) -> Path | None:
    inside = path / CRATE if path.is_dir() else path
    return inside if inside.name == CRATE and inside.is_file() else None


def _read(path: Path) -> PortableState:
    return _read_section(path, "trained")


def _read_section(path: Path, section: str) -> PortableState:
    found = describe(path)
    if section not in found:
        raise Unreadable(f"{path} has no section {section}; it has {', '.join(found)}")
    tensors = {name: lazy(tensor, path) for name, tensor in found[section].items()}
    return PortableState(tensors, {}, {}, {}, {}, "crate", step=7)


@pytest.fixture(params=[True, False], ids=["an-engines", "a-models"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reader:
    found = Reader(
        f"a {CRATE}", _find, _read, read_section=_read_section, is_an_engines=request.param
    )
    monkeypatch.setattr(portable, "READERS", (found, *READERS))
    return found


def save(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"trained": {"w": torch.arange(6.0)}, "averaged": {"w": torch.ones(6)}}
    torch.save(values, folder / CRATE)
    return folder


def test_a_format_of_its_own_is_read_from_a_checkpoint(reader: Reader, tmp_path: Path) -> None:
    state = portable.read(save(tmp_path / "there"))
    assert (state.origin, state.step) == ("crate", 7)
    assert torch.equal(state.weights["w"].whole(), torch.arange(6.0))
    assert torch.equal(
        portable.read(tmp_path / "there", "averaged").weights["w"].whole(), torch.ones(6)
    )
    with pytest.raises(Unreadable, match="no section none; it has trained, averaged"):
        portable.read(tmp_path / "there", "none")


def test_only_an_engines_is_looked_for_in_an_engines_folders(
    reader: Reader, tmp_path: Path
) -> None:
    save(tmp_path / "own" / "engine")
    save(tmp_path / "named" / "global_step3")
    (tmp_path / "named" / "latest").write_text("global_step3")
    for checkpoint in (tmp_path / "own", tmp_path / "named"):
        if reader.is_an_engines:
            assert portable.read(checkpoint).origin == "crate"
        else:
            with pytest.raises(Unreadable):
                portable.read(checkpoint)


def test_choosing_a_step_and_saying_what_is_missing_know_it(reader: Reader, tmp_path: Path) -> None:
    for step in (2, 10):
        save(tmp_path / "run" / f"checkpoint-{step}")
    chosen = choose(tmp_path / "run", None, print)
    assert (chosen.path.name, chosen.origin) == ("checkpoint-10", "crate")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"Looked for: a {CRATE}, a distributed checkpoint's"):
        choose(tmp_path / "empty", None, print)


def test_a_format_without_sections_refuses_one(tmp_path: Path) -> None:
    without = Reader("a crate", _find, _read)
    with pytest.raises(Unreadable, match="has no sections; leave --section=ema out"):
        without.state(save(tmp_path) / CRATE, "ema")


def test_what_takes_any_file_is_asked_last(tmp_path: Path) -> None:
    file = tmp_path / "any.name"
    file.touch()
    assert [reader.find(file) for reader in READERS if not reader.is_an_engines] == [None, file]
    assert READERS[-1] is plain.READER
    assert len({reader.looked_for for reader in READERS}) == len(READERS)
