"""Checks of arguments, shared by all operators: wrong shapes raise ValueError, wrong dtypes TypeError."""

from collections.abc import MutableMapping
from itertools import pairwise
from typing import get_args

from torch import Tensor, bfloat16, bool, device, dtype, float16, float32, float64, int64, promote_types
from torch.utils.weak import WeakTensorKeyDictionary

_FETCHED: MutableMapping[Tensor, tuple[int, list[int]]] = WeakTensorKeyDictionary()  # see `_on_host`
FLOATS = (float32, bfloat16, float16, float64)


class Dims(dict[str, int]):
    """Sizes by name, bound by the first tensor that has them and required of all later ones, and their one device."""

    first: tuple[str, device] | None = None

    def bind(self, name: str, tensor: Tensor, spec: str) -> None:
        """Binds or compares the sizes of `tensor`, one letter code per dimension; `1|H` also allows size 1."""
        self.beside(name, tensor)
        codes = spec.split()
        if tensor.dim() != len(codes):
            raise ValueError(f"{name} must be [{', '.join(codes)}], got shape {list(tensor.shape)}")
        for code, size in zip(codes, tensor.shape, strict=True):
            if size == 1 and code.startswith("1|"):
                continue
            if self.setdefault(code.removeprefix("1|"), size) != size:
                known = {key: self[key] for key in map(_bare, codes) if key in self}
                raise ValueError(f"{name} must be [{', '.join(codes)}] with {known}, got shape {list(tensor.shape)}")

    def beside(self, name: str, tensor: Tensor) -> None:
        """Requires `tensor` to be on the device of the first one."""
        if self.first is None:
            self.first = name, tensor.device
        elif tensor.device != self.first[1]:
            raise ValueError(f"{name} must be on the device of {self.first[0]}, {self.first[1]}, got {tensor.device}")

    def flags(self, name: str, tensor: Tensor | None, spec: str) -> None:
        """Binds an optional bool tensor."""
        if tensor is None:
            return
        if tensor.dtype != bool:
            raise TypeError(f"{name} must be bool, got {tensor.dtype}")
        self.bind(name, tensor, spec)

    def grouped(self) -> None:
        """Requires the query heads Hq to be a multiple, once or more, of the KV heads H."""
        if self["H"] == 0 or self["Hq"] == 0 or self["Hq"] % self["H"]:
            raise ValueError(f"query heads must be a multiple of KV heads, got Hq={self['Hq']} and H={self['H']}")


def floats(**tensors: Tensor) -> None:
    """Requires one floating dtype that attention is stored in."""
    (first_name, first), *others = tensors.items()
    if first.dtype not in FLOATS:
        raise TypeError(f"{first_name} must be float32, bfloat16, float16 or float64, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")


def singles(**tensors: Tensor) -> None:
    """Requires float32."""
    for name, tensor in tensors.items():
        if tensor.dtype != float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")


def one_of(name: str, value: object, choices: object) -> None:
    """Requires a value of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


def integers(name: str, tensor: Tensor) -> None:
    """Requires int64."""
    if tensor.dtype != int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}")


def wide(stored: dtype) -> dtype:
    """What attention over values stored as `stored` is computed in: float32, or float64 for float64."""
    return promote_types(stored, float32)


def positive_softcap(softcap: float | None) -> None:
    """Requires a soft cap above zero, where there is one."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")


def segment_lengths(name: str, cu_seqlens: Tensor, segments: int, total: int) -> list[int]:
    """Lengths of the segments on the host; `cu_seqlens` must be int64 [segments + 1], rising from 0 to `total`."""
    integers(name, cu_seqlens)
    if cu_seqlens.shape != (segments + 1,):
        raise ValueError(f"{name} must be [B * H + 1] = [{segments + 1}], got shape {list(cu_seqlens.shape)}")
    bounds = _on_host(cu_seqlens)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must rise from 0 to {total}, got {bounds}")
    return lengths


def _on_host(tensor: Tensor) -> list[int]:
    """Values of a tensor; those on a GPU are fetched once, as it waits for all work queued there before."""
    if tensor.is_cpu or tensor.is_inference():  # inference tensors do not say whether they were written since
        values: list[int] = tensor.tolist()
        return values
    known = _FETCHED.get(tensor)
    if known is None or known[0] != tensor._version:
        known = _FETCHED[tensor] = tensor._version, tensor.tolist()
    return known[1]


def _bare(code: str) -> str:
    return code.removeprefix("1|")
