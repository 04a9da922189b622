"""The GPU's kernels compile to machine code for GPUs that are not here, and their blocks fit into shared memory.

The interpreter takes what a compiler refuses, and knows no shared memory.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import slow
from sirius.kernels import gpu

pytest.importorskip("triton")
pytestmark = pytest.mark.integration

KERNELS = re.findall(r"^def (\w+_kernel)\(", Path(gpu.__file__).with_name("programs.py").read_text(), re.MULTILINE)
GPUS = {  # their target, and KiB of shared memory that one program can have
    "A100": ("cuda", 80, 32, 163),
    "RTX 4090, L4, L40": ("cuda", 89, 32, 99),
    "H100, H200": ("cuda", 90, 32, 227),
    "B200": ("cuda", 100, 32, 227),
    "RTX 5090": ("cuda", 120, 32, 99),
    "MI300": ("hip", "gfx942", 64, 64),
}
CASES = [(name, dtype) for name in GPUS for dtype in ("bfloat16", "float16", "float32")]
QUICK = ("RTX 4090, L4, L40", "bfloat16")  # the least memory of NVIDIA's


@pytest.mark.parametrize(("name", "dtype"), [case if case == QUICK else slow(*case) for case in CASES])
def test_the_kernels_compile_and_fit(name, dtype, tmp_path, monkeypatch):
    *target, memory = GPUS[name]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, str(Path(__file__).with_name("compiled.py")), *map(str, target), dtype]
    taken = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert {kernel.split()[0] for kernel in taken} == set(KERNELS)
    assert {kernel: size for kernel, size in taken.items() if size > memory * 1024} == {}
