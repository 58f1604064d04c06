"""Find the documented functions, methods and classes of Python files, as (question, code) material for training.

One `CodeFunction` is one documented definition. Which side of the split its file is on depends on the module name only:
every machine holds out the same modules, whatever its installation looks like.
"""

import ast
import hashlib
import inspect
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from megatron_conan.data.prepare import prepare_code, prepare_query

STDLIB = "stdlib"
HELD_OUT_SHARE = {STDLIB: 0.25}
HELD_OUT_SHARE_OTHERS = 0.08
MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 50
MIN_BODY_CHARACTERS = 60
MAX_CODE_CHARACTERS = 4000  # of one definition; far more than the ~96 tokens that are embedded
MAX_DOCSTRING_CHARACTERS = 1500
MAX_FILE_BYTES = 1_000_000  # larger ones are generated tables

# Folders (and files) of tests, copies of other packages, and examples: their text is a copy or a poor question.
SKIPPED_PARTS = frozenset(
    {
        *("test", "tests", "testing", "_vendor", "vendor", "vendored", "externals", "extern", "third_party"),
        *("idlelib", "lib2to3", "turtledemo", "distutils", "ensurepip", "pydoc_data", "site-packages", "dist-packages"),
        *("examples", "example", "benchmarks", "conftest", "__phello__", "megatron_conan"),
    }
)

_ROLE = re.compile(r":[\w:+.-]+:`~?([^`]*)`")  # Sphinx :class:`~a.b` -> a.b
_SIGNATURE_LINE = re.compile(r"[\w.]+\([^\n]*\)\s*(->\s*.+)?$")  # C functions open with `name(a, b) -> x`
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(])")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class CodeFunction:
    """One documented definition of one file."""

    package: str  # "stdlib" or the top-level name in site-packages
    file: str  # path relative to its root, with forward slashes
    line: int
    name: str  # qualified: zipfile.ZipFile.open
    signature: str  # name and argument names
    docstring: str  # whole, cleaned and cut
    query: str  # first sentence of the docstring
    code: str  # source without any docstring, cut
    prepared_query: str
    prepared_code: str
    held_out: bool

    @property
    def usable(self) -> bool:
        """Whether question and code are long enough to train or to evaluate on."""
        num_words = len(self.query.split())
        body = self.code.partition("\n")[2]
        return (
            MIN_QUERY_WORDS <= num_words <= MAX_QUERY_WORDS
            and len(body.strip()) >= MIN_BODY_CHARACTERS
            and len(self.prepared_query.split()) >= MIN_QUERY_WORDS
            and bool(self.prepared_code)
        )


@dataclass(frozen=True)
class SourceFile:
    """A file to read: `root / file` belongs to `package`."""

    package: str
    root: str
    file: str


def stable_fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on the strings alone: the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def module_name(file: str) -> str:
    """`email/__init__.py` -> `email`, `json/decoder.py` -> `json.decoder`."""
    parts = file.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_held_out(package: str, file: str) -> bool:
    """Whether a file is held out of all training: a quarter of the standard library's modules, 8% of the others."""
    scope = STDLIB if package == STDLIB else "site-packages"
    share = HELD_OUT_SHARE.get(package, HELD_OUT_SHARE_OTHERS)
    return stable_fraction("held-out", scope, module_name(file)) < share


def is_skipped(file: str) -> bool:
    """Whether a path lies in a folder of tests or copies, or is itself a test."""
    parts = file.removesuffix(".py").split("/")
    return not SKIPPED_PARTS.isdisjoint(parts) or parts[-1].startswith("test_") or parts[-1].endswith("_test")


def first_sentence(docstring: str) -> str:
    """The first sentence of a cleaned docstring on one line, without a leading signature and without Sphinx roles."""
    for paragraph in docstring.split("\n\n"):
        text = " ".join(paragraph.split())
        if text and not _SIGNATURE_LINE.fullmatch(text):
            return _SENTENCE_END.split(_ROLE.sub(r"\1", text), maxsplit=1)[0]
    return ""


def read_functions(source: SourceFile) -> list[CodeFunction] | None:
    """All documented definitions of one file in source order, or None where it does not parse.

    Functions inside functions are part of their parent's code and not listed by themselves.
    """
    path = Path(source.root, source.file)
    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE_BYTES:
            return []
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").replace("\f", " ")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    lines = text.split("\n")
    found: list[CodeFunction] = []
    _collect(tree, module_name(source.file), source, lines, found)
    return found


def _collect(node: ast.AST, prefix: str, source: SourceFile, lines: list[str], found: list[CodeFunction]) -> None:
    """Append the documented definitions below `node`, through classes and if/try blocks but not into functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            name = f"{prefix}.{child.name}"
            function = _build(child, name, source, lines)
            if function is not None:
                found.append(function)
            if isinstance(child, ast.ClassDef):
                _collect(child, name, source, lines, found)
        elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            _collect(child, prefix, source, lines, found)


def _build(node: Definition, name: str, source: SourceFile, lines: list[str]) -> CodeFunction | None:
    docstring_node = _docstring_node(node)
    if docstring_node is None:
        return None
    value = docstring_node.value
    assert isinstance(value, ast.Constant)
    assert isinstance(value.value, str)
    docstring = inspect.cleandoc(value.value.encode("utf-8", "replace").decode("utf-8"))
    code = _code_without_docstrings(node, lines)
    query = first_sentence(docstring)
    if not query or not code:
        return None
    code = code[:MAX_CODE_CHARACTERS]
    return CodeFunction(
        package=source.package,
        file=source.file,
        line=node.lineno,
        name=name,
        signature=_signature(node, name),
        docstring=docstring[:MAX_DOCSTRING_CHARACTERS],
        query=query,
        code=code,
        prepared_query=prepare_query(query),
        prepared_code=prepare_code(code),
        held_out=is_held_out(source.package, source.file),
    )


def _docstring_node(node: Definition) -> ast.Expr | None:
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first if first.value.value.strip() else None
    return None


def _code_without_docstrings(node: Definition, lines: list[str]) -> str:
    """Source of a definition without its docstring and those of everything inside; empty for one-line definitions."""
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, _DEFINITIONS):
            docstring = _docstring_node(inner)
            if docstring is None:
                continue
            if docstring.lineno == inner.lineno:  # `def f(): "text"`: no body worth having
                if inner is node:
                    return ""
                continue
            dropped.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    kept = [lines[i - 1] for i in range(node.lineno, (node.end_lineno or node.lineno) + 1) if i not in dropped]
    indent = len(kept[0]) - len(kept[0].lstrip())
    return "\n".join(line[indent:] if line[:indent].isspace() else line for line in kept if line.strip())


def _signature(node: Definition, name: str) -> str:
    """Qualified name with the names of the arguments: `json.dump(obj, fp, indent)`."""
    if isinstance(node, ast.ClassDef):
        return f"{name}({', '.join(ast.unparse(base) for base in node.bases)})"
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return f"{name}({', '.join(a for a in names if a not in ('self', 'cls'))})"
