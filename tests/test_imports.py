"""Imports go one way: down each list, and never from the library to the experiments. The library needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import diffstride

SOURCE = Path(diffstride.__file__).parent
LIBRARY = [
    "integrations", "export", "convert", "cost", "nn", "tracing", "functional", "_graph", "options", "backends",
    "geometry", "_validation", "_files", "_logging", "_text", "errors", "_version",
]  # fmt: skip
EXPERIMENTS = [
    "commands", "studies", "benchmark", "training", "models", "data", "figures", "history", "parser", "console",
    "provenance",
]  # fmt: skip
LAYERS = [*(f"experiments.{name}" for name in EXPERIMENTS), *LIBRARY]  # upper ones first
LARGEST_SHARE = 0.15  # of the code, in one package


def package(module):
    """The part of a dotted name below `diffstride` that the lists name."""
    parts = module.split(".")[1:]
    name = ".".join(parts[: 2 if parts[:1] == ["experiments"] else 1])
    return "_version" if name == "__version__" else name


def imported(path):
    """The modules of ours that a file imports when it runs, as dotted names; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if (SOURCE.parent / f"{name.replace('.', '/')}").with_suffix(".py").exists() else node.module
                if node.module == "diffstride" or node.module == "diffstride.experiments":
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        found = {m for m in imported(path) if m.startswith("diffstride.") and m != "diffstride.experiments"}
        yield name, path, found


def test_imports_only_go_down():
    checked = 0
    for name, _, found in modules():
        if name in ("diffstride", "diffstride.experiments"):
            continue
        own = LAYERS.index(package(name))
        for other in found:
            assert LAYERS.index(package(other)) >= own, f"{name} imports {other}, which is above it"
            checked += 1
    assert checked > 200


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other in found if other != name} for name, _, found in modules() if name != "diffstride"}
    graph = {name: {o for o in found if o in graph and not name.startswith(f"{o}.")} for name, found in graph.items()}
    done = set()

    def visit(name, above):
        assert name not in above, " imports ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_package_holds_too_much():
    lines = {}
    for name, path, _ in modules():
        lines[package(name)] = lines.get(package(name), 0) + len(path.read_text().splitlines())
    largest = max(lines, key=lines.get)
    assert lines[largest] <= LARGEST_SHARE * sum(lines.values()), f"{largest} has {lines[largest]} lines"


def test_private_parts_of_torch_are_imported_in_one_file():
    private = ("torch._dynamo", "torch._subclasses", "torch._dispatch", "torch._decomp", "torch.fx.experimental")
    for name, path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(n.startswith(private) for n in names):
                assert name == "diffstride.tracing._torch", f"{name} imports {names}"


def test_the_library_imports_nothing_but_torch():
    script = (
        "import sys, torch; before = set(sys.modules); import diffstride; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before if 'experiments' not in m}), "
        "'diffstride.experiments' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    names, experiments = out.rsplit(maxsplit=1)
    assert experiments == "False"
    assert not set(ast.literal_eval(names)) & {
        "lightning", "pytorch_lightning", "transformers", "datasets", "kornia", "jsonargparse", "matplotlib", "rich",
        "PIL", "scipy", "librosa", "numba", "soundfile", "soxr",
    }  # fmt: skip


def test_importing_loads_neither_sympy_nor_the_compiler():
    """Each takes longer than the rest of the library; torch itself leaves them out until they are needed."""
    script = "import sys, diffstride; print(sorted({'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == []
