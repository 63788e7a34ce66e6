"""The names of weights as the model has them, without those of what was wrapped around it."""

from __future__ import annotations

from collections.abc import Iterable

from shardwright.train.checkpoint.format.lazy import Unreadable

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_LEADING = "module."


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return names without what compilation, recomputation, FSDP and DDP put into them.

    DDP's prefix is taken off where all of them have it. Raises Unreadable where two become one.
    """
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names
    }
    while plain and all(name.startswith(_LEADING) for name in plain.values()):
        plain = {name: short.removeprefix(_LEADING) for name, short in plain.items()}
    if len(set(plain.values())) < len(plain):
        raise Unreadable("two weights have the same name without those of their wrappers")
    return plain
