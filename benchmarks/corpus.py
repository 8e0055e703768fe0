"""A corpus of real texts without a download: documentation that every Python includes.

Sources, all under the standard library's folder: the language reference that `help()` shows
(pydoc_data/topics.py) and the docstrings of the library's modules, read by `ast` and never imported. They are
cleaned to plain prose, cut into titles, sentences and paragraphs, and ordered by the SHA-256 of each text, so
that the choice depends only on the texts. The mix of lengths is that of a search index: 40 % short (3 to 12
words: questions, titles), 45 % sentences (13 to 40), 15 % paragraphs (41 to 250).

The same Python gives the same corpus, on any machine; another Python has other texts, so results record
`fingerprint`."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from . import machine

MODULES = (
    "argparse abc bisect calendar collections contextlib copy csv datetime decimal difflib doctest "
    "fractions functools gettext glob graphlib gzip hashlib heapq imaplib inspect ipaddress json "
    "locale logging mailbox nntplib optparse os pathlib pickle pickletools platform poplib pprint "
    "profile queue random re sched secrets selectors shelve shlex shutil smtplib socket socketserver "
    "ssl statistics string subprocess symtable tarfile tempfile textwrap threading timeit tokenize "
    "trace traceback turtle typing unittest urllib uuid warnings weakref webbrowser xml zipfile "
    "asyncio email http concurrent importlib multiprocessing ctypes dbm encodings html idlelib "
    "sqlite3 tkinter wsgiref "
)

MIX = ((0.40, 3, 12), (0.45, 13, 40), (0.15, 41, 250))
"""Share of the corpus, and the words a text of that kind has."""


def _sources() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        for node in ast.walk(ast.parse(topics.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 200:
                yield node.value
    for module in MODULES.split():
        files = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
        for file in files:
            if not file.is_file() or "test" in file.relative_to(library).as_posix():
                continue
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):  # a template, not a module
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = ast.get_docstring(node)
                    if text:
                        yield text


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        if re.search(r"^\s*(>>>|\.\.\.|[-=*~^]{4,}|\|)", block, re.MULTILINE):
            continue  # code, a table, a rule
        flat = re.sub(r"[*`]+|\[\d+\]|:\w+:", "", re.sub(r"\s+", " ", block)).strip()
        letters = sum(c.isalpha() or c == " " for c in flat)
        if flat and letters / len(flat) > 0.85:
            yield flat


@lru_cache(maxsize=1)
def texts() -> tuple[str, ...]:
    """All usable texts of this Python, each once, ordered by their SHA-256."""
    found: set[str] = set()
    for source in _sources():
        for paragraph in _paragraphs(source):
            found.add(paragraph)
            found.update(re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph))
    return tuple(sorted(found, key=lambda t: hashlib.sha256(t.encode()).digest()))


def sentences(count: int = 2000) -> list[str]:
    """`count` texts with the mix of lengths above, in an order independent of the lengths. Raises ValueError
    if this Python does not have enough."""
    if machine.tiny():
        count = min(count, 24)
    chosen: list[str] = []
    for index, (share, low, high) in enumerate(MIX):
        fitting = [t for t in texts() if low <= len(t.split()) <= high]
        wanted = count - len(chosen) if index == len(MIX) - 1 else round(count * share)
        if len(fitting) < wanted:
            raise ValueError(
                f"this Python has {len(fitting)} texts of {low} to {high} words, and {wanted} are needed"
            )
        chosen += fitting[:wanted]
    return sorted(chosen, key=lambda t: hashlib.sha256(b"order" + t.encode()).digest())


def prose() -> str:
    """One long text: the paragraphs of more than 40 words, one after the other."""
    return "\n\n".join(t for t in texts() if 40 < len(t.split()) <= 250)


def fingerprint(lines: Sequence[str]) -> str:
    """A short SHA-256 of the texts: identifies the corpus of a result."""
    return hashlib.sha256("\0".join(lines).encode()).hexdigest()[:16]


def statistics(lines: Sequence[str], lengths: Sequence[int]) -> dict[str, float | int | str]:
    """Properties of a corpus: texts, tokens (as counted by the model's tokenizer), and the length mix."""
    ordered = sorted(lengths)
    at = {f"tokens_p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (10, 50, 90, 100)}
    return {"texts": len(lines), "tokens": sum(lengths), "fingerprint": fingerprint(lines), **at}
