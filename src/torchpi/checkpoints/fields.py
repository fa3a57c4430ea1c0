"""Known fields of other programs' checkpoint files: used, without effect, or supported with some values only."""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Mapping
from typing import Any

import msgspec

from torchpi.assets import assets
from torchpi.errors import CheckpointError, listed


@dataclasses.dataclass(frozen=True)
class Field:
    """An entry of assets/checkpoint_fields.toml, with one of `used`, `unused` and `only`."""

    used: str | None = None
    """Purpose."""
    unused: str | None = None
    """Reason why the field has no effect on results."""
    only: tuple[Any, ...] = ()
    """Supported values; "null" stands for null, which TOML lacks."""
    because: str = ""
    """Reason why other values are not supported."""


FIELDS = msgspec.toml.decode(
    (assets() / "checkpoint_fields.toml").read_bytes(), type=dict[str, dict[str, Field]], strict=False
)


def require_fields(table: str, document: Mapping[str, Any], where: str | pathlib.Path) -> None:
    """Raise an error for fields of a document that are not in a table of `FIELDS`, and for unsupported values."""
    for name, value in document.items():
        pattern = next((known for known in FIELDS[table] if fnmatch.fnmatchcase(name, known)), None)
        if pattern is None:
            raise CheckpointError(
                f"{where} has the unknown field {name} ({_text(value)}), whose effect torchpi does not know. Delete it "
                "there if the policy does not depend on it; docs/checkpoints.md lists the known fields."
            )
        field = FIELDS[table][pattern]
        allowed = [None if known == "null" else known for known in field.only]
        # 1 == True in Python, but not in JSON.
        if allowed and not any(
            known == value and isinstance(known, bool) == isinstance(value, bool) for known in allowed
        ):
            expected = listed(map(_text, allowed), "or")
            raise CheckpointError(f"{where}: {name} is {_text(value)}; only {expected} is supported: {field.because}.")


def _text(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}…"
