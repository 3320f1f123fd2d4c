"""Who imports whom, read from the source: what the architecture test judges."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("dedup", "raft", "oncekeeper", "node", "chaos")
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "dedup": frozenset(),
    "raft": frozenset({"dedup"}),
    "oncekeeper": frozenset({"dedup"}),
    "node": frozenset({"dedup", "raft", "oncekeeper"}),
    "chaos": frozenset({"dedup", "raft", "oncekeeper", "node"}),
}

PURE = (
    "dedup/*.py",
    "raft/ledger*.py",
    "raft/codec.py",
    "raft/commands.py",
    "raft/journal_format.py",
    "raft/wire.py",
    "node/asides.py",
    "node/coordinator.py",
    "node/doubt.py",
    "node/deferring.py",
    "node/dues.py",
    "node/flow.py",
    "node/hands.py",
    "node/lanes.py",
    "node/lease.py",
    "node/messages.py",
    "node/offsets.py",
    "node/ownership.py",
    "node/partitions.py",
    "node/pieces.py",
    "node/records_model.py",
    "node/settling.py",
    "node/testify.py",
    "node/tickets.py",
    "node/undecodable.py",
    "node/views.py",
    "node/wheel.py",
    "node/why.py",
    "node/workers/port.py",
    "node/working.py",
    "oncekeeper/log/cut.py",
    "oncekeeper/log/delayed.py",
    "oncekeeper/log/port.py",
)
# What pure modules may use: data structures, arithmetic, bytes and types. All else is an adapter, or may be one.
PURE_LIBRARY = frozenset(
    [
        "__future__",
        "array",
        "bisect",
        "bitarray",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "google_crc32c",
        "hashlib",
        "heapq",
        "itertools",
        "math",
        "mmh3",
        "msgspec",
        "operator",
        "re",
        "string",
        "struct",
        "types",
        "typing",
        "zlib",
    ]
)
# Anonymous memory, cleared by the kernel when it is touched: no file is mapped, and no clock or chance is in it.
PURE_EXCEPTIONS = {("dedup/bloom.py", "mmap")}
# datetime computes with times that it is given; what asks for the present one is refused by name.
PURE_BUT = {"datetime": frozenset({"now", "utcnow", "today"})}
# Modules of this project that pure ones may use although they are not on the list: they are values and text only.
PURE_NEIGHBOURS = {"oncekeeper.envelope", "oncekeeper.errors", "node.workers.testimony"}

IMPORTERS = ("__import__", "importlib.import_module")
ENGINE_LIBRARY = "pysyncobj"
ENGINE = "raft/engine*.py"
UNPICKLERS = frozenset({"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"})


class Import(NamedTuple):
    file: str
    line: int
    module: str  # absolute, dotted
    name: str = ""  # of a `from` import

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def sources(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py"))


def imports(file: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, also those inside of functions; not those that only a type checker sees."""
    name = str(file.relative_to(root))
    tree = ast.parse(file.read_text("utf-8"))
    skipped = {
        id(inner)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for part in block.body
        for inner in ast.walk(part)
    }
    for found in ast.walk(tree):
        if id(found) in skipped:
            continue
        if isinstance(found, ast.Import):
            for alias in found.names:
                yield Import(name, found.lineno, alias.name)
        elif isinstance(found, ast.ImportFrom):
            module = found.module or ""
            if found.level:
                package = list(file.relative_to(root).parts[: -found.level])
                module = ".".join([*package, module]).rstrip(".")
            for alias in found.names:
                yield Import(name, found.lineno, module, alias.name)
        elif isinstance(found, ast.Call) and ast.unparse(found.func) in IMPORTERS:
            yield from (
                Import(name, found.lineno, str(argument.value))
                for argument in found.args[:1]
                if isinstance(argument, ast.Constant)
            )


def violations(root: Path) -> list[str]:
    """Everything in the tree that breaks a rule, in words."""
    pure = {str(path.relative_to(root)) for pattern in PURE for path in root.glob(pattern)}
    engine = {str(path.relative_to(root)) for path in root.glob(ENGINE)}
    wrong: list[str] = []
    for file in sources(root):
        name = str(file.relative_to(root))
        found = list(imports(file, root))
        wrong += _wrong_direction(name, found)
        wrong += [f"{_at(each)} imports {each.module}: nothing is ever unpickled" for each in found
                  if each.top in UNPICKLERS]  # fmt: skip
        if name not in engine:
            wrong += [f"{_at(each)} imports {each.module}: only {ENGINE} may" for each in found
                      if each.top == ENGINE_LIBRARY]  # fmt: skip
        if name in pure:
            wrong += _impure(file, found, pure)
    return wrong


def _wrong_direction(name: str, found: Sequence[Import]) -> list[str]:
    package = name.partition("/")[0]
    return [
        f"{_at(each)} imports {each.module}: {package} may import of this project: "
        f"{', '.join(sorted(MAY_IMPORT[package])) or 'nothing'}"
        for each in found
        if each.top in PACKAGES and each.top != package and each.top not in MAY_IMPORT[package]
    ]


def _impure(file: Path, found: Sequence[Import], pure: set[str]) -> list[str]:
    wrong = []
    for each in found:
        if each.top in PACKAGES:
            if not _is_pure_neighbour(each, pure):
                wrong.append(
                    f"{_at(each)} is pure and imports {each.module}, which is not on the list of pure ones"
                )
        elif (each.file, each.top) in PURE_EXCEPTIONS:
            continue
        elif each.top not in PURE_LIBRARY and each.top not in PURE_BUT:
            wrong.append(f"{_at(each)} is pure and imports {each.module}")
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and any(node.attr in names for names in PURE_BUT.values()):
            if ast.unparse(node.value).split(".")[0] in PURE_BUT:
                wrong.append(f"{file.name}:{node.lineno} is pure and reads a clock: {ast.unparse(node)}")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("open", "print", "input")
        ):
            wrong.append(f"{file.name}:{node.lineno} is pure and calls {node.func.id}()")
    return wrong


def _is_pure_neighbour(each: Import, pure: set[str]) -> bool:
    modules = [each.module, f"{each.module}.{each.name}"]
    if any(module in PURE_NEIGHBOURS for module in modules):
        return True
    return any(module.replace(".", "/") + ".py" in pure for module in modules)


def _at(each: Import) -> str:
    return f"{each.file}:{each.line}"
