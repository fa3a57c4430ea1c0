"""A command's arguments: their names as options, other names that users try, and messages in their terms."""

import dataclasses
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from torchpi.assets import assets
from torchpi.errors import UsageError, closest, listed

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """The rule by which an option that may be None is shown as `--env STR`, not `--env {None}|STR`; None is read."""
    is_optional = get_origin(info.type) in (Union, types.UnionType) and type(None) in get_args(info.type)
    if not is_optional or tyro.conf.DisallowNone in info.markers:
        return None
    shown = PrimitiveTypeInfo.make(info.type, info.markers | {tyro.conf.DisallowNone})
    found = ConstructorRegistry.get_primitive_spec(shown)
    assert isinstance(found, PrimitiveConstructorSpec)
    spec = found
    return dataclasses.replace(
        spec,
        choices=None if spec.choices is None else (*sorted({*spec.choices} - {"None"}), "None"),
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def options_of(command: Any) -> dict[str, str]:
    """The arguments of a command by their names in Python: `--num-steps`, or, of a positional one, `POLICY`."""
    found: dict[str, str] = {}
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if dataclasses.is_dataclass(kind):
            found |= options_of(kind)
            continue
        name = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
        is_positional = tyro.conf.Positional in marks
        found[field.name] = name.upper() if is_positional else f"--{name.replace('_', '-')}"
    return found


def translate(args: Sequence[str], command: Any, name: str) -> list[str]:
    """The words of a command line as the command reads them: former names (`aliases`) are replaced, and a positional
    argument may be given by its name, `--policy demo`.
    """
    options = options_of(command)
    renamed, aliases = getattr(command, "renamed", {}), getattr(command, "aliases", {})
    by_name = {f"--{option.lower()}": "" for option in options.values() if not option.startswith("--")}
    words: list[str] = []
    remaining = iter(args)
    for word in remaining:
        given, equals, value = word.partition("=")
        flag = given.replace("_", "-") if given.startswith("--") else given
        if flag in renamed:
            raise UsageError(f"{flag} is now {renamed[flag]}.")
        unknown = flag.startswith("--") and flag not in (*options.values(), *aliases)
        if unknown and (here := _elsewhere(flag, options, {**renamed, **aliases})):
            raise UsageError(f"torchpi {name} has no {flag}, it has {here}; see torchpi {name} --help.")
        if flag in by_name:
            by_name[flag] = value if equals else next(remaining, "")
        else:
            words.append(f"{aliases[flag]}{equals}{value}" if flag in aliases else word)
    return [*filter(None, by_name.values()), *words]


def _elsewhere(flag: str, options: Mapping[str, str], former: Mapping[str, str]) -> str | None:
    """The argument here in place of an option of LeRobot or openpi, one in a group, or almost a former name; of a
    group that has options here, these, rather than one of a similar name elsewhere."""
    table = tomllib.loads((assets() / "options.toml").read_text(encoding="utf-8"))
    if found := next((option for option in table.get(flag, ()) if option in options.values()), None):
        return found
    here = {option.lstrip("-"): option for option in options.values()}
    others = {name.lstrip("-"): option for name, option in former.items()}
    group, _, last = flag.lstrip("-").rpartition(".")
    if group and last not in here | others and (own := [here[n] for n in here if f"{n}-".startswith(f"{group}-")]):
        return listed(own)
    near = closest(last, here | others)
    return (here | others)[near] if near and ("." in flag or near in others) else None  # tyro suggests the rest


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message with the command's options in place of Python's arguments: `--config` for `config=`."""
    names = "|".join(name for name, option in options.items() if option.startswith("--"))
    pattern = rf"(?<![\w/.&?-])({names})=(?:True\b)?(?! in Python)"  # none of a path's or an address' parts

    def option(found: re.Match[str]) -> str:
        has_value = re.match(r"[\w'\"{[(]", message[found.end() :])
        return f"{options[found[1]]}{' ' if has_value else ''}"

    return re.sub(pattern, option, message) if names else message
