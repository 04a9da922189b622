"""The unit tests of the C++ kernels, run against a library that AddressSanitizer and UBSan watch."""

import os
import shutil
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

import sirius

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/unit/test_{name}.py" for name in ("cpu_kernels", "kernel_table", "quantized_kernels")]
FLAGS = "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-O1"
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # those of Python and PyTorch are not ours
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
}
RUN = """
import sys
from pathlib import Path
import pytest
from sirius.kernels import cpu
cpu.LIBRARY = Path(sys.argv[1])
assert cpu.library() is not None, "the library cannot be loaded"
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def found(compiler: str, name: str) -> str | None:
    """Return where a compiler has a library of its own, None where it has none."""
    asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = asked.stdout.strip()
    return path if os.path.isabs(path) else None


def built(compiler: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernels as an install does, with the sanitizers; hatchling itself is not needed for it."""
    hook = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    monkeypatch.setattr(hook, "BuildHookInterface", object, raising=False)
    monkeypatch.setitem(sys.modules, hook.__name__, hook)
    monkeypatch.syspath_prepend(ROOT)
    import_module("hatch_build").build(compiler, ROOT, library, FLAGS)


@pytest.mark.timeout(3600)
def test_the_kernels_touch_no_memory_but_theirs_and_nothing_undefined(monkeypatch, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sanitizers = found(compiler, "libasan.so"), found(compiler, "libubsan.so")
    if None in sanitizers:
        pytest.skip(f"{compiler} has no sanitizers")
    first = (
        sanitizers[0],
        found(compiler, "libstdc++.so"),
    )  # loaded before Python; without the second no C++ exception works
    library = tmp_path / "libsirius_cpu.so"
    built(compiler, library, monkeypatch)
    here = str(Path(sirius.__file__).parents[1])
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": here, "LD_PRELOAD": " ".join(filter(None, first))}
    command = [sys.executable, "-c", RUN, str(library), *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    report = [line for line in done.stderr.splitlines() if "runtime error" in line or "ERROR: AddressSanitizer" in line]
    assert done.returncode == 0 and not report, "\n".join([*report, done.stdout[-3000:], done.stderr[-6000:]])
