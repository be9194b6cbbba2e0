"""The training text: Python's standard library, read from the machine that trains.

Knows files and text; nothing of tokens or torch. Everything here is a pure function of the files
found, so the same Python release gives the same corpus on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_SHARE = 0.04

# Tests repeat themselves, tables and rendered documentation teach a small model nothing of code,
# and what is installed beside the standard library has other owners and other licences.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
# Written when Python was built: it holds the paths of the machine.
EXCLUDED_PREFIXES = ("_sysconfigdata",)

LESSON_CHARACTERS_MIN = 60
LESSON_CHARACTERS_MAX = 1000
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You write Python.")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class SourceFile(NamedTuple):
    """One file of the corpus; `name` is its path below the root, with slashes."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this file is kept from training: by the hash of its name, so for ever."""
        return _fraction(self.name) < HELD_OUT_SHARE


class Corpus(NamedTuple):
    """The files to train on and those to measure on."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    def digest(self) -> str:
        """SHA-256 over all names and texts: equal digests mean equal corpora."""
        digest = hashlib.sha256()
        for file in (*self.training, *self.held_out):
            digest.update(f"{file.name}\0{file.text}\0".encode())
        return digest.hexdigest()


def read_corpus(root: Path | None = None) -> Corpus:
    """Read every usable source below `root`, by default this Python's standard library.

    Raises:
        FileNotFoundError: there is no Python source below `root`.
    """
    if root is None:
        root = Path(sysconfig.get_path("stdlib"))
    files = tuple(_read_files(root))
    if not files:
        raise FileNotFoundError(f"{root}: no Python sources to train on")
    return Corpus(
        training=tuple(file for file in files if not file.held_out),
        held_out=tuple(file for file in files if file.held_out),
    )


def _read_files(root: Path) -> Iterator[SourceFile]:
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        folders = name.split("/")
        if EXCLUDED_FOLDERS.intersection(folders) or folders[-1].startswith(EXCLUDED_PREFIXES):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare an old encoding of their own
        if text.strip():
            yield SourceFile(name, text)


def lessons(file: SourceFile) -> Iterator[tuple[Message, ...]]:
    """Conversations made from `file`: a docstring's summary asks, the documented code answers.

    They teach the chat turns, and that an answer is one definition and then ends. Some have a
    system message and some a second turn, chosen by hash.
    """
    pending: tuple[Message, ...] = ()
    for node, segment in _documented(file.text):
        question = _question(node, segment)
        if question is None:
            continue
        if not pending and _fraction("system", segment) < 0.25:
            chosen = int(_fraction("prompt", segment) * len(SYSTEM_PROMPTS))
            pending = (Message("system", SYSTEM_PROMPTS[chosen]),)
        pending = (*pending, Message("user", question), Message("assistant", segment))
        if len(pending) >= 4 or _fraction("more", segment) < 0.8:
            yield pending
            pending = ()
    if pending:
        yield pending


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _documented(text: str) -> Iterator[tuple[Definition, str]]:
    """Every documented public function, method and class of fitting size, dedented."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node):
            segment = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).strip()
            if LESSON_CHARACTERS_MIN <= len(segment) <= LESSON_CHARACTERS_MAX:
                yield node, segment


def _question(node: Definition, segment: str) -> str | None:
    """What a user might have asked to be given `segment`; None if its docstring does not say."""
    docstring = ast.get_docstring(node) or ""
    summary = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    if not 12 <= len(summary) <= 120 or not summary[0].isupper():
        return None
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    lowered = summary[0].lower() + summary[1:]
    joint = "for" if kind == "class" else "to"
    forms = (
        f"{summary}.",
        lowered,
        f"Write a {kind} {joint} {lowered}.",
        f"Write a Python {kind}: {lowered}",
        f"Write a {kind} called {node.name}.",
        f"Write a {kind} {node.name} that can {lowered}.",
    )
    return forms[int(_fraction("form", segment) * len(forms))]


def _fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
