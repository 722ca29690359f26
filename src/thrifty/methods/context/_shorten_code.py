"""Code made shorter that still parses: bodies of functions and blocks give way to a comment.

Python is read by its own parser. Languages of the C family (C, C++, Java, JavaScript, TypeScript, Go, Rust, C#, CSS)
are read by their braces, outside strings and comments; there only blocks of whole lines are emptied."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thrifty.methods.context._shorten_text import split_lines

Fits = Callable[[str], bool]
_PYTHON = re.compile(r"(?m)^(?:def|class|async def)\s+\w+")
"""What text must have before it is parsed at all."""


def shorten_python(text: str, fits: Fits, matches: Callable[[str], bool], back: str) -> str | None:
    """The largest bodies without a match go first, then those with one, docstrings, classes, statements from the end.
    None where it is no Python with a function or a class, or where nothing fits."""
    tree = _parsed(text) if _PYTHON.search(text) else None
    if tree is None or not any(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in tree.body):
        return None
    lines = split_lines(text)

    def build(gone: Sequence[_Span]) -> str:
        told = f"; {back}" if back else ""
        return "".join(_without(lines, gone, "...  # {lines} left out" + told, "...  # {lines} left out"))

    spans = [s for n in ast.walk(tree) if (s := _body(n, lines)) is not None]
    functions = [s for s in spans if not s.is_class]

    def rank(s: _Span) -> tuple[bool, int]:
        return any(matches(line) for line in lines[s.start : s.stop]), s.start - s.stop

    ordered = sorted(functions, key=rank)
    classes = [s for s in spans if s.is_class]
    best = _fewest(lambda k: build(ordered[:k]), len(ordered), fits)
    bare = [s for n in ast.walk(tree) if (s := _body(n, lines, docstring=True)) is not None and not s.is_class]
    for further in (bare, classes + functions):
        if best is None and fits(shorter := build(further)):
            best = shorter
    if best is None:
        best = _statements(tree, lines, build, functions, classes, fits, back)
    return best if best is not None and _parsed(best) is not None else None


def shorten_braces(text: str, fits: Fits, back: str) -> str | None:
    """Empties the deepest blocks, and less deep ones until it fits. None where it does not look like such a language,
    where its braces do not balance, or where nothing fits."""
    lines = split_lines(text)
    if sum(bool(re.search(r"[{;]\s*$", line)) for line in lines) < max(3, len(lines) // 10):
        return None
    blocks = _blocks(text)
    if not blocks:
        return None
    told = f"; {back}" if back else ""
    for depth in range(max(b.depth for b in blocks), -1, -1):
        gone = [b for b in blocks if b.depth == depth and b.stop > b.start]
        if gone:
            candidate = "".join(_without(lines, gone, "/* {lines} left out" + told + " */", "/* {lines} left out */"))
            if fits(candidate) and _blocks(candidate) is not None:
                return candidate
    return None


# -- details -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Span:
    """Lines [start, stop) that can give way."""

    start: int
    stop: int
    depth: int = 0
    is_class: bool = False


def _parsed(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _body(node: ast.AST, lines: Sequence[str], docstring: bool = False) -> _Span | None:
    """The lines of a function's or class's body, where they are lines of its own; behind its docstring, or with it."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return None
    body = node.body
    if not docstring and len(body) > 1 and ast.get_docstring(node, clean=False) is not None:
        before, body = body[0].end_lineno or 0, body[1:]
    else:
        before = node.lineno
    first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", ()))])
    stop = body[-1].end_lineno or first
    alone = first > before and not lines[first - 1][: body[0].col_offset].strip()
    if not alone or stop - first < 1:
        return None
    return _Span(first - 1, stop, is_class=isinstance(node, ast.ClassDef))


def _fewest(build: Callable[[int], str], n: int, fits: Fits) -> str | None:
    """The text with the fewest of n cuts that fits."""
    low, high = 1, n
    best: str | None = None
    while low <= high:
        middle = (low + high) // 2
        candidate = build(middle)
        if fits(candidate):
            best, high = candidate, middle - 1
        else:
            low = middle + 1
    return best


def _statements(
    tree: ast.Module,
    lines: Sequence[str],
    build: Callable[[Sequence[_Span]], str],
    functions: Sequence[_Span],
    classes: Sequence[_Span],
    fits: Fits,
    back: str,
) -> str | None:
    """As many statements of the outline as fit, from the first, and a comment for the rest."""
    outline = build([*classes, *functions])
    short = _parsed(outline)
    if short is None:
        return None
    shown = split_lines(outline)
    told = f"; {back}" if back else ""

    def first(cut: int) -> str:
        keep = len(short.body) - cut
        stop = short.body[keep - 1].end_lineno or 0 if keep else 0
        behind = tree.body[keep - 1].end_lineno or 0 if keep else 0
        text = "".join(shown[:stop])
        text += "" if not text or text.endswith("\n") else "\n"
        return f"{text}# {len(lines) - behind} lines left out{told}\n"

    return _fewest(first, len(short.body), fits)


def _without(lines: Sequence[str], gone: Sequence[_Span], first_mark: str, mark: str) -> list[str]:
    """The lines, each outermost span replaced by its mark, at the indent of its first line."""
    out: list[str] = []
    at, told = 0, False
    for span in sorted(gone, key=lambda s: (s.start, -s.stop)):
        if span.start < at:
            continue  # inside one that has gone
        out += lines[at : span.start]
        n = span.stop - span.start
        words = (mark if told else first_mark).replace("{lines}", "1 line" if n == 1 else f"{n} lines")
        first = lines[span.start]
        indent = first[: len(first) - len(first.lstrip())] if first.strip() else ""
        end = "\n" if lines[span.stop - 1].endswith(("\n", "\r")) else ""
        out.append(indent + words + end)
        at, told = span.stop, True
    return [*out, *lines[at:]]


_SKIPPED = re.compile(
    r"""//[^\n]*|/\*[^*]*(?:\*(?!/)[^*]*)*(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*(?:`|\Z)"""
    r"""|[{}]|\n""",
    re.DOTALL,
)
"""Comments, strings, braces, line ends. What is never closed runs to the end, so that reading takes linear time."""


def _blocks(text: str) -> list[_Span] | None:
    """The lines strictly between the braces of each block, with its depth, where no code shares a line with its braces
    inside; None where braces do not balance."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    line, found = 0, []
    stack: list[tuple[int, bool]] = []
    for match in _SKIPPED.finditer(text):
        token = match[0]
        if token == "{":
            behind = text[match.end() : _line_end(text, match.end())].strip()
            stack.append((line, not behind or behind.startswith(("//", "/*"))))
        elif token == "}":
            if not stack:
                return None
            opened, clean = stack.pop()
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
            if line - opened > 1 and clean and not before:
                found.append(_Span(opened + 1, line, len(stack)))
        line += token.count("\n")
    return None if stack else found


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end
