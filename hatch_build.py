"""Compiles the CPU kernels when sirius is installed; without a compiler it installs all the same, without them."""

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/sirius/kernels/csrc")
LIBRARY = Path("src/sirius/kernels/libsirius_cpu.so")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast"]
GENERIC = {"generic": (4, [])}
X86 = {
    "generic": (4, ["-O2"]),  # for CPUs of before 2013; more takes twice as long to compile
    "avx2": (8, ["-march=x86-64-v3"]),
    "avx512": (16, ["-march=x86-64-v4", "-mavx512vnni"]),  # Skylake, which has no VNNI, takes avx2
    "avx512bf16": (16, ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"]),
    "amx": (16, ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]),  # newer compilers
    "emulated": (16, ["-march=x86-64-v3", "-DSIRIUS_EMULATED", "-Og"]),  # avx512bf16 by other instructions, for tests
}


class KernelBuild(BuildHookInterface):
    """The build hook that hatchling calls before it packs a wheel, an editable one too."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Compile, and make the wheel this platform's own where that worked."""
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        try:
            if compiler is None:
                raise OSError("there is no C++ compiler")
            build(compiler, Path(self.root))
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", "") or error
            self.app.display_warning(f"sirius is installed without its CPU kernels: {detail}")
            return
        build_data["artifacts"].append(LIBRARY.as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def build(compiler: str, root: Path, library: Path = LIBRARY, flags: Sequence[str] = ()) -> None:
    """Compile rows.cpp once for each instruction set, and link; raise CalledProcessError where that fails.

    The instruction set `amx` is left out where the compiler or its assembler does not know it.

    library  the file to write, relative to root unless it is absolute
    flags    further ones for every command, those that link too
    """
    sets = X86 if platform.machine().lower() in ("x86_64", "amd64") else GENERIC
    if "amx" in sets and not assembles(compiler, sets["amx"][1], "tilezero %tmm0"):
        sets = {name: each for name, each in sets.items() if name != "amx"}
    tiles = ["-DSIRIUS_AMX"] if "amx" in sets else []
    with TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        commands = [
            [f"-DSIRIUS_ISA={name}", f"-DSIRIUS_WIDTH={width}", *own, "-c", str(root / SOURCE / "rows.cpp")]
            for name, (width, own) in sets.items()
        ]
        commands.append([*tiles, "-c", str(root / SOURCE / "kernels.cpp")])
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(commands))]
        jobs = [[compiler, *FLAGS, *command, *flags, "-o", out] for command, out in zip(commands, objects, strict=True)]
        list(pool.map(run, jobs))
        linked = Path(folder) / library.name
        run([compiler, "-shared", "-fopenmp", *flags, *objects, "-o", str(linked)])
        shutil.move(linked, root / library)  # a running process keeps the one it has


def assembles(compiler: str, flags: Sequence[str], instruction: str) -> bool:
    """Tell whether a compiler takes such flags, and its assembler an instruction."""
    command = [compiler, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input=f'asm("{instruction}");', text=True, capture_output=True).returncode == 0


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
