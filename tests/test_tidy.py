"""The house rules that a machine can check, on every file, from the first commit."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
FILE_LINES_MAX: Final = 500
FUNCTION_LINES_MAX: Final = 70
LINE_LENGTH_MAX: Final = 100

TOP_LEVEL: Final = {
    ".ci",
    ".gitattributes",
    ".gitignore",
    "LICENSE",
    "README.md",
    "actors",
    "deploy",
    "protocol",
    "pyproject.toml",
    "runtime",
    "tests",
    "tools",
}
EMPTY_NAMES: Final = {"common", "helper", "helpers", "misc", "util", "utils"}
"""Names that say nothing of what is inside."""

DANGEROUS_MODULES: Final = {
    "cloudpickle",
    "dill",
    "imp",
    "importlib",
    "marshal",
    "pickle",
    "shelve",
}
SAFE_IMPORTLIB: Final = {
    "importlib.abc",
    "importlib.machinery",
    "importlib.metadata",
    "importlib.resources",
}
DANGEROUS_CALLS: Final = {
    "__import__",
    "compile",
    "eval",
    "exec",
    "joblib.load",
    "numpy.load",
    "np.load",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}


def tracked_files() -> list[Path]:
    """The files of the repository: those that git knows or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    paths = {ROOT / name for name in listing.split("\0") if name}
    return sorted(path for path in paths if path.exists() and not path.is_symlink())


PYTHON_FILES: Final = [path for path in tracked_files() if path.suffix == ".py"]
TREES: Final = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PYTHON_FILES}


def problems(look: Callable[[Path, ast.Module], Iterable[str]]) -> list[str]:
    """What one look finds in all Python files."""
    return [
        f"{path.relative_to(ROOT)}: {problem}"
        for path, tree in TREES.items()
        for problem in look(path, tree)
    ]


def test_files_are_short_and_so_are_their_lines() -> None:
    def look(path: Path, _: ast.Module) -> Iterator[str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > FILE_LINES_MAX:
            yield f"{len(lines)} lines"
        for number, line in enumerate(lines, 1):
            if len(line) > LINE_LENGTH_MAX:
                yield f"line {number} has {len(line)} characters"

    assert not problems(look)


def test_a_function_fits_a_screen() -> None:
    def look(_: Path, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    yield f"{node.name} has {length} lines"

    assert not problems(look)


def test_files_and_folders_are_named_for_what_is_in_them() -> None:
    def look(path: Path, _: ast.Module) -> Iterator[str]:
        yield from EMPTY_NAMES & {path.stem, *path.relative_to(ROOT).parts}

    assert not problems(look)


def test_nothing_is_left_to_do_in_a_comment() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")

    def look(path: Path, _: ast.Module) -> Iterator[str]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "#" in line and any(word in line for word in words):
                yield f"line {number}"

    assert not problems(look)


def test_every_module_says_what_it_is() -> None:
    def look(path: Path, tree: ast.Module) -> Iterator[str]:
        if not path.is_relative_to(ROOT / "tests") and not ast.get_docstring(tree):
            yield "no docstring"

    assert not problems(look)


def test_a_packages_face_is_a_docstring() -> None:
    def look(path: Path, tree: ast.Module) -> Iterator[str]:
        if path.name == "__init__.py" and len(tree.body) > 1:
            yield "more than a docstring"

    assert not problems(look)


def test_nothing_runs_or_imports_what_came_as_data() -> None:
    def look(path: Path, tree: ast.Module) -> Iterator[str]:
        for danger in (*dangerous_imports(tree), *dangerous_calls(tree)):
            # Tests may look at modules by name: the names are their own.
            if not (path.is_relative_to(ROOT / "tests") and "importlib" in danger):
                yield danger

    assert not problems(look)


def dangerous_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            is_safe = any(name == safe or name.startswith(f"{safe}.") for safe in SAFE_IMPORTLIB)
            if name.partition(".")[0] in DANGEROUS_MODULES and not is_safe:
                yield f"line {node.lineno}: import of {name}"  # type: ignore[attr-defined]


def dangerous_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            # A regular expression or a method named compile is none of the built-ins.
            if name in DANGEROUS_CALLS or name.endswith((".unsafe_load", ".allow_pickle")):
                yield f"line {node.lineno}: call of {name}"
            if any(
                keyword.arg in {"allow_pickle", "trust_remote_code"} for keyword in node.keywords
            ):
                yield f"line {node.lineno}: {name} is told to trust its input"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import importlib",
        "from importlib import import_module",
        "import os, marshal",
        "eval('1')",
        "exec(code)",
        "__import__('os')",
        "torch.load(path)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_look_for_dangers_finds_them(code: str) -> None:
    tree = ast.parse(code)
    assert [*dangerous_imports(tree), *dangerous_calls(tree)]


@pytest.mark.parametrize(
    "code",
    [
        "import re; re.compile('x')",
        "from importlib.metadata import version",
        "model.eval()",
        "import json; json.load(file)",
        "from safetensors.torch import load_file",
    ],
)
def test_the_look_for_dangers_finds_no_others(code: str) -> None:
    tree = ast.parse(code)
    assert not [*dangerous_imports(tree), *dangerous_calls(tree)]


def test_every_top_level_entry_is_a_known_one() -> None:
    entries = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert entries <= TOP_LEVEL


def test_every_folder_says_what_is_in_it() -> None:
    for folder in ("actors", "deploy", "protocol", "runtime", "tests", "tools"):
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        assert 0 < len(text.splitlines()) <= 40
