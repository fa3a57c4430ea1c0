"""The names of a dataset's dimensions, compared with a robot's: the same joints in another order, or other joints."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchpi.errors import DatasetError

_SYNONYMS = {
    **{"pos": "position", "qpos": "position", "vel": "velocity", "qvel": "velocity", "torque": "effort"},
    **{"j": "joint", "l": "left", "r": "right", "jaw": "gripper", "claw": "gripper", "finger": "gripper"},
    **{f"d{axis}": axis for axis in ("x", "y", "z", "roll", "pitch", "yaw")},
}
_ROLES, _GENERIC, _ROTATION = (
    frozenset(words.split())
    for words in (
        "action actions state states obs observation observations cmd command target goal main delta value",
        "left right arm joint motor dim dimension axis channel index servo actuator dof pad",
        "roll pitch yaw rx ry rz rw qx qy qz qw angle rot rotation euler quat orientation",
    )
)
"""Words that say nothing about the joint; those that any joint could be called by; those of rotations."""
_POSE = _ROTATION | {"x", "y", "z"}
_EXCLUSIVE = (frozenset({"left", "right"}), frozenset({"position", "velocity", "effort"}))
"""Words of which the same dimension never has two."""

_Name = tuple[str, ...]


def dimension_names(feature: Mapping[str, Any], num_dims: int) -> tuple[str, ...] | None:
    """The names of a column's dimensions; None: the dataset doesn't name each of them.

    They lie in a list, in lists of lists, in groups {"motors": ["shoulder", …]}, or have indices {"shoulder": 0, …}. A
    list of two or more that is too short or too long names the first dimensions: these may contradict the robot's.
    """
    names = feature.get("names")
    groups = list(names.values()) if isinstance(names, Mapping) else []
    found = (tuple(_flat(value)) for value in (names, *groups))
    whole = next((each for each in found if each and len(each) == num_dims), None)
    if whole is None and isinstance(names, list) and len(some := list(_flat(names))) > 1:
        return tuple([*some, *(f"dim_{i}" for i in range(len(some), num_dims))][:num_dims])
    return whole


def _flat(value: Any, group: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        if value and all(index in value.values() for index in range(len(value))):
            yield from sorted(value, key=value.__getitem__)
            return
        for key, part in value.items():  # the group tells two arms with the same joints apart
            yield from _flat(part, f"{group}{key}_" if len(value) > 1 else group)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part, group)
    elif value is not None:
        yield f"{group}{value}"


def order_of(found: Sequence[str], expected: Sequence[str]) -> list[int]:
    """The place of each of the robot's dimensions among the dataset's.

    Names are the same up to case, separators, what all of them begin or end with, words such as "pos" or "action", and
    the number that counting starts with. The names decide where both have the same ones; the order does where the names
    say too little. Names that contradict each other are a ValueError, with a pair of them.
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
    for i, place in enumerate(order):
        for group in _EXCLUSIVE:
            a, b = group.intersection(words[place]), group.intersection(wanted[i])
            if a and b and a != b:
                raise DatasetError(f"{found[place]!r} is not {expected[i]!r}")
    return order


def tell_order(found: Sequence[str] | None, expected: Sequence[str]) -> bool:
    """False for names that fit the expected ones in any order, such as "motor_0"; None: no names."""
    orders = (expected, expected[::-1], [*expected[1:], *expected[:1]])
    try:
        return found is not None and any(order_of(found, each) != list(range(len(found))) for each in orders)
    except DatasetError:
        return True


def _words(name: str) -> _Name:
    """Its words and numbers, in small letters: "kLeftElbow.pos" has "k", "left", "elbow" and "position"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return tuple(_SYNONYMS.get(word, word) for word in re.findall(r"[^\W\d_]+|\d+", spaced.lower()))


def _distinct(names: Sequence[_Name], dropped: frozenset[str]) -> list[_Name]:
    """The part of each name that tells it from the others; numbers count from 0."""
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
    """True for names that can't be one dimension's."""
    a, b = _letters(found), _letters(expected)
    is_pose = [bool(words & _POSE) and words <= _POSE | _GENERIC - {"joint"} for words in (a, b)]
    if _is_generic(found) or _is_generic(expected):
        return ("joint" in a and is_pose[1]) or ("joint" in b and is_pose[0])
    if all(is_pose) and not a & b:
        return bool(a & _ROTATION) != bool(b & _ROTATION)
    return not (a <= b or b <= a)
