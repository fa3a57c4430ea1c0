"""Comparison of a dataset's dimension names with a robot's: the same joints in another order, or other joints."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchpi.errors import DatasetError

_SYNONYMS = {
    **{"pos": "position", "qpos": "position", "vel": "velocity", "qvel": "velocity", "torque": "effort"},
    **{"j": "joint", "l": "left", "r": "right", "jaw": "gripper", "claw": "gripper", "finger": "gripper"},
    **{f"d{axis}": axis for axis in ("x", "y", "z", "roll", "pitch", "yaw")},
}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ROLES = _set("action actions state states obs observation observations cmd command target goal main delta value")
"""Words that carry no information about the joint."""
_GENERIC = _set("left right arm joint motor dim dimension axis channel index servo actuator dof pad")
"""Words that fit any joint."""
_ROTATION = _set("roll pitch yaw rx ry rz rw qx qy qz qw angle rot rotation euler quat orientation")
_POSE = _ROTATION | {"x", "y", "z"}
_EXCLUSIVE = (frozenset({"left", "right"}), frozenset({"position", "velocity", "effort"}))
"""Groups of words of which one dimension never has two."""

_Name = tuple[str, ...]


def dimension_names(feature: Mapping[str, Any], num_dims: int) -> tuple[str, ...] | None:
    """Names of a column's dimensions; None if the dataset doesn't name each of them.

    Accepted are a list, nested lists, groups {"motors": ["shoulder", …]} and indices {"shoulder": 0, …}. A list of two
    or more names with the wrong length names the first dimensions, so that they can still contradict the robot's.
    """
    names = feature.get("names")
    groups = list(names.values()) if isinstance(names, Mapping) else []
    for candidate in (tuple(_flat(value)) for value in (names, *groups)):
        if candidate and len(candidate) == num_dims:
            return candidate
    if isinstance(names, list) and len(first := list(_flat(names))) > 1:
        return tuple([*first, *(f"dim_{i}" for i in range(len(first), num_dims))][:num_dims])
    return None


def _flat(value: Any, group: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        if value and all(index in value.values() for index in range(len(value))):
            yield from sorted(value, key=value.__getitem__)
            return
        for key, part in value.items():  # the group distinguishes two arms with the same joints
            yield from _flat(part, f"{group}{key}_" if len(value) > 1 else group)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part, group)
    elif value is not None:
        yield f"{group}{value}"


def order_of(found: Sequence[str], expected: Sequence[str]) -> list[int]:
    """The index in the dataset of each of the robot's dimensions.

    Names are compared without case, separators, shared beginnings and endings, words such as "pos" or "action", and the
    number that counting starts with. If both have the same names, these decide; if the names carry too little
    information, the order is kept. Contradictory names are a ValueError that shows a pair of them.
    """
    words, wanted = [_words(name) for name in found], [_words(name) for name in expected]
    order = list(range(len(found)))
    for dropped in (_ROLES, _ROLES | _EXCLUSIVE[1]):
        ours, theirs = _distinct(words, dropped), _distinct(wanted, dropped)
        if len(set(ours)) == len(ours) and set(ours) == set(theirs):
            order = [ours.index(name) for name in theirs]
            break
    else:
        for i, name in enumerate(theirs):
            if name in ours and ours[i] != name and not _is_generic(name):
                j = ours.index(name)
                raise DatasetError(f"{found[j]!r} has the index {j}, not {i}, and not all names are the same")
            if _differ(ours[i], name):
                raise DatasetError(f"index {i} is {found[i]!r}, not {expected[i]!r}")
    for i, j in enumerate(order):
        for group in _EXCLUSIVE:
            a, b = group.intersection(words[j]), group.intersection(wanted[i])
            if a and b and a != b:
                raise DatasetError(f"{found[j]!r} is not {expected[i]!r}")
    return order


def names_determine_order(found: Sequence[str] | None, expected: Sequence[str]) -> bool:
    """True if names determine the order; False for names such as "motor_0", which fit in any order, and for None."""
    orders = (expected, expected[::-1], [*expected[1:], *expected[:1]])
    try:
        return found is not None and any(order_of(found, each) != list(range(len(found))) for each in orders)
    except DatasetError:
        return True


def _words(name: str) -> _Name:
    """Lower-case words and numbers of a name: "kLeftElbow.pos" has "k", "left", "elbow" and "position"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return tuple(_SYNONYMS.get(word, word) for word in re.findall(r"[^\W\d_]+|\d+", spaced.lower()))


def _distinct(names: Sequence[_Name], dropped: frozenset[str]) -> list[_Name]:
    """The part of each name that distinguishes it from the others; numbers are made to count from 0."""
    parts = [tuple(word for word in name if word not in dropped) for name in names]
    for end in (0, -1):
        while len(parts) > 1 and all(len(name) > 1 for name in parts) and len({name[end] for name in parts}) == 1:
            parts = [name[1:] if end == 0 else name[:-1] for name in parts]
    forms = [tuple("#" if word.isdecimal() else word for word in name) for name in parts]
    numbered = []
    for name, form in zip(parts, forms, strict=True):
        alike = [other for other, its_form in zip(parts, forms, strict=True) if its_form == form]
        first = {i: min(int(other[i]) for other in alike) for i, word in enumerate(form) if word == "#"}
        numbered.append(tuple(str(int(word) - first[i]) if i in first else word for i, word in enumerate(name)))
    return numbered


def _letters(name: _Name) -> set[str]:
    return {word for word in name if not word.isdecimal()}


def _is_generic(name: _Name) -> bool:
    return all(word in _GENERIC or (len(word) == 1 and word not in "xyz") for word in _letters(name))


def _differ(found: _Name, expected: _Name) -> bool:
    """True if two names can't mean the same dimension."""
    a, b = _letters(found), _letters(expected)
    is_pose = [bool(words & _POSE) and words <= _POSE | _GENERIC - {"joint"} for words in (a, b)]
    if _is_generic(found) or _is_generic(expected):
        return ("joint" in a and is_pose[1]) or ("joint" in b and is_pose[0])
    if all(is_pose) and not a & b:
        return bool(a & _ROTATION) != bool(b & _ROTATION)
    return not (a <= b or b <= a)
