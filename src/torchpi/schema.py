"""Reading, validating and writing JSON; every file from users and other programs is parsed here."""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import msgspec.inspect as schema

from torchpi.atomic import replace_text
from torchpi.errors import ConfigError, MissingFileError, TorchpiError, did_you_mean

T = TypeVar("T")

MAX_DEPTH = 32
_MAX_DIGITS = 40
COMMENT = "comment"
"""Field that people can add to any object in files that they write."""


def is_file_name(text: str) -> bool:
    """True if an untrusted text is a plain file name: no folders, no unprintable characters, at most 255 bytes."""
    return pathlib.PurePath(text).name == text != ".." and text.isprintable() and len(text.encode()) <= 255


def read_json(path: str | pathlib.Path, *, error: type[TorchpiError] = ConfigError) -> Any:
    """Read the value in a JSON file; raise `error` if it is not valid JSON."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}; check its path.")
    return parse_json(path.read_bytes(), str(path), error=error)


def parse_json(text: str | bytes, where: str, *, error: type[TorchpiError] = ConfigError) -> Any:
    """Parse a JSON text; `where` names it in errors, which are those of `read_json`."""
    try:
        # Some editors begin files with a byte order mark.
        return bounded(DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig")))
    except (RecursionError, ValueError) as problem:  # ValueError: JSONDecodeError or UnicodeDecodeError
        is_deep = isinstance(problem, RecursionError)
        fault = "objects and lists are nested too deeply" if is_deep else str(problem).rstrip(".")
        raise error(f"{where} is not valid JSON: {fault}. Correct the file, or get it again.") from problem


def bounded(value: Any) -> Any:
    """Return a JSON value; raise a ValueError if it is nested too deeply."""
    if (depth := _depth(value)) > MAX_DEPTH:
        raise ValueError(f"objects and lists are nested {depth} deep; expected at most {MAX_DEPTH}.")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text:.20}… has {len(text)} digits; expected at most {_MAX_DIGITS}.")
    return int(text)


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text:.20}{'…' * (len(text) > 20)} is too large.")
    return number


DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float)
"""Decoder that refuses numbers too large for any field; for texts with several values."""


def read_json_object(path: str | pathlib.Path, *, error: type[TorchpiError] = ConfigError) -> dict[str, Any]:
    """Read the object in a JSON file; for the errors see `read_json`."""
    value = read_json(path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def without_comments(value: Any) -> Any:
    """Remove the field `comment` from all objects in a JSON value."""
    if isinstance(value, list):
        return [without_comments(item) for item in value]
    if isinstance(value, dict):
        return {name: without_comments(item) for name, item in value.items() if name != COMMENT}
    return value


def write_json(path: pathlib.Path, document: Any) -> None:
    """Write a document as indented JSON; NaN raises a ValueError."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, f"{text}\n")


def check_json(value: Any, where: str, *, error: type[TorchpiError] = ConfigError, max_bytes: int = 10**8) -> None:
    """Raise an error unless a value can be written as JSON and sent as msgpack, within limits of size and depth."""
    try:
        json.dumps(value, allow_nan=False)
        size, depth = len(msgspec.msgpack.encode(value)), _depth(value)  # checks for 64 bit integers and valid Unicode
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else f"{problem}".rstrip(".")
        raise error(f"{where} can't be written as JSON, or sent: {reason:.200}.") from problem
    if depth > MAX_DEPTH:
        raise error(f"{where} has objects and lists nested {depth} deep; expected at most {MAX_DEPTH}.")
    if size > max_bytes:
        raise error(f"{where} has {size} bytes; expected at most {max_bytes}.")


def _depth(value: Any) -> int:
    if isinstance(value, str | int | float):  # fast path for most values
        return 0
    items = value.values() if isinstance(value, Mapping) else value
    return 1 + max(map(_depth, items), default=0) if isinstance(items, Iterable) else 0


def parse(
    kind: type[T], value: Any, where: str, *, error: type[TorchpiError] = ConfigError, known_only: bool = True
) -> T:
    """Build a dataclass from a JSON value, after checking for unknown and missing fields and wrong types.

    Args:
        kind: a dataclass, with nested ones if needed; its `__post_init__` runs.
        where: the document's name in errors.
        known_only: refuse unknown fields; False for documents of other programs, which may add fields.
    """
    if known_only and (unknown := list(_unknown_fields(schema.type_info(kind), value, ""))):
        fields = ", ".join(path + did_you_mean(path.rpartition(".")[2], known) for path, known in sorted(unknown))
        raise error(f"{where} has unknown fields {fields}; known are {', '.join(unknown[0][1])}.")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        message = _plain_message(str(problem), schema.type_info(kind), value)
        raise error(f"{where}: {message.rstrip('.')}.") from problem


def _plain_message(message: str, kind: schema.Type, value: Any) -> str:
    """Complete an error of msgspec: name the found value and the valid choices, and use Python's type names."""
    message, _, path = message.partition(" - at `$")
    path = path.strip(".`")
    kinds, found = _at(kind, value, path)
    location = f" at `{path}`" if path else ""
    if message.startswith("Invalid enum value "):
        choices = [repr(choice) for part in kinds if isinstance(part, schema.LiteralType) for choice in part.values]
        return f"{message.replace(' enum', '')}{location}; valid are {', '.join(choices)}"
    if message.startswith("Expected "):
        message = message.replace("array", "list")
        is_complete = ", got " in message or found is ...
        return f"{message}{location}" if is_complete else f"{message}, got {found!r}{location}"
    if message.startswith("Object missing "):
        return f"{message}{location}"
    return f"`{path}`: {message}" if path else message  # from `__post_init__`: a whole sentence


def _at(kind: schema.Type, value: Any, path: str) -> tuple[tuple[schema.Type, ...], Any]:
    """Possible types at a path in msgspec's notation, and the value there; `...` if the value is unknown."""
    kinds = kind.types if isinstance(kind, schema.UnionType) else (kind,)
    for step in re.findall(r"\.\.\.|[^.\[\]]+", path):
        inner: list[schema.Type] = []
        for part in kinds:
            if isinstance(part, schema.DataclassType):
                inner += [field.type for field in part.fields if field.encode_name == step]
            elif isinstance(part, schema.VarTupleType | schema.ListType):
                inner.append(part.item_type)
            elif isinstance(part, schema.DictType):
                inner.append(part.value_type)
        kinds = tuple(one for part in inner for one in (part.types if isinstance(part, schema.UnionType) else (part,)))
        if isinstance(value, Mapping):
            value = value.get(step, ...)
        else:
            value = value[int(step)] if isinstance(value, list | tuple) and step.isdecimal() else ...
    return kinds, value


def _unknown_fields(kind: schema.Type, value: Any, path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Path of each unknown field, and the names of the fields that are known there."""
    if isinstance(kind, schema.UnionType):
        parts = [part for part in kind.types if isinstance(part, schema.DataclassType | schema.VarTupleType)]
        for part in parts[:1]:
            yield from _unknown_fields(part, value, path)
    elif isinstance(kind, schema.DataclassType) and isinstance(value, Mapping):
        fields = {field.encode_name: field.type for field in kind.fields}
        for name, item in value.items():
            if name not in fields:
                yield f"{path}{name}", tuple(fields)
            else:
                yield from _unknown_fields(fields[name], item, f"{path}{name}.")
    elif isinstance(kind, schema.VarTupleType | schema.ListType) and isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _unknown_fields(kind.item_type, item, f"{path}{number}.")
    elif isinstance(kind, schema.DictType) and isinstance(value, Mapping):
        for name, item in value.items():
            yield from _unknown_fields(kind.value_type, item, f"{path}{name}.")


def require_stated(found: Any, complete: Any, where: str, *, error: type[TorchpiError] = ConfigError) -> None:
    """Raise an error unless a JSON value states every field of `complete`; defaults are not accepted."""
    if missing := list(_unstated_fields(found, complete, "")):
        raise error(f"{where} lacks {', '.join(missing)}; every field must be stated.")


def _unstated_fields(found: Any, complete: Any, path: str) -> Iterator[str]:
    if isinstance(complete, Mapping):
        for name, value in complete.items():
            if not isinstance(found, Mapping) or name not in found:
                yield f"{path}{name}"
            else:
                yield from _unstated_fields(found[name], value, f"{path}{name}.")
    elif isinstance(complete, list | tuple):
        for number, (item, complete_item) in enumerate(zip(found, complete, strict=True)):
            yield from _unstated_fields(item, complete_item, f"{path}{number}.")
