"""Where there is no CUDA device, kernels run in Triton's interpreter: asked for before the first import of Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
