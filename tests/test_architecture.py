"""The architecture, read from the imports: what may know of what, what is loaded when, and what never is."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import reading
from house import ORDER

ROOT = Path(__file__).resolve().parent.parent

UPWARD: dict[tuple[str, str], str] = {
    ("model.causal", "generation"): "generate is a method of the model, as people call it",
    ("model.pretrained", "seq2seq"): "AutoModel and the other Auto classes load encoder-decoders too",
}
"""Imports that go up nevertheless, each for a reason; at most two."""

MOST_FILES, MOST_LINES = 12, 2500
"""Of a folder, its `__init__` not counted among the files."""

LARGE: dict[str, str] = {
    "minilm.families": "one file a family",
    "minilm.generation": "one loop under two ways of asking, each with the options of the library it follows",
}
"""Folders that are larger nevertheless, each for a reason."""

AT_THE_TOP = {"torch", "numpy"}
"""Packages that modules may import when they are imported; the command line's may import typer too."""

NEVER = (
    "transformers",
    "sentence_transformers",
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
)
"""Not at run time, not even within functions: the libraries that minilm is compared with, and formats that
run code."""

INTEGRATIONS: dict[str, str] = {
    "integrations.transformers": "transformers",
    "integrations.trainer": "transformers",
    "integrations.langchain": "langchain_core",
    "integrations.langchain_search": "langchain_core",
    "integrations.llama_index": "llama_index",
    "integrations.llama_index_search": "llama_index",
}
"""Modules for other libraries, which nothing imports: each may import its library within functions."""

KERNELS_MAY_IMPORT = {"torch", "triton", "numpy"}


@dataclass(frozen=True)
class Import:
    """One import: who, what (absolute), where, and when."""

    importer: str
    imported: str
    line: int
    when: str
    """"start", "call" (within a function), or "types" (for the type checker alone)."""

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.imported} ({self.when})"


def module_name(path: Path, top: Path, package: str) -> str:
    """minilm/families/bert.py -> minilm.families.bert."""
    parts = [package, *path.relative_to(top).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, name: str) -> Iterator[Import]:
    """All imports of one file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name, alias.name, child.lineno, when)
            elif isinstance(child, ast.ImportFrom):
                start = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*start, *([child.module] if child.module else [])])
                for alias in child.names:  # `from . import rope` and `from .rope import angles` both
                    yield Import(name, f"{base}.{alias.name}", child.lineno, when)
            elif isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                yield from walk(child, "types")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, "call" if when == "start" else when)
            else:
                yield from walk(child, when)

    yield from walk(tree, "start")


def files_of(folder: str, package: str) -> dict[str, Path]:
    """Module names and files of a package."""
    top = ROOT / folder
    return {module_name(path, top, package): path for path in sorted(top.rglob("*.py"))}


MODULES = files_of("minilm", "minilm")
KERNELS = files_of("kernels", "minilm.kernels")
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(path, name)]


def own_module(imported: str) -> str | None:
    """The module of minilm that an import is of: minilm.model.rope.angles -> rope. None for other
    packages."""
    parts = imported.split(".")
    if parts[0] != "minilm":
        return None
    while len(parts) > 1 and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts[1:])


def room_of(module: str) -> str:
    """The folder, or the file at the top, that a module stands in: model.rope -> model."""
    return module.split(".")[0]


def door_of(room: str) -> set[str]:
    """The names that a folder hands on: its `__all__`."""
    path = MODULES[f"minilm.{room}"]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@dataclass(frozen=True)
class Step:
    """An import from one module of minilm to another, both without the leading `minilm.`."""

    importer: str
    imported: str
    found: Import


def steps() -> Iterator[Step]:
    """All imports inside minilm/, but for those of the folders beside it (kernels/, benchmarks/)."""
    for found in IMPORTS:
        imported = own_module(found.imported)
        beside = found.imported.split(".")[1:2] in (["kernels"], ["benchmarks"], ["_C"])
        if imported is not None and not beside:
            yield Step(found.importer.removeprefix("minilm").lstrip("."), imported, found)


def test_every_module_has_its_place() -> None:
    for name in MODULES:
        room = room_of(name.removeprefix("minilm").lstrip("."))
        assert room in ORDER, f"{name}: put {room} in ORDER of this test, and in the map of the README"


def test_imports_go_down() -> None:
    """Lazy ones, and those for types, included."""
    wrong, used = [], set()
    for step in steps():
        one, other = ORDER.index(room_of(step.importer)), ORDER.index(room_of(step.imported))
        if other <= one:
            continue
        if (step.importer, step.imported) in UPWARD:
            used.add((step.importer, step.imported))
            continue
        wrong.append(f"{step.found}: {ORDER[other]} stands above {ORDER[one]}")
    assert not wrong, "\n".join(wrong)
    assert used == set(UPWARD), f"exceptions that nothing needs any more: {set(UPWARD) - used}"
    assert len(UPWARD) <= 2


def test_folders_are_entered_by_their_doors() -> None:
    """From elsewhere only the names in a folder's `__all__` are imported, or names of the modules in it."""
    wrong = []
    for step in steps():
        room = room_of(step.imported)
        if not step.importer or room == room_of(step.importer) or f"minilm.{room}" not in MODULES:
            continue
        if MODULES[f"minilm.{room}"].name != "__init__.py":
            continue
        inside = step.found.imported.removeprefix(f"minilm.{room}").lstrip(".").split(".")
        if inside[0] and inside[0] not in door_of(room):
            wrong.append(f"{step.found}: {inside[0]} is not in __all__ of minilm.{room}")
    assert not wrong, "\n".join(wrong)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The circles of a graph, each as "a -> b -> a"; the first that each walk meets."""
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return found


def test_no_two_files_import_each_other() -> None:
    """Nor in a larger circle, at whatever time; the exceptions above are left out."""
    graph: dict[str, set[str]] = {}
    for step in steps():
        if (step.importer, step.imported) not in UPWARD and step.importer and step.imported != step.importer:
            graph.setdefault(step.importer, set()).add(step.imported)
    for name, path in KERNELS.items():
        for found in imports_of(path, name):
            target = found.imported
            while target not in KERNELS and "." in target:
                target = target.rpartition(".")[0]
            if target in KERNELS and target != name:
                graph.setdefault(name, set()).add(target)
    assert not circles(graph), "\n".join(circles(graph))


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def test_folders_are_of_a_size_to_be_read() -> None:
    wrong = []
    for folder in sorted({path.parent for path in MODULES.values()}):
        name = ".".join(folder.relative_to(ROOT).parts)
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py"))
        if (len(files) > MOST_FILES or lines > MOST_LINES) and name not in LARGE:
            wrong.append(f"{name} has {len(files)} files and {lines} lines")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("what", reading.MOST)
def test_what_a_reader_reads_is_short(what: str) -> None:
    patterns, most = reading.MOST[what]
    lines = reading.lines_of(patterns)
    assert len(lines) > 10
    assert sum(lines.values()) <= most, lines


def test_a_family_knows_its_dialect_and_nothing_else() -> None:
    """families/ imports the configuration, the rules and other families; what writes config.json may save."""
    for found in IMPORTS:
        if found.importer.startswith("minilm.families") and found.when != "types":
            top = found.imported.split(".")[0]
            assert top in ("minilm", "__future__") or top in sys.stdlib_module_names, found
            module = own_module(found.imported)
            writes = found.importer == "minilm.families.pretrained_config" and module == "files.saving"
            known = ("families", "config", "weights", "_version")
            assert module is None or module.split(".")[0] in known or writes, found


def test_other_packages_come_in_when_they_are_used() -> None:
    wrong = []
    for found in IMPORTS:
        top = found.imported.split(".")[0]
        if found.when != "start" or top == "minilm" or top in sys.stdlib_module_names or top in AT_THE_TOP:
            continue
        if not (found.importer.startswith("minilm.cli") and top == "typer"):
            wrong.append(f"{found}: import it in the function that needs it")
    assert not wrong, "\n".join(wrong)


def test_what_is_never_imported() -> None:
    """Not the references, and nothing that runs code from a file."""
    everything = [*IMPORTS, *(found for name, path in KERNELS.items() for found in imports_of(path, name))]
    wrong = []
    for found in everything:
        top = found.imported.split(".")[0]
        theirs = INTEGRATIONS.get(found.importer.removeprefix("minilm."))
        if top in NEVER and not (top == theirs and found.when == "call"):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_integrations_stand_outside() -> None:
    """Each is there, touches its library, and is imported by nothing of minilm."""
    for module, library in INTEGRATIONS.items():
        touched = [f for f in IMPORTS if f.importer == f"minilm.{module}" and f.imported.startswith(library)]
        assert touched, f"minilm.{module} does not import {library}"
    wrong = [str(f) for f in IMPORTS if "integrations" in f.imported and "integrations" not in f.importer]
    assert not wrong, "\n".join(wrong)
    assert "transformers" not in loaded()["import minilm.integrations.transformers"]


def test_nothing_is_unpickled_or_evaluated() -> None:
    """torch.load, numpy's allow_pickle, eval and exec do not occur."""
    wrong = []
    for name, path in {**MODULES, **KERNELS}.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                if called in ("torch.load", "pickle.load", "pickle.loads", "torch.hub"):
                    wrong.append(f"{where}: {called}")
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("eval", "exec")
            ):
                wrong.append(f"{where}: {node.func.id}")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                wrong += [f"{where}: allow_pickle"] * (getattr(node.value, "value", None) is not False)
    assert not wrong, "\n".join(wrong)


def test_kernels_import_nothing_of_minilm() -> None:
    for name, path in KERNELS.items():
        for found in imports_of(path, name):
            top = found.imported.split(".")[0]
            inside = found.imported.startswith("minilm.kernels.")
            allowed = inside or top in KERNELS_MAY_IMPORT or top in sys.stdlib_module_names
            assert allowed, found


def test_the_folder_of_kernels_shadows_nobody() -> None:
    """`kernels` is another package's name on PyPI, which transformers imports when it is there."""
    assert "kernels" not in loaded()["import minilm.ops"]


# --- at run time ---

HEAVY = (
    *(
        "transformers",
        "sentence_transformers",
        "tokenizers",
        "sentencepiece",
        "gguf",
        "jinja2",
        "huggingface_hub",
        "rich",
    ),
    *("typer", "click", "tqdm", "safetensors", "triton", "requests", "httpx", "pandas", "sklearn", "scipy"),
)


def run(code: str, *options: str, **environment: str) -> str:
    """What a fresh interpreter prints; its errors are ours."""
    result = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "tests",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


API = "AutoModel, AutoTokenizer, AutoConfig, SentenceEncoder, LLM, SamplingParams, pipeline"
STEPS = (
    "import minilm",
    "import minilm.ops",
    f"from minilm import {API}",
    "import minilm.integrations.transformers",
)


@functools.cache
def loaded() -> dict[str, list[str]]:
    """The modules that have come in beyond torch's own after each of `STEPS`, one after the other."""
    code = f"""
import sys, torch
before = set(sys.modules)
for step in {STEPS!r}:
    exec(step)
    print(repr((step, sorted(set(sys.modules) - before))))
"""
    return dict(ast.literal_eval(line) for line in run(code).splitlines())


def test_import_brings_in_nothing_heavy() -> None:
    """Beyond torch's own modules: no tokenizers, no command line, no reference library, and hardly anything
    of ours."""
    new = loaded()["import minilm"]
    assert not [name for name in new if name in HEAVY]
    ours = [name for name in new if name.startswith("minilm")]
    assert len(ours) <= 3, f"importing minilm imports {ours}"
    assert len(new) <= 6, f"importing minilm imports {new}"


def test_models_bring_in_only_what_they_use() -> None:
    """A model built and run from a configuration needs none of the packages that files and texts need."""
    code = f"""
import sys, torch
before = set(sys.modules)
import minilm
config = minilm.BertConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, vocab_size=20)
minilm.AutoModel.from_config(config)(torch.tensor([[4, 5]]))
print(sorted((set(sys.modules) - before) & set({HEAVY!r})))
"""
    assert ast.literal_eval(run(code)) == []


FAMILIES = [
    path.stem
    for path in sorted((ROOT / "minilm" / "families").glob("[a-z]*.py"))
    if path.stem not in ("family", "positions", "pretrained_config", "table")
]


def test_the_whole_api_is_light() -> None:
    """Classes for models, texts and tasks together: no family, no command line, no kernels in Triton, nothing
    of others beyond what torch has brought in. Modules are counted, since seconds are the machine's."""
    new = loaded()[f"from minilm import {API}"]
    ours = [name for name in new if name.split(".")[0] == "minilm"]
    others = {name.split(".")[0] for name in new} - {"minilm", *AT_THE_TOP, *sys.stdlib_module_names}
    assert not others, f"the API imports {sorted(others)}"
    assert len(FAMILIES) > 8
    late = [f"minilm.families.{family}" for family in FAMILIES]
    late += ["minilm.cli", "minilm.kernels", "minilm.benchmarks", "minilm.integrations", "minilm.doctor"]
    assert not [name for name in ours if name.startswith(tuple(late))]
    assert len(ours) <= 120, f"{len(ours)} modules of minilm: {ours}"


def test_runs_without_the_optional_packages() -> None:
    """No extension, no Triton, no hub, nothing of the command line: a model from a configuration runs."""
    missing = (
        "minilm._C",
        "triton",
        "huggingface_hub",
        "gguf",
        "typer",
        "rich",
        "jinja2",
        "sentencepiece",
        "tqdm",
    )
    code = f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
import torch, minilm
from minilm import ops
config = minilm.LlamaConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, vocab_size=20)
model = minilm.AutoModelForCausalLM.from_config(config)
model(torch.tensor([[4, 5]])).loss
print(sorted(ops.explain().backends("rms_norm")), "minilm._C" in str(ops.explain()))
"""
    assert run(code) == "['reference'] True"


@pytest.mark.slow
def test_transformers_is_not_in_the_process() -> None:
    """After the usual work with a real model: a text embedded, tokens classified, a fresh configuration."""
    code = """
import sys
import minilm
encoder = minilm.SentenceEncoder("all-MiniLM-L6-v2")
encoder.encode(["a text"])
minilm.AutoTokenizer.from_pretrained("all-MiniLM-L6-v2")("a text", return_tensors="pt")
print([name for name in sys.modules if name.split(".")[0] in ("transformers", "sentence_transformers")])
"""
    assert run(code) == "[]"
