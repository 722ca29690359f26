"""Python files in functions and blocks of whole statements, and a file again with only some of them.

Lines [start, stop) count from 0. Whatever is left out, the rest parses: only whole statements of one body go, and a
placeholder takes their place."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from thrifty.methods.context._documents import parsed
from thrifty.methods.context._shorten_text import split_lines

_HEADERS = (ast.With, ast.AsyncWith, ast.For, ast.AsyncFor, ast.While, ast.If)


@dataclass(frozen=True, slots=True)
class Span:
    """Lines [start, stop) of one file."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Function:
    """A function or a method whose body has lines of its own. `start`: of its first decorator; `body`: its statements,
    side by side, each with the comments before it."""

    start: int
    stop: int
    body: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Lines of the body."""
        return self.stop - self.body[0].start


@dataclass(frozen=True, slots=True)
class File:
    """One file: its lines, the functions in it, and its outermost statements, side by side."""

    lines: tuple[str, ...]
    functions: tuple[Function, ...]
    top: tuple[Span, ...]

    @classmethod
    def of(cls, text: str, tree: ast.Module) -> File:
        """A parsed file. Functions inside functions are part of them; a statement that shares a line with another is
        one with it."""
        lines = split_lines(text)
        found: list[Function] = []
        for node in tree.body:
            _functions(node, lines, found)
        return cls(tuple(lines), tuple(found), tuple(_spans(tree.body, 0, len(lines))))

    def text(self, span: Span | Function) -> str:
        """Its lines."""
        return "".join(self.lines[span.start : span.stop])

    def build(self, kept: Collection[Span], dropped: Collection[Span] = (), back: str = "") -> str:
        """The file with those statements of its functions that are in `kept`, without the outermost ones in `dropped`.
        The first placeholder says `back`."""
        out: list[str] = []
        at, told = 0, back
        gone = sorted((span for span in dropped), key=lambda s: s.start)
        for first, last in _runs(gone):
            inside = [f for f in self.functions if at <= f.start and f.stop <= first]
            at, told = self._functions(out, inside, at, first, kept, told)
            out.append(_placeholder(self.lines, first, last, "", told))
            at, told = last, ""
        rest = [f for f in self.functions if f.start >= at]
        self._functions(out, rest, at, len(self.lines), kept, told)
        return "".join(out)

    def _functions(
        self, out: list[str], functions: Sequence[Function], at: int, stop: int, kept: Collection[Span], told: str
    ) -> tuple[int, str]:
        """Lines [at, stop), a placeholder for each run of statements that are not kept."""
        for function in functions:
            for first, last in _runs([s for s in function.body if s not in kept]):
                out += self.lines[at:first]
                out.append(_placeholder(self.lines, first, last, "...  ", told))
                at, told = last, ""
        out += self.lines[at:stop]
        return stop, told


def parses(text: str) -> bool:
    """Whether Python reads it."""
    return parsed(text) is not None


def _functions(node: ast.stmt, lines: Sequence[str], found: list[Function]) -> None:
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            _functions(inner, lines, found)
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    body = node.body
    while len(body) == 1 and isinstance(body[0], _HEADERS) and not getattr(body[0], "orelse", ()):
        body = body[0].body  # one statement that holds all others: what is in it can go, one by one
    before = body[0].lineno - 1
    alone = not lines[before][: _characters(lines[before], body[0].col_offset)].strip()
    stop = node.end_lineno or node.lineno
    if alone and before >= node.lineno and (body[-1].end_lineno or stop) == stop:
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        spans = _spans(body, _first_line(body[0]), stop)
        if not _shares_end(lines, spans[-1], body[-1]):
            found.append(Function(start, stop, tuple(spans)))


def _spans(body: Sequence[ast.stmt], start: int, stop: int) -> list[Span]:
    """Statements as line spans that cover [start, stop): each begins where the last ended."""
    found: list[Span] = []
    at = start
    for i, node in enumerate(body):
        end = stop if i == len(body) - 1 else node.end_lineno or at
        if i + 1 < len(body) and _first_line(body[i + 1]) < end:
            continue  # the next one begins on this one's last line
        found.append(Span(at, end))
        at = end
    return [span for span in found if span.stop > span.start]


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1


def _characters(line: str, offset: int) -> int:
    """A column in UTF-8 bytes, as `ast` gives it, in characters."""
    return len(line.encode("utf-8", "surrogatepass")[:offset].decode("utf-8", "ignore"))


def _shares_end(lines: Sequence[str], span: Span, node: ast.stmt) -> bool:
    """Whether something but a comment stands behind a body's last statement, on its line."""
    line = lines[span.stop - 1]
    rest = line[_characters(line, node.end_col_offset or 0) :].strip()
    return bool(rest) and not rest.startswith(("#", ";"))


def _runs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Neighbouring spans as one: (first line, one past the last)."""
    runs: list[tuple[int, int]] = []
    for span in spans:
        if runs and runs[-1][1] == span.start:
            runs[-1] = (runs[-1][0], span.stop)
        else:
            runs.append((span.start, span.stop))
    return runs


def _placeholder(lines: Sequence[str], first: int, last: int, stub: str, back: str) -> str:
    """One line for lines [first, last): `...` where a body needs a statement, and how many are missing."""
    shown = next((line for line in lines[first:last] if re.match(r"\s*[^\s#]", line)), lines[first])
    indent = shown[: len(shown) - len(shown.lstrip())] if stub and shown.strip() else ""
    count = "1 line" if last - first == 1 else f"{last - first} lines"
    end = "\n" if lines[last - 1].endswith(("\n", "\r")) else ""
    return f"{indent}{stub}# {count} left out{'; ' + back if back else ''}{end}"
