"""`torchpi convert`: a checkpoint of any format into any other."""

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

from torchpi.atomic import atomic_folder
from torchpi.checkpoints import folder, lerobot, openpi
from torchpi.checkpoints.adapt import adapt
from torchpi.checkpoints.address import existing_folder
from torchpi.checkpoints.checkpoint import Checkpoint, Format, format_of, open_checkpoint
from torchpi.checkpoints.layout import stored_array
from torchpi.checkpoints.openpi_layout import jax_table
from torchpi.checkpoints.openpi_torch import EMBEDDING, EXPERT_LM_HEAD, LEROBOT_PREFIX, TIED_EMBEDDING, torch_table
from torchpi.checkpoints.safetensors_files import write_safetensors
from torchpi.collate import collate
from torchpi.config import Pi0Config
from torchpi.errors import CheckpointError
from torchpi.model.pi0 import Pi0
from torchpi.policy import policy_of
from torchpi.schema import write_json
from torchpi.transforms.normalize import save_norm_stats
from torchpi.types import Observation

MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Report of `convert`."""

    source: str
    source_format: Format
    target: str
    target_format: Format
    dtype: str
    """Of the arrays that were written."""
    num_parameters: int
    mapped: int
    """Arrays of the source that went into the target."""
    folded: Mapping[str, tuple[str, str]]
    """By the array that they change, the LoRA arrays that were folded into it."""
    tied: str
    """The array that was read as the embedding, where it has another name."""
    dropped: Mapping[str, str]
    """Arrays of the source that no computation reads, and why."""
    adapted: list[str]
    """Arrays and settings that were cut or extended."""
    notes: list[str]
    """Facts that the target can't say, or says otherwise."""
    files: list[str]
    array_difference: float | None = None
    """The largest difference between an array that was meant and the one read back; None: not checked."""
    action_difference: float | None = None
    """The same of sampled actions."""

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.source_format}) to {self.target} ({self.target_format}, {self.dtype}), "
            f"{self.num_parameters / 1e6:.1f} M parameters",
            f"mapped: {self.mapped} arrays, every one that a computation reads",
        ]
        if self.folded:
            lines.append(f"folded: LoRA weights into {len(self.folded)} arrays: {', '.join(self.folded)}")
        if self.tied:
            lines.append(f"tied: the embedding is {self.tied}")
        lines += [f"dropped: {name} ({reason})" for name, reason in self.dropped.items()]
        lines += [f"adapted: {line}" for line in self.adapted]
        lines += [f"note: {line}" for line in self.notes]
        lines.append(f"files: {', '.join(self.files)}")
        if self.array_difference is not None:
            lines.append(
                f"read back: arrays differ by at most {self.array_difference:g}, sampled actions by "
                f"{self.action_difference:g}"
            )
        return "\n".join(lines)


def convert(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    to: Format,
    *,
    dtype: torch.dtype | None = None,
    config: Pi0Config | str | pathlib.Path | None = None,
    sizes: Mapping[str, int] | None = None,
    lora_alpha: tuple[float, float] | None = None,
    asset_id: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    check: bool = True,
    **policy: Any,
) -> Conversion:
    """Write a checkpoint in another format; the target appears complete or not at all.

    Args:
        source, config, lora_alpha: see `load_model`.
        target: a new folder.
        to: "torchpi", "openpi-jax", "openpi-pytorch" or "lerobot".
        dtype: of the arrays; by default the source's.
        sizes: other values of action_dim, action_horizon or max_token_len: weights are cut or extended by zeros.
        asset_id: which of the source's statistics; for a target of openpi also the name under which they are written.
        max_shard_bytes: above it a policy folder's weights are written in shards; other systems' loaders read one file.
        overwrite: replace a target that is there.
        check: read the target back, and compare its arrays and sampled actions with the source's.
        policy: more arguments of `load_policy` (embodiment, norm_stats, tokenizer, …), which torchpi and lerobot need
            where the source does not say them.

    Raises:
        FileNotFoundError, KeyError, ValueError: see `load_model` and `load_policy`; there is something at the target;
            the target can't say what the policy needs.
    """
    path = pathlib.Path(target).expanduser()
    _check_target(path, to, overwrite=overwrite)
    checkpoint = open_checkpoint(source, config=config)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    dtype = dtype or checkpoint.dtype
    model = checkpoint.model(dtype=dtype, lora_alpha=lora_alpha)
    adapted = adapt(model, sizes or {})
    with atomic_folder(path) as beside:
        if to in ("torchpi", "lerobot"):
            notes = _write_policy(beside, checkpoint, model, to, dtype, max_shard_bytes, asset_id, policy)
        else:
            notes = _write_openpi(beside, checkpoint, model, to, dtype, asset_id, policy)
        files = sorted(str(file.relative_to(beside)) for file in beside.rglob("*") if file.is_file())
        files = [name for name in files if not name.startswith(("params/d/", "params/ocdbt."))]
        differences = _check(beside, model, dtype) if check else {}
    return _report(
        checkpoint, to, model, dtype, target=str(path), adapted=adapted, notes=notes, files=files, **differences
    )


def _report(checkpoint: Checkpoint, to: Format, model: Pi0, dtype: torch.dtype, **outcome: Any) -> Conversion:
    return Conversion(
        source=checkpoint.address,
        source_format=checkpoint.format,
        target_format=to,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        mapped=len(checkpoint.table(checkpoint.stored_config)),
        folded=checkpoint.folded,
        tied=checkpoint.tied,
        dropped=checkpoint.dropped,
        **outcome,
    )


def _check_target(path: pathlib.Path, to: str, *, overwrite: bool) -> None:
    """Refuse an unknown format, and a place where something is that is not to be replaced."""
    if to not in get_args(Format):
        raise CheckpointError(f"Unknown format {to!r}; formats are {', '.join(get_args(Format))}.")
    if not path.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists already; choose another path, or overwrite it (--overwrite).")
    try:
        format_of(existing_folder(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is no checkpoint, and is not overwritten: {error}") from error


def _write_policy(
    root: pathlib.Path,
    checkpoint: Checkpoint,
    model: Pi0,
    to: Format,
    dtype: torch.dtype,
    max_shard_bytes: int,
    asset_id: str | None,
    requested: Mapping[str, Any],
) -> list[str]:
    spec = checkpoint.spec().requested(asset_id=asset_id, **requested).with_tokenizer()
    policy = policy_of(model, dataclasses.replace(spec, provenance=_provenance(checkpoint, spec.provenance)))
    if to == "torchpi":
        policy.write_spec(root)
        folder.write_weights(root, model, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return []
    _write_torch(root, model, dtype, prefix=LEROBOT_PREFIX, embeddings=2)
    notes = lerobot.write_spec(root, model.config, policy.spec, dtype)
    (root / lerobot.TOKENIZER).mkdir()
    policy.write_tokenizer(root / lerobot.TOKENIZER)
    lerobot.write_tokenizer_config(root / lerobot.TOKENIZER, policy.transforms.tokenizer.special_tokens)
    if policy.default_prompt is not None:
        notes.append(f"the default prompt {policy.default_prompt!r} is not written: LeRobot has none")
    return notes


def _provenance(checkpoint: Checkpoint, before: Mapping[str, Any]) -> dict[str, Any]:
    converted = {
        "source": checkpoint.address,
        "format": checkpoint.format,
        "sha256": _sha256(checkpoint),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return {**{key: value for key, value in before.items() if key != "source"}, "converted": converted}


def _sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of all files of weights, by their names and contents."""
    in_params = checkpoint.format == "openpi-jax"
    root = checkpoint.arrays.source if in_params else checkpoint.root
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*") if in_params else root.glob("*.safetensors")):
        if file.is_file():
            digest.update(file.relative_to(root).as_posix().encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _write_openpi(
    root: pathlib.Path,
    checkpoint: Checkpoint,
    model: Pi0,
    to: Format,
    dtype: torch.dtype,
    asset_id: str | None,
    requested: Mapping[str, Any],
) -> list[str]:
    if unknown := sorted(set(requested) - {"norm_stats", "embodiment"}):
        raise CheckpointError(f"A checkpoint of openpi says nothing of {', '.join(unknown)}; leave it out.")
    config = model.config
    unsaid = ["max_token_len", "discrete_state_input"]
    if to == "openpi-jax":
        table = jax_table(config)
        shapes = {name: array.shape for name, array in table.items()}
        (root / "params").mkdir()
        openpi.write_params(root / "params", shapes, lambda name: stored_array(model, table[name], dtype), dtype=dtype)
        unsaid.insert(0, "action_horizon")
    else:
        _write_torch(root, model, dtype, prefix="", embeddings=1)
        document = {
            "action_dim": config.action_dim,
            "action_horizon": config.require("action_horizon"),
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "precision": str(dtype).removeprefix("torch."),
        }
        write_json(root / "config.json", document)
    values = {field: getattr(config, field) for field in unsaid if getattr(config, field) is not None}
    notes = [f"{field} {value} is not written: it is in openpi's training config" for field, value in values.items()]
    return notes + _write_assets(root, checkpoint, asset_id, requested)


def _write_torch(root: pathlib.Path, model: Pi0, dtype: torch.dtype, *, prefix: str, embeddings: int) -> None:
    """Write the arrays of openpi's PyTorch port, with those that a strict loader misses otherwise, in one file: neither
    openpi nor LeRobot reads shards (LeRobot 0.6 then uses random weights).

    Args:
        embeddings: 1: under the text head's name, as `safetensors.torch.save_model` leaves one of two tied arrays; 2:
            under both names.
    """
    table = torch_table(model.config)
    embedding = table.pop(EMBEDDING)
    table[TIED_EMBEDDING] = embedding
    if embeddings == 2:
        table[EMBEDDING] = embedding
    head = (model.config.vocab_size, model.config.action_expert.width)  # nobody reads the expert's
    shapes = {f"{prefix}{name}": array.shape for name, array in table.items()} | {f"{prefix}{EXPERT_LM_HEAD}": head}

    def read(name: str) -> torch.Tensor:
        entry = table.get(name.removeprefix(prefix))
        return torch.zeros(head, dtype=dtype) if entry is None else stored_array(model, entry, dtype)

    alias = {EMBEDDING: TIED_EMBEDDING} if embeddings == 1 else {}
    write_safetensors(root, shapes, read, dtype=dtype, metadata=alias)


def _write_assets(
    root: pathlib.Path, checkpoint: Checkpoint, asset_id: str | None, policy: Mapping[str, Any]
) -> list[str]:
    """Statistics beside weights of openpi: all of an openpi checkpoint, or the policy's one."""
    spec = checkpoint.spec()
    if spec.norm_stats is None and not policy:
        if asset_id is not None and asset_id not in spec.assets:
            raise CheckpointError(
                f"{checkpoint.root} has no statistics for {asset_id!r}; it has {', '.join(spec.assets) or 'none'}."
            )
        chosen = spec.assets if asset_id is None else {asset_id: spec.assets[asset_id]}
        for name, file in chosen.items():
            (root / "assets" / name).mkdir(parents=True)
            (root / "assets" / name / "norm_stats.json").write_bytes(file.read_bytes())
        return [] if chosen else ["there are no statistics in the source, and so none in the target"]
    spec = spec.requested(**policy)
    assert spec.embodiment is not None
    assert spec.norm_stats is not None
    name = asset_id or spec.embodiment.asset_id or spec.embodiment.name
    (root / "assets" / name).mkdir(parents=True)
    save_norm_stats(root / "assets" / name, spec.norm_stats)
    return [f"the robot is not written: openpi's training config has it; its statistics are assets/{name}"]


def _check(root: pathlib.Path, model: Pi0, dtype: torch.dtype) -> dict[str, float]:
    """Read back what was written; the differences of arrays and of sampled actions from what was meant."""
    written = open_checkpoint(root, config=model.config)
    difference = 0.0
    for name, entry in written.table(model.config).items():
        meant, found = stored_array(model, entry, dtype), written.arrays.read(name)
        if not torch.equal(meant.view(torch.uint8), found.view(torch.uint8)):  # bits: NaN equals itself
            off = (meant.float() - found.float()).abs().nan_to_num(nan=torch.inf)
            difference = max(difference, float(off.max()))
    observation, noise = _sample_inputs(model.config)
    with torch.no_grad():
        expected = model.sample_actions(observation, noise=noise, num_steps=2)
        again = written.model(dtype=dtype)
        found = again.sample_actions(observation, noise=noise, num_steps=2)
    del again
    gc.collect()
    return {"array_difference": difference, "action_difference": float((expected - found).abs().max())}


def _sample_inputs(config: Pi0Config) -> tuple[Observation, torch.Tensor]:
    rng = np.random.default_rng(0)
    sample = {
        "image": {"base_0_rgb": rng.integers(0, 256, (config.image_size, config.image_size, 3), np.uint8)},
        "image_mask": {"base_0_rgb": True},
        "state": rng.standard_normal(config.action_dim, np.float32),
        "tokenized_prompt": rng.integers(0, config.vocab_size, 12),
        "tokenized_prompt_mask": np.ones(12, bool),
    }
    noise = rng.standard_normal((1, config.action_horizon or 10, config.action_dim), np.float32)
    return collate([sample]), torch.from_numpy(noise)
