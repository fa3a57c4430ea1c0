"""`torchpi compare`: where two policies part, stage by stage, on one observation and the same noise."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchpi.arrays import read_npz
from torchpi.checkpoints.address import existing_folder
from torchpi.checkpoints.folder import is_policy_folder
from torchpi.collate import collate
from torchpi.doctor.observation import prompt_text
from torchpi.doctor.result import json_values
from torchpi.errors import UsageError
from torchpi.policy import Policy, load_policy
from torchpi.randomness import generator_at
from torchpi.trace.record import calls_of
from torchpi.ui.format import format_shape

TOLERANCE = 1e-4  # of a stage's largest value; float32 keeps some 1e-6 through all layers

# Of an embodiment, what says whose it is, not what is computed.
_NAMES = ("name", "asset_id", "metadata")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One value on the way, in both policies."""

    name: str
    differs: bool
    shape: tuple[int, ...] | None = None
    """In both; None: a text, or the shapes differ."""
    max_abs: float | None = None
    """The largest absolute difference; None: not numbers of one shape."""
    scale: float | None = None
    """The largest absolute value in either."""
    message: str = ""
    """What differs, where it is no difference of numbers."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two policies, called A and B."""

    tolerance: float
    settings: tuple[str, ...]
    """What their configurations differ in, one line each."""
    stages: tuple[Stage, ...]
    """In the order in which they are computed."""
    stopped: tuple[str, ...] = ()
    """Why one of them could not go on."""

    @property
    def first_difference(self) -> str | None:
        """The name of the first stage that differs."""
        return next((stage.name for stage in self.stages if stage.differs), None)

    @property
    def same(self) -> bool:
        """Whether they agree in everything: settings and stages."""
        return not self.settings and not self.stopped and self.first_difference is None

    @property
    def status(self) -> int:
        """0 if they agree, else 1."""
        return int(not self.same)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; numbers that are not finite are None."""
        found = {"same": self.same, "first_difference": self.first_difference, "status": self.status}
        return dict(json_values(found | dataclasses.asdict(self)))


def compare_policies(
    a: Policy,
    b: Policy,
    observation: Mapping[str, Any],
    *,
    tolerance: float = TOLERANCE,
    num_steps: int = 10,
    seed: int = 0,
) -> Comparison:
    """Walk both policies on one observation.

    Padding, of prompt, state and absent cameras, is left out: it changes no result. Where horizon or action_dim differ,
    each policy gets its part of the same noise.

    Args:
        observation: of the robot, nested, or flat with '.' between the keys.
        tolerance: a stage differs if its largest difference is above this, times its largest value.
        num_steps: Euler steps.
        seed: of the noise.

    Raises:
        ValueError: neither can read the observation; neither states its action_horizon; a tolerance below 0.
    """
    if not tolerance >= 0:
        raise UsageError(f"tolerance must not be negative, got {tolerance}.")
    configs = a.model.config, b.model.config
    stated = [config.action_horizon for config in configs if config.action_horizon is not None]
    horizons = [config.action_horizon or (stated or [configs[0].require("action_horizon")])[0] for config in configs]
    shape = max(horizons), max(config.action_dim for config in configs)
    noise = generator_at(seed, "compare").standard_normal(shape).astype(np.float32)
    (ours, our_end), (theirs, their_end) = (
        _walk_as_far_as_possible(policy, observation, noise[:horizon, : policy.model.config.action_dim], num_steps)
        for policy, horizon in zip((a, b), horizons, strict=True)
    )
    if not ours and not theirs:
        raise UsageError(f"Neither policy can read the observation. A: {our_end} B: {their_end}.")
    return Comparison(
        tolerance,
        tuple(_differences(_settings(a), _settings(b))),
        tuple(_compare(name, ours.get(name), theirs.get(name), tolerance) for name in _in_order(ours, theirs)),
        tuple(f"{side} could not go on: {end}" for side, end in (("A", our_end), ("B", their_end)) if end),
    )


# ---- the walk ----


@torch.no_grad()
def _walk_as_far_as_possible(
    policy: Policy, observation: Mapping[str, Any], noise: np.ndarray, num_steps: int
) -> tuple[dict[str, np.ndarray | str], str]:
    """The stages by name, and why it ended early; empty: it did not."""
    stages: dict[str, np.ndarray | str] = {}
    try:
        for name, value in _walk(policy, observation, noise, num_steps):
            stages[name] = value if isinstance(value, np.ndarray | str) else value.float().cpu().numpy()
    except (KeyError, ValueError) as error:
        return stages, str(error.args[0])
    return stages, ""


def _walk(
    policy: Policy, observation: Mapping[str, Any], noise: Float32[np.ndarray, "H A"], num_steps: int
) -> Iterator[tuple[str, Any]]:
    """Name and value of each stage, batches without their axis; the prompt behind the state, which may be in it."""
    model, transforms, robot = policy.model, policy.transforms, policy.embodiment
    state, inputs = policy.prepare(observation)
    present = [name for name, is_present in inputs["image_mask"].items() if is_present]
    yield "cameras", ", ".join(present)
    for name in present:
        yield f"image {name}", inputs["image"][name]
    yield "state", state
    normalized = inputs["state"][: len(state)]
    yield "normalized state", normalized
    instruction = robot.to_model(observation, default_prompt=policy.default_prompt)["prompt"]
    yield "prompt text", prompt_text(transforms, instruction, normalized)
    yield "token ids", inputs["tokenized_prompt"][inputs["tokenized_prompt_mask"]]
    batch = collate([inputs]).to(model.device)
    with calls_of(model, ["vision"]) as calls:
        prefix = model.embed_prefix(batch, drop_padding=True)
    for name, image_tokens in zip(present, calls["vision"][0].output, strict=True):
        yield f"image tokens {name}", image_tokens
    yield "prefix tokens", prefix[0][0]
    cache = model.prefill(batch, prefix, action_horizon=len(noise))
    for i, (keys, values, length) in enumerate(cache.key_values):
        yield f"cache layer {i} keys", keys[0, :length]
        yield f"cache layer {i} values", values[0, :length]
    start = torch.from_numpy(noise)[None].to(model.device)
    yield "v_t at t = 1", model.denoise_step(cache, start, torch.ones(1, device=model.device))[0]
    chunk = model.sample_actions(batch, noise=start, num_steps=num_steps)[0]
    yield "action chunk, normalized", chunk
    actions = transforms.inverse(chunk.float().cpu().numpy(), action_size=robot.action_size)
    yield "actions, robot's units", robot.from_model(actions, state)


def _in_order(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names of both, each behind the one that it follows in its own walk."""
    names = list(ours)
    for i, name in enumerate(theirs):
        if name not in ours:
            names.insert(names.index(list(theirs)[i - 1]) + 1 if i else 0, name)
    return names


# ---- the comparison ----


def _compare(name: str, one: np.ndarray | str | None, other: np.ndarray | str | None, tolerance: float) -> Stage:
    if one is None or other is None:
        return Stage(name, True, message=f"only {'A' if other is None else 'B'} has it")
    if isinstance(one, str) or isinstance(other, str):
        return Stage(name, one != other, message="" if one == other else f"A {one!r}, B {other!r}")
    if one.shape != other.shape:
        return Stage(name, True, message=f"shapes differ: A {format_shape(one.shape)}, B {format_shape(other.shape)}")
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity from infinity
        largest = float(abs(a - b).max())
    scale = float(max(abs(a).max(), abs(b).max()))
    if broken := [side for side, values in (("A", a), ("B", b)) if not np.isfinite(values).all()]:
        return Stage(name, True, one.shape, largest, scale, f"NaN or infinity in {' and '.join(broken)}")
    return Stage(name, largest > tolerance * scale, one.shape, largest, scale)


def _settings(policy: Policy) -> dict[str, Any]:
    transforms = policy.transforms
    return {
        "model": policy.model.config.to_dict(),
        "dtype": str(policy.model.compute_dtype).removeprefix("torch."),
        "embodiment": {name: value for name, value in policy.embodiment.to_dict().items() if name not in _NAMES},
        "normalization": {key: dataclasses.asdict(transforms.normalization[key]) for key in ("state", "actions")},
        "prompt": {
            "default": policy.default_prompt,
            "format": transforms.prompt_format,
            "truncation": transforms.truncation,
            "with state": transforms.discrete_state_input,
        },
    }


def _differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """A line for each leaf in which two trees differ."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = ({str(i): part for i, part in enumerate(side)} for side in (one, other))
    if isinstance(one, dict) and isinstance(other, dict) and set(one) == set(other):
        for name in one:
            yield from _differences(one[name], other[name], f"{where}.{name}" if where else name)
    elif one != other:
        yield f"{where}: {_short(one)} in A, {_short(other)} in B"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{len(value)} entries" if isinstance(value, list) else f"{text[:57]}…"


# ---- the command ----


def run_compare(
    a: str,
    b: str,
    *,
    observation: pathlib.Path,
    as_json: bool = False,
    tolerance: float = TOLERANCE,
    num_steps: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    **load: Any,
) -> int:
    """Compare two policies and print it.

    Args:
        a, b: of the policies, as `load_policy` takes them.
        observation: an .npz file with the robot's own keys, nested ones joined with '.', as for `torchpi infer`.
        as_json: print one JSON document on stdout, and all else on stderr.
        tolerance, num_steps, seed: see `compare_policies`.
        dtype, device: of both.
        load: further arguments of `load_policy`, for those of the two that do not say everything themselves. A policy
            folder keeps what it says.

    Returns:
        The exit status: 0 if they agree, else 1.
    """

    def loaded(path: str) -> Policy:
        says_everything = is_policy_folder(existing_folder(path))
        return load_policy(path, device=device, dtype=dtype, **({} if says_everything else load))

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        request = read_npz(observation)
        comparison = compare_policies(
            loaded(a), loaded(b), request, tolerance=tolerance, num_steps=num_steps, seed=seed
        )
    if as_json:
        print(json.dumps({"a": str(a), "b": str(b)} | comparison.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
        _print(comparison, console, title=f"torchpi compare: A {a}, B {b}")
    return comparison.status


def _print(comparison: Comparison, console: Console, *, title: str) -> None:
    console.print(Text(title, style="bold"))
    if comparison.settings:
        console.print("their settings differ:")
        for line in comparison.settings:
            console.print(f"  {line}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, column in enumerate(("stage", "shape", "largest difference", "scale", "")):
        table.add_column(column, justify="right" if i in (2, 3) else "left", overflow="fold", no_wrap=i == 0)
    for stage in comparison.stages:
        numbers = ["" if value is None else f"{value:.3g}" for value in (stage.max_abs, stage.scale)]
        shape = "" if stage.shape is None else format_shape(stage.shape)
        verdict = (f"differs: {stage.message}" if stage.message else "differs") if stage.differs else "same"
        table.add_row(stage.name, shape, *numbers, Text(verdict, style="bold red" if stage.differs else "dim"))
    console.print(table)
    for line in comparison.stopped:
        console.print(Text(line, style="bold red"))
    console.print(_conclusion(comparison))


def _conclusion(comparison: Comparison) -> str:
    if comparison.first_difference is not None:
        return f"The first stage that differs is: {comparison.first_difference}."
    if comparison.stopped:
        return "Every stage that both reached is the same."
    same = f"Every stage is the same, within {comparison.tolerance:g} of its scale"
    return f"{same}; their settings differ." if comparison.settings else f"{same}."
