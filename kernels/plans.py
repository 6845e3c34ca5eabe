"""What a launcher does, written down: `Notes` are taken while it runs, and become a function that does the same again.

The function is Python, of one line for each allocation, operation of torch and launch, in their order:

    t2 = empty((2, 64, 10), dtype=c0, device=device); p2 = t2.data_ptr()
    c1(4, 2, 1, stream, c2, c3, None, None, None, p0, p1 + 4096, p2, 512)

Kernels are given addresses. So views that only they see are not made again, and small buffers that only they see are
cut from one allocation, `p`.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

# Buffers of at most so many bytes are cut from one allocation, which lives as long as the call. They begin where an
# allocation could: at multiples of 512.
SMALL, ALIGNMENT = 2**20, 512
# Like the launcher, but takes the tensors among its arguments, and the numbers that may change between calls.
Plan = Callable[[list[Tensor], tuple[int, ...]], Any]

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
)


class Call(NamedTuple):
    """An operation of torch."""

    operation: Any
    args: Any
    options: dict[str, Any]
    results: Any


class Launch(NamedTuple):
    """A launch of a kernel as it was compiled."""

    compiled: Any
    grid: tuple[int, ...]
    values: tuple[int, ...]  # in front of the arguments; others may take their place
    args: tuple[Any, ...]


class Notes(TorchDispatchMode):
    """Notes what a launcher does. All tensors are kept meanwhile, so that no memory is given out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Call | Launch] = []
        self.are_taken = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, and note that."""
        results = func(*args, **(kwargs or {}))
        if self.are_taken:
            self.taken.append(Call(func, args, kwargs or {}, results))
        return results

    def plan(self, given: list[Tensor], results: Any) -> Plan | None:
        """The plan of what was noted between what was `given` and the results; None if it hangs on data."""
        return _Writer(given, self.taken).plan(results)


class _Writer:
    """Writes a plan."""

    def __init__(self, given: list[Tensor], noted: list[Call | Launch]) -> None:
        self.given, self.noted = given, noted
        self.names = {id(tensor): f"{number}" for number, tensor in enumerate(given)}  # of tensors, by their id
        self.owners = {_memory(tensor): tensor for tensor in given}  # of memory, by its address: who came with it
        self.owners.pop(0, None)
        self.held: dict[int, set[str]] = {}  # names of tensors that hold memory
        self.offsets: dict[int, int] = {}  # of memory that is cut from one allocation
        self.cut = 0  # bytes that are
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {"empty": torch.empty, "driver": driver}

    def plan(self, results: Any) -> Plan | None:
        """The plan."""
        calls = [noted for noted in self.noted if isinstance(noted, Call)]
        numbers = itertools.count(len(self.given))
        views = set()
        for call in calls:
            made, taken = _tensors_in(call.results), _tensors_in((call.args, call.options))
            # What is no tensor comes from looking at data, and a tensor that nobody has made is a view in disguise.
            if not made or any(id(each) not in self.names and self._is_known(each) for each in taken):
                return None
            if call.operation is torch.ops.aten.detach.default and id(taken[0]) in self.names:
                self.names[id(made[0])] = self.names[id(taken[0])]  # which PyTorch makes of each allocation
                views.add(id(call))
            elif not call.operation._schema.is_mutable and all(map(self._is_known, made)):
                views.add(id(call))
            for tensor in made:
                self.names.setdefault(id(tensor), f"{next(numbers)}")
                if _memory(tensor):
                    self.owners.setdefault(_memory(tensor), tensor)

        # What is wanted as a tensor and not as an address, from the end: results, and what operations take that are
        # carried out. These are all that make something new, and views and allocations that are wanted.
        wanted = self._names_in(results)
        carried_out = set()
        for call in reversed(calls):
            is_new = id(call) not in views and call.operation not in _ALLOCATIONS
            if is_new or not wanted.isdisjoint(self._names_in(call.results) - self._names_in(call.args)):
                carried_out.add(id(call))
                wanted |= self._names_in((call.args, call.options))

        last: dict[int, int] = {}  # the line after which memory is not used any more
        for noted in self.noted:
            if isinstance(noted, Launch):
                self._launch(noted)
            elif noted.operation in _ALLOCATIONS:
                self._allocate(noted.results, id(noted) in carried_out)
            elif id(noted) in carried_out:
                self._call(noted)
            used = noted.args if isinstance(noted, Launch) else (noted.args, noted.options, noted.results)
            last.update((_memory(tensor), len(self.lines) - 1) for tensor in _tensors_in(used))
        kept = {_memory(tensor) for tensor in _tensors_in((self.given, results))}
        for memory, line in last.items():
            if memory in self.held and memory not in kept:
                self.lines[line] += "".join(f"; t{name} = None" for name in sorted(self.held[memory]))
        return self._compiled(results)

    def _compiled(self, results: Any) -> Plan:
        """The lines as a function."""
        device = next(tensor.device for tensor in _tensors_in((results, self.given)))
        first = [
            f"t{number}, p{number} = tensors[{number}], tensors[{number}].data_ptr()"
            for number in range(len(self.given))
        ]
        first.append(f"device = {self._constant(device)}")
        first.append("stream = driver.active.get_current_stream(driver.active.get_current_device())")
        if self.cut:
            first.append(f"t = empty({self.cut}, dtype={self._constant(torch.uint8)}, device=device); p = t.data_ptr()")
        lines = [*first, *self.lines, f"return {self._written(results)}"]
        exec("def plan(tensors, values):\n    " + "\n    ".join(lines), self.scope)
        plan: Plan = self.scope["plan"]
        return plan

    def _is_known(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self.owners

    def _names_in(self, nested: Any) -> set[str]:
        return {self.names[id(tensor)] for tensor in _tensors_in(nested) if id(tensor) in self.names}

    def _constant(self, value: Any) -> str:
        """The name of something that stays the same."""
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name

    def _written(self, value: Any) -> str:
        """A value as Python."""
        if id(value) in self.names:
            return f"t{self.names[id(value)]}"
        if type(value) in (tuple, list):
            inside = "".join(f"{self._written(each)}, " for each in value)
            return f"({inside})" if type(value) is tuple else f"[{inside}]"
        if type(value) in (int, bool, type(None)):
            return repr(value)
        return self._constant(value)

    def _address(self, tensor: Tensor) -> str:
        """Where a tensor begins."""
        memory = _memory(tensor)
        if memory == 0:
            return "0"
        if memory in self.offsets:
            return f"p + {self.offsets[memory] + tensor.data_ptr() - memory}"
        if memory in self.owners:
            owner = self.owners[memory]
            return f"p{self.names[id(owner)]} + {tensor.data_ptr() - owner.data_ptr()}"
        self._constant(tensor)  # which has to live on
        return repr(tensor.data_ptr())

    def _allocate(self, tensor: Tensor, is_wanted: bool) -> None:
        """A line for an allocation, or a piece of the one from which small ones are cut."""
        memory, name = _memory(tensor), self.names[id(tensor)]
        if not is_wanted and tensor.nbytes <= SMALL:
            self.offsets[memory] = self.cut
            self.cut += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return
        self.held.setdefault(memory, set()).add(name)
        what = f"empty({tuple(tensor.shape)}, dtype={self._constant(tensor.dtype)}, device=device)"
        self.lines.append(f"t{name} = {what}; p{name} = t{name}.data_ptr()")

    def _call(self, call: Call) -> None:
        """A line for an operation of torch."""
        options = "".join(f"{name}={self._written(value)}, " for name, value in call.options.items())
        made = [self.names[id(tensor)] for tensor in _tensors_in(call.results)]
        for tensor, name in zip(_tensors_in(call.results), made, strict=True):
            self.held.setdefault(_memory(tensor), set()).add(name)
        args = self._written(call.args)
        names = "".join(f"t{name}, " for name in made) if isinstance(call.results, (tuple, list)) else f"t{made[0]}"
        addresses = "".join(f"; p{name} = t{name}.data_ptr()" for name in made)
        self.lines.append(f"{names} = {self._constant(call.operation)}(*{args}, {options}){addresses}")

    def _launch(self, launch: Launch) -> None:
        """A line for a launch."""
        compiled, grid = launch.compiled, (*launch.grid, 1, 1)[:3]
        args = [self._address(arg) if isinstance(arg, Tensor) else self._written(arg) for arg in launch.args]
        if launch.values:
            args.insert(0, f"*(values or {launch.values})")
        run, *handles = map(self._constant, (compiled.run, compiled.function, compiled.packed_metadata))
        where = ", ".join((*map(str, grid), "stream", *handles, "None, None, None"))
        self.lines.append(f"{run}({where}, {', '.join(args)})")


def _memory(tensor: Tensor) -> int:
    """The address of the memory of a tensor, 0 for none."""
    return tensor.untyped_storage().data_ptr()


def _tensors_in(nested: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [tensor for each in nested for tensor in _tensors_in(each)] if isinstance(nested, (tuple, list)) else []
