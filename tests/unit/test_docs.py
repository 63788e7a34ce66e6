"""The documentation says what the sources say, its links lead somewhere, the README stays short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs import generate
from docs.generate import DOCS, ROOT
from shardwright.train.config import known_keys

CHAPTERS = sorted(DOCS.glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + CHAPTERS
MOST_BYTES_OF_THE_README = 12_000


def without_code(path: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("](", "] ("), text)


def anchors(path: Path) -> Iterator[str]:
    """Yield what a link to the page may end in, as forges and mkdocs agree on it."""
    text = without_code(path)
    yield from re.findall(r'<a id="([^"]+)"></a>', text)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(path))


@pytest.mark.parametrize(
    "name", ["configuration.md", "coming_from.md", "architecture.md", "strategies.md"]
)
def test_what_the_sources_say_is_what_the_chapters_say(name: str) -> None:
    path = DOCS / name
    expected = generate.generated()[path]
    # Compared as a whole, shown by lines.
    assert path.read_text(encoding="utf-8").splitlines() == expected.splitlines(), (
        f"docs/{name} is not what the sources say; run `{generate.COMMAND}` and commit it"
    )


def test_every_key_is_in_the_configuration_chapter_with_what_it_does() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    sections = {key for key in known_keys() if any(k.startswith(f"{key}.") for k in known_keys())}
    for key in known_keys():
        if key in sections or key.endswith(".kind"):
            continue
        entries = re.findall(rf"\*\*`{re.escape(key)}`\*\* \((.+)\)<br>\n  (.*)", text)
        assert entries, f"{key} is not in docs/configuration.md"
        for facts, said in entries:
            assert "; " in facts, f"{key} has no type and default: {facts}"
            assert len(said) > 3, f"{key} has no sentence below its field in train/config/"


def test_a_group_is_a_section_with_all_its_options() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for folder in (ROOT / "conf").iterdir():
        found = sorted(path.stem for path in folder.glob("*.yaml"))
        if not found:
            continue
        ((_, section),) = re.findall(rf"^## ({folder.name})\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        if len(found) > 1:
            assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == found


def test_defaults_are_those_that_a_run_gets() -> None:
    """Of the options where they agree, also where the type has another; of the type otherwise."""
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for line in (
        "**`trainer.max_steps`** (integer ≥ 1 or `null`; default `1000`)",
        "**`trainer.learning_rate`** (number > 0; default `0.0006`)",
        "**`checkpoint.async`** (true or false; default `false`)",
        "**`data.paths`** (list of one or more texts; has to be given)",
        "**`model.hidden_size`** (integer ≥ 1; each option has its own)",
        "**`strategy.stage`** (`0`, `1`, `2` or `3`; each option has its own)",
        "**`strategy.aio.threads`** (integer ≥ 1; default `1`)",
        "**`launcher.grace_seconds`** (number > 0; default `30`)",
        "**`launcher.grace_seconds`** (number > 0 and ≤ 65535; default `120`)",
        "memory, updated by the CPU. Sets `strategy.stage=2`, `strategy.offload_optimizer=cpu`. "
        "Fields: [zero](#strategy-zero). |",
    ):
        assert line in text


def test_the_generator_imports_nothing_heavy() -> None:
    code = "import sys, docs.generate; docs.generate.generated(); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"torch", "transformers", "deepspeed"} & set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name} links to {link}, which is not there"
        if page.parent == DOCS:
            assert target.parent == DOCS, f"{link} of {page.name} is not part of the site"
        if anchor:
            assert anchor in set(anchors(target)), f"{page.name}: {link} has no such heading"


def test_links_are_found() -> None:
    """Of a page that has some, with and without an anchor."""
    found = links(ROOT / "README.md")
    assert "docs/configuration.md" in found
    assert "docs/commands.md#exit-codes" in found
    assert "configuration.md#launcher" in links(DOCS / "launchers.md")
    assert "exit-codes" in set(anchors(DOCS / "commands.md"))
    assert "trainer.max_steps" in set(anchors(DOCS / "configuration.md"))


def test_anchors_are_unique() -> None:
    for chapter in CHAPTERS:
        found = list(anchors(chapter))
        assert len(found) == len(set(found)), f"{chapter.name} has two headings of one name"


def test_the_site_and_the_readme_have_every_chapter() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    names = [path for entry in site["nav"] for path in entry.values()]
    assert sorted(names) == [chapter.name for chapter in CHAPTERS]
    for page, folder in ((ROOT / "README.md", "docs/"), (DOCS / "index.md", "")):
        assert set(links(page)) >= {f"{folder}{name}" for name in names if name != "index.md"}


def test_the_readme_is_short() -> None:
    size = (ROOT / "README.md").stat().st_size
    assert size <= MOST_BYTES_OF_THE_README, (
        f"README.md has {size:,} bytes; move what is longer to a chapter of docs/"
    )
