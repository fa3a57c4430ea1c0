"""openpi's JAX checkpoints (orbax, OCDBT), read with tensorstore, without JAX.

The arrays of one kind of all layers are stacked in one leaf there, and here every layer has its own matrix. `leaves`
says for each leaf which parts of it go where; everything else in this file follows from it.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torchpi.checkpoints.fill import materialized_parameter, refuse_mismatch
from torchpi.config import GemmaConfig, Pi0Config, VisionConfig
from torchpi.model.pi0 import Pi0

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One part of a leaf, and the rows of a parameter that it fills."""

    param: str
    """Name in `Pi0.state_dict()`."""
    layer: int | None = None
    """Index on the leaf's first axis, None: the whole leaf."""
    axes: tuple[int, ...] | None = None
    """Order of the part's axes in the parameter, where rows (outputs) come first; None: unchanged."""
    rows: tuple[int, int] | None = None
    """First row and end of the parameter's rows; None: all."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of an openpi checkpoint."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Where its parts go; together they fill all that they touch."""


def leaves(config: Pi0Config) -> dict[str, Leaf]:
    """Every array of an openpi checkpoint of these sizes, by its key path joined with '.'."""
    found = {
        "PaliGemma.llm.embedder.input_embedding": Leaf(
            (config.vocab_size, config.paligemma.width), (Piece("embedding"),)
        )
    }
    found |= _siglip_leaves(config)
    found |= _gemma_leaves(config.paligemma, "backbone", "", adaptive_norm=False)
    found |= _gemma_leaves(config.action_expert, "expert", "_1", adaptive_norm=config.pi05)
    width, action_dim = config.action_expert.width, config.action_dim
    found |= _dense("action_in_proj", "suffix.action_in_proj", action_dim, width)
    found |= _dense("action_out_proj", "action_out_proj", width, action_dim)
    if config.pi05:
        found |= _dense("time_mlp_in", "suffix.time_mlp_in", width, width)
        found |= _dense("time_mlp_out", "suffix.time_mlp_out", width, width)
    else:
        found |= _dense("state_proj", "suffix.state_proj", action_dim, width)
        found |= _dense("action_time_mlp_in", "suffix.action_time_mlp_in", 2 * width, width)
        found |= _dense("action_time_mlp_out", "suffix.action_time_mlp_out", width, width)
    return found


def _dense(leaf: str, module: str, num_in: int, num_out: int) -> dict[str, Leaf]:
    return {
        f"{leaf}.kernel": Leaf((num_in, num_out), (Piece(f"{module}.weight", axes=(1, 0)),)),
        f"{leaf}.bias": Leaf((num_out,), (Piece(f"{module}.bias"),)),
    }


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The layers of one stack, whose arrays of a kind are one leaf."""

    modules: str
    depth: int

    def leaf(
        self,
        name: str,
        *shape: int,
        axes: tuple[int, ...] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Leaf:
        pieces = (Piece(f"{self.modules}.{i}.{name}", layer=i, axes=axes, rows=rows) for i in range(self.depth))
        return Leaf((self.depth, *shape), tuple(pieces))


def _siglip_leaves(config: Pi0Config) -> dict[str, Leaf]:
    vit = config.siglip
    width, mlp, heads, patch = vit.width, vit.mlp_dim, vit.num_heads, vit.patch
    img, block = "PaliGemma.img", "PaliGemma.img.Transformer.encoderblock"
    attention = f"{block}.MultiHeadDotProductAttention_0"
    blocks = _Stack("vision.blocks", vit.depth)
    found = {
        f"{img}.embedding.kernel": Leaf(
            (patch, patch, 3, width), (Piece("vision.patch_embed.weight", axes=(3, 0, 1, 2)),)
        ),
        f"{img}.embedding.bias": Leaf((width,), (Piece("vision.patch_embed.bias"),)),
        f"{img}.Transformer.encoder_norm.scale": Leaf((width,), (Piece("vision.norm.weight"),)),
        f"{img}.Transformer.encoder_norm.bias": Leaf((width,), (Piece("vision.norm.bias"),)),
        f"{attention}.out.kernel": blocks.leaf("out.weight", heads, width // heads, width, axes=(2, 0, 1)),
        f"{attention}.out.bias": blocks.leaf("out.bias", width),
        f"{block}.MlpBlock_0.Dense_0.kernel": blocks.leaf("fc1.weight", width, mlp, axes=(1, 0)),
        f"{block}.MlpBlock_0.Dense_0.bias": blocks.leaf("fc1.bias", mlp),
        f"{block}.MlpBlock_0.Dense_1.kernel": blocks.leaf("fc2.weight", mlp, width, axes=(1, 0)),
        f"{block}.MlpBlock_0.Dense_1.bias": blocks.leaf("fc2.bias", width),
    }
    if vit.position == "learned":
        found[f"{img}.pos_embedding"] = Leaf((1, config.num_patches, width), (Piece("vision.pos_embed"),))
    for i, part in enumerate(("query", "key", "value")):
        rows, shape = (i * width, (i + 1) * width), (heads, width // heads)
        found[f"{attention}.{part}.kernel"] = blocks.leaf("qkv.weight", width, *shape, axes=(1, 2, 0), rows=rows)
        found[f"{attention}.{part}.bias"] = blocks.leaf("qkv.bias", *shape, rows=rows)
    for i in (0, 1):
        found[f"{block}.LayerNorm_{i}.scale"] = blocks.leaf(f"norm{i + 1}.weight", width)
        found[f"{block}.LayerNorm_{i}.bias"] = blocks.leaf(f"norm{i + 1}.bias", width)
    return found | _dense(f"{img}.head", "vision.head", width, config.paligemma.width)


def _gemma_leaves(gemma: GemmaConfig, stack: str, suffix: str, *, adaptive_norm: bool) -> dict[str, Leaf]:
    width, mlp, head_dim = gemma.width, gemma.mlp_dim, gemma.head_dim
    heads, kv_heads = gemma.num_heads, gemma.num_kv_heads
    llm = "PaliGemma.llm"
    attn, feed_forward = f"{llm}.layers.attn", f"{llm}.layers.mlp{suffix}"
    layers = _Stack(f"{stack}.layers", gemma.depth)
    found = {
        f"{attn}.attn_vec_einsum{suffix}.w": layers.leaf(
            "attention.out.weight", heads, head_dim, width, axes=(2, 0, 1)
        ),
        f"{feed_forward}.gating_einsum": layers.leaf("feed_forward.gate_up.weight", 2, width, mlp, axes=(0, 2, 1)),
        f"{feed_forward}.linear": layers.leaf("feed_forward.down.weight", mlp, width, axes=(1, 0)),
    }
    qkv = "attention.qkv.weight"
    if kv_heads == heads:  # plain multi-head attention is one leaf there
        found[f"{attn}.qkv_einsum{suffix}.w"] = layers.leaf(qkv, 3, heads, width, head_dim, axes=(0, 1, 3, 2))
    else:
        q_end, kv_end = heads * head_dim, (heads + 2 * kv_heads) * head_dim
        found[f"{attn}.q_einsum{suffix}.w"] = layers.leaf(qkv, heads, width, head_dim, axes=(0, 2, 1), rows=(0, q_end))
        found[f"{attn}.kv_einsum{suffix}.w"] = layers.leaf(
            qkv, 2, kv_heads, width, head_dim, axes=(0, 1, 3, 2), rows=(q_end, kv_end)
        )
    for norm in ("pre_attention_norm", "pre_ffw_norm"):
        leaf = f"{llm}.layers.{norm}{suffix}"
        if adaptive_norm:
            found[f"{leaf}.Dense_0.kernel"] = layers.leaf(f"{norm}.dense.weight", width, 3 * width, axes=(1, 0))
            found[f"{leaf}.Dense_0.bias"] = layers.leaf(f"{norm}.dense.bias", 3 * width)
        else:
            found[f"{leaf}.scale"] = layers.leaf(f"{norm}.scale", width)
    final = f"{llm}.final_norm{suffix}"
    if adaptive_norm:
        return found | _dense(f"{final}.Dense_0", f"{stack}.final_norm.dense", width, 3 * width)
    return found | {f"{final}.scale": Leaf((width,), (Piece(f"{stack}.final_norm.scale"),))}


def config_from_shapes(shapes: Shapes) -> Pi0Config:
    """The sizes that a checkpoint's arrays have; horizon, prompt length and format are in none and stay unset.

    The image size is in the learned position embedding; without one it is 224, as in all published models.

    Raises:
        ValueError: an array that is needed to tell a size is missing or has another rank.
    """
    llm, img = "PaliGemma.llm.layers", "PaliGemma.img"
    block = f"{img}.Transformer.encoderblock"

    def shape(leaf: str, ndim: int) -> tuple[int, ...]:
        if leaf not in shapes:
            raise ValueError(
                f"the checkpoint has no array {leaf!r}, which every π₀ and π₀.₅ model has; "
                f"found {sorted(shapes)[:8] or 'none'}"
            )
        if len(shapes[leaf]) != ndim:
            raise ValueError(f"array {leaf!r} must have {ndim} dimensions, its shape is {list(shapes[leaf])}")
        return shapes[leaf]

    def gemma(suffix: str) -> GemmaConfig:
        depth, _, width, mlp_dim = shape(f"{llm}.mlp{suffix}.gating_einsum", 4)
        if f"{llm}.attn.qkv_einsum{suffix}.w" in shapes:
            _, _, heads, _, head_dim = shape(f"{llm}.attn.qkv_einsum{suffix}.w", 5)
            kv_heads = heads
        else:
            _, heads, _, head_dim = shape(f"{llm}.attn.q_einsum{suffix}.w", 4)
            kv_heads = shape(f"{llm}.attn.kv_einsum{suffix}.w", 5)[2]
        return GemmaConfig(width, depth, mlp_dim, heads, kv_heads, head_dim)

    patch, _, _, width = shape(f"{img}.embedding.kernel", 4)
    vit_depth, _, vit_heads, _ = shape(f"{block}.MultiHeadDotProductAttention_0.query.kernel", 4)
    vit_mlp = shape(f"{block}.MlpBlock_0.Dense_0.kernel", 3)[2]
    learned = f"{img}.pos_embedding" in shapes
    num_patches = shape(f"{img}.pos_embedding", 3)[1] if learned else (224 // patch) ** 2
    return Pi0Config(
        pi05="time_mlp_in.kernel" in shapes,
        paligemma_variant=gemma(""),
        action_expert_variant=gemma("_1"),
        siglip_variant=VisionConfig(width, vit_depth, vit_mlp, vit_heads, patch, "learned" if learned else "sincos2d"),
        action_dim=shape("action_in_proj.kernel", 2)[0],
        action_horizon=None,
        max_token_len=None,
        discrete_state_input=None,
        vocab_size=shape("PaliGemma.llm.embedder.input_embedding", 2)[0],
        image_size=patch * round(num_patches**0.5),
    )


def find_params(root: pathlib.Path) -> pathlib.Path | None:
    """The folder with the arrays: `root` itself, `root/params`, or `root/<step>/params` if there is one step only.

    Raises:
        ValueError: there are several steps.
    """
    for candidate in (root, root / "params"):
        if (candidate / "_METADATA").is_file() and (candidate / "manifest.ocdbt").is_file():
            return candidate
    steps = [entry for entry in root.iterdir() if entry.name.isdigit() and (entry / "params").is_dir()]
    if len(steps) > 1:
        raise ValueError(f"{root} holds several steps, {sorted(int(s.name) for s in steps)}; give the path of one")
    return find_params(steps[0]) if steps else None


def norm_stats_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """By asset id (which may contain '/'), the norm_stats.json files that belong to a checkpoint."""
    params = find_params(root)
    if params is None:
        return {}
    assets = params.parent / "assets"
    return {file.parent.relative_to(assets).as_posix(): file for file in sorted(assets.rglob("norm_stats.json"))}


class JaxArrays:
    """The arrays of one `params` folder, by key path without the leading 'params' and the trailing 'value'."""

    def __init__(self, params: pathlib.Path) -> None:
        """Read the metadata and open every array; no data is read yet.

        Raises:
            ValueError: the metadata or an array is truncated or corrupt.
        """
        self.params = params
        try:
            metadata = json.loads((params / "_METADATA").read_text(encoding="utf-8"))
            paths = [
                tuple(str(part["key"]) for part in entry["key_metadata"])
                for entry in metadata["tree_metadata"].values()
            ]
            names = [_leaf_name(path) for path in paths]
            spec = {
                "driver": "zarr3" if metadata.get("use_zarr3", False) else "zarr",
                # A chunk that is not there is zeros, unless the writer says that it wrote zeros as well.
                "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{params / '_METADATA'} is corrupt: {type(error).__name__}: {error}; get the file again"
            ) from error
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{params} holds {', '.join(twice)} twice")
        futures = {name: self._open(spec, path) for name, path in zip(names, paths, strict=True)}
        self._stores = {name: self._wait(name, future) for name, future in futures.items()}
        self.shapes: Shapes = {name: tuple(store.shape) for name, store in self._stores.items()}

    def config(self) -> Pi0Config:
        """The sizes that the arrays have, see `config_from_shapes`."""
        try:
            return config_from_shapes(self.shapes)
        except ValueError as error:
            raise ValueError(f"{self.params}: {error}") from error

    def _open(self, spec: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        import tensorstore

        base = {"driver": "file", "path": f"{self.params.resolve()}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        # Compressed bytes are then pages of the file, which the system may drop, and no memory of ours.
        context = {"file_io_mode": {"mode": "memmap"}}
        return tensorstore.open({**spec, "kvstore": kvstore, "context": context}, open=True, read=True)

    def _wait(self, name: str, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, KeyError) as error:  # what tensorstore's status codes become
            reason = str(error).partition(" [tensorstore_spec=")[0]
            raise ValueError(
                f"{self.params}: array {name!r} is missing, truncated or corrupt: {reason}; get the checkpoint again"
            ) from error

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The array as a tensor in `dtype`, by default its stored one.

        tensorstore casts while it copies out of the decoded chunk, so that a float32 leaf (4.8 GB of a full-size model,
        which is 6.7 GB in bfloat16) is never here twice.
        """
        import tensorstore

        store = self._stores[name]
        if dtype is not None:
            store = tensorstore.cast(store, tensorstore.dtype(str(dtype).removeprefix("torch.")))
        array: np.ndarray = self._wait(name, store.read())
        if array.dtype.name == "bfloat16":  # from ml_dtypes, which torch.from_numpy does not know
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def load(self, config: Pi0Config, *, dtype: torch.dtype, device: str | torch.device) -> Pi0:
        """Build the model that `config` describes and fill every weight.

        The largest leaf is read first, when little else is allocated, so that the peak stays near the model's own size.

        Raises:
            ValueError: arrays are missing, left over or misshapen.
        """
        expected = leaves(config)
        self._check(expected)
        model = Pi0(config, device="meta", dtype=dtype)
        for name, leaf in sorted(expected.items(), key=lambda item: -math.prod(item[1].shape)):
            _fill(model, leaf, self.read(name, dtype), device)
        return model

    def _check(self, expected: Mapping[str, Leaf]) -> None:
        missing, extra = sorted(set(expected) - set(self.shapes)), sorted(set(self.shapes) - set(expected))
        misshapen = [
            f"{name} is {list(self.shapes[name])}, expected {list(leaf.shape)}"
            for name, leaf in expected.items()
            if name in self.shapes and self.shapes[name] != leaf.shape
        ]
        if any("lora" in name for name in extra):
            raise ValueError(f"{self.params} is a LoRA checkpoint; folding LoRA weights is not supported yet")
        refuse_mismatch(self.params, missing, extra, misshapen)


def _leaf_name(path: tuple[str, ...]) -> str:
    inner = path[1:] if path[0] == "params" else path
    return ".".join(inner[:-1] if inner[-1] == "value" else inner)


def _fill(model: Pi0, leaf: Leaf, array: torch.Tensor, device: str | torch.device) -> None:
    for piece in leaf.pieces:
        part = array if piece.layer is None else array[piece.layer]
        part = part if piece.axes is None else part.permute(piece.axes)
        rows = materialized_parameter(model, piece.param, device).data
        rows = rows if piece.rows is None else rows[slice(*piece.rows)]
        rows.view(part.shape).copy_(part)
