"""Compiles every Triton kernel for GPUs that need not be here, and says what it takes of them.

    python compile_kernels.py [page.md]

Operators are called on CPU tensors with a driver that compiles for one target after the other and launches nothing, so
what is compiled is what they would launch. Prints JSON, one record per kernel; with a path, takes more sizes of heads
and writes a page.
"""

import importlib
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import triton
from mmkv_kernels.ragged.reference import Tail
from triton import knobs
from triton.backends.compiler import GPUTarget

KIB = 1024
TARGETS = {  # shared memory a block may use, as the vendors document it
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
DTYPES = torch.bfloat16, torch.float32
SIZES = 64, 72, 128, 256
TESTED = *((target, 128) for target in TARGETS), ("sm_90", 72)  # loads of 72 have 16 bytes only if told they can


class Driver:
    """A driver that has all targets as devices, and none to launch on."""

    def __init__(self):
        self.device = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": list(TARGETS.values())[device][1]},
            load_binary=lambda *binary: (0, 0, 0, 0, KIB),
            unload_module=lambda module: None,
        )

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return list(TARGETS.values())[self.device][0]

    def launcher_cls(self, source, metadata):
        return lambda *launch: None


def call_statistics(size, dtype):
    keys = torch.zeros(1, 2, 64, size, dtype=dtype)
    operator("statistics")(keys, keys, torch.ones(1, 1, 64, dtype=torch.bool))


def call_gather(size, dtype):
    tail, kept = torch.zeros(1, 2, 64, size, dtype=dtype), torch.zeros(64, size, dtype=dtype)
    cu_seqlens = torch.tensor([0, 32, 64])
    operator("gather")(tail, tail, torch.zeros(64, dtype=torch.int64), cu_seqlens, None)
    operator("gather")(tail, tail, torch.zeros(64, dtype=torch.int64), cu_seqlens, (kept, kept, cu_seqlens))


def call_window(size, dtype):
    queries, keys = torch.zeros(1, 14, 32, size, dtype=dtype), torch.zeros(1, 2, 64, size, dtype=dtype)
    valid, mask = torch.ones(1, 1, 64, dtype=torch.bool), torch.ones(1, 1, 32, 64, dtype=torch.bool)
    operator("window")(queries, keys, 0.1, valid, None, None, "mean")
    operator("window")(queries, keys, 0.1, valid, mask, 30.0, "mean")
    operator("window")(queries, keys, 0.1, valid, mask, 30.0, "max")


def call_ragged(size, dtype):
    tail, kept = torch.zeros(1, 2, 8, size, dtype=dtype), torch.zeros(64, size, dtype=dtype)
    for rows, softcap in ((1, None), (8, 30.0)):
        queries = torch.zeros(1, 14, rows, size, dtype=dtype)
        prefix_mask = None if softcap is None else torch.ones(rows, 64, dtype=torch.bool)
        tail_mask = None if softcap is None else torch.ones(1, 1, rows, 8, dtype=torch.bool)
        parts = kept, kept, torch.tensor([0, 32, 64]), prefix_mask, Tail(tail, tail, tail_mask)
        operator("ragged")(queries, *parts, 0.1, softcap, True)


def call_topk(size, dtype):
    scores, mask = torch.zeros(1, 2, 64, dtype=dtype), torch.ones(1, 1, 64, dtype=torch.bool)
    operator("topk")(scores, torch.zeros(1, 2, dtype=torch.int64), None, None)
    operator("topk")(scores, torch.zeros(1, dtype=torch.int64), mask, mask)


def call_bacon(size, dtype):
    x, mask, sizes = torch.zeros(1, 2, 64), torch.ones(1, 1, 64, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    operator("bacon")(x, x, x, mask, sizes, "elt", 2, "padded", 0.5, True)
    operator("bacon")(x, x, x, mask, sizes, "elt", 2, "supported", 0.5, False)


def call_mixkv(size, dtype):
    x, head = torch.zeros(1, 2, 64), torch.zeros(1, 2)
    operator("mixkv")(x, x, x, head, head, torch.ones(1, 1, 64, dtype=torch.bool))


def call_paged(size, dtype):
    cache = torch.zeros(4, 16, 2, size, dtype=dtype)
    table, bounds = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0, 32, 64])
    for align in ("left", "right"):
        operator("paged")(cache, cache, table, torch.tensor([64]), torch.zeros(64).long(), bounds, align)


CALLS = {
    "statistics": call_statistics,
    "gather": call_gather,
    "window": call_window,
    "ragged": call_ragged,
    "paged": call_paged,
    "topk": call_topk,
    "bacon": call_bacon,
    "mixkv": call_mixkv,
}
OF_SCORES = {"topk", "bacon", "mixkv"}  # the size of a head says nothing to these: they are compiled once


def operator(folder):
    """The host function of an operator's Triton module."""
    module = importlib.import_module(f"mmkv_kernels.{folder}.triton")
    return next(value for name, value in vars(module).items() if name.endswith("_triton"))


def kernels(folder, device):
    """Kernels of an operator compiled for a device so far, by name."""
    functions = vars(importlib.import_module(f"mmkv_kernels.{folder}.triton")).values()
    for function in functions:
        if isinstance(function, triton.JITFunction) and device in function.device_caches:
            yield from function.device_caches[device][0].values()
            function.device_caches.clear()


def usage(kernel):
    """Registers of a thread, bytes it spills, and bytes of shared memory of a block."""
    if "amdgcn" in kernel.asm:
        count = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
        spilled = 4 * count["vgpr_spill_count"]  # scalar registers are spilled to vector registers, not to memory
        return {"registers": count["vgpr_count"], "spilled": spilled, "shared": kernel.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    spilled = count["STACK"] + count["LOCAL"]  # where registers are spilled to
    return {"registers": count["REG"], "spilled": spilled, "shared": kernel.metadata.shared}


def compile_all(cases):
    """One record for every kernel and dtype, of targets and head sizes."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # no kernel runs, and hosts read what they would have written
    for (target, size), (folder, call), dtype in itertools.product(cases, CALLS.items(), DTYPES):
        driver.device = list(TARGETS).index(target)
        if folder in OF_SCORES and (size, dtype) != (128, torch.float32):
            continue
        call(size, dtype)
        for kernel in kernels(folder, driver.device):
            case = {"kernel": kernel.metadata.name, "target": target, "head_size": size, "dtype": str(dtype)[6:]}
            yield {**case, "warps": kernel.metadata.num_warps, **usage(kernel)}


def page(records):
    """The records as a Markdown page."""
    columns = list(records[0])
    rows = [columns, ["---"] * len(columns), *(record.values() for record in records)]
    spills = sum(record["spilled"] > 0 for record in records)
    return (
        "# What the Triton kernels take of a GPU\n\n"
        f"Compiled with triton {triton.__version__} for {', '.join(TARGETS)}, without a GPU. "
        f"Speed is not measured here. {spills} of {len(records)} spill.\n\n"
        "    python kernels/tests/compile_kernels.py benchmarks/results/kernels-compile.md\n\n"
        "A kernel has a line for each of its variants: without masks, and with masks and a soft cap, joined by mean "
        "and by maximum.\nRegisters per thread; spilled: bytes per thread; shared: bytes per block.\n\n"
        + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
    )


if __name__ == "__main__":
    records = list(compile_all(itertools.product(TARGETS, SIZES) if sys.argv[1:] else TESTED))
    print(json.dumps(records))
    if sys.argv[1:]:
        pathlib.Path(sys.argv[1]).write_text(page(records))
