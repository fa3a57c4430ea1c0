"""JSON documents → dataclasses: the one validator of every file that users or other programs write."""

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
"""The field of an object for readers, in files that people write."""


def is_file_name(text: str) -> bool:
    """True for the name of a file that may lie next to the one that names it: no folder, nothing unprintable."""
    return pathlib.PurePath(text).name == text != ".." and text.isprintable() and len(text.encode()) <= 255


def read_json(path: str | pathlib.Path, *, error: type[TorchpiError] = ConfigError) -> Any:
    """The value in a JSON file; `error` is raised where it is not JSON."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}.")
    return parse_json(path.read_bytes(), str(path), error=error)


def parse_json(text: str | bytes, where: str, *, error: type[TorchpiError] = ConfigError) -> Any:
    """The value that a text, the contents of `where`, is in JSON; errors as of `read_json`."""
    try:
        # Some editors put a mark in front.
        return bounded(DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig")))
    except RecursionError as problem:
        raise error(f"{where} is not valid JSON: objects and lists are nested too deeply.") from problem
    except ValueError as problem:  # JSONDecodeError and UnicodeDecodeError
        raise error(f"{where} is not valid JSON: {str(problem).rstrip('.')}.") from problem


def bounded(value: Any) -> Any:
    """A JSON value, if it is not nested too deeply; else a plain ValueError."""
    if (depth := _depth(value)) > MAX_DEPTH:
        raise ValueError(f"{depth} objects and lists are in each other; expected at most {MAX_DEPTH}.")
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
"""For several values in one text. Refuses numbers that no field holds."""


def read_json_object(path: str | pathlib.Path, *, error: type[TorchpiError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file; errors as of `read_json`."""
    value = read_json(path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def without_comments(value: Any) -> Any:
    """A JSON value without the fields `comment` of its objects, at any depth."""
    if isinstance(value, list):
        return [without_comments(item) for item in value]
    if isinstance(value, dict):
        return {name: without_comments(item) for name, item in value.items() if name != COMMENT}
    return value


def write_json(path: pathlib.Path, document: Any) -> None:
    """Write a document as JSON that people can read; NaN is a ValueError."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, f"{text}\n")


def check_json(value: Any, where: str, *, error: type[TorchpiError] = ConfigError, max_bytes: int = 10**8) -> None:
    """Raise an error unless a value can be written as JSON and sent as msgpack, in so many bytes and not too deep."""
    try:
        json.dumps(value, allow_nan=False)
        size, depth = len(msgspec.msgpack.encode(value)), _depth(value)  # integers of 64 bits, texts in Unicode
    except (TypeError, ValueError, OverflowError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else f"{problem}".rstrip(".")
        raise error(f"{where} can't be written as JSON, or sent: {reason:.200}.") from problem
    if depth > MAX_DEPTH or size > max_bytes:
        found = f"{depth} objects and lists in each other" if depth > MAX_DEPTH else f"{size} bytes"
        raise error(f"{where} has {found}; expected at most {MAX_DEPTH if depth > MAX_DEPTH else max_bytes}.")


def _depth(value: Any) -> int:
    if isinstance(value, str | int | float):  # most values, and fast
        return 0
    items = value.values() if isinstance(value, Mapping) else value
    return 1 + max(map(_depth, items), default=0) if isinstance(items, Iterable) else 0


def parse(
    kind: type[T], value: Any, where: str, *, error: type[TorchpiError] = ConfigError, known_only: bool = True
) -> T:
    """Build a dataclass from a JSON value: every field known, none missing, each of its type.

    Args:
        kind: a dataclass; its fields' types are checked, nested ones as well. Its own checks (`__post_init__`) run.
        where: the document's name, in front of messages.
        known_only: refuse unknown fields; False for documents of other programs, which may add some.
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
    """An error of msgspec with the found number and the valid choices, which it leaves out, in Python's words."""
    message, _, path = message.partition(" - at `$")
    path = path.strip(".`")
    kinds, found = _at(kind, value, path)
    place = f" at `{path}`" if path else ""
    if message.startswith("Invalid enum value "):
        choices = [repr(choice) for part in kinds if isinstance(part, schema.LiteralType) for choice in part.values]
        return f"{message.replace(' enum', '')}{place}; valid are {', '.join(choices)}"
    if message.startswith("Expected "):
        message = message.replace("array", "list")
        complete = ", got " in message or found is ...
        return f"{message}{place}" if complete else f"{message}, got {found!r}{place}"
    if message.startswith("Object missing "):
        return f"{message}{place}"
    return f"`{path}`: {message}" if path else message  # of the dataclass's own checks: whole sentences


def _at(kind: schema.Type, value: Any, path: str) -> tuple[tuple[schema.Type, ...], Any]:
    """The types that are possible at a path as msgspec writes it, and the value there; `...`: which is not known."""
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
    """The path of every field that a value has too many, and the names that are known at its place."""
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
    """Raise an error unless a JSON value states every field of the complete one: no default stands in for it."""
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
        for number, (ours, theirs) in enumerate(zip(found, complete, strict=True)):
            yield from _unstated_fields(ours, theirs, f"{path}{number}.")
