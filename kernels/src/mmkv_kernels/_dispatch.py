"""Which implementation of an operator runs, and what torch.compile sees of it."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]
LARGEST_HEAD = 256  # a row of a tile is one head vector, padded to a power of two

P = ParamSpec("P")
R = TypeVar("R")


def takes_triton(impl: str, tensor: Tensor, *sizes: int) -> bool:
    """Whether the Triton kernels run on caches like `tensor` with these head sizes.

    "auto" takes them on GPUs where they can run; who asks for "triton" gets it, or an error that says why not.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    if impl == "reference" or (impl == "auto" and not tensor.is_cuda):
        return False
    error = _obstacle(tensor, sizes)
    if impl == "triton" and error is not None:
        raise error
    return error is None


def _obstacle(tensor: Tensor, sizes: tuple[int, ...]) -> Exception | None:
    """Why Triton cannot run here; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return ImportError("impl='triton' needs triton: pip install 'mmkv-kernels[triton]'")
    from triton import knobs

    if not tensor.is_cuda and not knobs.runtime.interpret:
        return ValueError(f"impl='triton' runs on GPUs (or under TRITON_INTERPRET=1), got {tensor.device}")
    if tensor.dtype == torch.float64:
        return ValueError("impl='triton' takes float32, bfloat16 and float16, got torch.float64")
    if not all(0 < size <= LARGEST_HEAD for size in sizes):
        return ValueError(f"impl='triton' takes head sizes from 1 to {LARGEST_HEAD}, got {sizes}")
    return None


def operator(fake: Callable[..., R], mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function one node of the graphs of torch.compile, `torch.ops.mmkv_kernels.<its name>`.

    `fake` gives tensors of the shapes and dtypes of its results; `mutates` names what it writes to. Without
    torch.compile the function is called as it is: dispatch would cost more than attention over a short cache.
    """

    def register(body: Callable[P, R]) -> Callable[P, R]:
        node = torch.library.custom_op(f"mmkv_kernels::{body.__name__}", body, mutates_args=mutates)
        node.register_fake(fake)

        @functools.wraps(body)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return node(*args, **kwargs) if torch.compiler.is_compiling() else body(*args, **kwargs)

        return call

    return register
