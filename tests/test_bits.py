"""The bits of a result must not depend on where its arrays lie in memory.

Where the compiler cannot tell whether two arrays overlap, it writes a loop twice, with vector instructions and without,
and the addresses decide at run time; it may take arrays that are only close to each other for overlapping. The two
copies of a loop that adds up a number do so in different orders. So no loop may add up a number and also store.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MACHINE_CODE, STRUCTURES

pytestmark = MACHINE_CODE


def sums_that_depend_on_addresses(machine_code: str) -> list[str]:
    """Which vector loops of a function in LLVM's language carry a sum from turn to turn and store."""
    (body,) = re.findall(r"^define [^\n]*\bi32 @.*?^}", machine_code, re.M | re.S)[:1]
    blocks = re.split(r'^(?=[\w."$-]+:)', body, flags=re.M)
    loops = [block for block in blocks if "vector.body" in block.partition(":")[0] and " store " in block]
    return [name for block in loops for name in re.findall(r"%([\w.$-]+) = phi <[0-9]+ x double> ", block)]


def of_a_call(function: Any, *arguments: Any) -> str:
    """A function in LLVM's language, compiled as those of the package."""
    import numba

    code = numba.njit(fastmath={"reassoc", "contract"}, error_model="numpy")(function)
    code(*arguments)
    (machine_code,) = code.inspect_llvm().values()
    return str(machine_code)


def test_the_test_finds_such_a_loop() -> None:
    def both(values: Any, out: Any) -> float:
        total = 0.0
        for i in range(values.size):
            out[i] = 2.0 * values[i]
            total += values[i]
        return total

    def one_after_the_other(values: Any, out: Any) -> float:
        total = 0.0
        for i in range(values.size):
            out[i] = 2.0 * values[i]
        for i in range(values.size):
            total += values[i]
        return total

    for function, expected in ((both, True), (one_after_the_other, False)):
        machine_code = of_a_call(function, np.ones(9), np.ones(9))
        assert "vector.body" in machine_code
        assert bool(sums_that_depend_on_addresses(machine_code)) is expected


def test_no_sum_of_the_largest_loop_depends_on_addresses() -> None:
    from kbt_rl.inference.kernels.row_blocks import gather

    machine_code = of_a_call(gather.py_func, np.ones((5, 40)), np.ones(5), np.ones(40), np.ones(40), np.ones(5))
    assert "vector.body" in machine_code
    assert sums_that_depend_on_addresses(machine_code) == []


def compiled_afresh(
    structures: tuple[str, ...], layers: tuple[int, ...], outputs: tuple[int, ...], counts: tuple[int, ...], dtype: str
) -> None:
    """Compile what heads of these kinds use and print which of it there was, and each sum that depends on addresses."""
    import torch

    from kbt_rl import BayesianHead, HeadBatch, HeadConfig
    from kbt_rl.inference import kernels

    for structure in structures:
        for depth in layers:
            for o in outputs:
                heads = [
                    BayesianHead(4, o, HeadConfig(structure=structure, layers=depth, dtype=dtype)) for _ in range(3)
                ]
                head, batch = heads[0], HeadBatch(heads)
                for rows in counts:
                    head.update(torch.ones(rows, 4), torch.zeros(rows, o))
                    head.predict(torch.ones(rows, 4))
                    head(torch.ones(rows, 4))
                for together in (False, True):
                    batch.update(torch.ones(3, 4), torch.zeros(3, o), together=together)
                batch.predict(torch.ones(3, 4))
                batch(torch.ones(3, 4))
    for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, function in vars(importlib.import_module(info.name)).items():
            if getattr(function, "__module__", None) != info.name or not hasattr(function, "inspect_llvm"):
                continue
            for machine_code in function.inspect_llvm().values():
                print("compiled", info.name, name)
                for found in sums_that_depend_on_addresses(machine_code):
                    print("depends", info.name, name, found)


@pytest.mark.parametrize(
    "kinds",
    [
        (("neuron",), (2,), (1,), (1,), "float64"),
        pytest.param((STRUCTURES, (1, 2, 3), (1, 2), (1, 3), "float64"), marks=pytest.mark.nightly),
        pytest.param((STRUCTURES, (1, 2), (1, 2), (1, 3), "float32"), marks=pytest.mark.nightly),
    ],
    ids=["neuron, one output, one row", "all", "all in float32"],
)
def test_no_sum_depends_on_addresses(kinds: tuple[Any, ...], tmp_path: Path) -> None:
    code = f"from test_bits import compiled_afresh; compiled_afresh(*{kinds!r})"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("learn_neurons", "propagate", "predict"):
        assert any(line.startswith("compiled") and line.endswith(f" {name}") for line in lines)
    assert [line for line in lines if line.startswith("depends")] == []
