"""Which instruction sets an install compiles."""

import sys
import types
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def hatch_build(monkeypatch):
    hook = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    monkeypatch.setattr(hook, "BuildHookInterface", object, raising=False)
    monkeypatch.setitem(sys.modules, hook.__name__, hook)
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return import_module("hatch_build")


@pytest.mark.parametrize("known", [True, False])
def test_tiles_are_compiled_where_the_compiler_knows_them(monkeypatch, tmp_path, hatch_build, known):
    commands: list[list[str]] = []

    def compiles(command: list[str]) -> None:
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(hatch_build, "run", compiles)
    monkeypatch.setattr(hatch_build, "assembles", lambda compiler, flags, instruction: known)
    monkeypatch.setattr(hatch_build.platform, "machine", lambda: "x86_64")
    hatch_build.build("c++", tmp_path, tmp_path / "kernels.so")
    sets = {word.removeprefix("-DSIRIUS_ISA=") for command in commands for word in command if "-DSIRIUS_ISA=" in word}
    assert sets == set(hatch_build.X86) - (set() if known else {"amx"})
    assert any("-DSIRIUS_AMX" in command for command in commands) == known


def test_a_compiler_is_asked_for_flags_that_no_compiler_has(hatch_build):
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := hatch_build.shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    assert hatch_build.assembles(compiler, ["-O1"], "nop")
    assert not hatch_build.assembles(compiler, ["-mno-such-instructions"], "nop")
    assert not hatch_build.assembles(compiler, ["-O1"], "no such instruction")
