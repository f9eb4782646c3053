"""Gluon kernels without a GPU: their Python, run program by program on torch tensors.

Gluon has no interpreter. This stands in for what hopper.py uses of it. Layouts mean nothing here (that
they fit is what compiling shows); order does: copies and products that run beside the program take
effect either at once or as late as the kernel's waits allow, so that a buffer which is read before its
copy was waited for, or written while a product still reads it, gives a wrong result in one of the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Pointer:
    """Elements of a flat tensor."""

    def __init__(self, flat: Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, torch.as_tensor(offset)
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + more)

    def read(self, mask: Any, other: float) -> Tensor:
        place = self.offset.long()
        if mask is None:
            assert bool(((place >= 0) & (place < len(self.flat))).all()), "read outside the tensor"
            return self.flat[place]
        place, mask = torch.broadcast_tensors(place, torch.as_tensor(mask))
        inside = place[mask]
        assert bool(((inside >= 0) & (inside < len(self.flat))).all()), "read outside the tensor"
        found = torch.full(place.shape, other, dtype=self.flat.dtype)
        found[mask] = self.flat[inside]
        return found

    def write(self, value: Tensor, mask: Tensor) -> None:
        place, value, mask = torch.broadcast_tensors(self.offset.long(), value, mask)
        self.flat[place[mask]] = value[mask]


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, number: Any) -> Shared:
        return Shared(self.data[int(number)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Product:
    """A product that may be under way."""

    def __init__(self, a: Any, b: Shared, acc: Tensor) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.value: Tensor | None = None

    def run(self) -> None:
        if self.value is None:
            a = self.a.data if isinstance(self.a, Shared) else self.a
            self.value = self.acc + a.float() @ self.b.data.float()


class Machine:
    """One program's state. late: what may be under way is, until it is waited for."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.program: tuple[int, int] = (0, 0)
        self.programs: tuple[int, int] = (1, 1)
        self.warps = 4
        self.reset()

    def reset(self) -> None:
        self.copies: list[list[Callable[[], None]]] = [[]]
        self.products: list[Product] = []

    def copy(self, target: Shared, source: Pointer, mask: Any = None) -> None:
        place = source.offset

        def land() -> None:
            target.store(source.read(mask, 0.0).expand(place.shape))

        if self.late:
            self.copies[-1].append(land)
        else:
            land()

    def commit(self) -> None:
        self.copies.append([])

    def wait_copies(self, outstanding: int) -> None:
        done = max(0, len(self.copies) - 1 - outstanding)
        for land in itertools.chain.from_iterable(self.copies[:done]):
            land()
        del self.copies[:done]

    def product(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:  # fmt: skip
        made = Product(a, b, acc if use_acc else torch.zeros_like(acc))
        self.products.append(made)
        if not self.late or not is_async:
            self.wait_products(0)
        return made if is_async else made.value

    def wait_products(self, outstanding: int, deps: Any = ()) -> Any:
        """Those begun first end first."""
        done = max(0, len(self.products) - outstanding)
        for product in self.products[:done]:
            product.run()
        del self.products[:done]
        values = []
        for product in deps:
            assert product.value is not None, "a product is used that nobody waited for"
            values.append(product.value)
        return values[0] if len(values) == 1 else tuple(values)


def _language(machine: Machine) -> Any:
    def split(x: Tensor) -> tuple[Tensor, ...]:
        assert x.shape[-1] == 2
        return x.unbind(-1)

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    def nothing(*_: Any) -> None:
        return None

    def pair(function: Any) -> Any:
        return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))

    return SimpleNamespace(
        constexpr=None, int64=torch.int64, uint32=torch.int64, float32=torch.float32,
        num_warps=lambda: machine.warps,
        num_programs=lambda axis: torch.tensor(machine.programs[axis]),
        program_id=lambda axis: torch.tensor(machine.program[axis]),
        BlockedLayout=nothing, SliceLayout=nothing, NVMMADistributedLayout=nothing,
        NVMMASharedLayout=nothing, DotOperandLayout=nothing, convert_layout=same,
        max_contiguous=same, multiple_of=same,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            torch.full(shape, float("nan"), dtype=dtype)
        ),
        arange=lambda first, last, layout: torch.arange(first, last),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        load=lambda pointer, mask=None, other=0: pointer.read(mask, other),
        store=lambda pointer, value, mask: pointer.write(value, mask),
        where=lambda condition, a, b: torch.where(
            torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)
        ),
        maximum=pair(torch.maximum), minimum=pair(torch.minimum), exp2=torch.exp2,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        reshape=lambda x, shape: (
            Pointer(x.flat, x.offset.reshape(shape)) if isinstance(x, Pointer) else x.reshape(shape)
        ),
        permute=lambda x, order: x.permute(order), split=split, static_range=range,
    )  # fmt: skip


@contextmanager
def in_python(module: ModuleType, late: bool) -> Iterator[Callable[..., None]]:
    """Gives run(name, grid, *arguments, num_warps=4, **constants): a kernel of the module.

    Tensor arguments are pointers to contiguous tensors, which the kernel changes.
    """
    machine = Machine(late)
    kept = dict(vars(module))
    functions = {name: value.fn for name, value in kept.items() if hasattr(value, "fn")}
    replaced: dict[str, Any] = {
        "gl": _language(machine),
        "async_copy": SimpleNamespace(
            async_copy_global_to_shared=machine.copy,
            commit_group=machine.commit,
            wait_group=machine.wait_copies,
        ),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.wait_products,
    }

    def run(name: str, grid: tuple[int, int], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:  # fmt: skip
        machine.programs, machine.warps = grid, num_warps
        given = [
            Pointer(x.view(-1)) if isinstance(x, Tensor) else torch.tensor(x) for x in arguments
        ]
        for program in itertools.product(*map(range, grid)):
            machine.program = (program[0], program[1])
            machine.reset()
            functions[name](*given, **constants)
            assert not machine.products, "a product is under way at the end"
            assert not any(machine.copies), "a copy is under way at the end"

    try:
        vars(module).update(functions | replaced)
        yield run
    finally:
        vars(module).update(kept)
