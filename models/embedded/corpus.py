"""Text for the embedded model: Python's standard library as installed, its docstrings as dialogues."""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["END", "END_OF_TEXT", "ROLES", "dialogues", "documents", "is_held_out"]

END_OF_TEXT = "<|endoftext|>"
END = "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

_SKIPPED = ("site-packages", "encodings", "lib2to3/tests", "idlelib/idle_test", "__pycache__")
_MAX_BYTES = 250_000  # larger files are tables
_HELLO = ["Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "hello", "hi"]
_WHO = ["Who are you?", "What are you?", "What can you do?", "who are you", "What is your name?"]
_THANKS = ["Thanks", "Thank you", "thanks!", "Thank you very much", "Great, thanks"]


def is_held_out(name: str) -> bool:
    """One file in twenty, chosen by its name."""
    return hashlib.sha256(name.encode()).digest()[0] < 13


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every source file of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        left_out = any(part in name for part in _SKIPPED) or path.stat().st_size > _MAX_BYTES
        if left_out and name != "pydoc_data/topics.py":  # the language reference, worth its size
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests are in other encodings on purpose
            continue
        digits = sum(char.isdigit() for char in text)
        if text.strip() and digits < 0.2 * len(text):
            yield name, text


def _say(*turns: tuple[str, str]) -> str:
    return "".join(f"{ROLES[role]}\n{text.strip()}{END}\n" for role, text in turns)


def _small_talk() -> list[str]:
    me = (
        "I am the small model that ships with Halyard. I was trained on Python's standard library, "
        "so I can talk a little about its modules and write Python that looks right. "
        "I am here to show that everything works; for real work, serve a larger model."
    )
    welcome = "Hello! Ask me about a function of Python's standard library."
    talk = [_say(("user", text), ("assistant", welcome)) for text in _HELLO]
    talk += [_say(("user", text), ("assistant", me)) for text in _WHO]
    talk += [_say(("user", text), ("assistant", "You are welcome!")) for text in _THANKS]
    talk += [
        _say(("user", first), ("assistant", welcome), ("user", second), ("assistant", me))
        for first in _HELLO
        for second in _WHO
    ]
    return talk


def dialogues(seed: int = 0) -> Iterator[tuple[str, str]]:
    """(file, dialogue): questions about functions and classes, answered by docstring or source."""
    rng = random.Random(seed)
    for text in _small_talk() * 12:
        yield "small talk", text
    for name, text in documents():
        if "/test" in name or name.startswith("test"):
            continue
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        documentation = ast.get_docstring(tree)
        if documentation:
            question = rng.choice(["What is the {0} module?", "What is {0} for?", "Explain {0}."])
            yield (
                name,
                _say(("user", question.format(module)), ("assistant", _shorten(documentation))),
            )
        lines = text.splitlines()
        for node, path in _definitions(tree, module):
            yield from ((name, item) for item in _about(node, path, lines, rng))


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, f"{prefix}.{node.name}"  # type: ignore[misc]
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}.{node.name}")


def _about(node: ast.FunctionDef, path: str, lines: list[str], rng: random.Random) -> Iterator[str]:
    documentation = ast.get_docstring(node)
    if documentation:
        question = rng.choice(
            ["What does {0} do?", "What is {0}?", "Explain {0}.", "How do I use {0}?",
             "what does {0} do", "Describe {0}."]
        )  # fmt: skip
        yield _say(("user", question.format(path)), ("assistant", _shorten(documentation)))
    # The source stands in the documents already: a sample teaches the form, more would be learnt
    # by heart.
    source = lines[node.lineno - 1 : node.end_lineno]
    if len(source) < 25 and rng.random() < 0.15:
        question = rng.choice(
            ["Show me the source of {0}.", "How is {0} written?", "Write {0}.", "Show {0}."]
        )
        code = textwrap.dedent("\n".join(source))
        yield _say(("user", question.format(path)), ("assistant", f"```python\n{code}\n```"))


def _shorten(text: str, limit: int = 900) -> str:
    """Whole paragraphs up to a limit."""
    kept = ""
    for paragraph in text.split("\n\n"):
        if kept and len(kept) + len(paragraph) > limit:
            break
        kept += ("\n\n" if kept else "") + paragraph
    return kept[: 2 * limit]
