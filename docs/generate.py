"""The parts of the documentation that the sources say themselves: `python -m docs.generate`.

The configuration chapter is made of the config's own types and of conf/, the tree in the
architecture chapter of the first line of each module, the table of optimizers of what is known
of each, and the chapter for who comes from elsewhere of the names there. Imports no torch.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs import coming_from
from shardwright.launchers.plan.hardware import GROUP, Hardware
from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.train.config.optimizers import OPTIMIZERS, OptimizerFacts
from shardwright.train.config.section import Section
from shardwright.train.config.sections import Sections

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
DOCS = ROOT / "docs"
COMMAND = "python -m docs.generate"
BEGIN = f"<!-- Made by `{COMMAND}` of the first line of each module: edit those. -->"
END = "<!-- The end of the tree. -->"
BEGIN_OPTIMIZERS = f"<!-- Made by `{COMMAND}` of train/config/optimizers.py: edit that. -->"
END_OPTIMIZERS = "<!-- The end of the optimizers. -->"
PACKAGES = ("shardwright", "train", "launchers", "benchmarks")
MOST_SIZES_OF_AN_OPTION = 3
"""An option that has to give more fields than these is a preset, whose file shows its sizes."""

# --- what a field says of itself ------------------------------------------------------------------


@cache
def own_fields(section: type[Section]) -> dict[str, str]:
    """Return the fields that a class itself declares, each with the text below it."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = str(following.value.value)
            found[statement.target.id] = re.sub(r"\s+", " ", text).strip()
    return found


def lineage(section: type[Section]) -> list[type[Section]]:
    """Return the class and those whose fields it has, the most general first."""
    return [
        base
        for base in reversed(section.__mro__)
        if issubclass(base, Section) and base is not Section and own_fields(base)
    ]


def declared_in(section: type[Section], name: str) -> type[Section]:
    return next(base for base in reversed(lineage(section)) if name in own_fields(base))


def key(field: FieldInfo, name: str) -> str:
    """Return the field's name in YAML."""
    return field.alias or name


def type_in_words(hint: Any) -> str:
    """Return what a value may be, as people say it."""
    *first, last = dict.fromkeys(_alternatives(hint, []))
    return f"{', '.join(first)} or {last}" if first else last


_PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def _alternatives(hint: Any, bounds: list[Any]) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _alternatives(arguments[0], [*bounds, *_flat(arguments[1:])])
    elif origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            yield from _alternatives(alternative, bounds)
    elif origin is Literal:
        yield from (f"`{value}`" for value in arguments)
    elif origin is tuple:
        yield f"list of {_length(bounds)}{_plural(type_in_words(arguments[0]))}"
    elif origin is dict:
        yield "mapping"
    elif isinstance(hint, type) and issubclass(hint, Section):
        yield f"mapping of {', '.join(f'`{name}`' for name in hint.model_fields)}"
    else:
        yield _PLAIN[hint].replace("null", "`null`") + _in_words(bounds)


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]


def _plural(words: str) -> str:
    return re.sub(r"^(integer|number|text|mapping)\b", r"\1s", words)


def _length(bounds: list[Any]) -> str:
    least = max((b.min_length for b in bounds if isinstance(b, MinLen)), default=0)
    most = [b.max_length for b in bounds if isinstance(b, MaxLen)]
    return f"{least} " if most == [least] else "one or more " if least == 1 else ""


def _in_words(bounds: list[Any]) -> str:
    signs = []
    for bound in bounds:
        match bound:
            case Ge(ge=limit):
                signs.append(f"≥ {limit}")
            case Gt(gt=limit):
                signs.append(f"> {limit}")
            case Le(le=limit):
                signs.append(f"≤ {limit}")
            case Lt(lt=limit):
                signs.append(f"< {limit}")
            case _:
                pass  # a pattern or a validator, whose message says it
    return f" {' and '.join(signs)}" if signs else ""


# --- what conf/ says ------------------------------------------------------------------------------


def title(path: Path) -> str:
    """Return the comment at the head of an option's file, as one sentence."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("#").strip()


def options(group: str) -> dict[str, dict[str, Any]]:
    """Return the values of each option of a group, those of the options below it included."""
    return {path.stem: _values(path) for path in sorted((CONF / group).glob("*.yaml"))}


def _values(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = {}
    for below in tree.pop("defaults", []):
        if isinstance(below, str) and below != "_self_":
            values |= _values(path.with_name(f"{below}.yaml"))
    return values | tree


def brought_along(path: Path) -> list[str]:
    """Return the options of other groups that an option chooses, as on the command line."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for below in tree.get("defaults", []):
        if isinstance(below, str) and below != "_self_":
            found += brought_along(path.with_name(f"{below}.yaml"))
        elif isinstance(below, dict):
            ((group, option),) = below.items()
            found.append(f"{re.sub(r'^override /|@.*$', '', group)}={option}")
    return found


def written(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, BaseModel):
        return "its fields'"
    if isinstance(value, float):
        return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].replace("+", ""), f"{value:g}")
    if isinstance(value, tuple):
        value = [v.model_dump() if isinstance(v, BaseModel) else v for v in value]
    return (value or '""') if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- the configuration chapter --------------------------------------------------------------------

INTRODUCTION = f"""\
<!-- Made by `{COMMAND}` of train/config/ and conf/: edit those, then run it. -->

# Configuration

A run is composed of one option of each group below, `group=option`, and of single keys,
`group.key=value`. Every key is on this page, with what it may be, its default
and its effect. An unknown key, a wrong type, two values that contradict each other, or one that
nothing reads are an error before anything starts.

```bash
shardwright train model=gpt2_small strategy=zero2 trainer.max_steps=2000
shardwright train --cfg job                  # the composed config; --cfg job -p trainer: one group
shardwright train --config-dir mine ...      # with groups and experiments of your own
```

A list replaces the one that there is: `data.paths="[a.txt, b.txt]"`. A key that may be unset takes
`null`. A default below is what the option brings; where its options differ, the table of the group
says what each of them sets. A run's `config.yaml` holds every key as it was resolved.
"""


def configuration() -> str:
    """Return the chapter docs/configuration.md."""
    hints = typing.get_type_hints(Sections, include_extras=True)
    groups = [name for name in Sections.model_fields if (CONF / name).is_dir()]
    anchors: set[str] = set()
    parts = [INTRODUCTION, "## The run itself\n"]
    own = [name for name in Sections.model_fields if name not in groups]
    values = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    parts.append(_fields(Sections, own, "", [values], anchors, ""))
    parts += [_group(name, hints[name], anchors) for name in groups]
    parts.append(_experiments())
    parts.append(_group(GROUP, Hardware, anchors))
    parts.append(_sweeps(anchors))
    return "\n".join(parts)


def kinds(hint: Any) -> dict[str, type[Section]]:
    """Return the classes of a section by their kind; of one without kinds, itself by no name."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    members = typing.get_args(hint) or (hint,)
    if len(members) == 1:
        return {"": members[0]}
    return {typing.get_args(typing.get_type_hints(member)["kind"])[0]: member for member in members}


def _group(group: str, hint: Any, anchors: set[str]) -> str:
    sections = kinds(hint)
    by_option = options(group)
    head = (inspect.getdoc(inspect.getmodule(next(iter(sections.values())))) or "").splitlines()[0]
    parts = [f"## {group}\n", f"{head.partition(': ')[2].capitalize()}\n"]
    blocks: dict[type[Section], list[str]] = {}
    for kind, section in sections.items():
        for base in lineage(section):
            blocks.setdefault(base, []).append(kind)
    defaults = {
        kind: [v for v in by_option.values() if v.get("kind", "") == kind] for kind in sections
    }
    parts.append(_options(group, sections, by_option))
    # What all have first, what one has last; among equals in the order of the sources.
    for base, having in sorted(blocks.items(), key=lambda block: -len(block[1])):
        names = [name for name in own_fields(base) if name in base.model_fields and name != "kind"]
        values = [
            v
            for kind in having
            for v in defaults[kind]
            if all(declared_in(sections[kind], name) is base for name in names)
        ] or [v for kind in having for v in defaults[kind]]
        if len(sections) > 1:
            parts.append(f"### {_heading(group, having, list(sections))}\n")
        if text := (inspect.getdoc(base) if "__doc__" in base.__dict__ else ""):
            parts.append(f"{_prose(text)}\n" if len(sections) > 1 else "")
        of_one = having[0] if len(having) == 1 and len(sections) > 1 else ""
        parts.append(_fields(base, names, f"{group}.", values, anchors, of_one))
    return "\n".join(part for part in parts if part)


def _heading(group: str, having: list[str], all_kinds: list[str]) -> str:
    others = [kind for kind in all_kinds if kind not in having]
    if not others:
        return f"{group}: every kind"
    if len(others) == 1 and len(having) > 1:
        return f"{group}: every kind but {others[0]}"
    return f"{group}: {', '.join(having)}"


def _options(
    group: str, sections: Mapping[str, type[Section]], by_option: Mapping[str, dict[str, Any]]
) -> str:
    if len(by_option) == 1:
        return ""
    rows = ["| option | what it is |", "|---|---|"]
    for option, values in by_option.items():
        path = CONF / group / f"{option}.yaml"
        fields = sections[values.get("kind", "")].model_fields
        by_key = {key(field, name): field for name, field in fields.items()}
        given = {n for n, f in by_key.items() if f.is_required() and n != "kind"}
        hidden = {"kind"} | (given if len(given) > MOST_SIZES_OF_AN_OPTION else set())
        sets = [
            f"`{group}.{name}={written(value)}`"
            for name, value in values.items()
            if name not in hidden
            and value != "???"
            and not isinstance(value, list | dict)
            and value != by_key[name].get_default()
        ]
        said = _prose(title(path)).rstrip(".") + "."
        sets += [f"`{other}`" for other in brought_along(path)]
        said += f" Sets {', '.join(sets)}." if sets else ""
        if values.get("kind", option) != option and len(sections) > 1:
            kind = values["kind"]
            said += f" Fields: [{kind}](#{group}-{kind})."
        rows.append(f"| `{option}` | {_cell(said)} |")
    return "\n".join(rows) + "\n"


def _fields(
    section: type[Section],
    names: list[str],
    prefix: str,
    values: list[dict[str, Any]],
    anchors: set[str],
    kind: str,
) -> str:
    hints = typing.get_type_hints(section, include_extras=True)
    lines = []
    for name in names:
        field = section.model_fields[name]
        text = own_fields(section)[name]
        if isinstance(hints[name], type) and issubclass(hints[name], Section):
            below: type[Section] = hints[name]
            inner = [v[key(field, name)] for v in values if key(field, name) in v]
            within = f"{prefix}{key(field, name)}."
            own = list(own_fields(below))
            lines.append(f"- **`{prefix}{key(field, name)}`**: {_prose(text)}")
            lines.append(_fields(below, own, within, inner, anchors, kind).rstrip("\n"))
            continue
        full = f"{prefix}{key(field, name)}"
        anchor = full if full not in anchors else f"{full}.{kind}"
        anchors.add(anchor)
        facts = f"{type_in_words(hints[name])}; {_default(field, key(field, name), values)}"
        said = _prose(text).removeprefix(f"`{full}`: ")
        lines.append(f'- <a id="{anchor}"></a>**`{full}`** ({facts})<br>\n  {said}')
    return "\n".join(lines) + "\n" if lines else ""


def _default(field: FieldInfo, name: str, values: list[dict[str, Any]]) -> str:
    """Return what a key is where nobody says: what all options bring, or else the type's own."""
    brought = {json.dumps(v[name]) for v in values if name in v}
    if brought == {'"???"'}:
        return "has to be given"
    if len(brought) == 1 and len(values) == sum(name in v for v in values):
        return f"default `{written(json.loads(brought.pop()))}`"
    if field.is_required():
        return "each option has its own"
    return f"default `{written(field.get_default(call_default_factory=True))}`"


def _experiments() -> str:
    rows = ["## experiment\n", "A whole run by name; it sets keys of any group.\n"]
    rows += ["| option | what it is |", "|---|---|"]
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").strip())
        rows.append(f"| `{path.stem}` | {_cell(_prose(' '.join(comment)))} |")
    return "\n".join(rows) + "\n"


def _sweeps(anchors: set[str]) -> str:
    said = (inspect.getdoc(SweepConfig) or "").splitlines()[0]
    parts = [
        "## sweep\n",
        f"{_prose(said)} Of `shardwright sweep` alone: no part of a run's config; "
        "see [Sweeps](sweeps.md).\n",
    ]
    rows = ["| option | what it is |", "|---|---|"]
    for path in sorted((CONF / "sweep").glob("*.yaml")):
        rows.append(f"| `{path.stem}` | {_cell(_prose(title(path)))} |")
    parts += ["\n".join(rows) + "\n"]
    parts.append(_fields(SweepConfig, list(own_fields(SweepConfig)), "sweep.", [], anchors, ""))
    return "\n".join(parts)


_CODE = re.compile(r'\S+="[^"]*"|[^\s("]*[\w>*/-][_=<*]+[^\s,;:)"]*[^\s,;:.)"]')
"""Keys, values, paths and patterns in running text, which have characters of Markdown's own."""


def _prose(text: str) -> str:
    """Return a docstring or comment as Markdown in one line."""
    text = re.sub(r"``(.+?)``", r"`\1`", re.sub(r"\s+", " ", text))
    text = "".join(
        part if is_code else _CODE.sub(r"`\g<0>`", part) for is_code, part in _by_code(text)
    )
    return "".join(
        part if is_code else part.replace("<", "\\<") for is_code, part in _by_code(text)
    )


def _by_code(text: str) -> Iterator[tuple[bool, str]]:
    for index, part in enumerate(re.split(r"(`[^`]+`)", text)):
        yield bool(index % 2), part


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the tree of the architecture chapter ---------------------------------------------------------


def tree() -> str:
    """Return each folder and module of the packages, with the first line of what it says."""
    return "\n".join(line for package in PACKAGES for line in _folder(ROOT / package, 0))


def _folder(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", folder / "__init__.py", depth)
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield _line(path.name, path, depth + 1)
    for below in sorted(folder.iterdir()):
        if (below / "__init__.py").is_file() and not below.is_symlink():
            yield from _folder(below, depth + 1)


def _line(name: str, module: Path, depth: int) -> str:
    said = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").splitlines()
    return f"{'    ' * depth}- `{name}` {_prose(said[0]) if said else ''}".rstrip()


def architecture(text: str) -> str:
    """Return the architecture chapter with the tree as it is now."""
    return _replaced(text, BEGIN, tree(), END)


def _replaced(text: str, begin: str, part: str, end: str) -> str:
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


# --- the optimizers of the chapter on strategies --------------------------------------------------


def optimizers() -> str:
    """Return the table of optimizers, with where each works."""
    rows = ["| `trainer.optimizer` | strategies | what it is |", "|---|---|---|"]
    for name, facts in OPTIMIZERS.items():
        rows.append(f"| `{name}` | {_where(facts)} | {_cell(facts.description)} |")
    return "\n".join(rows)


def _where(facts: OptimizerFacts) -> str:
    if facts.takes_sharded and not (facts.why_not_flat or facts.is_for_gpus):
        return "all"
    where = "`single`, `ddp`, " + ("`zero0`" if facts.why_not_flat else "`zero0` to `zero3`")
    if facts.takes_sharded:
        where += ", `fsdp`" + (" without offload" if facts.is_for_gpus else "")
        where += "" if facts.takes_sharded_bf16 else ", there with masters in fp32"
    return where + ("; masters in fp32" if facts.why_fp32_masters else "")


def generated() -> dict[Path, str]:
    """Return what each generated file has to hold."""
    chapter, strategies = DOCS / "architecture.md", DOCS / "strategies.md"
    of_strategies = strategies.read_text(encoding="utf-8")
    return {
        DOCS / "configuration.md": configuration(),
        DOCS / "coming_from.md": coming_from.chapter(COMMAND, lambda text: _cell(_prose(text))),
        chapter: architecture(chapter.read_text(encoding="utf-8")),
        strategies: _replaced(of_strategies, BEGIN_OPTIMIZERS, optimizers(), END_OPTIMIZERS),
    }


if __name__ == "__main__":
    for file, content in generated().items():
        file.write_text(content, encoding="utf-8")
