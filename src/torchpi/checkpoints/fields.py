"""Fields of a checkpoint's files: each is used, changes nothing that is computed, or is read with some values only."""

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
    """An entry of assets/checkpoint_fields.toml; it has one of `used`, `unused` and `only`."""

    used: str | None = None
    """The purpose."""
    unused: str | None = None
    """The reason why nothing that is computed depends on it."""
    only: tuple[Any, ...] = ()
    """The values that are read; TOML has no null, "null" stands for it."""
    because: str = ""
    """The reason why no others are."""


FIELDS = msgspec.toml.decode(
    (assets() / "checkpoint_fields.toml").read_bytes(), type=dict[str, dict[str, Field]], strict=False
)


def require_fields(table: str, document: Mapping[str, Any], where: str | pathlib.Path) -> None:
    """Refuse fields of a document that its table of `FIELDS` does not have, and values that it does not allow."""
    for name, value in document.items():
        pattern = next((known for known in FIELDS[table] if fnmatch.fnmatchcase(name, known)), None)
        if pattern is None:
            raise CheckpointError(
                f"{where} has the field {name} ({_text(value)}), of which it is not known here what it changes. Delete "
                "it there if the policy does not depend on it; docs/checkpoints.md lists the fields that are known."
            )
        field = FIELDS[table][pattern]
        allowed = [None if known == "null" else known for known in field.only]
        if allowed and not any(
            known == value and isinstance(known, bool) == isinstance(value, bool) for known in allowed
        ):
            expected = listed(map(_text, allowed), "or")
            raise CheckpointError(f"{where}: {name} is {_text(value)}; only {expected} is read: {field.because}.")


def _text(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}…"
