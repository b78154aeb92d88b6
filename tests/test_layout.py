"""Style as a test: sizes, names, who may import what, and where the environment is read."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "actors", "jobs", "serve")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 400
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}

MAY_IMPORT = {
    "ray": {
        "actors/ray_runtime.py",
        "actors/ray_replica.py",
        "actors/ray_jobs.py",
        "serve/app.py",
        "serve/local_cluster.py",
    },
    "faiss": {"actors/faiss_index.py", "actors/exact_search.py", "actors/gpu_device.py"},
    "pynvml": {"actors/gpu_probe.py"},
}
MAY_READ_ENVIRONMENT = {
    "actors/faiss_library.py",
    "actors/gpu_probe.py",
    "actors/ray_tls.py",
    "serve/local_cluster.py",
    "serve/app.py",
    "serve/cli.py",
    "jobs/__main__.py",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_packages(tree: ast.Module) -> Iterator[str]:
    """Top-level packages of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def names_used_of_os(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (alias.name for alias in node.names)


def reads_environment(tree: ast.Module) -> bool:
    return bool({"environ", "environb", "getenv"} & set(names_used_of_os(tree)))


def long_functions(tree: ast.Module) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in functions
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]


def silent_handlers(tree: ast.Module) -> list[int]:
    """Lines of `except ...:` whose whole body is `pass` or `...`."""

    def says_nothing(statement: ast.stmt) -> bool:
        literal = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        return isinstance(statement, ast.Pass) or literal

    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return [node.lineno for node in handlers if all(says_nothing(statement) for statement in node.body)]


def test_every_package_has_files() -> None:
    assert {name_of(path).split("/")[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_too_long(path: Path) -> None:
    assert long_functions(tree_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_has_a_vague_name(path: Path) -> None:
    assert not {path.stem, *name_of(path.parent).split("/")} & VAGUE_NAMES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_seams_are_imported_only_by_their_owners(path: Path) -> None:
    found = set(imported_packages(tree_of(path)))
    assert [package for package, owners in MAY_IMPORT.items() if package in found and name_of(path) not in owners] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_environment_is_read_only_at_the_edge(path: Path) -> None:
    assert name_of(path) in MAY_READ_ENVIRONMENT or not reads_environment(tree_of(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_error_is_swallowed(path: Path) -> None:
    assert silent_handlers(tree_of(path)) == []


def test_serve_is_ours_and_not_ray_serve() -> None:
    assert Path(str(serve.__file__)).resolve() == ROOT / "serve" / "__init__.py"
    theirs = importlib.util.find_spec("ray.serve")
    assert theirs is not None
    assert theirs.name == "ray.serve"
    assert Path(str(theirs.origin)).resolve() != Path(str(serve.__file__)).resolve()


# ---- the checks themselves can fail

LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ray", {"ray"}),
        ("import ray.serve as s, os", {"ray", "os"}),
        ("from ray.exceptions import RayError", {"ray"}),
        ("def f():\n    import faiss", {"faiss"}),
        ("from . import ray", set()),
        ("import rayon", {"rayon"}),
    ],
)
def test_imported_packages_of_source(source: str, expected: set[str]) -> None:
    assert set(imported_packages(ast.parse(source))) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("os.environ['A']", True),
        ("x = os.getenv('A')", True),
        ("from os import environ", True),
        ("from os import path", False),
        ("runtime.environ", False),
        ("'os.environ'", False),
    ],
)
def test_reads_environment_of_source(source: str, expected: bool) -> None:
    assert reads_environment(ast.parse(source)) is expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", [3]),
        ("...", [3]),
        ("'why'\n    pass", [3]),
        ("return", []),
        ("log()", []),
    ],
)
def test_silent_handlers_of_source(body: str, expected: list[int]) -> None:
    source = f"try:\n    f()\nexcept OSError:\n    {body}"
    assert silent_handlers(ast.parse(source)) == expected


def test_long_functions_of_source() -> None:
    assert long_functions(ast.parse(LONG)) == [f"f: {FUNCTION_LINES_MAX + 1} lines"]
    assert long_functions(ast.parse(LONG.replace("    x = 1\n", "", 1))) == []
