"""Shapes: torch's FakeTensorMode with a short way for what an inner loop does over and over.

torch derives the result of each operation anew, or looks it up in a cache whose key takes longer than all the rest.
Here an operation whose inputs have been seen before, in shape, strides and dtype, gets its result from a smaller key,
and a view is taken of the storage at once. Whatever is not plain (operators that write, alias or read; complex or
sparse tensors; tensors whose values are known) goes torch's own way.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import _disable_current_modes

from bilevel_profiling.forecasting import kernels

_VIEW, _FRESH, _OTHER = range(3)
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_NONE = object()
_wait_tensor = torch.ops._c10d_functional.wait_tensor.default


# torch's mode is made to be entered, not wrapped: its `dispatch` is the one place where the mode itself is off.
class Shapes(FakeTensorMode):
    """Tensors made inside the block have no data. Tensors that exist already can be used in it."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}
        self.unseen: set[OpOverload] = set()
        """Operators that make more than was counted."""
        self.aside = 0
        """Above 0, tensors have data after all."""
        self._doubles: dict[int, tuple[weakref.ref[Tensor], Tensor, Tensor | None]] = {}

    def stand_in(self, tensor: Tensor) -> Tensor:
        """The tensor without data that takes the place of one that exists already: always the same one."""
        if self.aside:
            return tensor
        known = self._doubles.get(id(tensor))
        if known is None or known[0]() is not tensor:
            with _disable_current_modes():
                double = self.from_tensor(tensor)
                if not tensor.dim() and tensor.device.type == "cpu" and not tensor.requires_grad:
                    double.constant = tensor.clone()  # such as the step count of an optimizer, which it reads
                self._doubles[id(tensor)] = known = weakref.ref(tensor), double, tensor.grad if tensor.is_leaf else None
        return known[1]

    def restore(self) -> None:
        """Give the tensors that existed already their gradients back, in place of those without data."""
        for real, _, gradient in self._doubles.values():
            tensor = real()
            if tensor is not None and tensor.is_leaf and type(tensor.grad) is FakeTensor:
                tensor.grad = gradient
        self._doubles.clear()

    def dispatch(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        if func is _wait_tensor:
            return args[0]  # torch's rule of shapes makes another one
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds[func] = _kind(func)
        if torch.Tag.nondeterministic_seeded in func.tags:
            _draw(func, args, kwargs)
        if kind == _VIEW and _plain(args[0]):
            device = args[0].fake_device
            with in_kernel_invocation_manager(self):
                seen = func(*args, **kwargs)
            return (
                FakeTensor(self, seen, device)
                if isinstance(seen, Tensor)
                else [FakeTensor(self, part, device) for part in seen]
            )
        if func in kernels.STORAGE:
            return self._on_storage(super().dispatch(func, types, args, kwargs), kernels.STORAGE[func](args))
        if func in kernels.UNSEEN:
            self.unseen.add(func)
        key = _key(func, args, kwargs) if kind == _FRESH else None
        if key is None:
            return super().dispatch(func, types, args, kwargs)
        made = self._known.get(key)
        if made is None:
            output = super().dispatch(func, types, args, kwargs)
            self._known[key] = _described(output, args)
            return output
        if made is _NONE:
            return super().dispatch(func, types, args, kwargs)
        several, outputs = made
        with in_kernel_invocation_manager(self):
            bare = [
                None if out is None else torch.empty_strided(out[0], out[1], dtype=out[2], device="meta")
                for out in outputs
            ]
        tensors = [
            None if empty is None else FakeTensor(self, empty, out[3]) for empty, out in zip(bare, outputs, strict=True)
        ]
        return several(tensors) if several else tensors[0]

    def _on_storage(self, output: Any, size: int) -> Any:
        """The same tensor on a storage of at least `size` bytes."""
        if output.untyped_storage().nbytes() >= size:
            return output
        with in_kernel_invocation_manager(self):
            whole = torch.empty(-(-size // output.itemsize), dtype=output.dtype, device="meta")
            return FakeTensor(self, whole.as_strided(output.shape, output.stride()), output.fake_device)


_kinds: dict[OpOverload, int] = {}


def _kind(func: OpOverload) -> int:
    schema = func._schema
    if func.namespace != "aten" or schema.is_mutable or _READS & set(func.tags) or func._can_decompose():
        return _OTHER
    if func.is_view:
        return _VIEW if schema.arguments and str(schema.arguments[0].type) == "Tensor" else _OTHER
    aliased = any(argument.alias_info is not None for argument in (*schema.arguments, *schema.returns))
    return _OTHER if aliased else _FRESH


def _draw(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Move the real generator, as the operator would: whoever looks whether numbers were drawn is to see it."""
    schema = func._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    if given.get("dropout_p") == 0 or given.get("train", given.get("training")) is False:
        return
    device = next((leaf.fake_device for leaf in args if isinstance(leaf, FakeTensor)), given.get("device"))
    with _disable_current_modes():
        torch.rand(1, device=device or "cpu")


def _plain(tensor: Any) -> bool:
    """Whether a tensor is what it looks like: shape, strides and dtype, with no value, conjugation or negation to
    remember.
    """
    if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.layout is not torch.strided:
        return False
    return not (tensor.dtype.is_complex or tensor.is_neg())


def _key(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """All that shapes, strides and dtypes of the outputs can depend on; None for what is not plain."""
    found: list[Any] = [func, torch.get_default_dtype()]
    if not (
        _describe(args, found) and (not kwargs or _describe([part for item in kwargs.items() for part in item], found))
    ):
        return None
    return tuple(found)


def _describe(items: Sequence[Any], found: list[Any]) -> bool:
    for item in items:
        kind = type(item)
        if kind is FakeTensor:
            if not _plain(item):
                return False
            found += (item.shape, item.stride(), item.dtype, item.fake_device)
        elif kind is list or kind is tuple:
            found.append(len(item))
            if not _describe(item, found):
                return False
        elif kind in _PLAIN:
            found += (kind, item)
        else:
            return False
    return True


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}


def _described(output: Any, args: Sequence[Any]) -> Any:
    """How to make the same output again; `_NONE` if it lies on an input's storage, or is not made of plain tensors."""
    parts = [output] if isinstance(output, FakeTensor) else output
    if not isinstance(parts, (list, tuple)):
        return _NONE
    storages = {item.untyped_storage()._cdata for item in _tensors(args)}
    described: list[Any] = []
    for part in parts:
        if part is None:
            described.append(None)
            continue
        if (
            type(part) is not FakeTensor
            or part.constant is not None
            or part.layout is not torch.strided
            or part.storage_offset()
        ):
            return _NONE
        storage = part.untyped_storage()
        size = (
            sum((n - 1) * step for n, step in zip(part.shape, part.stride(), strict=True)) + 1 if part.numel() else 0
        ) * part.itemsize
        if storage._cdata in storages or storage.nbytes() != size:
            return _NONE
        storages.add(storage._cdata)
        described.append((part.shape, part.stride(), part.dtype, part.fake_device))
    # What the operator returns in torch's own way may be a named tuple; autograd takes a plain one as well.
    return (None if parts is not output else list if isinstance(output, list) else tuple), described


def _tensors(items: Sequence[Any]) -> list[Any]:
    found = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found += _tensors(item)
    return found
