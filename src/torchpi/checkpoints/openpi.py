"""openpi's JAX checkpoints (orbax, OCDBT), read and written with tensorstore, without JAX."""

import base64
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchpi.checkpoints.layout import Shapes, loaded_dtypes, require_writable
from torchpi.errors import CheckpointError
from torchpi.schema import DECODER, bounded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}


def find_params(root: pathlib.Path) -> pathlib.Path | None:
    """The folder with the arrays: `root` itself, `root/params`, or `root/<step>/params` if there is one step only."""
    for candidate in (root, root / "params"):
        if (candidate / "_METADATA").is_file() and (candidate / "manifest.ocdbt").is_file():
            return candidate
    steps = [entry for entry in root.iterdir() if entry.name.isdigit() and (entry / "params").is_dir()]
    return find_params(steps[0]) if len(steps) == 1 else None


def norm_stats_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The norm_stats.json files in the folder `assets` of an openpi checkpoint, by asset ID (which may contain "/")."""
    assets = folder / "assets"
    files = sorted(assets.rglob("norm_stats.json"))
    return {file.parent.relative_to(assets).as_posix(): file for file in files}


class JaxArrays:
    """Arrays of a `params` folder, named by key path without the leading "params" and the trailing "value"."""

    def __init__(self, params: pathlib.Path) -> None:
        """Read the metadata and open every array, without reading its data."""
        self.source = params
        try:
            metadata = bounded(DECODER.decode((params / "_METADATA").read_text(encoding="utf-8")))
            paths = [
                tuple(str(part["key"]) for part in entry["key_metadata"])
                for entry in metadata["tree_metadata"].values()
            ]
            names = [_array_name(path) for path in paths]
            spec = {
                "driver": "zarr3" if metadata.get("use_zarr3", False) else "zarr",
                # A missing chunk means zeros, unless the metadata say that chunks of zeros were written too.
                "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{params / '_METADATA'} is corrupt: {type(error).__name__}: {error}; get the file again."
            ) from error
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CheckpointError(f"{params} holds {', '.join(twice)} twice.")
        futures = {name: self._open(spec, path) for name, path in zip(names, paths, strict=True)}
        self._stores = {name: self._wait(name, future) for name, future in futures.items()}
        self.shapes: Shapes = {name: tuple(store.shape) for name, store in self._stores.items()}
        self.dtypes = loaded_dtypes(params, {name: store.dtype.name for name, store in self._stores.items()}, _DTYPES)

    def _open(self, spec: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        import tensorstore

        base = {"driver": "file", "path": f"{self.source.resolve()}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        # Memory-mapped compressed data are pages that the system can drop, not memory of this process.
        context = {"file_io_mode": {"mode": "memmap"}}
        return tensorstore.open({**spec, "kvstore": kvstore, "context": context}, open=True, read=True)

    def _wait(self, name: str, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, KeyError) as error:  # tensorstore's status codes in Python
            reason = str(error).partition(" [tensorstore_spec=")[0]
            raise CheckpointError(
                f"{self.source}: array {name!r} is missing, truncated or corrupt: {reason}; get the checkpoint again."
            ) from error

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read an array in `dtype`, by default the stored one.

        tensorstore casts while it copies from the decoded chunk, so that memory never holds a float32 array twice
        (up to 4.8 GB in a full-size model, whose bfloat16 weights are 6.7 GB).
        """
        import tensorstore

        store = self._stores[name]
        if dtype is not None:
            store = tensorstore.cast(store, tensorstore.dtype(str(dtype).removeprefix("torch.")))
        array: np.ndarray = self._wait(name, store.read())
        if array.dtype.name == "bfloat16":  # ml_dtypes' dtype, which torch.from_numpy does not support
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _array_name(path: tuple[str, ...]) -> str:
    inner = path[1:] if path[0] == "params" else path
    return ".".join(inner[:-1] if inner[-1] == "value" else inner)


def write_params(params: pathlib.Path, shapes: Shapes, read: Callable[[str], torch.Tensor]) -> None:
    """Write a `params` folder that orbax can restore, with key paths as in openpi's published checkpoints.

    The folder must exist and be empty. Arrays are read by name and written one at a time, each as one zstd-compressed
    chunk.
    """
    started = time.time_ns()
    tree, sharding, array_metadatas = {}, {}, []
    single = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "TFRT_CPU_0"})
    for name, shape in shapes.items():
        keys = ("params", *name.split("."))
        path, size = ".".join(keys), list(shape)
        array = read(name)
        require_writable(array.dtype)
        _write_array(params, path, array.contiguous())
        value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": size}
        tree[str(keys)] = {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": value}
        sharding[base64.b64encode(path.encode()).decode()] = single
        chunk = {"param_name": path, "write_shape": size, "chunk_shape": size, "ext_metadata": None}
        array_metadatas.append({"array_metadata": chunk})
    documents = {
        "_METADATA": {
            "tree_metadata": tree,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_sharding": sharding,
        "array_metadatas/process_0": {"array_metadatas": array_metadatas},
        "_CHECKPOINT_METADATA": {
            "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": {},
        },
    }
    (params / "array_metadatas").mkdir()
    for file, document in documents.items():
        (params / file).write_text(json.dumps(document), encoding="utf-8")


def _write_array(params: pathlib.Path, path: str, tensor: torch.Tensor) -> None:
    import ml_dtypes
    import tensorstore

    is_half = tensor.dtype is torch.bfloat16
    array: Any = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if is_half else tensor.numpy()
    metadata = {
        "shape": list(array.shape),
        "chunks": list(array.shape),
        "dtype": "bfloat16" if is_half else "<f4",
        "compressor": {"id": "zstd", "level": 1},
        "fill_value": None,
    }
    base = {"driver": "file", "path": f"{params.resolve()}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    # For orbax a missing chunk is an error, not zeros.
    spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata, "store_data_equal_to_fill_value": True}
    tensorstore.open(spec, create=True).result().write(array).result()
