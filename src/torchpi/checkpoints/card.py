"""The model card of a policy on the Hugging Face Hub: its README.md, of what policy.json says."""

import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torchpi.assets import assets
from torchpi.checkpoints.spec import PolicySpec
from torchpi.config import Pi0Config
from torchpi.errors import counted, printable
from torchpi.rates import rates_of

_GEMMA = (
    " PaliGemma, from which the published π₀ and π₀.₅ begin, is subject to the [Gemma Terms of "
    "Use](https://ai.google.dev/gemma/terms)."
)


def model_card(
    repo_id: str, spec: PolicySpec, config: Pi0Config, *, num_parameters: int, license: str | None = None
) -> str:
    """The text of README.md, with the Hub's metadata in front.

    Args:
        license: by its name on the Hub, as "apache-2.0"; None: the card says what the weights come from.
    """
    robot, stated = spec.embodiment, spec.provenance
    assert robot is not None
    front = {
        "library_name": "torchpi",
        "pipeline_tag": "robotics",
        "license": license,
        "tags": ["torchpi", "vision-language-action", "pi05" if config.pi05 else "pi0", robot.name[:50]],
        "base_model": _on_the_hub(origins(stated)),
        "datasets": _on_the_hub(_datasets(stated)),
    }
    cameras = [
        (camera.key, f"{camera.dtype}, {camera.layout}{f', depth in {camera.depth.unit}' if camera.depth else ''}",
         camera.presence) for camera in robot.read_cameras if camera.key is not None
    ]  # fmt: skip
    reads_state, units = config.state_in_prompt or not config.pi05, iter(robot.state_units)
    state = [(part.key, name, next(units)) for part in robot.state for name in part.names]
    rate = f", at {robot.control_hz:g} Hz" if robot.control_hz else ""
    executed = f"; {robot.execute_steps} of them are meant to be executed" if robot.execute_steps else ""
    to_lerobot = f" In its own format: `torchpi convert hf://{repo_id} FOLDER --to lerobot`."
    begun = ", ".join(origins(stated)) or ("random ones" if "recipe" in stated else "a source that is not stated")
    terms = f"The weights begin from {_cell(begun)}.{_GEMMA if begun != 'random ones' else ''}"
    values = {
        # JSON is YAML, and its quotes keep what comes from outside.
        "front": "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value),
        "repo_id": repo_id,
        "name": repo_id.partition("/")[2],
        "robot": _cell(robot.name),
        "facts": _rows(_facts(spec, config, num_parameters)),
        "image_size": config.image_size,
        "cameras": _rows(cameras),
        "state": _rows(state if reads_state else [("not read", "", "")]),
        "default_prompt": f"; without one, “{_cell(spec.default_prompt)}”" if spec.default_prompt else "",
        "chunk": f"Chunks of {config.action_horizon or 'any number of'} actions{rate}{executed}.",
        "actions": _rows((a.name, a.unit, a.command, a.kind, a.low, a.high) for a in robot.actions),
        "action_size": robot.action_size,
        "lerobot": to_lerobot if robot.hook is None and reads_state else "",
        "license": f"{license}, says who uploaded it. {terms}" if license else terms,
    }
    return string.Template((assets() / "model_card.md").read_text(encoding="utf-8")).substitute(values)


def origins(provenance: Mapping[str, Any]) -> list[str]:
    """The checkpoints that a policy's weights were made of."""
    found = [_options(provenance, "model").get("init"), provenance.get("source")]
    found += [_mapping(provenance, step).get("source") for step in ("converted", "quantized")]
    return [text for text in dict.fromkeys(found) if isinstance(text, str) and text != "torchpi train"]


def training_of(provenance: Mapping[str, Any]) -> list[str]:
    """The training, as far as it is stated: steps, the beginning, the machine, recordings."""
    parts, recipe, dataset = list[str](), _mapping(provenance, "recipe"), _mapping(provenance, "dataset")
    if "batch_size" in recipe and "step" in provenance:
        begun = _options(provenance, "model").get("init") or "random weights"
        steps, samples = counted(provenance["step"], "step"), counted(recipe["batch_size"], "sample")
        parts.append(f"{steps} of {samples}, from {begun}")
    if "machine" in provenance:
        parts.append(f"on {provenance['machine']}")
    if {"num_episodes", "num_frames"} <= set(dataset):
        frames = f"{dataset['num_frames']:,}".replace(",", " ")
        parts.append(f"{dataset['num_episodes']} demonstrations by scripted experts, {frames} frames")
    return parts


def _facts(spec: PolicySpec, config: Pi0Config, num_parameters: int) -> Iterator[tuple[str, str]]:
    stated = spec.provenance
    yield "model", f"{config.variant}, {num_parameters / 1e6:.2f} million parameters"
    yield "normalization", ", ".join(f"{key} by {rule.kind}" for key, rule in (spec.normalization or {}).items())
    yield from (("trained on", dataset) for dataset in _datasets(stated))
    yield from (("training", text) for text in training_of(stated))
    if "results" in stated:
        where = f", {stated['results'].get('env', '')}" if isinstance(stated["results"], Mapping) else ""
        for task, rate in rates_of(stated["results"], "results").items():
            low, high = rate.interval
            text = f"{rate.success_rate:.0%} of {rate.episodes} episodes, 95 % interval {low:.0%} – {high:.0%}"
            yield f"success{where}: {task}", text


def _datasets(provenance: Mapping[str, Any]) -> list[str]:
    data = _options(provenance, "data")
    mixture = data.get("mixture")
    parts = (data, *(mixture if isinstance(mixture, list | tuple) else ()))
    found = [part.get("dataset") for part in parts if isinstance(part, Mapping)]
    return [dataset for dataset in found if dataset and isinstance(dataset, str)]


def _options(provenance: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """A group of the recipe's options; in recipes of earlier versions they are in none."""
    recipe = _mapping(provenance, "recipe")
    return _mapping(recipe, group) or recipe


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the provenance, which is free; empty where it is no mapping."""
    found = document.get(key)
    return found if isinstance(found, Mapping) else {}


def _on_the_hub(addresses: Iterable[str]) -> list[str]:
    """The names of repositories in addresses hf://org/name."""
    found = (re.match(r"hf://(?:datasets/)?(\w[\w.-]*/\w[\w.-]*)", address, re.ASCII) for address in addresses)
    return list(dict.fromkeys(match[1] for match in found if match))


def _rows(rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: Any) -> str:
    """Text from outside as Markdown: in one line, without tags, links and columns."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", "" if value is None else printable(value))
