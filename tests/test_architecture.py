"""The rules of docs/design.md that a machine can check, read from the source text without importing it."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = "kernels_pallas"

MAY_IMPORT: dict[str, set[str]] = {
    KERNELS: set(),
    "config": set(),
    "sharding": {"config"},
    "shapes": {"config"},
    "models": {"config", "shapes", "sharding", KERNELS},
    "data": {"config", "sharding"},
    "checkpoint": {"config", "sharding"},
    "hardware": {"config"},
    "observe": {"config", "hardware", "shapes"},
    "training": {"config", "sharding", "models", "checkpoint", "observe", "processes", "compile_cache"},
    "plan": {"config", "hardware", "shapes", "sharding", "models", "training", "observe"},
    "inference": {"config", "sharding", "models", "checkpoint", "data"},
    "evaluation": {"config", "sharding", "models", "data", "training", "inference"},
    "recipes": {
        "config",
        "sharding",
        "data",
        "training",
        "inference",
        "evaluation",
        "observe",
        "processes",
    },
    "processes": {"config"},
    "compile_cache": set(),
}
"""Room -> the rooms it may import. The table of docs/design.md."""

COMMANDS = {
    f"maxlm/{name}.py"
    for name in ("train", "generate", "evaluate", "inspect", "launch", "data/__main__", "plan/__main__")
}
"""They may import anything, and do so inside functions, after the command line is understood."""

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "torch.load", "os.system", "os.popen", "jnp.load"}


class Import(NamedTuple):
    """One `import` of a module of this repository."""

    file: str
    line: int
    module: str
    in_function: bool
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def product() -> list[str]:
    """Every Python file of the two packages, relative to the root."""
    files = [*(ROOT / "maxlm").rglob("*.py"), *(ROOT / KERNELS).rglob("*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in files)


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), file)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(module: str) -> str:
    """`maxlm.models.ops` -> `models`; everything in kernels_pallas is one room."""
    parts = module.split(".")
    return KERNELS if parts[0] == KERNELS else parts[1] if len(parts) > 1 else "maxlm"


def imported_names(node: ast.AST) -> Iterator[str]:
    """Modules that an import statement may load, as dotted names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are written in full, not relative"
        assert node.module is not None
        known = {module_name(file) for file in product()}
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        submodules = [name for name in inner if name in known]
        yield from submodules
        if len(submodules) < len(inner):
            yield node.module


@functools.cache
def own_imports() -> tuple[Import, ...]:
    found: list[Import] = []

    def visit(file: str, node: ast.AST, in_function: bool, for_types_only: bool) -> None:
        for name in imported_names(node):
            if name.split(".")[0] in ("maxlm", KERNELS):
                found.append(Import(file, getattr(node, "lineno", 0), name, in_function, for_types_only))
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types_only |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            visit(file, child, in_function, for_types_only)

    for file in product():
        visit(file, tree(file), False, False)
    return tuple(found)


def test_the_reader_of_imports_sees_them() -> None:
    """Guards the other tests: a walk that finds nothing would pass them all."""
    assert len(own_imports()) > 150
    assert any(i.in_function for i in own_imports())
    assert ("maxlm/sharding.py", "maxlm.config") in {(i.file, i.module) for i in own_imports()}


def test_every_room_is_in_the_table() -> None:
    rooms = {room(module_name(file)) for file in product() if file not in COMMANDS | {"maxlm/__init__.py"}}
    assert rooms == set(MAY_IMPORT)


def test_the_table_itself_has_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


def test_imports_go_down_the_table() -> None:
    wrong = [
        str(found)
        for found in own_imports()
        if found.file not in COMMANDS
        and room(found.module) not in {room(module_name(found.file))} | MAY_IMPORT[room(module_name(found.file))]
    ]
    assert not wrong


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module_name(file): set() for file in product()}
    for found in own_imports():
        if not (found.in_function or found.for_types_only):
            graph[module_name(found.file)].add(found.module)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError and names the circle


def test_only_commands_import_inside_functions() -> None:
    assert not [str(found) for found in own_imports() if found.in_function and found.file not in COMMANDS]


def test_only_ops_imports_the_kernels() -> None:
    importers = {found.file for found in own_imports() if room(found.module) == KERNELS and "maxlm/" in found.file}
    assert importers and all(file.startswith("maxlm/models/ops/") for file in importers)


def outside_imports(files: list[str]) -> dict[str, set[str]]:
    """Package outside this repository and the standard library -> the files that import it."""
    found: dict[str, set[str]] = {}
    for file in files:
        for node in ast.walk(tree(file)):
            for name in imported_names(node):
                package = name.split(".")[0]
                if package not in sys.stdlib_module_names | {"maxlm", KERNELS}:
                    found.setdefault(package, set()).add(file)
    return found


def test_the_config_needs_no_numeric_library() -> None:
    files = [file for file in product() if file.startswith("maxlm/config/")]
    assert set(outside_imports(files)) == {"tyro", "cattrs"}


def test_the_kernels_need_jax_alone() -> None:
    files = [file for file in product() if file.startswith(KERNELS)]
    assert set(outside_imports(files)) <= {"jax", "numpy"}


def requirements(name: str) -> set[str]:
    """The packages in a list of setup.py."""
    for node in tree("setup.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            words = [leaf.value for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)]
            return {re.split(r"[>=<\[]", str(word))[0] for word in words}
    raise AssertionError(f"setup.py has no list {name}")


def test_setup_names_what_is_imported() -> None:
    """A missing requirement breaks a fresh installation; a superfluous one is downloaded for nothing."""
    imported = {"orbax-checkpoint" if name == "orbax" else name for name in outside_imports(product())}
    optional = requirements("HUB") | requirements("VIZ") | {"wandb"}  # wandb: who logs to it installs it
    assert imported - optional == requirements("REQUIRED")
    assert imported >= optional


@pytest.mark.parametrize("file", product())
def test_nothing_loads_or_runs_code_from_data(file: str) -> None:
    for node in ast.walk(tree(file)):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        for name in imported_names(node):
            assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{where} imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in FORBIDDEN_CALLS, f"{where} calls {called}"
            assert keywords.get("shell", "False") == "False", f"{where} runs a shell"
            assert keywords.get("allow_pickle", "False") == "False", f"{where} unpickles"
            if called in ("np.load", "numpy.load"):
                assert "allow_pickle" in keywords, f"{where} must say allow_pickle=False"


@pytest.mark.parametrize("file", product())
def test_a_file_says_what_it_is_and_reads_in_one_sitting(file: str) -> None:
    text = (ROOT / file).read_text()
    assert ast.get_docstring(tree(file)), f"{file} has no docstring"
    assert text.count("\n") <= 500


def test_readme_names_every_file():
    """The tree in the README has each file of the product; families of configs may be named by a pattern."""
    tree = (ROOT / "README.md").read_text().split("    maxlm/\n", 1)[1]
    words = set(tree.replace("/", " ").split())
    names = {path.name for room in ("maxlm", "kernels_pallas", "benchmarks") for path in (ROOT / room).rglob("*.py")}
    assert not {name for name in names - {"__init__.py"} if name.removesuffix(",") not in {w.strip(",") for w in words}}
