"""The package keeps its shape: few files on the root, small folders, classes and functions, few of others' private parts.

A line of code is one that is not blank, not a comment and not of a docstring. What breaks a rule today stands as a
number in a table of exceptions. Such a number may be lowered and never raised.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ndreamer_dist"
NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef

MOST_ROOT_FILES = 7
MOST_FOLDER_LINES, LARGER_FOLDERS = 1500, {"cohort": 2426, "stats": 1689}
MOST_CLASS_LINES, LARGER_CLASSES = 200, {"ResultsReader": 352}
MOST_LINES_OF_NINE_IN_TEN, MOST_FUNCTION_LINES = 20, 44
MOST_PARAMETERS, FUNCTIONS_WITH_MORE = 6, 17
NAMES_DEFINED_TWICE = 0
PRIVATE_PARTS_OF_OTHERS = 5
"""By file and name."""


@dataclass(frozen=True)
class Source:
    """A module of the package."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(PACKAGE))

    @property
    def folder(self) -> str:
        """The folder that it is in, or its own name if it lies on the root."""
        return self.path.relative_to(PACKAGE).parts[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    @cached_property
    def code(self) -> set[int]:
        """Numbers of the lines that hold code."""
        text = io.StringIO(self.path.read_text())
        tokens = (token for token in tokenize.generate_tokens(text.readline) if token.type not in NOT_CODE)
        lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
        return lines - {line for node in ast.walk(self.tree) for line in docstring_lines(node)}

    def lines(self, node: ast.stmt) -> int:
        """Return how many lines of code a class or a function has."""
        assert node.end_lineno is not None
        return len(self.code & set(range(node.lineno, node.end_lineno + 1)))

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def public_names(self) -> Iterator[str]:
        """Give the public names that the module defines at its top level, less its logger."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef | Function):
                names = [node.name]
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            yield from (name for name in names if not name.startswith("_") and name != "logger")


def docstring_lines(node: ast.AST) -> Iterator[int]:
    """Give the lines of a node's docstring, and of the texts that document its attributes."""
    if isinstance(node, ast.Module | ast.ClassDef | Function):
        for child in node.body:
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield from range(child.lineno, (child.end_lineno or child.lineno) + 1)


SOURCES = [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]


def test_the_root_holds_few_files() -> None:
    names = [path.name for path in PACKAGE.iterdir() if path.is_file() and path.name != "py.typed"]
    assert len(names) <= MOST_ROOT_FILES, sorted(names)


@pytest.mark.parametrize("folder", sorted({source.folder for source in SOURCES}))
def test_no_folder_is_large(folder: str) -> None:
    lines = sum(len(source.code) for source in SOURCES if source.folder == folder)
    assert lines <= LARGER_FOLDERS.get(folder, MOST_FOLDER_LINES)


def test_no_class_is_large() -> None:
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                most = LARGER_CLASSES.get(node.name, MOST_CLASS_LINES)
                assert source.lines(node) <= most, f"{source.name}: {node.name}"


def test_functions_are_short() -> None:
    lengths = {f"{source.name}: {node.name}": source.lines(node) for source in SOURCES for node in source.functions()}
    ordered = sorted(lengths.values())
    assert ordered[9 * len(ordered) // 10] <= MOST_LINES_OF_NINE_IN_TEN
    assert {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES} == {}


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_no_string_stands_alone_in_a_function() -> None:
    """It would be the second half of a message that is cut off."""
    for source in SOURCES:
        for function in source.functions():
            nodes = list(ast.walk(function))
            docstrings = {node.body[0] for node in nodes if isinstance(node, Function)}
            docstrings |= {text for node in nodes if isinstance(node, ast.ClassDef) for text in node.body}
            alone = [node for node in nodes if is_text(node) and node not in docstrings]
            assert not alone, f"{source.name}: {function.name}, line {alone[0].lineno}"


def test_functions_take_few_parameters() -> None:
    """The command line and figures are excepted."""
    many = []
    for source in SOURCES:
        if source.name not in ("cli.py", "figures/plots.py"):
            for node in source.functions():
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                if sum(argument.arg not in ("self", "cls") for argument in arguments) > MOST_PARAMETERS:
                    many.append(f"{source.name}: {node.name}")
    assert len(many) <= FUNCTIONS_WITH_MORE, many


def test_a_public_name_means_one_thing() -> None:
    """Commands have the names of the functions that they call, so the command line is excepted."""
    places = defaultdict(set)
    for source in SOURCES:
        if source.name != "cli.py":
            for name in source.public_names():
                places[name].add(source.name)
    twice = {name: sorted(files) for name, files in places.items() if len(files) > 1}
    assert len(twice) <= NAMES_DEFINED_TWICE, twice


def test_few_private_parts_of_other_packages_are_used() -> None:
    own = own_names()
    used = {(source.name, part) for source in SOURCES for part in private_parts(source.tree, own)}
    assert len(used) <= PRIVATE_PARTS_OF_OTHERS, sorted(used)


def own_names() -> set[str]:
    """Return every name that the package itself gives to something."""
    names: set[str] = set()
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef | Function):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def private_parts(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Give what a module imports from private modules of others, and their private attributes that it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("ndreamer_dist"):
            yield from (f"{node.module}.{name.name}" for name in node.names if is_private(f"{node.module}.{name.name}"))
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if is_private(name.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr


def is_private(dotted: str) -> bool:
    """Return whether a name is its package's own: an underscore, or zarr's core, which zarr documents as private."""
    parts = dotted.split(".")
    marked = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return marked or parts[:2] == ["zarr", "core"]
