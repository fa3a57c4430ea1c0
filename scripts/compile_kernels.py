"""Compile the engine's Triton kernels without a GPU, and write their figures to docs/kernels.md.

    python scripts/compile_kernels.py [--out docs/kernels.md]

The kernels' own wrappers are called with empty CPU tensors of π₀.₅'s full-size shapes in bfloat16: three cameras, 200
prompt tokens, a chunk of 50 actions. Nothing is computed. Needs the extra 'gpu'.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torchpi.engine.kernels import Kernels, triton_kernels
from torchpi.engine.kernels.jit import Kernel

CAPABILITIES = {80: "A100", 86: "RTX 30", 89: "L4, RTX 40", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.float8_e4m3fn: "*fp8e4nv"}
FP8_CAPABILITY = 89

ROOT = pathlib.Path(__file__).parents[1]
PREFIX, SUFFIX = 3 * 256 + 200, 50
BACKBONE, EXPERT, HEADS, HEAD_DIM, PATCHES, VISION = 2048, 1024, 8, 256, 256, 1152

DOCUMENT = """# Fused kernels for GPUs

`torchpi.engine.kernels` implements the operations between a layer's matmuls, each as plain PyTorch and as a
[Triton](https://triton-lang.org) kernel with one launch (`pip install 'torchpi[gpu]'`, Linux). Each file contains
formula, plain reference and kernel for one subject. The engine calls either through the same signatures: `PLAIN`, or
`triton_kernels()`.

**Nothing here has been run on a GPU.** The kernels are compared with their references in Triton's interpreter on a
CPU (float32, bfloat16, ragged sizes), the references with the plain model, and the figures below come from compiling
without a GPU. Block sizes follow from these figures; no time was measured, and none is claimed.

## Operations

Each computes in float32 from the first load to the last store, and returns its input's dtype.

| operation | formula | replaces in the plain model |
| --- | --- | --- |
| `rms_norm` | x, or x + y, and its n = x / √(mean x² + 1e-6); 1 + scale is folded into the next matmul | residual, `RMSNorm` |
| `ada_rms_norm` | x, or x + y·gate, and its n·(1 + scale) + shift | gated residual, the next `AdaRMSNorm` |
| `layer_norm` | x, or x + y, and its (x − mean) / √(var + ε)·weight + bias | SigLIP's residual and LayerNorm |
| `split_rope_store` | (a·cos − b·sin, b·cos + a·sin) of queries and keys; keys and values into the cache | split, RoPE, write into the cache |
| `geglu` | gelu(gate)·up, the tanh form | GeGLU's activation for many rows (prefix) |
| `linear_geglu` | gelu(x·Wgᵀ)·(x·Wuᵀ) | GeGLU's first matmul and activation, few rows (suffix) |
| `attend` | softmax(q·keysᵀ/√K over the allowed keys)·values | mask, grouped-query attention |
| `to_fp8` | e4m3(x / scale), at most 448 | the rounding before an [fp8](quantization.md) matmul, after SigLIP's attention and activation |

In an fp8 policy every operation before a matmul takes that matmul's calibrated scale and writes e4m3: its output in
its input's dtype, divided by the scale and rounded, bit-identical to `to_fp8` of that output. `linear_geglu` then
also reads e4m3; its matmul accumulates in float32, multiplies by each output's scale, and rounds its result once.

A layer of the action expert takes eight launches: a norm, the QKV matmul, `split_rope_store`, `attend`, the output
matmul, a norm, `linear_geglu`, and the down projection.

- Each program of a norm and of `split_rope_store` handles one token, so that reductions stay inside it. A modulation
  that all tokens or samples share is read with stride 0, never copied.
- `linear_geglu` has few rows, so it is bound by reading its weights (16.8 MB in the expert): 128 programs for 4096
  columns, a pipeline of five stages.
- `attend` concatenates the queries of one key/value head as rows. The suffix has few (400), so its keys are also
  split over programs; the last program of a block of rows, determined by an atomic counter, combines the parts in a
  fixed order, so that the result is the same in every run on one kind of GPU. The counters are in the object that
  `triton_kernels` returns, which is for one stream at a time.

## Compiled kernels

Full-size π₀.₅ in bfloat16, three cameras, 200 prompt tokens, 50 actions, batch 1 unless stated otherwise; as many
programs as on 132 processors (H100, H200). Registers (r) per thread, shared memory per program, and tensor-core
instructions in the PTX. No register is spilled. ({versions}.) In float32 the two kernels with matmuls would need more
shared memory than most GPUs have: they are for 16-bit dtypes.

{table}

## Commands

    python scripts/compile_kernels.py                          # compiles for all architectures, writes this document
    TRITON_INTERPRET=1 pytest tests/unit/triton_kernels.py     # kernels against references on a CPU
    pytest tests/unit/triton_kernels.py                        # the same on a GPU
"""  # noqa: E501


@dataclasses.dataclass(frozen=True)
class Launch:
    """Launch of a kernel by its wrapper."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of a kernel that was compiled for one architecture."""

    registers: int
    spills: int
    """Spilled bytes, stored and loaded."""
    shared: int
    """Shared memory per program, in bytes."""
    tensor_core: Mapping[str, int]
    """Tensor-core instructions in the PTX, by name."""


def launches(kernels: Kernels) -> Iterator[tuple[str, Launch]]:
    """Yield each operation at the shapes of full-size π₀.₅ with its launch."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    slots, heads = PREFIX + SUFFIX, HEADS + 2
    x, cache, valid = empty(1, SUFFIX, EXPERT), empty(2, 1, slots, 1, HEAD_DIM), empty(1, dtype=torch.int32)
    angles = empty(2, 1, slots, HEAD_DIM // 2, dtype=torch.float32)
    table = empty(2, 1, 1, 3 * EXPERT, dtype=torch.float32)
    prefix, vision = empty(1, PREFIX, BACKBONE), empty(3, PATCHES, VISION)
    expert_fp8 = [empty(*shape, dtype=torch.float8_e4m3fn) for shape in ((1, SUFFIX, EXPERT), (2 * 4096, EXPERT))]
    fp8 = {"fp8_scale": 0.01}
    calls: dict[str, Callable[[], Any]] = {
        "rms_norm, backbone": lambda: kernels.rms_norm(prefix),
        "rms_norm with residual, backbone": lambda: kernels.rms_norm(prefix, prefix),
        "ada_rms_norm, expert": lambda: kernels.ada_rms_norm(x, table[0]),
        "ada_rms_norm with residual, expert": lambda: kernels.ada_rms_norm(x, table[1], x, table[0]),
        "layer_norm, SigLIP": lambda: kernels.layer_norm(vision, vision[0, 0], vision[0, 1]),
        "layer_norm with residual, SigLIP": lambda: kernels.layer_norm(vision, *vision[0, :2], vision),
        "split_rope_store, backbone": lambda: kernels.split_rope_store(
            empty(1, PREFIX, heads * HEAD_DIM), *angles[:, :, :PREFIX], *cache, 0
        ),
        "split_rope_store, backbone's last layer": lambda: kernels.split_rope_store(
            empty(1, PREFIX, 2 * HEAD_DIM), *angles[:, :, :PREFIX], *cache, 0
        ),
        "split_rope_store, expert": lambda: kernels.split_rope_store(
            empty(1, SUFFIX, heads * HEAD_DIM), *angles[:, :, PREFIX:], *cache, PREFIX
        ),
        "geglu, backbone": lambda: kernels.geglu(empty(1, PREFIX, 2 * 16_384)),
        "linear_geglu, expert": lambda: kernels.linear_geglu(x, empty(2 * 4096, EXPERT)),
        "attend, backbone": lambda: kernels.attend(
            empty(1, PREFIX, HEADS, HEAD_DIM), *cache[:, :, :PREFIX], valid, PREFIX
        ),
        "attend, backbone, one camera": lambda: kernels.attend(
            empty(1, 288, HEADS, HEAD_DIM), *cache[:, :, :288], valid, 288
        ),
        "attend, expert": lambda: kernels.attend(empty(1, SUFFIX, HEADS, HEAD_DIM), *cache, valid, PREFIX),
        "attend, expert of π₀": lambda: kernels.attend(
            empty(1, 1 + SUFFIX, HEADS, HEAD_DIM), *empty(2, 1, slots + 1, 1, HEAD_DIM), valid, PREFIX, 1
        ),
        "attend, expert, batch 8": lambda: kernels.attend(
            empty(8, SUFFIX, HEADS, HEAD_DIM), *empty(2, 8, slots, 1, HEAD_DIM), empty(8, dtype=torch.int32), PREFIX
        ),
        "rms_norm, backbone, to fp8": lambda: kernels.rms_norm(prefix, **fp8),
        "rms_norm with residual, backbone, to fp8": lambda: kernels.rms_norm(prefix, prefix, **fp8),
        "ada_rms_norm, expert, to fp8": lambda: kernels.ada_rms_norm(x, table[0], **fp8),
        "ada_rms_norm with residual, expert, to fp8": lambda: kernels.ada_rms_norm(x, table[1], x, table[0], **fp8),
        "layer_norm, SigLIP, to fp8": lambda: kernels.layer_norm(vision, vision[0, 0], vision[0, 1], **fp8),
        "layer_norm with residual, SigLIP, to fp8": lambda: kernels.layer_norm(vision, *vision[0, :2], vision, **fp8),
        "to_fp8, SigLIP's attention": lambda: kernels.to_fp8(vision, 0.01),
        "geglu, backbone, to fp8": lambda: kernels.geglu(empty(1, PREFIX, 2 * 16_384), **fp8),
        "linear_geglu, expert, of and to fp8": lambda: kernels.linear_geglu(
            *expert_fp8, empty(2 * 4096, dtype=torch.float32), **fp8
        ),
        "attend, backbone, to fp8": lambda: kernels.attend(
            empty(1, PREFIX, HEADS, HEAD_DIM), *cache[:, :, :PREFIX], valid, PREFIX, **fp8
        ),
        "attend, expert, to fp8": lambda: kernels.attend(
            empty(1, SUFFIX, HEADS, HEAD_DIM), *cache, valid, PREFIX, **fp8
        ),
    }
    for name, call in calls.items():
        found: list[Launch] = []

        def record(kernel: Kernel, grid: tuple[int, ...], found: list[Launch] = found) -> Callable[..., None]:
            def launch(*positional: Any, **options: Any) -> None:
                parameters = inspect.signature(kernel.function).parameters
                arguments = dict(zip(parameters, positional, strict=False))
                arguments |= {key: options.pop(key) for key in list(options) if key in parameters}
                found.append(Launch(kernel, grid, arguments, options))

            return launch

        with mock.patch.object(Kernel, "__getitem__", record):
            call()
        (only,) = found
        yield name, only


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile as Triton's launcher would, with pointers and multiples of 16 marked as such."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(inspect.signature(launch.kernel.function).parameters.items()):
        value = launch.arguments[name]
        compiled_in = getattr(parameter.annotation, "__name__", "") == "constexpr" or value is None
        if compiled_in or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        number = "fp32" if isinstance(value, float) else "i32"
        signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else number
        if number == "i32" and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel.compiled, signature, constants, attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    found = TENSOR_CORE.findall(compiled.asm["ptx"])
    spills = re.findall(r"(\d+) bytes spill", log.getvalue())
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    by_name = {name: found.count(name) for name in dict.fromkeys(found)}
    return Compiled(int(registers), sum(map(int, spills)), compiled.metadata.shared, by_name)


def compile_for_all(launch: Launch, capabilities: Sequence[int]) -> list[Compiled | None]:
    """Figures for each architecture; None if the launch needs e4m3 and the architecture lacks it."""
    fp8 = any(isinstance(value, Tensor) and value.dtype is torch.float8_e4m3fn for value in launch.arguments.values())
    return [None if fp8 and each < FP8_CAPABILITY else compile_launch(launch, each) for each in capabilities]


def cell(figures: Compiled | None) -> str:
    """Table cell with registers per thread, shared memory per program, and tensor-core instructions."""
    if figures is None:
        return "–"
    parts = [f"{figures.registers} r", f"{figures.shared / 1024:.0f} KB" if figures.shared >= 1024 else ""]
    parts += [f"{count} {name.partition('.')[0]}" for name, count in figures.tensor_core.items()]
    if figures.spills:
        parts.append(f"**{figures.spills} bytes spilled**")
    return ", ".join(filter(None, parts))


def main() -> int:
    """Compile everything and write the document; return 1 if a kernel spills registers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "kernels.md")
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES)
    options = parser.parse_args()
    header = ["operation", "programs", *(f"sm_{each} ({CAPABILITIES[each]})" for each in options.capabilities)]
    lines, spills = [header, ["---"] * len(header)], 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1"}
        for name, launch in launches(triton_kernels()):
            figures = compile_for_all(launch, options.capabilities)
            spills += sum(each.spills for each in figures if each is not None)
            lines.append([name, " × ".join(str(n) for n in launch.grid if n > 1), *map(cell, figures)])
            print(f"{name}: {'; '.join(map(cell, figures))}", flush=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = f"Triton {importlib.metadata.version('triton')}, torchpi's kernels of this revision"
    options.out.write_text(DOCUMENT.format(table=table, versions=versions), encoding="utf-8")
    print(f"{spills} bytes spilled; wrote {options.out}")
    return int(spills > 0)


if __name__ == "__main__":
    sys.exit(main())
