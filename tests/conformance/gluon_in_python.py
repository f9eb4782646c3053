"""Gluon kernels without a GPU: their Python, run program by program on torch tensors.

Gluon has no interpreter. This stands in for what hopper.py and hopper_linear.py use of it. Layouts mean
nothing here (that they fit is what compiling shows); order does: copies and products that run beside
the program take effect either at once or as late as the kernel's waits allow, so that a buffer which is
read before its copy was waited for, or written while a product still reads it, gives a wrong result in
one of the two. Partitions of warps are threads; tensor copies land early where products are late, and
the other way round. Who waits for what never comes fails.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds that a partition waits for another


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

    layout = None

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, number: Any) -> Shared:
        return Shared(self.data[int(number)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def slice(self, first: int, length: int) -> Shared:
        return Shared(self.data[first : first + length])

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Beside:
        assert self.data.shape == (shape[0] * shape[1] // 64, 64)
        return Beside(self.data, shape[0])


class Beside:
    """Swizzled pieces of 64 columns that lie one behind the other, as the matrix that they are: to read."""

    def __init__(self, pieces: Tensor, rows: int, transposed: bool = False) -> None:
        self.pieces, self.rows, self.transposed = pieces, rows, transposed

    def permute(self, order: tuple[int, ...]) -> Beside:
        return Beside(self.pieces, self.rows, not self.transposed)

    @property
    def data(self) -> Tensor:
        whole = torch.cat(self.pieces.split(self.rows), 1)
        return whole.T if self.transposed else whole


class Boxes:
    """A matrix that is copied in boxes: what of one is outside reads as zero and is not written."""

    def __init__(self, matrix: Tensor, rows: int, columns: int) -> None:
        self.matrix, self.shape = matrix, (rows, columns)
        self.dtype, self.layout = matrix.dtype, None

    def _part(self, place: list[Any]) -> Tensor:
        row, column = map(int, place)
        assert row >= 0
        assert column >= 0
        return self.matrix[row : row + self.shape[0], column : column + self.shape[1]]

    def read(self, place: list[Any], target: Shared) -> None:
        part = self._part(place)
        assert target.data.shape == self.shape
        target.data.zero_()
        target.data[: part.shape[0], : part.shape[1]] = part

    def write(self, place: list[Any], source: Shared) -> None:
        part = self._part(place)
        part.copy_(source.data[: part.shape[0], : part.shape[1]])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * 2  # the kernels' elements have 16 bits


class Barrier:
    """A barrier in shared memory: phases follow each other as arrivals and bytes come."""

    def __init__(self, changed: threading.Condition) -> None:
        self.changed = changed
        self.count = self.left = self.bytes = self.phase = 0
        self.coming: list[Callable[[], int]] = []  # copies on their way; each gives its bytes

    def init(self, count: int) -> None:
        self.count = self.left = count

    def step(self, arrivals: int = 0, num_bytes: int = 0) -> None:
        self.left -= arrivals
        self.bytes += num_bytes
        assert self.left >= 0, "more arrivals than a phase has"
        if not self.left and not self.bytes:
            self.phase += 1
            self.left = self.count
        self.changed.notify_all()

    def land(self) -> None:
        while self.coming:
            self.step(num_bytes=-self.coming.pop(0)())

    def passed(self, parity: int) -> bool:
        return (self.phase - 1) % 2 == parity


class Barriers:
    def __init__(self, number: int, changed: threading.Condition) -> None:
        self.all = [Barrier(changed) for _ in range(number)]

    def index(self, number: Any) -> Barrier:
        return self.all[int(number)]


class Product:
    """A product that may be under way."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.value: Tensor | None = None

    def run(self) -> None:
        if self.value is None:
            a = self.a.data if isinstance(self.a, Shared) else self.a
            acc = (
                self.acc.value if isinstance(self.acc, Product) else self.acc
            )  # those before are done
            self.value = acc + a.float() @ self.b.data.float()


class Machine:
    """One program's state. late: what may be under way is, until it is waited for."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.program: tuple[int, ...] = (0, 0)
        self.programs: tuple[int, ...] = (1, 1)
        self.warps = 4
        self.reset()

    def reset(self) -> None:
        self.own = threading.local()
        self.changed = threading.Condition()
        self.failed: list[BaseException] = []

    def _kept(self, name: str, empty: Any) -> Any:
        """What a partition of warps has under way."""
        if not hasattr(self.own, name):
            setattr(self.own, name, empty)
        return getattr(self.own, name)

    @property
    def copies(self) -> list[list[Callable[[], None]]]:
        found: list[list[Callable[[], None]]] = self._kept("copies", [[]])
        return found

    @property
    def products(self) -> list[Product]:
        found: list[Product] = self._kept("products", [])
        return found

    @property
    def stores(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = self._kept("stores", [])
        return found

    def copy_box(self, source: Boxes, place: list[Any], ready: Barrier, target: Shared) -> None:
        def land() -> int:
            source.read(place, target)
            return source.num_bytes

        with self.changed:
            ready.coming.append(land)
            if self.late:
                ready.land()
            self.changed.notify_all()

    def store_box(self, target: Boxes, place: list[Any], source: Shared) -> None:
        self.stores.append(lambda: target.write(place, source))
        if not self.late:
            self.wait_stores(0)

    def wait_stores(self, outstanding: int) -> None:
        done = max(0, len(self.stores) - outstanding)
        for store in self.stores[:done]:
            store()
        del self.stores[:done]

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        with self.changed:
            barrier.step(arrivals=1, num_bytes=int(num_bytes))

    def arrive(self, barrier: Barrier, pred: Any = True) -> None:
        if pred:
            with self.changed:
                barrier.step(arrivals=1)

    def wait_barrier(self, barrier: Barrier, parity: Any) -> None:
        def done() -> bool:
            barrier.land()
            return bool(self.failed) or barrier.passed(int(parity))

        with self.changed:
            assert self.changed.wait_for(done, PATIENCE), "a wait for what never comes"
            assert not self.failed, "another partition failed"

    def partitions(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(parts) - 1 == len(warps) == len(registers)

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                torch.set_num_threads(1)
                function(*arguments)
                self.check_at_rest()
            except BaseException as error:  # noqa: BLE001 - raised below
                with self.changed:
                    self.failed.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]

    def check_at_rest(self) -> None:
        assert not self.products, "a product is under way at the end"
        assert not any(self.copies), "a copy is under way at the end"
        assert not self.stores, "a store is under way at the end"

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
        # One that is still under way stays what it is: good to add to, nothing to calculate with.
        values = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
        return values[0] if len(values) == 1 else tuple(values)


def _language(machine: Machine) -> Any:
    def split(x: Tensor) -> tuple[Tensor, ...]:
        assert x.shape[-1] == 2
        return x.unbind(-1)

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    def nothing(*_: Any) -> None:
        return None

    def shared(dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype is torch.int64:
            return Barriers(shape[0], machine.changed)
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

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
        allocate_shared_memory=shared, warp_specialize=machine.partitions,
        arange=lambda first, last, layout: torch.arange(first, last),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), zeros_like=torch.zeros_like,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        load=lambda pointer, mask=None, other=0: pointer.read(mask, other),
        store=lambda pointer, value, mask: pointer.write(value, mask),
        where=lambda condition, a, b: torch.where(
            torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)
        ),
        maximum=pair(torch.maximum), minimum=pair(torch.minimum), exp2=torch.exp2, log2=torch.log2,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        reshape=lambda x, shape: (
            Pointer(x.flat, x.offset.reshape(shape)) if isinstance(x, Pointer) else x.reshape(shape)
        ),
        permute=lambda x, order: x.permute(order), split=split, static_range=range,
    )  # fmt: skip


@contextmanager
def in_python(late: bool, *modules: ModuleType) -> Iterator[Callable[..., None]]:
    """Gives run(name, grid, *arguments, num_warps=4, **constants): a kernel of the modules.

    Tensor arguments are pointers to contiguous tensors, which the kernel changes; Boxes, descriptors.
    """
    machine = Machine(late)
    kept = [dict(vars(module)) for module in modules]
    functions = [
        {name: value.fn for name, value in names.items() if hasattr(value, "fn")} for names in kept
    ]
    replaced: dict[str, Any] = {
        "gl": _language(machine),
        "async_copy": SimpleNamespace(
            async_copy_global_to_shared=machine.copy,
            commit_group=machine.commit,
            wait_group=machine.wait_copies,
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=machine.copy_box,
            async_copy_shared_to_global=machine.store_box,
            store_wait=machine.wait_stores,
        ),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.init(count),
            expect=machine.expect,
            arrive=machine.arrive,
            wait=machine.wait_barrier,
        ),
        "fence_async_shared": lambda: None,
        "gdc_launch_dependents": lambda: None,
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.wait_products,
    }

    def given_as(x: Any) -> Any:
        if isinstance(x, Boxes):
            return x
        return Pointer(x.view(-1)) if isinstance(x, Tensor) else torch.tensor(x)

    def run(name: str, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:  # fmt: skip
        machine.programs, machine.warps = grid, num_warps
        given = [given_as(x) for x in arguments]
        kernel = next(own[name] for own in functions if name in own)
        for program in itertools.product(*map(range, grid)):
            machine.program = program
            machine.reset()
            kernel(*given, **constants)
            machine.check_at_rest()

    try:
        for module, own in zip(modules, functions, strict=True):
            vars(module).update(own | replaced)
        yield run
    finally:
        for module, names in zip(modules, kept, strict=True):
            for name in replaced:
                vars(module).pop(name, None)
            vars(module).update(names)
