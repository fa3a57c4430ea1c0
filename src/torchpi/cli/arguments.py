"""Command-line arguments: how types become options, and former or foreign option names."""

import dataclasses
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from torchpi.assets import assets
from torchpi.errors import UsageError, closest, listed

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Tyro rule that shows an optional argument as `--env STR` instead of `--env {None}|STR`, and still reads None."""
    is_optional = get_origin(info.type) in (Union, types.UnionType) and type(None) in get_args(info.type)
    if not is_optional or tyro.conf.DisallowNone in info.markers:
        return None
    without_none = PrimitiveTypeInfo.make(info.type, info.markers | {tyro.conf.DisallowNone})
    result = ConstructorRegistry.get_primitive_spec(without_none)
    assert isinstance(result, PrimitiveConstructorSpec)
    spec = result  # a name of one type for the lambdas
    return dataclasses.replace(
        spec,
        choices=None if spec.choices is None else (*sorted({*spec.choices} - {"None"}), "None"),
        instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


@REGISTRY.struct_rule
def _without_empty_defaults(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Tyro rule that omits empty defaults, such as "(default: None)", from the help, whose text explains them."""
    if not dataclasses.is_dataclass(info.type) or tyro.conf.DisallowNone in info.markers:
        return None
    inner = dataclasses.replace(info, markers=(*info.markers, tyro.conf.DisallowNone))  # so that this rule passes it on
    spec = ConstructorRegistry.get_struct_spec(inner)
    if not isinstance(spec, StructConstructorSpec):
        return None
    no_hint = tyro.conf.arg(help_behavior_hint="")
    fields = [
        dataclasses.replace(field, type=cast("Any", Annotated[field.type, no_hint]))
        if field.default in (None, (), "")
        else field
        for field in spec.fields
    ]
    return dataclasses.replace(spec, fields=tuple(fields))


def options_of(command: Any) -> dict[str, str]:
    """Map a command's Python field names to its options: `num_steps` to `--num-steps`, positional ones to `POLICY`."""
    options: dict[str, str] = {}
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        hint = hints[field.name]
        field_type, *markers = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if dataclasses.is_dataclass(field_type):
            options |= options_of(field_type)
            continue
        name = next((marker.name for marker in markers if getattr(marker, "name", None)), field.name)
        is_positional = tyro.conf.Positional in markers
        options[field.name] = name.upper() if is_positional else f"--{name.replace('_', '-')}"
    return options


def translate(args: Sequence[str], command: Any, name: str) -> list[str]:
    """Rewrite arguments for tyro: former names (`aliases`) become present ones, and a positional argument may also be
    given by name, `--policy demo`.

    Raises:
        UsageError: a renamed option, or one of LeRobot or openpi; names the option to use instead.
    """
    options = options_of(command)
    renamed, aliases = getattr(command, "renamed", {}), getattr(command, "aliases", {})
    positional = {f"--{option.lower()}": "" for option in options.values() if not option.startswith("--")}
    translated: list[str] = []
    words = iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
        if flag in renamed:
            raise UsageError(f"{flag} is now {renamed[flag]}.")
        is_unknown = flag.startswith("--") and flag not in (*options.values(), *aliases)
        if is_unknown and (replacement := _replacement(flag, options, {**renamed, **aliases})):
            raise UsageError(f"torchpi {name} has no {flag}, it has {replacement}; see torchpi {name} --help.")
        if flag in positional:
            positional[flag] = value if equals else next(words, "")
        else:
            translated.append(f"{aliases[flag]}{equals}{value}" if flag in aliases else word)
    return [*filter(None, positional.values()), *translated]


def _replacement(flag: str, options: Mapping[str, str], former: Mapping[str, str]) -> str | None:
    """Find the option that replaces an unknown one: an option of LeRobot or openpi, a misspelled former name, or an
    option written in a group, as `--wandb.mode`."""
    table = tomllib.loads((assets() / "options.toml").read_text(encoding="utf-8"))
    if replacement := next((option for option in table.get(flag, ()) if option in options.values()), None):
        return replacement
    current = {option.lstrip("-"): option for option in options.values()}
    former = {name.lstrip("-"): option for name, option in former.items()}
    group, _, name = flag.lstrip("-").rpartition(".")
    if group and name not in current | former:
        in_group = [option for current_name, option in current.items() if f"{current_name}-".startswith(f"{group}-")]
        if in_group:
            return listed(in_group)
    near = closest(name, current | former)
    if near and ("." in flag or near in former):
        return (current | former)[near]
    return None  # tyro suggests similar options itself


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Replace Python arguments in a message by the command's options: `config=` by `--config`."""
    names = "|".join(name for name, option in options.items() if option.startswith("--"))
    pattern = rf"(?<![\w/.&?-])({names})=(?:True\b)?(?! in Python)"  # not inside a path or an address

    def to_option(match: re.Match[str]) -> str:
        has_value = re.match(r"[\w'\"{[(]", message[match.end() :])
        return f"{options[match[1]]}{' ' if has_value else ''}"

    return re.sub(pattern, to_option, message) if names else message
