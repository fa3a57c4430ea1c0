"""What meta/info.json says of a column: its dimensions, and those of several that are joined."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchpi.errors import DatasetError


def dimension_names(feature: Mapping[str, Any], num_dims: int) -> tuple[str, ...] | None:
    """The names of a column's dimensions; None: the data set doesn't name each of them."""
    names = feature.get("names")
    if isinstance(names, Mapping):  # {"motors": ["shoulder", …]}
        names = next((value for value in names.values() if isinstance(value, list)), None)
    fits = isinstance(names, list) and len(names) == num_dims
    return tuple(map(str, names)) if fits and names else None


def joined_feature(parts: Mapping[str, Mapping[str, Any]], root: Path) -> dict[str, Any]:
    """The feature of a column that is made of several, one behind the other.

    Dimensions without names of their own are called after their column: joint_position_0, joint_position_1, …; a single
    one as the column.

    Args:
        parts: the features by their names.
        root: the data set's folder.
    """
    names: list[str] = []
    for name, feature in parts.items():
        num_dims = _num_dims(name, feature, root)
        numbered = (name,) if num_dims == 1 else tuple(f"{name}_{i}" for i in range(num_dims))
        names += dimension_names(feature, num_dims) or numbered
    dtype = np.result_type(*(feature["dtype"] for feature in parts.values()))
    return {"dtype": dtype.name, "shape": [len(names)], "names": names}


def _num_dims(name: str, feature: Mapping[str, Any], root: Path) -> int:
    """Of a column that can be joined with others."""
    dtype, shape = feature.get("dtype"), feature.get("shape")
    if not _is_numeric(dtype) or not isinstance(shape, list) or len(shape) > 1:
        raise DatasetError(
            f"{name} of {root} can't be joined with other columns: it is {dtype} of the shape {shape} per frame; "
            "expected numbers, one of them or one list."
        )
    return int(shape[0]) if shape else 1


def _is_numeric(dtype: Any) -> bool:
    try:
        return np.dtype(dtype).kind in "biuf" and dtype is not None
    except TypeError:  # video, image, …
        return False
