"""Numbers, shapes and JSON documents as text."""

import json
import math
from collections.abc import Mapping
from typing import Any


def format_shape(shape: tuple[int, ...]) -> str:
    """Format a shape as `[4, 968, 2048]`."""
    return f"[{', '.join(map(str, shape))}]"


def format_count(count: int) -> str:
    """Format a count with grouped digits: `1 234 567`."""
    return f"{count:,}".replace(",", " ")


def large_count(count: int) -> str:
    """Format a large count in words: `3.25 billion`."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return format_count(count)


def format_number(value: float | int, *, missing: str | None = None) -> str:
    """Format a number with three digits, thousands without an exponent; `missing` replaces NaN and infinity."""
    if missing is not None and not math.isfinite(value):
        return missing
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def format_gib(num_bytes: float | int) -> str:
    """Format a size in GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def format_duration(seconds: float | int) -> str:
    """Format a duration as `2 h 05 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(document: Any) -> None:
    """Print one JSON document on stdout: the output of a command's --json."""
    print(json.dumps(without_nan(document), allow_nan=False))
