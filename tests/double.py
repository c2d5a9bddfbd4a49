"""A test double of a CUDA device: tensors in host memory that claim the device `cuda:0`.

It counts what is done with them: operations on the device, copies between device and host with their bytes, places
where the host would wait for the device, and operations that mix tensors of both. It measures neither times nor memory.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::masked_select",
    "aten::equal", "aten::is_nonzero",
}  # fmt: skip
"""Operations whose result, or its shape, is needed on the host."""


class OnDevice(torch.Tensor):
    """A tensor on the double."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        pass

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)
    is_meta = property(lambda _: False)

    def tolist(self) -> Any:
        ACTIVE[-1].waits.append(("tolist", place()))
        return self.inner.tolist()

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (ACTIVE[-1] if ACTIVE else IDLE).run(func, args, kwargs or {})


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def place() -> str:
    """Return file and line of the innermost frame of the package."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "ndreamer_dist" in frame.filename:
            return f"{frame.filename.split('ndreamer_dist/')[-1]}:{frame.lineno}"
    return "?"


@dataclass
class Counts:
    """What a `Device` has counted.

    Attributes
    ----------
    operations, order
        Operations by name, and in order with the shapes and dtypes of their tensors.
    waits, mixed
        Waits for the device, and operations with tensors of both devices: what, and where in the package.
    copies
        Direction (`in` to the device or `out`), bytes, and place in the package of each copy.
    bytes
        Bytes read and written by operations.
    began, sizes
        For the caller's notes: where in `order` something began, and the sizes of its input.
    """

    operations: collections.Counter = field(default_factory=collections.Counter)
    order: list[tuple] = field(default_factory=list)
    waits: list[tuple[str, str]] = field(default_factory=list)
    mixed: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[str, int, str]] = field(default_factory=list)
    bytes: int = 0
    began: int = 0
    sizes: tuple[int, ...] = ()

    def copied(self, way: str) -> list[int]:
        """Return the bytes of each copy in one direction."""
        return [size for direction, size, _ in self.copies if direction == way]


class Device(Counts, TorchDispatchMode):
    """Counts while its context is entered."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Counts.__init__(self)

    def __enter__(self) -> Device:
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        ACTIVE.pop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode composite operations are not decomposed before
                return func.decompose(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        made_there = asked is not None and asked.type in ("cuda", "meta")
        if name == "aten::_to_copy":
            return self._copied(func, args, kwargs, asked)
        if not made_there and not any(isinstance(leaf, OnDevice) for leaf in leaves):
            return func(*args, **kwargs)
        self._note(name, args, kwargs, leaves)
        there = {**kwargs, "device": torch.device("cpu")} if made_there else kwargs
        out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, there))
        returns = func._schema.returns
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        if not views and "empty" not in name and name not in ("aten::_local_scalar_dense", "aten::is_same_size"):
            self._count(name, leaves, out)
        if name == "aten::_local_scalar_dense":
            return out
        written = [
            kwargs.get(argument.name, args[index] if index < len(args) else None)
            for index, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            return out if not returns else written[0] if len(returns) == 1 else tuple(written)
        return tree_map(lambda each: OnDevice(each) if isinstance(each, torch.Tensor) else each, out)

    def _copied(self, func: Any, args: Any, kwargs: Any, asked: torch.device | None) -> Any:
        source = args[0]
        target = type(source) is OnDevice if asked is None else asked.type in ("cuda", "meta")
        out = func(unwrapped(source), **{name: value for name, value in kwargs.items() if name != "device"})
        if isinstance(source, OnDevice) and not target:
            self.copies.append(("out", out.nbytes, place()))
            if not kwargs.get("non_blocking"):
                self.waits.append(("copy to the host", place()))
            return out
        if not target:
            return out
        if not isinstance(source, OnDevice):
            self.copies.append(("in", out.nbytes, place()))
            out = out.clone() if out.data_ptr() == source.data_ptr() else out
        self._count("aten::_to_copy", [source], out)
        return OnDevice(out)

    def _note(self, name: str, args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> None:
        """Record whether the host waits for an operation, and whether it mixes tensors of both devices."""
        if name in WAITS or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None and len(args) < 3):
            self.waits.append((name, place()))
        host = [leaf for leaf in leaves if not isinstance(leaf, OnDevice) and leaf.dim() > 0]
        if name == "aten::copy_":
            if not all(isinstance(leaf, OnDevice) for leaf in leaves):
                way = "out" if isinstance(args[1], OnDevice) else "in"
                self.copies.append((way, args[1].nbytes, place()))
                if way == "out" and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                    self.waits.append(("copy to the host", place()))
        elif name in ("aten::index", "aten::index_put_", "aten::index_put"):
            indices = [leaf for leaf in args[1] if leaf is not None]
            if any(leaf.dtype == torch.bool for leaf in indices):
                self.waits.append(("index by a mask", place()))
            self.mixed += [(name, place()) for leaf in indices if not isinstance(leaf, OnDevice)]
        elif host:
            self.mixed.append((name, place()))

    def _count(self, name: str, leaves: list[torch.Tensor], out: Any) -> None:
        outs = [unwrapped(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.operations[name] += 1
        seen = [*map(unwrapped, leaves), *outs]
        self.order.append((name, *((tuple(each.shape), each.dtype) for each in seen)))
        self.bytes += sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in seen)


ACTIVE: list[Device] = []
IDLE = Device()


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Make `device="cuda"` work without CUDA until the block ends."""
    before = torch.cuda._lazy_init, torch.as_tensor, torch.tensor
    torch.cuda._lazy_init = lambda: None
    torch.as_tensor, torch.tensor = map(_maker, before[1:])
    try:
        yield
    finally:
        torch.cuda._lazy_init, torch.as_tensor, torch.tensor = before


def _maker(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(data: Any, *words: Any, dtype: Any = None, device: Any = None, **named: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return real(data, *words, dtype=dtype, device=device, **named)
        if isinstance(data, OnDevice):
            return data if dtype in (None, data.dtype) else data.to(dtype)
        active = ACTIVE[-1] if ACTIVE else IDLE
        out = real(data, *words, dtype=dtype, **named)
        active.copies.append(("in", out.nbytes, place()))
        active.waits.append(("copy from pageable memory", place()))
        return OnDevice(out)

    return make


def moved(network: nn.Module) -> nn.Module:
    """Move a network's parameters and buffers to the double."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.data.clone()))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer.clone())
    return network
