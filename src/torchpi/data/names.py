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
        "joint motor dim dimension axis channel index servo actuator dof pad",
        "roll pitch yaw rx ry rz rw qx qy qz qw axis angle rot rotation euler quat orientation",
    )
)
"""Words that say nothing about the joint; those that any joint could be called by; those of rotations."""
_CARTESIAN = _ROTATION | {"x", "y", "z"}
_EXCLUSIVE = (frozenset({"left", "right"}), frozenset({"position", "velocity", "effort"}))
"""Words of which the same dimension never has two."""

_Name = tuple[str, ...]


def dimension_names(feature: Mapping[str, Any], num_dims: int) -> tuple[str, ...] | None:
    """The names of a column's dimensions; None: the dataset doesn't name each of them.

    They lie in a list, in lists of lists, in groups {"motors": ["shoulder", …]}, or have indices {"shoulder": 0, …}.
    """
    names = feature.get("names")
    groups = list(names.values()) if isinstance(names, Mapping) else []
    found = (tuple(_flat(value)) for value in (names, *groups))
    return next((each for each in found if each and len(each) == num_dims), None)


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
    say too little.

    Args:
        found: the dataset's names.
        expected: the robot's, as many.

    Raises:
        ValueError: names that contradict each other; the message has a pair of them.
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
                raise DatasetError(f"{found[j]!r} has the index {j}, {expected[i]!r} has {i}")
            if _differ(ours[i], name):
                raise DatasetError(f"index {i} is {found[i]!r}, not {expected[i]!r}")
    for i, place in enumerate(order):
        for group in _EXCLUSIVE:
            a, b = group.intersection(words[place]), group.intersection(wanted[i])
            if a and b and a != b:
                raise DatasetError(f"{found[place]!r} is not {expected[i]!r}")
    return order


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
    families: dict[_Name, list[_Name]] = {}
    for name in parts:
        families.setdefault(_letters(name), []).append(name)
    return [_from_zero(name, families[_letters(name)]) for name in parts]


def _letters(name: _Name) -> _Name:
    return tuple("#" if word.isdecimal() else word for word in name)


def _from_zero(name: _Name, family: Sequence[_Name]) -> _Name:
    first = [min(int(other[i]) if other[i].isdecimal() else 0 for other in family) for i in range(len(name))]
    return tuple(str(int(word) - start) if word.isdecimal() else word for word, start in zip(name, first, strict=True))


def _is_generic(name: _Name) -> bool:
    words = {word for word in name if not word.isdecimal()}
    return all(word in _GENERIC or (len(word) == 1 and word not in "xyz") for word in words)


def _differ(found: _Name, expected: _Name) -> bool:
    """True for names that can't be one dimension's."""
    a, b = ({word for word in name if not word.isdecimal()} for name in (found, expected))
    for one, other in ((a, b), (b, a)):
        if "joint" in one and other & _CARTESIAN and other <= _CARTESIAN | _GENERIC - {"joint"}:
            return not _is_generic(tuple(other))
    if _is_generic(found) or _is_generic(expected):
        return False
    if a <= _CARTESIAN and b <= _CARTESIAN and a & b == set():
        return bool(a & _ROTATION) != bool(b & _ROTATION)
    return not (a <= b or b <= a)
