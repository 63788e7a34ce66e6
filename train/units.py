"""Counts, sizes and times as people read them."""

from __future__ import annotations

from string import ascii_letters


def counted(count: int, noun: str) -> str:
    """Return a count with a noun whose plural takes an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: float) -> str:
    """Return a count of bytes in the unit that leaves it at most three digits, TB the largest."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return a time in the one or two units that say enough."""
    whole = max(0, round(seconds))
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def bytes_of(text: str) -> int:
    """Return the bytes that a text like "50GB" or "1.5 TiB" means; raise ValueError at others."""
    number, unit = _split(text)
    name = unit.lower().removesuffix("b")
    base = 1024 if name.endswith("i") else 1000
    return int(number * base ** ("", "k", "m", "g", "t").index(name.removesuffix("i")))


def seconds_of(text: str) -> float:
    """Return the seconds that a text like "30d" or "12 h" means; raise ValueError at others."""
    number, unit = _split(text)
    lengths = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
    if unit not in lengths:
        raise ValueError(f"{text} has none of the units {', '.join(lengths)}")
    return number * lengths[unit]


def _split(text: str) -> tuple[float, str]:
    number = text.rstrip(ascii_letters)
    return float(number), text[len(number) :]
