"""How complex a piece of Python is, by five measures, from its syntax tree and its tokens.

Used to label training queries by their reference solutions: at test time there is no solution, and complexity is
predicted from the query. Nothing is executed. Where tools differ, the rule taken stands in the docstring."""

from __future__ import annotations

import ast
import io
import keyword
import math
import tokenize
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from thrifty.errors import InvalidInput

_CLOSERS = {")", "]", "}"}
_OPERANDS = {"None", "True", "False"}
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True, slots=True)
class Complexity:
    """Five measures of one piece of code; `maintainability` (0 to 100) is the only one that falls with complexity."""

    lines: int
    cyclomatic: int
    halstead: float
    cognitive: int
    maintainability: float


def complexity(code: str) -> Complexity:
    """The five measures of Python source. Raises InvalidInput for source that does not parse.

    >>> complexity("def f(x):\\n    return x + 1\\n").cyclomatic
    1
    """
    try:
        tree = ast.parse(code)
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise InvalidInput(f"code that is no Python: {error}: give the reference solution's source") from error
    docs = _docstrings(tree)
    kept = [t for t in tokens if t.type not in _LAYOUT and t.start not in docs]
    lines = len({line for t in kept for line in range(t.start[0], t.end[0] + 1)})
    branches, volume = cyclomatic(tree), halstead_volume(kept)
    return Complexity(lines, branches, volume, cognitive(tree), maintainability(volume, branches, lines))


def cyclomatic(tree: ast.AST) -> int:
    """McCabe's number of the whole piece: 1 and one for every `if`, `elif`, ternary, loop, `except`, `assert`,
    `for` and `if` of a comprehension, `case` with a pattern, and one for each operand of `and`/`or` after the first."""
    total = 1
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)):
            total += 1
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, ast.match_case):
            wild = isinstance(node.pattern, ast.MatchAs) and node.pattern.pattern is None and node.guard is None
            total += not wild
    return total


def halstead_volume(tokens: Sequence[tokenize.TokenInfo]) -> float:
    """N log2 n of Halstead: N operators and operands in all, n different ones.

    Operands are names, numbers, texts, True, False and None; operators are keywords and signs, where a closing bracket
    belongs to its opening one."""
    seen = [(_is_operand(t), t.string) for t in tokens if t.string not in _CLOSERS or t.type != tokenize.OP]
    return len(seen) * math.log2(len(set(seen))) if seen else 0.0


def cognitive(tree: ast.AST) -> int:
    """Cognitive complexity (Campbell 2018): one for each break of the linear flow, and one for each level it is nested
    in. `elif` and `else` add one and no nesting; a run of equal `and`/`or` adds one; so does a function that calls
    itself. A function within a function nests what it holds."""
    return _Cognitive().of(tree)


def maintainability(volume: float, branches: int, lines: int) -> float:
    """The maintainability index on 0 to 100: max(0, 171 - 5.2 ln V - 0.23 CC - 16.2 ln LOC) / 1.71."""
    if lines == 0:
        return 100.0
    index = 171 - 5.2 * math.log(max(volume, 1.0)) - 0.23 * branches - 16.2 * math.log(lines)
    return max(0.0, min(100.0, index / 1.71))


def scores(measured: Sequence[Complexity], weights: Sequence[float] = (1, 1, 1, 1, 1)) -> list[float]:
    """One complexity a piece, in [0, 1]: each measure scaled to the range of the whole set (maintainability turned
    round; a measure that is the same everywhere counts 0), then the weighted mean. The paper's weights are not in what
    was seen of it; equal ones are OURS. Raises InvalidInput for weights that are not five of at least 0."""
    if len(weights) != len(fields(Complexity)) or min(weights) < 0 or not sum(weights) > 0:
        raise InvalidInput(f"weights {list(weights)}: five numbers of at least 0, one above 0, are needed")
    rows = [(*astuple(m)[:4], -m.maintainability) for m in measured]
    total = [0.0] * len(rows)
    for j, weight in enumerate(weights):
        column = [row[j] for row in rows]
        low, high = min(column, default=0.0), max(column, default=0.0)
        for i, value in enumerate(column):
            total[i] += weight * (value - low) / (high - low) if high > low else 0.0
    return [t / sum(weights) for t in total]


# -- details -------------------------------------------------------------------------------------------------


def _is_operand(token: tokenize.TokenInfo) -> bool:
    if token.type == tokenize.NAME:
        return token.string in _OPERANDS or not keyword.iskeyword(token.string)
    return token.type != tokenize.OP


def _docstrings(tree: ast.AST) -> set[tuple[int, int]]:
    """Where texts begin that stand as statements of their own."""
    return {
        (node.lineno, node.col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


class _Cognitive:
    """Walks statements and expressions with the nesting they stand in."""

    def of(self, node: ast.AST, nesting: int = 0, functions: tuple[str, ...] = ()) -> int:
        if isinstance(node, ast.If):
            return self._if(node, nesting, functions, first=True)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = nesting + 1 if functions else nesting
            name = "" if isinstance(node, ast.Lambda) else node.name
            own = 1 if name and _calls(node, name) else 0
            return own + self._children(node, inside, (*functions, name))
        if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            head = [node.test] if isinstance(node, ast.While) else [node.target, node.iter]
            total = 1 + nesting + self._all(head, nesting, functions) + self._all(node.body, nesting + 1, functions)
            return total + (1 + self._all(node.orelse, nesting + 1, functions) if node.orelse else 0)
        if isinstance(node, (ast.IfExp, ast.ExceptHandler, ast.Match)):
            return 1 + nesting + self._children(node, nesting + 1, functions)
        if isinstance(node, ast.BoolOp):
            return 1 + self._children(node, nesting, functions)
        return self._children(node, nesting, functions)

    def _if(self, node: ast.If, nesting: int, functions: tuple[str, ...], first: bool) -> int:
        total = 1 + (nesting if first else 0)
        total += self.of(node.test, nesting, functions) + self._all(node.body, nesting + 1, functions)
        if len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
            return total + self._if(node.orelse[0], nesting, functions, first=False)
        return total + (1 + self._all(node.orelse, nesting + 1, functions) if node.orelse else 0)

    def _children(self, node: ast.AST, nesting: int, functions: tuple[str, ...]) -> int:
        return self._all(list(ast.iter_child_nodes(node)), nesting, functions)

    def _all(self, nodes: Sequence[ast.AST], nesting: int, functions: tuple[str, ...]) -> int:
        return sum(self.of(node, nesting, functions) for node in nodes)


def _calls(node: ast.AST, name: str) -> bool:
    return any(
        isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name
        for call in ast.walk(node)
    )
