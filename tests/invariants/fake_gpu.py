"""GPU of fake tensors, with shapes, dtypes and devices but no values. It records what would fail or wait on a real GPU.

A dispatch mode sees every operation. It records, with the project's line that calls the operation: operands on two
devices; values that the host waits for; tensors copied from host memory, which also wait and prevent the capture of a
CUDA graph; float64; generators of another device; and the dtypes of matmuls.

On "cuda" everything runs without autograd, which a build of PyTorch without CUDA cannot start there. "fakegpu" is the
device of a Python backend, on which autograd runs. Registering it changes PyTorch for the whole process, so use a
separate process. Tensors on the host are real.
"""

import contextlib
import dataclasses
import linecache
import pathlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import torchpi

PROJECT = str(pathlib.Path(torchpi.__file__).parent)

MIXED, READ, COPY = "operands on two devices", "value read on the host", "copy from the host"
FLOAT64, DTYPE, GENERATOR = "float64", "not in float32", "generator of another device"

aten = torch.ops.aten
_READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
_MATMULS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot}
_IN_FLOAT32 = {aten.rsqrt, aten.native_layer_norm, aten.sin, aten.cos, aten._softmax, aten._safe_softmax}
_CONVERSIONS = {Tensor.__bool__: bool, Tensor.__int__: int, Tensor.__float__: float}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Operation that is wrong on a GPU, and the project's line that calls it."""

    kind: str
    operation: str
    function: str
    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation} in {self.function}, {self.file}:{self.line}: {self.text}"


class MixedDevicesError(RuntimeError):
    """Operands on two devices, after which nothing can be computed."""


class GpuGenerator(torch.Generator):
    """Generator that claims to be on a device, because a build of PyTorch without that device has none."""

    def __new__(cls, device: str | torch.device) -> "GpuGenerator":
        made = super().__new__(cls)
        made.claimed = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.claimed


class Record:
    """Events on the device.

    Args:
        borders: functions of the project, by qualified name, that may read values on the host or copy from it, and
            the value that each reads. Masks that they index with count as True everywhere.
        other_files: further files that count as the project's.
    """

    def __init__(self, device: str, model: nn.Module, borders: Mapping[str, Any], other_files: tuple[str, ...]) -> None:
        self.device = torch.device(device, 0)
        self.borders = dict(borders)
        self.findings = dict[Finding, int]()
        """Number of occurrences of each finding."""
        self.border_crossings = Counter[str]()
        """Number of reads and copies by function, for the functions in `borders`."""
        self.matmuls: dict[str, set[torch.dtype]] = {}
        """Dtypes of the matmuls and attentions by the name of their module."""
        self.operations = 0
        self.in_attention = False
        self._files = (PROJECT, *other_files)
        self.name_modules(model)

    def name_modules(self, model: nn.Module) -> None:
        """Register the modules of a changed model."""
        self._modules = {id(module): name for name, module in model.named_modules()}

    def is_here(self, value: Any) -> bool:
        """True for a tensor, a device or a device's name on this device."""
        if isinstance(value, FakeTensor):
            return value.fake_device.type == self.device.type  # reading `device` would be recorded as an operation
        if isinstance(value, Tensor):
            return False
        return value is not None and torch.device(value).type == self.device.type

    def frames(self) -> Iterator[FrameType]:
        """Stack of the project's functions, innermost first."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.startswith(self._files):
                yield frame
            frame = frame.f_back

    def add(self, kind: str, operation: Any) -> Finding:
        """Record a finding, or a read at a border."""
        frame = next(self.frames(), None)
        if frame is None:
            finding = Finding(kind, str(operation), "", "", 0, "")
        else:
            path, line = frame.f_code.co_filename, frame.f_lineno
            name = path.removeprefix(PROJECT + "/") if path.startswith(PROJECT) else pathlib.Path(path).name
            text = linecache.getline(path, line).strip()
            function = frame.f_code.co_qualname.partition(".<locals>.")[0]
            finding = Finding(kind, str(operation), function, name, line, text)
        if kind in (READ, COPY) and finding.function in self.borders:
            self.border_crossings[finding.function] += 1
        else:
            self.findings[finding] = self.findings.get(finding, 0) + 1
        return finding

    def add_matmul(self, *operands: Tensor) -> None:
        """Record the dtypes of a matmul under the module that calls it."""
        for frame in self.frames():
            name = self._modules.get(id(frame.f_locals.get("self")))
            if name is not None:
                self.matmuls.setdefault(name, set()).update(operand.dtype for operand in operands)
                return


class _Operations(TorchDispatchMode):
    def __init__(self, record: Record, fake: FakeTensorMode) -> None:
        super().__init__()
        self.record, self.fake = record, fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, record, packet = kwargs or {}, self.record, func.overloadpacket
        if func.namespace == "prim":  # reads a tensor's device
            return func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [operand for operand in operands if record.is_here(operand)]
        if not here and not record.is_here(kwargs.get("device")):
            return func(*args, **kwargs)
        record.operations += 1
        if packet in _MATMULS and not record.in_attention:
            record.add_matmul(*operands)
        replaced, out = self._borders(func, packet, args, kwargs, operands, here)
        if not replaced:
            if here:
                out = func(*args, **kwargs)
            else:  # factory functions have no operand with the fake mode
                with self.fake:
                    out = func(*args, **kwargs)
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            if tensor.dtype in (torch.float64, torch.complex128):
                record.add(FLOAT64, func)
            elif packet in _IN_FLOAT32 and tensor.dtype is not torch.float32 and not record.in_attention:
                record.add(DTYPE, func)
        return out

    def _borders(self, func: Any, packet: Any, args: Any, kwargs: Any, operands: Any, here: Any) -> tuple[bool, Any]:
        """Record transfers between host and device. Returns True and the result if the operation can't be computed."""
        record = self.record
        if packet is aten._to_copy and "device" in kwargs:
            if record.is_here(kwargs["device"]) == bool(here):
                return False, None
            if here:
                record.add(READ, func)
                return True, torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            record.add(COPY, func)
            return True, self.empty(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if packet is aten.copy_:
            if len(here) == 1:
                record.add(READ if record.is_here(args[1]) else COPY, func)
                return True, args[0]
            return False, None
        if packet in _READS or (packet is aten.repeat_interleave and func._overloadname == "Tensor"):
            return True, self._read(func, packet, args)
        if packet in _INDEXING:
            return self._index(func, packet, args)
        large = [operand for operand in operands if operand.ndim and not record.is_here(operand)]
        if large:
            raise MixedDevicesError(str(record.add(MIXED, func)))
        if packet is aten.where and len(here) < len(operands):  # scalars become tensors on the device
            record.add(COPY, func)
        return False, None

    def _read(self, func: Any, packet: Any, args: Any) -> Any:
        finding = self.record.add(READ, func)
        if packet is aten._local_scalar_dense:
            value = self.record.borders.get(finding.function, 1)
            return bool(value) if args[0].dtype is torch.bool else value
        if packet is aten.nonzero:
            return self.empty((args[0].numel(), args[0].ndim), torch.int64)
        if packet in (aten.equal, aten.is_nonzero):
            return True
        raise NotImplementedError(finding)

    def _index(self, func: Any, packet: Any, args: Any) -> tuple[bool, Any]:
        tensor, indices = args[0], args[1]
        if any(index is not None and not self.record.is_here(index) for index in indices):
            self.record.add(COPY, func)
        masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return False, None
        self.record.add(READ, func)
        assert len(indices) == 1  # a mask over the first axes, with all elements True
        if packet in (aten.index, aten._unsafe_index):
            return True, tensor.flatten(0, masks[0].ndim - 1).clone()
        if args[2].numel() != 1:
            args[2].view(tensor.shape)
        return True, tensor

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        with self.fake:
            return torch.empty(shape, dtype=dtype, device=self.record.device)


class _Functions(TorchFunctionMode):
    """Replacements for functions that fail without the device, or whose operations don't show everything."""

    def __init__(self, record: Record, operations: _Operations) -> None:
        super().__init__()
        self.record, self.operations = record, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, record = dict(kwargs or {}), self.record
        if func in (torch.tensor, torch.as_tensor) and record.is_here(kwargs.get("device")):
            record.add(COPY, func.__name__)
            made = func(*args, **{**kwargs, "device": "cpu"})
            if made.dtype is torch.float64:
                record.add(FLOAT64, func.__name__)
            return self.operations.empty(made.shape, made.dtype)
        generator = kwargs.get("generator")
        if generator is not None:
            filled = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("tensor")
            if record.is_here(kwargs.get("device", filled)):
                if not record.is_here(generator.device):
                    record.add(GENERATOR, func.__name__)
                kwargs["generator"] = None
        if func is Tensor.__getitem__ and isinstance(args[1], list) and record.is_here(args[0]):
            record.add(COPY, "index")
            args = (args[0], self.operations.empty((len(args[1]),), torch.int64))
        is_indexing = func in (Tensor.__getitem__, Tensor.__setitem__) and record.is_here(args[0])
        if is_indexing and record.device.type == "cuda":
            if len(args) == 3 and isinstance(args[2], Tensor) and not record.is_here(args[2]):
                record.add(COPY, "copy_")
            return _indexed(*args)  # PyTorch would initialize the device, here and for reads
        if record.device.type == "cuda" and func is Tensor.__invert__:
            return aten.bitwise_not(*args)
        if func in _CONVERSIONS and record.is_here(args[0]):
            return _CONVERSIONS[func](aten._local_scalar_dense(args[0]))
        if func is F.scaled_dot_product_attention:
            # One kernel on a GPU, with the softmax in float32; on other devices PyTorch decomposes it.
            record.add_matmul(*args[:3])
            record.in_attention = True
            try:
                return func(*args, **kwargs)
            finally:
                record.in_attention = False
        return func(*args, **kwargs)


def _indexed(tensor: Tensor, key: Any, value: Any = None) -> Tensor:
    """`tensor[key]`, or with a value `tensor[key] = value`, with the operations that Python's indexing uses."""
    if isinstance(key, Tensor):
        return aten.index(tensor, [key]) if value is None else aten.index_put_(tensor, [key], value)
    keys, axis = list(key if isinstance(key, tuple) else (key,)), 0
    if Ellipsis in keys:
        index = keys.index(Ellipsis)
        missing = tensor.ndim - sum(one is not None for one in keys) + 1
        keys[index : index + 1] = [slice(None)] * missing
    for one in keys:
        if one is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(one, slice):
            tensor = aten.slice(tensor, axis, one.start, one.stop, one.step or 1)
        else:
            tensor = tensor.select(axis, one)
            continue
        axis += 1
    if value is None:
        return tensor
    return value.expand(tensor.shape) if isinstance(value, Tensor) else tensor.fill_(value)


@contextlib.contextmanager
def fake_gpu(
    device: str, model: nn.Module, *, borders: Mapping[str, Any] | None = None, other_files: tuple[str, ...] = ()
) -> Iterator[Record]:
    """Fake device for a model on "meta", whose parameters are moved to it; see `Record`."""
    record = Record(device, model, borders or {}, other_files)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        if device == "cuda":  # PyTorch would initialize it
            stack.enter_context(fake)
        operations = _Operations(record, fake)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    on_device = operations.empty(parameter.shape, parameter.dtype)
                    module._parameters[name] = nn.Parameter(on_device, requires_grad=parameter.requires_grad)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(operations)
        stack.enter_context(_Functions(record, operations))
        yield record


def on_device(record: Record, tensor: Tensor) -> bool:
    """True for a fake tensor on the device."""
    return isinstance(tensor, FakeTensor) and record.is_here(tensor)


def install_backend() -> None:
    """Register the device "fakegpu" in this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("fakegpu")
    torch.get_device_module("fakegpu").get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # for autocast
