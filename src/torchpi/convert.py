"""Conversion of checkpoints between formats (`torchpi convert`)."""

import dataclasses
import datetime
import gc
import hashlib
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch

from torchpi.assets import assets
from torchpi.atomic import atomic_folder
from torchpi.checkpoints import folder, lerobot, openpi
from torchpi.checkpoints.checkpoint import Checkpoint, open_checkpoint
from torchpi.checkpoints.formats import Format, format_of
from torchpi.checkpoints.layout import Rounding, array_dtype, require_writable, stored_array
from torchpi.checkpoints.openpi_layout import jax_table
from torchpi.checkpoints.openpi_torch import (
    EMBEDDING,
    EXPERT_LM_HEAD,
    LEROBOT_PREFIX,
    TIED_EMBEDDING,
    EmbeddingChoice,
    stated_dtype,
    torch_table,
)
from torchpi.checkpoints.peft import PeftArrays
from torchpi.checkpoints.safetensors_files import write_safetensors
from torchpi.checkpoints.sizes import ConfigLike, adapt, untrained_note
from torchpi.checkpoints.spec import PolicySpec
from torchpi.collate import collate
from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError, counted, first_of, listed
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy, policy_of
from torchpi.schema import write_json
from torchpi.transforms.normalize import openpi_rules, save_norm_stats
from torchpi.transforms.prompt import load_tokenizer

MAX_SHARD_BYTES = 5 * 10**9
OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Report of `convert`."""

    source: str
    source_format: Format
    target: str
    target_format: Format
    dtype: str
    """Dtypes of the written arrays."""
    num_parameters: int
    mapped: int
    """Number of the source's arrays that are in the target."""
    folded: Mapping[str, tuple[str, str]]
    """LoRA arrays that were merged, by the array that they update."""
    tied: str
    """The array that was read as the embedding, if it has another name."""
    dropped: Mapping[str, str]
    """Arrays of the source that no computation reads, each with the reason."""
    adapted: list[str]
    """Arrays and settings that were cut or extended."""
    notes: list[str]
    """Settings that the target can't store, or handles differently."""
    files: list[str]
    array_difference: float | None = None
    """Largest difference between an array and the one read back; None: not checked."""
    action_difference: float | None = None
    """The same for sampled actions, each side with its own preprocessing, in the robot's units."""
    input_difference: float | None = None
    """The same for images to be resized and a prompt to be cleaned; None: both sides preprocess them alike."""

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.source_format}) to {self.target} ({self.target_format}, {self.dtype}), "
            f"{self.num_parameters / 1e6:.1f} M parameters",
            f"mapped: {counted(self.mapped, 'array')}, every one that a computation reads",
        ]
        if self.folded:
            lines.append(f"folded: LoRA weights into {counted(len(self.folded), 'array')}: {', '.join(self.folded)}")
        if self.tied:
            lines.append(f"tied: the embedding is {self.tied}")
        lines += [f"dropped: {name} ({reason})" for name, reason in self.dropped.items()]
        lines += [f"adapted: {line}" for line in self.adapted]
        lines += [f"note: {line}" for line in self.notes]
        lines.append(f"files: {', '.join(self.files)}")
        if self.array_difference is not None:
            line = f"read back: arrays differ by at most {self.array_difference:g}, sampled actions by "
            line += f"{self.action_difference:g}"
            if self.input_difference is not None:
                line += (
                    ", and if images must be resized, or the prompt has white space around it, _ or newlines, by "
                    f"{self.input_difference:g}"
                )
            lines.append(line)
        return "\n".join(lines)


def convert(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    to: Format,
    *,
    dtype: torch.dtype | None = None,
    config: ConfigLike | None = None,
    sizes: Mapping[str, int] | None = None,
    lora_alpha: tuple[float, float] | None = None,
    embedding: EmbeddingChoice | None = None,
    asset_id: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    check: bool = True,
    verify: bool = True,
    **policy: Any,
) -> Conversion:
    """Write a checkpoint in another format, atomically.

    Args:
        source, config, lora_alpha, embedding, verify: see `load_model`.
        target: a new folder.
        dtype: dtype of all arrays; by default each keeps its own, or is float32 if LoRA is merged into it.
        sizes: new values of action_dim, action_horizon or max_token_len: weights are cut, or extended by zeros.
        asset_id: which of the source's statistics to use; in an openpi target also the folder to write them to.
        max_shard_bytes: size above which a policy folder's weights are split; other formats always have one file.
        overwrite: replace a checkpoint at `target`.
        check: read the target back, and compare its arrays and sampled actions with the source's.
        policy: more arguments of `load_policy` (embodiment, norm_stats, …), for what the source does not state.

    Raises:
        FileNotFoundError, KeyError, ValueError: see `load_policy`; the target exists, or can't store a setting.
    """
    path = _check_target(target, to, overwrite=overwrite)
    if dtype is not None:
        require_writable(dtype)
    checkpoint = open_checkpoint(source, config=config, embedding=embedding)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    checkpoint.require_full_precision("converted")
    spec, rounding = _spec(checkpoint, to, asset_id, policy), Rounding()
    model = checkpoint.model(dtype=dtype, lora_alpha=lora_alpha, rounding=rounding if dtype else None, verify=verify)
    adapted = adapt(model, sizes or {})
    notes = [f"{len(rounding)} weights are rounded, by at most {max(rounding.values()):g}"] if rounding else []
    with atomic_folder(path) as root:
        if to in ("torchpi", "lerobot"):
            assert spec is not None
            notes += _write_policy(root, policy_of(model, spec), to, max_shard_bytes)
        else:
            notes += _write_openpi(root, model, to)
            notes += _write_assets(root, checkpoint, model.config, spec, asset_id)
        files = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
        differences = _check(root, model, spec) if check else {}
    files = [name for name in files if not name.startswith(("params/d/", "params/ocdbt."))]
    report = {"target": str(path), "target_format": to, "adapted": adapted, "notes": notes, "files": files}
    return _report(checkpoint, model, **report, **differences)


def _report(checkpoint: Checkpoint, model: Pi0, **outcome: Any) -> Conversion:
    return Conversion(
        source=checkpoint.address,
        source_format=checkpoint.format,
        dtype=listed(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        mapped=len(checkpoint.table(checkpoint.stored_config)),
        folded=checkpoint.arrays.folded if isinstance(checkpoint.arrays, PeftArrays) else checkpoint.folded,
        tied=checkpoint.tied,
        dropped=checkpoint.dropped,
        **outcome,
    )


def _spec(checkpoint: Checkpoint, to: Format, asset_id: str | None, policy: Mapping[str, Any]) -> PolicySpec | None:
    """Everything except the weights; None for an openpi target whose statistics, if any, are copied unchanged."""
    spec = checkpoint.spec()
    if to in ("torchpi", "lerobot"):
        spec = spec.requested(asset_id=asset_id, **policy).with_tokenizer(checkpoint.config.vocab_size)
        return dataclasses.replace(spec, provenance=_provenance(checkpoint, spec.provenance))
    if unknown := sorted(set(policy) - {"norm_stats", "normalization", "embodiment", "preprocessing"}):
        raise CheckpointError(f"A checkpoint of openpi can't store {', '.join(unknown)}; leave it out.")
    if spec.norm_stats is None and not policy:
        return None
    chosen = asset_id if asset_id in spec.assets and "norm_stats" not in policy else None
    spec = spec.requested(asset_id=chosen, **policy)
    rules = spec.normalization or openpi_rules(checkpoint.config.pi05)
    return dataclasses.replace(spec, normalization=rules)


def _check_target(target: str | pathlib.Path, to: str, *, overwrite: bool) -> pathlib.Path:
    """Path of the target; raise an error if something other than a checkpoint to replace exists there."""
    path = pathlib.Path(target).expanduser()
    if to not in get_args(Format):
        raise CheckpointError(f"Unknown format {to!r}; formats are {', '.join(get_args(Format))}.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already; choose another path, or overwrite it (--overwrite).")
    try:
        if path.exists():
            if not path.is_dir():
                raise CheckpointError("It is a file.")
            format_of(path)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint, and is not overwritten: {error}") from error
    return path


def _provenance(checkpoint: Checkpoint, before: Mapping[str, Any]) -> dict[str, Any]:
    """Add the source of the conversion, with the SHA-256 of the names and contents of its weights files."""
    source, digest = checkpoint.arrays.source, hashlib.sha256()
    root, pattern = (source, "**/*") if source.is_dir() else (checkpoint.root, "*.safetensors")
    if source.suffix == ".npz":
        root, pattern = source.parent, source.name
    for file in sorted(root.glob(pattern)):
        if file.is_file():
            digest.update(file.relative_to(root).as_posix().encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    converted = {
        "source": checkpoint.address,
        "format": checkpoint.format,
        "sha256": digest.hexdigest(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return {**{key: value for key, value in before.items() if key != "source"}, "converted": converted}


def _write_policy(root: pathlib.Path, policy: Policy, to: Format, max_shard_bytes: int) -> list[str]:
    if to == "torchpi":
        policy.write_spec(root)
        folder.write_weights(root, policy.model, max_shard_bytes=max_shard_bytes)
        return []
    if untrained := policy.transforms.untrained_actions:
        raise CheckpointError(
            f"The policy's {first_of(untrained)} are not trained, and LeRobot would send the model's noise to the "
            "robot: train it first (torchpi train --init), and convert the result."
        )
    dtype = _write_torch(root, policy.model, prefix=LEROBOT_PREFIX, embeddings=(TIED_EMBEDDING, EMBEDDING))
    notes = lerobot.write_spec(root, policy.model.config, policy.spec, dtype)
    (root / lerobot.TOKENIZER).mkdir()
    policy.write_tokenizer(root / lerobot.TOKENIZER)
    lerobot.write_tokenizer_config(root / lerobot.TOKENIZER, policy.transforms.tokenizer.special_tokens)
    if policy.default_prompt is not None:
        notes.append(f"the default prompt {policy.default_prompt!r} is not written: LeRobot has none")
    return notes


def _write_openpi(root: pathlib.Path, model: Pi0, to: Format) -> list[str]:
    config, not_stored = model.config, ["max_token_len", "discrete_state_input"]
    if to == "openpi-jax":
        table = jax_table(config)
        shapes = {name: array.shape for name, array in table.items()}
        (root / "params").mkdir()
        openpi.write_params(root / "params", shapes, lambda name: stored_array(model, table[name]))
        not_stored.insert(0, "action_horizon")
    else:
        # Under the text head's name: of two tied arrays, `safetensors.torch.save_model` keeps this one.
        dtype = _write_torch(root, model, prefix="", embeddings=(TIED_EMBEDDING,))
        document = {
            "action_dim": config.action_dim,
            "action_horizon": config.require("action_horizon"),
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "precision": dtype,
        }
        write_json(root / "config.json", document)
    values = {field: getattr(config, field) for field in not_stored if getattr(config, field) is not None}
    notes = [f"{field} {value} is not written: it is in openpi's training config" for field, value in values.items()]
    notes += untrained_note(model.trained_action_dim, config.action_dim)
    return [*notes, "the tokenizer is not written: openpi has the published models'"]


def _write_torch(root: pathlib.Path, model: Pi0, *, prefix: str, embeddings: tuple[str, ...]) -> str:
    """Write the arrays of openpi's PyTorch port, and return the dtype for config.json.

    Arrays that are not used, but that strict loaders require, are included. The result is a single file, since neither
    openpi nor LeRobot reads shards (LeRobot 0.6 silently uses random weights).
    """
    table = torch_table(model.config)
    table |= dict.fromkeys(embeddings, table.pop(EMBEDDING))
    head = (model.config.vocab_size, model.config.action_expert.width)  # of the expert, which is not used
    dtypes = {f"{prefix}{name}": array_dtype(model, array) for name, array in table.items()}
    dtypes[f"{prefix}{EXPERT_LM_HEAD}"] = model.embedding.dtype
    shapes = {f"{prefix}{name}": array.shape for name, array in table.items()} | {f"{prefix}{EXPERT_LM_HEAD}": head}

    def read(name: str) -> torch.Tensor:
        entry = table.get(name.removeprefix(prefix))
        return torch.zeros(head) if entry is None else stored_array(model, entry)

    alias = {} if EMBEDDING in embeddings else {EMBEDDING: TIED_EMBEDDING}
    write_safetensors(root, shapes, read, dtypes=dtypes, metadata=alias)
    return stated_dtype(dtypes)


def _write_assets(
    root: pathlib.Path, checkpoint: Checkpoint, config: Pi0Config, spec: PolicySpec | None, asset_id: str | None
) -> list[str]:
    """Write the statistics of an openpi target: unchanged copies, or the policy's rewritten for openpi's rules."""
    if spec is None:
        source = checkpoint.spec()
        assets = source.assets if asset_id is None else {asset_id: source.asset(asset_id)}
        for name, file in assets.items():
            (root / "assets" / name).mkdir(parents=True)
            (root / "assets" / name / "norm_stats.json").write_bytes(file.read_bytes())
        if assets:
            return []
        note, rules = "the source has no statistics, and so the target has none", openpi_rules(config.pi05)
        if source.normalization and source.normalization != rules:
            kinds = listed(f"{key} by {rule.kind}" for key, rule in source.normalization.items())
            note += f"; the source normalizes {kinds}, openpi both by {rules['state'].kind}"
        return [note]
    resized = spec.require_preprocessing("openpi", config)
    spec, notes = spec.normalized_by(openpi_rules(config.pi05))
    assert spec.embodiment is not None
    assert spec.norm_stats is not None
    robot, name = spec.embodiment, asset_id or spec.embodiment.asset_id or spec.embodiment.name
    (root / "assets" / name).mkdir(parents=True)
    save_norm_stats(root / "assets" / name, spec.norm_stats)
    settings = {"num_steps": spec.num_steps if spec.num_steps != PolicySpec.num_steps else None, **spec.metadata}
    settings["the default prompt"] = spec.default_prompt
    notes += [f"{key} {value} is not written: openpi has none" for key, value in settings.items() if value is not None]
    if spec.prompt_format != "openpi" and not config.state_in_prompt:
        notes.append(
            "openpi cleans the prompt (white space around it, _ and newlines), and tokenizes its newline separately"
        )
    notes += [*resized, f"the robot is not written: openpi's training config has it; its statistics are assets/{name}"]
    if robot.camera_names != OPENPI_CAMERAS[: len(robot.camera_names)]:
        sent = ", ".join(camera.name or "" for camera in robot.read_cameras if camera.key is not None)
        if sent.count(",") >= len(OPENPI_CAMERAS):
            raise CheckpointError(
                f"{robot.name} has the cameras {sent}; openpi reads {', '.join(OPENPI_CAMERAS)} and drops others, so "
                "the policy would act differently there. Convert it to torchpi or lerobot."
            )
        notes.append(f"its cameras {sent} become openpi's {', '.join(OPENPI_CAMERAS)}, in this order")
    return notes


def _check(root: pathlib.Path, model: Pi0, spec: PolicySpec | None) -> dict[str, float | None]:
    """Read the target back, and compare its arrays and sampled actions with the model's."""
    written = open_checkpoint(root, config=model.config)
    array_difference = 0.0
    for name, entry in written.table(model.config).items():
        expected, found = stored_array(model, entry), written.arrays.read(name)
        # Bitwise, so that NaN equals itself.
        if expected.dtype is not found.dtype or not torch.equal(expected.view(torch.uint8), found.view(torch.uint8)):
            difference = (expected.float() - found.float()).abs().nan_to_num(nan=torch.inf)
            array_difference = max(array_difference, float(difference.max()))
    reloaded = written.model(dtype=None)
    model.compute_dtype_override = reloaded.compute_dtype_override = torch.float32
    differences: dict[str, float | None] = {"action_difference": torch.inf}
    if array_difference < torch.inf:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the made-up observation
            differences = _action_differences(model, reloaded, spec, written.spec())
    del reloaded
    gc.collect()
    return {"array_difference": array_difference, **differences}


def _action_differences(
    model: Pi0, reloaded: Pi0, spec: PolicySpec | None, written_spec: PolicySpec
) -> dict[str, float | None]:
    """`action_difference` and `input_difference` of `Conversion`."""
    config, random = model.config, np.random.default_rng(0)
    noise = torch.from_numpy(random.standard_normal((1, config.action_horizon or 10, config.action_dim))).float()
    size = config.image_size

    def sample(model: Pi0, inputs: Mapping[str, Any]) -> np.ndarray:
        with torch.no_grad():
            return model.sample_actions(collate([inputs]), noise=noise, num_steps=2)[0].numpy()

    # Any tokenizer will do for a comparison, so that the published models' need not be downloaded.
    tokenizer = assets() / "tiny_tokenizer.model"
    if spec and not spec.tokenizer and load_tokenizer(tokenizer).vocab_size <= config.vocab_size:
        spec = dataclasses.replace(spec, tokenizer=tokenizer)
    if spec is None or spec.tokenizer is None:  # compare the models only
        inputs = {
            "image": {"base_0_rgb": random.integers(0, 256, (size, size, 3), np.uint8)},
            "image_mask": {"base_0_rgb": np.True_},
            "state": random.standard_normal(config.action_dim),
            "tokenized_prompt": random.integers(config.vocab_size, size=12),
            "tokenized_prompt_mask": np.ones(12, bool),
        }
        return {"action_difference": float(np.abs(sample(model, inputs) - sample(reloaded, inputs)).max())}
    missing: dict[str, Any] = {}
    if not written_spec.embodiment:
        missing = {"embodiment": spec.embodiment, "truncation": "original"}
    written_spec = written_spec.requested(tokenizer=spec.tokenizer, **missing)
    policies = policy_of(model, spec), policy_of(reloaded, written_spec)
    large = policies[0].embodiment.to_model(policies[0].example_observation(deviations=0.7))
    plain = large | {"image": {name: image[:size, :size] for name, image in large["image"].items()}}

    unclean = large | {"prompt": " pick_up the object\n"}
    plain_inputs, unclean_inputs = ([p.transforms.forward(obs) for p in policies] for obs in (plain, unclean))

    def difference(observation: Mapping[str, Any], inputs: list[dict[str, Any]]) -> float:
        actions = []
        for policy, batch in zip(policies, inputs, strict=True):
            chunk = policy.transforms.inverse(sample(policy.model, batch), action_size=policy.embodiment.action_size)
            actions.append(policy.embodiment.from_model(chunk, observation["state"]))
        return float(np.abs(actions[0] - actions[1]).max())

    differences: dict[str, float | None] = {"action_difference": difference(plain, plain_inputs)}
    arrays = ([inputs["tokenized_prompt"], *inputs["image"].values()] for inputs in unclean_inputs)
    if not all(map(np.array_equal, *arrays)):
        differences["input_difference"] = difference(unclean, unclean_inputs)
    return differences
