"""Wire format: msgpack with NumPy, byte for byte as openpi writes it. Nothing is ever unpickled.

msgpack's own types are unchanged (tuples arrive as lists). NumPy's types are maps with byte-string keys:

    array   {b"__ndarray__": True, b"data": bytes in C order, b"dtype": dtype.str, b"shape": [...]}
    scalar  {b"__npgeneric__": True, b"data": Python number, b"dtype": dtype.str}

np.float64, np.str_ and np.bytes_ are subclasses of Python's float, str and bytes, and arrive as these.
"""

from __future__ import annotations

import re
from typing import Any, Callable

import msgpack
import numpy as np

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
ARRAY_KEYS = {ARRAY, b"data", b"dtype", b"shape"}
SCALAR_KEYS = {SCALAR, b"data", b"dtype"}

# Without complex, object and void (structured), which openpi refuses too.
ARRAY_KINDS = "biufSUmM"
SCALAR_KINDS = "biuf"

# Maps that other formats write for arrays and scalars. They are refused here: as maps they would fail much later.
FOREIGN = (
    ({"nd", "type", "data"}, "the package msgpack-numpy"),
    ({"__ndarray__", "data", "dtype", "shape"}, "a packer that turns the byte-string keys into text"),
    ({"__npgeneric__", "data", "dtype"}, "a packer that turns the byte-string keys into text"),
    ({"__numpy__", "dtype", "shape"}, "the package json-numpy"),
    ({"__ndarray_class__", "as_npy"}, "GR00T's client"),
)

# Values of dtype.str, and plain names ("float32"). With commas or brackets NumPy would parse structured types.
DTYPE = re.compile(r"[<>=|]?[A-Za-z]+[0-9]*(\[[0-9A-Za-z]+\])?")


def pack(obj: Any) -> bytes:
    """Pack `obj`: dicts with str or bytes keys, lists, str, bytes, numbers, bool, None, NumPy arrays and scalars.

    Raises:
        ValueError: a value has another type, a text is not Unicode, an integer exceeds 64 bits, or the nesting is about
            500 deep.
    """
    try:
        packed: bytes = msgpack.packb(obj, default=_encode)
        return packed
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Cannot pack the text {error.object!r:.80}: its character {error.start} is the lone surrogate "
            f"{ord(error.object[error.start]):#x}; expected Unicode characters. Decode the text again."
        ) from error


def unpack(data: bytes, *, max_items: int | None = None) -> Any:
    """Unpack the output of `pack`; arrays are writable.

    Args:
        max_items: largest total number of entries in all lists and maps; None means no limit. A server that reads
            untrusted input needs it: msgpack can turn one byte into a Python object of a hundred bytes.

    Raises:
        ValueError: the bytes are not exactly one object in this format, its nesting is about 1000 deep, or it has too
            many entries.
    """
    try:
        return msgpack.unpackb(data, **hooks(max_items, decode_map))
    # UnpackException: some versions of msgpack raise errors that are not ValueErrors.
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"Cannot unpack {len(data)} bytes: {reason}; expected msgpack as openpi_client.msgpack_numpy and "
            "torchpi_client.pack write it."
        ) from error


def hooks(max_items: int | None, decode: Callable[[dict[Any, Any]], Any]) -> dict[str, Any]:
    """Arguments of `msgpack.unpackb`, with hooks for complete lists and maps.

    Args:
        max_items: as for `unpack`. msgpack's own limits apply to incomplete lists and maps.
        decode: returns the value of a map, such as `decode_map`.
    """
    if max_items is None:
        return {"object_hook": decode}
    remaining = max_items

    def count(container: Any) -> Any:
        nonlocal remaining
        remaining -= len(container)
        if remaining < 0:
            raise ValueError(f"Its lists and maps have more than {max_items} entries.")
        return container

    return {
        "list_hook": count,
        "object_hook": lambda value: decode(count(value)),
        "max_array_len": max_items,
        "max_map_len": max_items,
    }


def _encode(value: Any) -> dict[bytes, Any]:
    """Encode a value that msgpack has no type for as a tagged map."""
    if isinstance(value, np.ndarray) and _has_bytes(value.dtype, ARRAY_KINDS):
        return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and _has_bytes(value.dtype, SCALAR_KINDS):
        number = value.item()
        if isinstance(number, (bool, int, float)):  # excludes np.longdouble, whose item() is a np.longdouble
            return {SCALAR: True, b"data": number, b"dtype": value.dtype.str}
    if isinstance(value, int):  # msgpack only calls this for integers that it cannot write
        raise ValueError(f"Cannot pack an integer of {value.bit_length()} bits; expected at most 64.")
    type_name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, (np.ndarray, np.generic)):
        type_name += f" of dtype {value.dtype}"
    raise ValueError(
        f"Cannot pack a {type_name}; expected dicts, lists, str, bytes, numbers, bool, None, and NumPy arrays and "
        "scalars of integers, floats, bool or text: convert it first."
    )


def _has_bytes(dtype: np.dtype[Any], kinds: str) -> bool:
    """True if bytes and `dtype.str` fully describe an array of this dtype."""
    return dtype.kind in kinds and dtype.isbuiltin != 2  # 2: a dtype of another library, unknown to np.dtype


def decode_map(value: dict[Any, Any]) -> Any:
    """Decode a tagged map into its array or scalar; other maps are returned unchanged."""
    if ARRAY in value:
        return _array(value)
    if SCALAR in value:
        return _scalar(value)
    names = {key.decode("latin-1") if isinstance(key, bytes) else key for key in value}
    for keys, origin in FOREIGN:
        if keys <= names:
            raise ValueError(f"It has an array or a number as packed by {origin}")
    return value


def _array(value: dict[Any, Any]) -> np.ndarray[Any, Any]:
    _require_keys(value, ARRAY_KEYS, "an array")
    dtype = _dtype(value[b"dtype"], ARRAY_KINDS)
    shape, data = value[b"shape"], value[b"data"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"An array's shape is {shape!r:.80}; expected a list of sizes.")
    if not isinstance(data, bytes):
        raise ValueError(f"An array's data is of type {type(data).__name__}; expected bytes.")
    expected = dtype.itemsize
    for size in shape:  # in Python's integers, which do not overflow
        expected *= size
    if len(data) != expected:
        raise ValueError(
            f"An array of shape {shape!s:.80} and dtype {dtype} has {len(data)} bytes; expected {expected}."
        )
    # Copied, because the buffer is read-only. NumPy refuses sizes and numbers of dimensions beyond its limits.
    return np.ndarray(tuple(shape), dtype, buffer=data).copy()


def _scalar(value: dict[Any, Any]) -> np.generic:
    _require_keys(value, SCALAR_KEYS, "a scalar")
    dtype, number = _dtype(value[b"dtype"], SCALAR_KINDS), value[b"data"]
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtype.kind]
    if type(number) not in allowed:
        raise ValueError(f"A scalar of dtype {dtype} has {number!r:.80} as its data.")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
        raise ValueError(f"A scalar of dtype {dtype} is {number}, which is out of range.")
    with np.errstate(over="ignore"):  # overflow gives infinity, as in every cast
        return dtype.type(number)


def _dtype(name: Any, kinds: str) -> np.dtype[Any]:
    if isinstance(name, str) and DTYPE.fullmatch(name):
        try:
            dtype = np.dtype(name)
        except (TypeError, ValueError, DeprecationWarning):  # DeprecationWarning if warnings are errors
            pass
        else:
            if dtype.itemsize > 0 and _has_bytes(dtype, kinds):
                return dtype
    raise ValueError(f"The dtype is {name!r:.80}; expected one of integers, floats, bool or text, such as '<f4'.")


def _require_keys(value: dict[Any, Any], keys: set[bytes], what: str) -> None:
    if set(value) != keys:
        found = str(sorted(f"{key}"[:40] for key in value))
        raise ValueError(f"{what} has the keys {found:.200}; expected {sorted(map(str, keys))}.")
