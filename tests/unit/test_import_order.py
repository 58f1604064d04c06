"""The package reads in one direction; optional packages have one door; files and functions keep a readable size."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_conan"
ORDER = ["config", "parallel", "data", "model", "loss", "mining", "train", "evaluation", "export"]
"""Every folder may import those before it. `kernels` stands alone; main.py, run_dir.py and cli.py are on top."""
OPTIONAL = {"transformer_engine", "apex", "faiss"}
GATEWAY = PACKAGE / "model" / "backends.py"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 100
CODE_FOLDERS = ["megatron_conan", "kernels", "data_tools", "launch", "benchmarks", "tests"]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, at any depth, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_all_folders_have_a_place_in_the_order():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)


@pytest.mark.parametrize("path", python_files("megatron_conan"), ids=label)
def test_nothing_imports_upwards(path):
    own = path.relative_to(PACKAGE).parts[0]
    if own in ("main.py", "run_dir.py", "cli.py"):
        return
    allowed = set() if own == "__init__.py" else {*ORDER[: ORDER.index(own) + 1], "kernels"}
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "megatron_conan":
            assert parts[1] in allowed, f"{label(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", python_files("kernels"), ids=label)
def test_kernels_stand_alone(path):
    for line, name in imports(path):
        if name.startswith("megatron_conan."):
            assert name.startswith("megatron_conan.kernels."), f"{label(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", python_files("megatron_conan", "kernels", "data_tools", "launch"), ids=label)
def test_optional_packages_have_one_door(path):
    if path == GATEWAY:
        return
    for line, name in imports(path):
        assert OPTIONAL.isdisjoint(name.split(".")), f"{label(path)}:{line} imports {name}; ask {label(GATEWAY)} for it"


def test_the_door_is_used():
    assert OPTIONAL & {part for _, name in imports(GATEWAY) for part in name.split(".")}


@pytest.mark.parametrize("path", python_files(*CODE_FOLDERS), ids=label)
def test_files_and_functions_keep_a_readable_size(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{label(path)}:{node.lineno} {node.name} has {num_lines} lines"


def test_names_say_something():
    vague = {"utils", "helpers", "misc", "common", "util", "helper"}
    assert not [label(path) for path in python_files(*CODE_FOLDERS) if path.stem in vague]
