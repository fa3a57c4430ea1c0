"""Model card of a policy on the Hugging Face Hub: a README.md generated from policy.json."""

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

_GEMMA_TERMS = (
    " PaliGemma, from which the published π₀ and π₀.₅ were trained, is subject to the [Gemma Terms of "
    "Use](https://ai.google.dev/gemma/terms)."
)


def model_card(
    repo_id: str, spec: PolicySpec, config: Pi0Config, *, num_parameters: int, license: str | None = None
) -> str:
    """Text of README.md, with the Hub's metadata as front matter.

    Args:
        license: by its name on the Hub, such as "apache-2.0"; None: the card states only the origin of the weights.
    """
    robot, provenance = spec.embodiment, spec.provenance
    assert robot is not None
    front_matter = {
        "library_name": "torchpi",
        "pipeline_tag": "robotics",
        "license": license,
        "tags": ["torchpi", "vision-language-action", "pi05" if config.pi05 else "pi0", robot.name[:50]],
        "base_model": _hub_names(origins(provenance)),
        "datasets": _hub_names(_datasets(provenance)),
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
    if origin := ", ".join(origins(provenance)):
        terms = f"The weights derive from {_cell(origin)}.{_GEMMA_TERMS}"
    elif "recipe" in provenance:
        terms = "The weights were trained from random initialization."
    else:
        terms = f"The origin of the weights is not stated.{_GEMMA_TERMS}"
    values = {
        # JSON is valid YAML, and its quotes escape untrusted text.
        "front": "\n".join(f"{key}: {json.dumps(value)}" for key, value in front_matter.items() if value),
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
        "license": f"{license}, as stated by the uploader. {terms}" if license else terms,
    }
    return string.Template((assets() / "model_card.md").read_text(encoding="utf-8")).substitute(values)


def origins(provenance: Mapping[str, Any]) -> list[str]:
    """Addresses of the checkpoints that a policy's weights were made from."""
    sources = [_options(provenance, "model").get("init"), provenance.get("source")]
    sources += [_mapping(provenance, step).get("source") for step in ("converted", "quantized")]
    return [source for source in dict.fromkeys(sources) if isinstance(source, str) and source != "torchpi train"]


def training_of(provenance: Mapping[str, Any]) -> list[str]:
    """Describe the training: steps, initial weights, machine and demonstrations, as far as they are stated."""
    parts, recipe, dataset = list[str](), _mapping(provenance, "recipe"), _mapping(provenance, "dataset")
    if "batch_size" in recipe and "step" in provenance:
        init = _options(provenance, "model").get("init") or "random weights"
        steps, samples = counted(provenance["step"], "step"), counted(recipe["batch_size"], "sample")
        parts.append(f"{steps} of {samples}, from {init}")
    if "machine" in provenance:
        parts.append(f"on {provenance['machine']}")
    if {"num_episodes", "num_frames"} <= set(dataset):
        frames = f"{dataset['num_frames']:,}".replace(",", " ")
        parts.append(f"{dataset['num_episodes']} demonstrations by scripted experts, {frames} frames")
    return parts


def _facts(spec: PolicySpec, config: Pi0Config, num_parameters: int) -> Iterator[tuple[str, str]]:
    provenance = spec.provenance
    yield "model", f"{config.variant}, {num_parameters / 1e6:.2f} million parameters"
    yield "normalization", ", ".join(f"{key} by {rule.kind}" for key, rule in (spec.normalization or {}).items())
    yield from (("trained on", dataset) for dataset in _datasets(provenance))
    yield from (("training", text) for text in training_of(provenance))
    if "results" in provenance:
        results = provenance["results"]
        env = f", {results.get('env', '')}" if isinstance(results, Mapping) else ""
        for task, rate in rates_of(results, "results").items():
            low, high = rate.interval
            text = f"{rate.success_rate:.0%} of {rate.episodes} episodes, 95 % interval {low:.0%} – {high:.0%}"
            yield f"success{env}: {task}", text


def _datasets(provenance: Mapping[str, Any]) -> list[str]:
    data = _options(provenance, "data")
    mixture = data.get("mixture")
    parts = (data, *(mixture if isinstance(mixture, list | tuple) else ()))
    datasets = [part.get("dataset") for part in parts if isinstance(part, Mapping)]
    return [dataset for dataset in datasets if dataset and isinstance(dataset, str)]


def _options(provenance: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """A group of options in the recipe; earlier versions had no groups."""
    recipe = _mapping(provenance, "recipe")
    return _mapping(recipe, group) or recipe


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested mapping of the provenance, which has no schema; empty if it is something else."""
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _hub_names(addresses: Iterable[str]) -> list[str]:
    """Names of the repositories in addresses hf://org/name, without duplicates."""
    matches = (re.match(r"hf://(?:datasets/)?(\w[\w.-]*/\w[\w.-]*)", address, re.ASCII) for address in addresses)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _rows(rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: Any) -> str:
    """Untrusted text as one line of Markdown, with tags, links and column separators escaped."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", "" if value is None else printable(value))
