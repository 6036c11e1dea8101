"""Compiles the Triton kernels for a GPU, which takes Triton's own assembler and no GPU.

A program of its own, run by test_triton_compiles.py: a process in which Triton interprets kernels can compile none.
"""

from __future__ import annotations

import importlib
import json
import re

STEPS = ("triton_prox_sgd.prox_sgd", "triton_prox_adam.prox_adam")
GROUPED = ("triton_group_sgd.prox_sgd_groups", "triton_group_adam.prox_adam_groups")
PENALTIES = ("triton_penalty_kernels.penalty_value", "triton_penalty_kernels.penalty_gradient")
DTYPES = ("fp32", "bf16", "fp64")


def main() -> None:
    """Print a JSON object: of each kernel, for each dtype, how many loads of 16 bytes there are and whether code is."""
    from triton.language import dtype

    compiled = {}
    for kernel in (*STEPS, *GROUPED, *PENALTIES):
        module, name = kernel.split(".")
        function = getattr(importlib.import_module(f"torchreg.kernels.{module}"), name)
        compiled[kernel] = [
            _compiled(function, kernel, dtype(name), dtype("fp64" if name == "fp64" else "fp32")) for name in DTYPES
        ]
    print(json.dumps(compiled))


def _compiled(function, kernel, dtype, compute) -> tuple[int, bool]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"table": "*i64", "tensors": "i32", "pieces": "*i64", "count": "i32", **_types(kernel)}
    constants, warps = _constants(kernel)
    constants = {"DTYPE": dtype, "COMPUTE": compute, **constants}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    positions = {name: (i,) for i, name in enumerate(signature)}
    source = ASTSource(
        function,
        signature=signature,
        constexprs={positions[name]: value for name, value in constants.items()},
        attrs={positions[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"},
    )
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    wide = "v2.b64" if dtype.name == "fp64" else "v4.b32"
    return len(re.findall(rf"ld\.global\.{wide}", built.asm["ptx"])), len(built.asm["cubin"]) > 0


def _types(kernel: str) -> dict[str, str]:
    if kernel in PENALTIES:
        last = {"partials": "*fp64"} if kernel.endswith("value") else {"factor": "*fp32"}
        return {"strengths": "*fp64", **last}
    return {"begin": "i32", "hypers": "*fp64", "counts": "*fp64", "grad_scale": "*fp32", "found_inf": "*fp32"}


def _constants(kernel: str) -> tuple[dict[str, object], int]:
    """In the order of the kernel's arguments, and the number of warps."""
    from torchreg.kernels import triton_penalty, triton_step
    from torchreg.kernels.pieces import LONGEST

    if kernel in PENALTIES:
        tile = {"ALIGNED": True, "PIECE": triton_penalty.PIECE_SIZE, "BLOCK": triton_penalty._BLOCK}
        return tile | ({} if kernel.endswith("value") else {"ADDED": True}), triton_penalty._WARPS
    longest = 0 if kernel in STEPS else LONGEST if "sgd" in kernel else 1024
    tile = triton_step.tile(longest)
    warps = tile.pop("num_warps")
    return {"LARGEST": 3.4e38, "SCALED": True, "GUARDED": True, "ALIGNED": True, **tile}, warps


if __name__ == "__main__":
    main()
