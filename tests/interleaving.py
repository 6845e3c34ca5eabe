"""Programs of a kernel that run at once in Triton's interpreter, which by itself runs them one after the other.

Each program has a thread of its own, and one of them at a time goes on: at each access to memory a draw says which. An
access of several lanes is made in two steps, of lanes drawn at random, for nothing promises that the lanes of a program
move together. A seed gives the same run again, so that what goes wrong can be looked at.

This shows what depends on the order in which programs, and the lanes within an access, come to memory. It does not show
what a weaker order of memory than the one of a single processor could add.
"""

import inspect
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight of every kernel)
from triton.runtime import interpreter

AT_ONCE = 6  # programs that are under way together; the others wait, as on a device that is full
Place = tuple[int, int, int]


class _Program(threading.Thread):
    """One program of a launch, which waits for its turns."""

    def __init__(self, place: Place, run: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.place, self.turn, self._run_kernel = place, threading.Semaphore(0), run

    def run(self) -> None:
        self.turn.acquire()
        self._run_kernel()


class Interleaving:
    """Takes the place of the interpreter's order of programs between `begin` and `end`."""

    def __init__(self, patch: Any, seed: int) -> None:
        self._random, self._builder = np.random.default_rng(seed), interpreter.interpreter_builder
        self._under_way: list[_Program] = []
        self._now: _Program | None = None
        self.switches = 0
        executor = interpreter.GridExecutor

        def build(fn: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            built = executor(fn, *arguments, **options)
            built.fn = self._together(fn)
            return built

        patch.setattr(interpreter, "GridExecutor", build)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"):
            patch.setattr(self._builder, name, getattr(self, name)(getattr(self._builder, name)))

    def _together(self, kernel: Callable[..., None]) -> Callable[..., None]:
        """A stand-in that is called once a program, and lets them all run when the last one is known."""
        places: list[Place] = []

        def program(**arguments: Any) -> None:
            places.append(self._builder.grid_idx)
            if len(places) == math.prod(self._builder.grid_dim):
                self._run(places, lambda: kernel(**arguments))

        program.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
        return program

    def _run(self, places: list[Place], kernel: Callable[[], None]) -> None:
        errors: list[BaseException] = []
        finished = threading.Semaphore(0)
        waiting = [places[index] for index in self._random.permutation(len(places))]

        def run() -> None:
            program = self._now
            assert program is not None
            try:
                self._builder.set_grid_idx(*program.place)
                kernel()
            except BaseException as error:
                errors.append(error)
            self._under_way.remove(program)
            begin()
            self._now = self._next()
            (finished.release if self._now is None else self._now.turn.release)()

        def begin() -> None:
            while waiting and len(self._under_way) < AT_ONCE:
                program = _Program(waiting.pop(), run)
                self._under_way.append(program)
                program.start()

        begin()
        self._now = self._next()
        assert self._now is not None
        self._now.turn.release()
        finished.acquire()
        if errors:
            raise errors[0]

    def _next(self) -> _Program | None:
        return self._under_way[self._random.integers(len(self._under_way))] if self._under_way else None

    def _switch(self) -> None:
        """Let any program go on, perhaps the same."""
        mine, self._now = self._now, self._next()
        assert mine is not None
        assert self._now is not None
        if mine is self._now:
            return
        self.switches += 1
        self._now.turn.release()
        mine.turn.acquire()
        self._builder.set_grid_idx(*mine.place)

    def _steps(self, mask: Any) -> list[Any]:
        """The lanes of a mask, in one or two steps."""
        if mask.data.size < 2:
            return [mask]
        first = self._random.random(mask.data.shape) < self._random.random()
        return [interpreter.TensorHandle(mask.data & lanes, mask.dtype) for lanes in (first, ~first)]

    def create_masked_load(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def call(pointers: Any, mask: Any, *rest: Any) -> Any:
            return self._in_steps(mask, lambda lanes: load(pointers, lanes, *rest))

        return call

    def create_masked_store(self, store: Callable[..., Any]) -> Callable[..., Any]:
        def call(pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
            self._in_steps(mask, lambda lanes: store(pointers, value, lanes, *rest))

        return call

    def create_atomic_rmw(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return self._in_steps(mask, lambda lanes: change(kind, pointers, value, lanes, *rest))

        return call

    def create_atomic_cas(self, swap: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._switch()
            return swap(*arguments)

        return call

    def _in_steps(self, mask: Any, access: Callable[[Any], Any]) -> Any:
        """What an access gives, if anything, lane by lane from the step the lane was in."""
        result = None
        for lanes in self._steps(mask):
            self._switch()
            given = access(lanes)
            if result is None:
                result = given
            else:
                result.data = np.where(lanes.data, given.data, result.data)
        return result
