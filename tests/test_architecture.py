"""The shape of the code: imports go down, files and functions stay small, the public names are what they are."""

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import sirius

SOURCE = Path(sirius.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}

LAYERS = [  # from the top down; a module imports from its own layer's package or from below
    {"__main__"},
    {"cli"},
    {"evaluation"},
    {"report", "trace"},
    {"demo", "benchmark"},
    {"jobs", "hf"},
    {"engine"},
    {"batch", "likelihood"},
    {"learnt"},
    {"decoding", "runtime", "text", "texts", "processors"},
    {"offload"},
    {"sparsity", "model"},
    {"kernels", "stats", "table"},
    {"forms", "settings"},
    {"core", "scoring", "shortage"},
    {"errors"},
]
APART = [  # these meet only in the batch
    ("decoding", "model"),
    ("decoding", "offload"),
    ("decoding", "runtime"),
    ("decoding", "sparsity"),
    ("sparsity", "model"),
]


def package(module: str) -> str:
    """Return the first part below sirius: sirius.runtime.cache -> runtime."""
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sirius."):
            names.add(package(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "sirius":
            names |= {alias.name for alias in node.names if alias.name != "__version__"}
    return names


def modules() -> list[Path]:
    return [path for path in FILES if path != SOURCE / "__init__.py"]


def rank(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports_of(path) - {own}:
        assert rank(name) > rank(own), f"{own} must not import {name}"
        assert (own, name) not in APART, f"{own} and {name} meet only in the batch"


def test_decoding_knows_no_model():
    for path in (SOURCE / "decoding").rglob("*.py"):
        assert "transformers" not in path.read_text()


def functions() -> list[ast.FunctionDef]:
    return [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def length(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_functions_are_short():
    lengths = sorted(length(f) for f in functions() if f.name != "generate" or "typer" not in ast.unparse(f))
    assert median(lengths) <= 10
    assert lengths[int(0.9 * len(lengths))] <= 30
    assert lengths[-1] <= 60


def test_files_are_short():
    lengths = [len(path.read_text().splitlines()) for path in FILES]
    assert median(lengths) <= 150
    assert max(lengths) <= 400


def test_public_functions_and_classes_say_what_they_are():
    for path, tree in TREES.items():
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_the_public_names_are_sorted_and_there():
    assert sirius.__all__ == sorted(sirius.__all__) == dir(sirius)
    assert all(getattr(sirius, name).__name__ == name for name in sirius.__all__)


def test_the_public_names_are_loaded_at_their_first_use():
    program = (
        "import sys, sirius; before = 'torch' in sys.modules; sirius.Engine; print(before, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_nothing_prints_but_the_command_line():
    for path, tree in TREES.items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not calls, f"{path} prints"
