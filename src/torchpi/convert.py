"""`torchpi convert`: a checkpoint of any format into any other."""

import dataclasses
import datetime
import gc
import hashlib
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, get_args

import torch

from torchpi.atomic import atomic_folder
from torchpi.checkpoints import folder, lerobot, openpi
from torchpi.checkpoints.checkpoint import Checkpoint, Format, format_of, open_checkpoint
from torchpi.checkpoints.layout import stored_array
from torchpi.checkpoints.openpi_layout import jax_table
from torchpi.checkpoints.openpi_torch import (
    EMBEDDING,
    EXPERT_LM_HEAD,
    LEROBOT_PREFIX,
    TIED_EMBEDDING,
    EmbeddingChoice,
    torch_table,
)
from torchpi.checkpoints.peft import PeftArrays
from torchpi.checkpoints.safetensors_files import write_safetensors
from torchpi.checkpoints.sizes import ConfigLike, adapt, untrained_note
from torchpi.checkpoints.spec import PolicySpec
from torchpi.errors import CheckpointError, first_of
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy, policy_of
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
    """Dtype of the written arrays."""
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
    config: ConfigLike | None = None,
    sizes: Mapping[str, int] | None = None,
    lora_alpha: tuple[float, float] | None = None,
    embedding: EmbeddingChoice | None = None,
    asset_id: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    check: bool = True,
    **policy: Any,
) -> Conversion:
    """Write a checkpoint in another format; the target appears complete or not at all.

    Args:
        source, config, lora_alpha, embedding: see `load_model`.
        target: a new folder; with `overwrite` also the place of another checkpoint.
        dtype: of the arrays; by default the source's.
        sizes: other values of action_dim, action_horizon or max_token_len: weights are cut or extended by zeros.
        asset_id: which of the source's statistics; for a target of openpi also the name under which they are written.
        max_shard_bytes: above it a policy folder's weights are written in shards; other systems' loaders read one file.
        check: read the target back, and compare its arrays and sampled actions with the source's.
        policy: more arguments of `load_policy` (embodiment, norm_stats, …), for what the source does not say.

    Raises:
        FileNotFoundError, KeyError, ValueError: see `load_model` and `load_policy`; there is something at the target;
            the target can't say what the policy needs.
    """
    path = _checked_target(target, to, overwrite=overwrite)
    checkpoint = open_checkpoint(source, config=config, embedding=embedding)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    checkpoint.require_full_precision("converted")
    model = checkpoint.model(dtype=(dtype := dtype or checkpoint.dtype), lora_alpha=lora_alpha)
    adapted = adapt(model, sizes or {})
    with atomic_folder(path) as beside:
        if to in ("torchpi", "lerobot"):
            spec = checkpoint.spec().requested(asset_id=asset_id, **policy).with_tokenizer(model.config.vocab_size)
            spec = dataclasses.replace(spec, provenance=_provenance(checkpoint, spec.provenance))
            notes = _write_policy(beside, policy_of(model, spec), to, dtype, max_shard_bytes)
        else:
            assets = _write_assets(beside, checkpoint, asset_id, policy)
            notes = [*_write_openpi(beside, model, to, dtype), *assets]
        files = sorted(str(file.relative_to(beside)) for file in beside.rglob("*") if file.is_file())
        differences = _check(beside, model, dtype) if check else {}
    return _report(
        checkpoint,
        model,
        target=str(path),
        target_format=to,
        dtype=str(dtype).removeprefix("torch."),
        adapted=adapted,
        notes=notes,
        files=[name for name in files if not name.startswith(("params/d/", "params/ocdbt."))],
        **differences,
    )


def _report(checkpoint: Checkpoint, model: Pi0, **outcome: Any) -> Conversion:
    return Conversion(
        source=checkpoint.address,
        source_format=checkpoint.format,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        mapped=len(checkpoint.table(checkpoint.stored_config)),
        folded=checkpoint.arrays.folded if isinstance(checkpoint.arrays, PeftArrays) else checkpoint.folded,
        tied=checkpoint.tied,
        dropped=checkpoint.dropped,
        **outcome,
    )


def _checked_target(target: str | pathlib.Path, to: str, *, overwrite: bool) -> pathlib.Path:
    """The path, where nothing is, or a checkpoint to be replaced."""
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
        raise CheckpointError(f"{path} is no checkpoint, and is not overwritten: {error}") from error
    return path


def _provenance(checkpoint: Checkpoint, before: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a policy, with the SHA-256 of all files of weights, by their names and contents."""
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


def _write_policy(
    root: pathlib.Path, policy: Policy, to: Format, dtype: torch.dtype, max_shard_bytes: int
) -> list[str]:
    if to == "torchpi":
        policy.write_spec(root)
        folder.write_weights(root, policy.model, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return []
    if untrained := policy.transforms.untrained_actions:
        raise CheckpointError(
            f"Nothing has trained the policy's {first_of(untrained)}, and LeRobot would send the robot the model's "
            "noise: train it first (torchpi train --init), and convert the result."
        )
    _write_torch(root, policy.model, dtype, prefix=LEROBOT_PREFIX, embeddings=(TIED_EMBEDDING, EMBEDDING))
    notes = lerobot.write_spec(root, policy.model.config, policy.spec, dtype)
    (root / lerobot.TOKENIZER).mkdir()
    policy.write_tokenizer(root / lerobot.TOKENIZER)
    lerobot.write_tokenizer_config(root / lerobot.TOKENIZER, policy.transforms.tokenizer.special_tokens)
    if policy.default_prompt is not None:
        notes.append(f"the default prompt {policy.default_prompt!r} is not written: LeRobot has none")
    return notes


def _write_openpi(root: pathlib.Path, model: Pi0, to: Format, dtype: torch.dtype) -> list[str]:
    config, unsaid = model.config, ["max_token_len", "discrete_state_input"]
    if to == "openpi-jax":
        table = jax_table(config)
        shapes = {name: array.shape for name, array in table.items()}
        (root / "params").mkdir()
        openpi.write_params(root / "params", shapes, lambda name: stored_array(model, table[name], dtype), dtype=dtype)
        unsaid.insert(0, "action_horizon")
    else:
        # Under the text head's name, as `safetensors.torch.save_model` leaves one of two tied arrays.
        _write_torch(root, model, dtype, prefix="", embeddings=(TIED_EMBEDDING,))
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
    notes += untrained_note(model.trained_action_dim, config.action_dim)
    return [*notes, "the tokenizer is not written: openpi has the published models'"]


def _write_torch(
    root: pathlib.Path, model: Pi0, dtype: torch.dtype, *, prefix: str, embeddings: tuple[str, ...]
) -> None:
    """Write the arrays of openpi's PyTorch port, with those that a strict loader misses otherwise, in one file: neither
    openpi nor LeRobot reads shards (LeRobot 0.6 then uses random weights)."""
    table = torch_table(model.config)
    table |= dict.fromkeys(embeddings, table.pop(EMBEDDING))
    head = (model.config.vocab_size, model.config.action_expert.width)  # nobody reads the expert's
    shapes = {f"{prefix}{name}": array.shape for name, array in table.items()} | {f"{prefix}{EXPERT_LM_HEAD}": head}

    def read(name: str) -> torch.Tensor:
        entry = table.get(name.removeprefix(prefix))
        return torch.zeros(head, dtype=dtype) if entry is None else stored_array(model, entry, dtype)

    alias = {} if EMBEDDING in embeddings else {EMBEDDING: TIED_EMBEDDING}
    write_safetensors(root, shapes, read, dtype=dtype, metadata=alias)


def _write_assets(
    root: pathlib.Path, checkpoint: Checkpoint, asset_id: str | None, policy: Mapping[str, Any]
) -> list[str]:
    """Statistics beside weights of openpi: all of an openpi checkpoint, or the policy's one."""
    if unknown := sorted(set(policy) - {"norm_stats", "embodiment", "preprocessing"}):
        raise CheckpointError(f"A checkpoint of openpi says nothing of {', '.join(unknown)}; leave it out.")
    spec = checkpoint.spec()
    if spec.norm_stats is None and not policy:
        chosen = spec.assets if asset_id is None else {asset_id: spec.asset(asset_id)}
        for name, file in chosen.items():
            (root / "assets" / name).mkdir(parents=True)
            (root / "assets" / name / "norm_stats.json").write_bytes(file.read_bytes())
        return [] if chosen else ["there are no statistics in the source, and so none in the target"]
    spec = spec.requested(**policy)
    resized = spec.require_preprocessing("openpi", checkpoint.config)
    assert spec.embodiment is not None
    assert spec.norm_stats is not None
    name = asset_id or spec.embodiment.asset_id or spec.embodiment.name
    (root / "assets" / name).mkdir(parents=True)
    save_norm_stats(root / "assets" / name, spec.norm_stats)
    settings = {"num_steps": spec.num_steps if spec.num_steps != PolicySpec.num_steps else None, **spec.metadata}
    notes = [f"{key} {value} is not written: openpi has none" for key, value in settings.items() if value is not None]
    return [
        *notes,
        *resized,
        f"the robot is not written: openpi's training config has it; its statistics are assets/{name}",
    ]


def _check(root: pathlib.Path, model: Pi0, dtype: torch.dtype) -> dict[str, float]:
    """Read back what was written; the differences of arrays and of sampled actions from what was meant."""
    written = open_checkpoint(root, config=model.config)
    difference = 0.0
    for name, entry in written.table(model.config).items():
        meant, found = stored_array(model, entry, dtype), written.arrays.read(name)
        if not torch.equal(meant.view(torch.uint8), found.view(torch.uint8)):  # bits: NaN equals itself
            off = (meant.float() - found.float()).abs().nan_to_num(nan=torch.inf)
            difference = max(difference, float(off.max()))
    config, random = model.config, torch.Generator().manual_seed(0)
    observation = Observation(
        images={"base_0_rgb": 2 * torch.rand(1, config.image_size, config.image_size, 3, generator=random) - 1},
        image_masks={"base_0_rgb": torch.ones(1, dtype=torch.bool)},
        state=torch.randn(1, config.action_dim, generator=random),
        tokenized_prompt=torch.randint(config.vocab_size, (1, 12), generator=random),
        tokenized_prompt_mask=torch.ones(1, 12, dtype=torch.bool),
    )
    noise = torch.randn(1, config.action_horizon or 10, config.action_dim, generator=random)
    with torch.no_grad():
        expected = model.sample_actions(observation, noise=noise, num_steps=2)
        again = written.model(dtype=dtype)
        found = again.sample_actions(observation, noise=noise, num_steps=2)
    del again
    gc.collect()
    return {"array_difference": difference, "action_difference": float((expected - found).abs().max())}
