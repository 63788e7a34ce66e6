"""What a part of the user's own imports is found in the sources, and is part of what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.train.own_files import fingerprint, imported_by
from shardwright.train.own_parts import part

FILES = {
    "own.py": "import helpers\nfrom pack.deep import leaf\n\ndef f():\n    import late",
    "helpers.py": "import own, json, nowhere",
    "late.py": "not python (",
    "never.py": "",
    "pack/__init__.py": "from . import cousin",
    "pack/cousin.py": "from .deep.leaf import name\nfrom .. import beyond",
    "pack/deep/__init__.py": "from ..aunt import *",
    "pack/deep/leaf.py": "import pack.deep",
    "pack/aunt.py": "",
    "pack/never.py": "",
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_file_is_followed_to_all_that_lies_beside_it(written: Path) -> None:
    found = imported_by(part("key", f"{written / 'own.py'}:f"))
    assert {name: str(path.relative_to(written)) for name, path in found.items()} == {
        "helpers": "helpers.py",
        "late": "late.py",
        "pack": "pack/__init__.py",
        "pack.cousin": "pack/cousin.py",
        "pack.deep": "pack/deep/__init__.py",
        "pack.deep.leaf": "pack/deep/leaf.py",
        "pack.aunt": "pack/aunt.py",
    }


def test_a_module_is_followed_from_where_its_package_lies(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(written)
    found = imported_by(part("key", "pack.deep.leaf:name"))
    assert found.keys() == {"pack", "pack.cousin", "pack.deep", "pack.aunt"}
    assert "helpers" in imported_by(part("key", "own:f"))


def test_of_what_is_installed_only_its_own_package_is_followed() -> None:
    found = imported_by(part("key", "pydantic.main:BaseModel"))
    assert "pydantic.config" in found
    assert {name.partition(".")[0] for name in found} == {"pydantic"}


@pytest.mark.parametrize("changed", ["own.py", "helpers.py", "pack/aunt.py"])
def test_the_fingerprint_of_a_source_is_that_of_all_its_files(written: Path, changed: str) -> None:
    before = fingerprint("key", f"{written / 'own.py'}:f")
    (written / "never.py").write_text("1")
    assert fingerprint("key", f"{written / 'own.py'}:f") == before
    (written / changed).write_text(FILES[changed] + "  # else")
    assert fingerprint("key", f"{written / 'own.py'}:f") != before


def test_a_file_that_imports_nothing_of_its_own_has_the_fingerprint_of_older_caches(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.py").write_text("import json")
    assert fingerprint("key", f"{tmp_path / 'own.py'}:f").keys() == {"name", "file"}
