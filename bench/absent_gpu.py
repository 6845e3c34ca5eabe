"""A driver for Triton of a GPU that is not there: kernels are compiled for it, and a launcher of the user's takes over.

`triton.runtime.driver.set_active(AbsentGpu(Launcher))`, before kernels are launched and not in Triton's interpreter.
"""

import importlib
import os
import pkgutil
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_instance_loss import dispatch

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


class _Utils:
    """What Triton asks a driver about its device."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """An H100's."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills, and from Triton 3.4 on the most threads of a block."""
        return (1, 1, 32, 0, 1024)[: 4 if _VERSION < (3, 4) else 5]

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""


class AbsentGpu:
    """The driver. `device`, `stream` and `capability` (90 is sm_90, an H100's) may change between launches."""

    def __init__(self, launcher: type) -> None:
        self.utils, self.launcher_cls = _Utils(), launcher
        self.device, self.stream, self.capability = 0, 0, 90

    def get_current_device(self) -> int:
        """The current one."""
        return self.device

    def set_current_device(self, device: int) -> None:
        """Tensors are on the CPU."""

    def get_current_stream(self, device: int | None = None) -> int:
        """The current one."""
        return self.stream

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """What Triton would time with."""
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        """As it is."""
        return kind


def define_kernels() -> None:
    """Import our kernels, which the active driver is to compile; tensors on the CPU go to them from here on."""
    kernels = importlib.import_module("triton_instance_loss.kernels")
    for room in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{room.name}")
    os.environ[dispatch.BACKEND_VARIABLE] = "triton"
    # It is asked for on the CPU. That the kernels are compiled has been decided when they were defined.
    os.environ["TRITON_INTERPRET"] = "1"
