"""The rooms of the house: imports only go down the list of the design, and the core needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import diffstride

SOURCE = Path(diffstride.__file__).parent
ROOMS = [
    "cli", "studies", "training", "plotting", "data", "models", "export", "convert", "cutoff", "cost", "program",
    "trace", "tracking", "nn", "functional", "backends", "geometry", "_caches", "_replay", "_check", "_files", "_text",
    "_version",
]  # fmt: skip


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "diffstride" and len(parts) > 1:
                yield "_version" if parts[1] == "__version__" else parts[1]


def test_imports_only_go_down():
    files = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    assert len(files) > 20
    for path in files:
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for other in imported_rooms(path):
            assert ROOMS.index(other) >= ROOMS.index(room), f"{path.name} in {room} imports {other}, which is above it"


def test_the_core_imports_nothing_but_torch():
    script = (
        "import sys, torch; before = set(sys.modules); import diffstride; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    heavy = {
        "lightning",
        "pytorch_lightning",
        "datasets",
        "kornia",
        "jsonargparse",
        "matplotlib",
        "rich",
        "PIL",
        "scipy",
        "librosa",
        "numba",
        "soundfile",
        "soxr",
    }
    assert not heavy & set(ast.literal_eval(out))


def test_importing_loads_neither_sympy_nor_the_compiler():
    """Each takes longer than the rest of the library; torch itself leaves them out until they are needed."""
    script = "import sys, diffstride; print(sorted({'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == []
