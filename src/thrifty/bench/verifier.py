"""reasoning-gym's own verifiers as a scorer.

Some of them evaluate the answer as Python or as a sympy expression, which runs what the model wrote: a
countdown answer of `__import__('os').system(...)` would be executed. Those are found by reading their source
(a call of eval, exec, parse_expr or sympify that `score_answer` can reach) and run in the sandbox, about two
seconds each; the others run here.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.bench import sandbox
from thrifty.errors import InvalidInput, Unsupported, nearest

_EVALUATE = frozenset({"eval", "exec", "parse_expr", "sympify"})
_LIMITS = sandbox.Limits(cpu_seconds=30, wall_seconds=60.0, memory_bytes=4 << 30, processes=32)


@dataclass(frozen=True)
class ReasoningGym:
    """Scores with the verifier of a reasoning-gym dataset.

    The entry (`question`, `answer`, `metadata`) is the first of these that there is: `entry`; the one generated
    again from `settings`, `seed`, `size` and `index` (for entries that JSON cannot hold); a gold that is an entry;
    the gold as its answer with the metadata of the task's `extra`. The verifier sees the marked final answer (see
    `scorers.final_answer`) or the whole text, stripped. A score counts only if the verifier takes the entry's own
    gold as right.

    Args:
        dataset: its name; where missing, the metadata's `source_dataset`.
        size: of the generated dataset, which changes the entries of some (index + 1 where missing).
        unsafe: run a verifier that evaluates the answer without isolation where the machine has none.

    Raises: InvalidInput for an unknown dataset or an entry that cannot be verified; Unsupported without the package, or
        where a verifier evaluates the answer and the machine cannot isolate it.
    """

    dataset: str | None = None
    entry: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    seed: int | None = None
    index: int | None = None
    size: int | None = None
    unsafe: bool = False

    async def __call__(self, text: str, gold: Any, task: Mapping[str, Any]) -> float:
        from thrifty.bench.scorers import final_answer

        order = self._order(gold, task)
        order["answer"] = final_answer(text).strip()
        if evaluates_answers(order["dataset"]):
            score, own, trouble = await self._isolated(order)
        else:
            score, own, trouble = _verify(order, _verifier(order["dataset"]))
        if own < 1:  # then a low score says nothing about the answer
            raise InvalidInput(
                f"reasoning-gym's {order['dataset']!r} rejects this task's own gold ({trouble or f'score {own:g}'}): "
                "keep the whole entry with its metadata, or, where JSON cannot hold it, settings, seed, size and index"
            )
        return score

    def _order(self, gold: Any, task: Mapping[str, Any]) -> dict[str, Any]:
        """What `_verify` needs, in JSON's types: the dataset, and the entry or how to generate it."""
        entry = self.entry if self.entry is not None else _entry(gold, task)
        name = self.dataset or entry.get("metadata", {}).get("source_dataset")
        if not isinstance(name, str):
            raise InvalidInput("scorer 'reasoning-gym' needs `dataset`, or `source_dataset` in the metadata")
        if self.entry is None and self.seed is not None and self.index is not None:
            make = {**(self.settings or {}), "seed": self.seed, "size": self.size or self.index + 1}
            return {"dataset": name, "index": self.index, "make": make}
        return {"dataset": name, "entry": dict(entry)}

    async def _isolated(self, order: dict[str, Any]) -> tuple[float, float, str]:
        """`_verify` in the sandbox. An answer that makes it fail, exit or pass its limits scores 0."""
        places = list(dict.fromkeys(_place(package) for package in ("reasoning_gym", "sympy", "mpmath", "yaml")))
        mark = secrets.token_hex(16)
        program = (
            f"import json, sys\nsys.path[:0] = {places!r}\nimport reasoning_gym\n"
            f"from collections.abc import Mapping\nfrom typing import Any\n{inspect.getsource(_verify)}\n"
            f"order = json.loads({json.dumps(order)!r})\n"
            f"def tell(score, own, trouble): print({mark!r} + json.dumps([score, own, trouble]), flush=True)\n"
            "tell(0.0, *_verify({**order, 'answer': ''})[1:])\n"
            "tell(*_verify(order))\n"
        )
        outcome = await sandbox.run(program, limits=_LIMITS, readable=places, unsafe=self.unsafe)
        if outcome.status == "refused":
            raise Unsupported(f"reasoning-gym's {order['dataset']!r} evaluates the answer as code: {outcome.reason}")
        reports = [line.removeprefix(mark) for line in outcome.stdout.splitlines() if line.startswith(mark)]
        if not reports:
            last = (outcome.stderr.strip().splitlines() or [outcome.status])[-1]
            raise InvalidInput(f"reasoning-gym's {order['dataset']!r} does not run in the sandbox: {last[:300]}")
        score, own, trouble = json.loads(reports[-1])
        return float(score), float(own), str(trouble)


def _verify(order: Mapping[str, Any], verify: Any = None) -> tuple[float, float, str]:
    """The verifier's score of the answer, its score of the entry's own gold (1 where it has none), and what went
    wrong with the gold. Stands alone, because the sandbox runs it from its source."""
    from reasoning_gym.factory import create_dataset, get_score_answer_fn

    name = order["dataset"]
    entry: Any = order["entry"] if "make" not in order else create_dataset(name, **order["make"])[order["index"]]
    verify = verify or get_score_answer_fn(name)
    scores, trouble = [], ""
    for answer in (order["answer"], entry["answer"]):
        trouble = ""
        try:
            value = float(verify(answer, entry)) if isinstance(answer, str) else 1.0
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError) as bad:
            value, trouble = 0.0, f"{type(bad).__name__}: {bad}"
        scores.append(1.0 if 1.0 < value < 1.0 + 1e-6 else value)  # small rewards for form may add up past 1
    return scores[0], scores[1], trouble


@functools.cache
def evaluates_answers(name: str) -> bool:
    """Whether the verifier of this dataset can reach a call that evaluates text as code."""
    kind, _ = _registered(name)
    owner = next(k for k in kind.__mro__ if "score_answer" in vars(k))
    tree = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    bodies: dict[str, list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bodies.setdefault(node.name, []).append(node)
    waiting, seen = ["score_answer"], set()
    while waiting:
        function = waiting.pop()
        seen.add(function)
        for node in (node for body in bodies.get(function, []) for node in ast.walk(body)):
            used = getattr(node, "id", None) or getattr(node, "attr", None)  # a name, or a method's name
            if used in _EVALUATE and used not in bodies:
                return True
            if used in bodies and used not in seen:
                waiting.append(str(used))
    return False


@functools.cache
def _verifier(name: str) -> Any:
    kind, config = _registered(name)
    return kind(config=config()).score_answer


def _registered(name: str) -> tuple[Any, Any]:
    """The class of a dataset and that of its settings."""
    try:
        import reasoning_gym  # noqa: F401  (fills the registry)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise Unsupported("scorer 'reasoning-gym' needs the package: pip install 'thrifty[bench]'") from error
    known = {known: kinds for known, kinds in DATASETS.items() if known != "composite"}  # that one only mixes others
    if name not in known:
        raise InvalidInput(nearest(name, known, "reasoning-gym dataset"))
    kind, config = known[name]
    return kind, config


def _entry(gold: Any, task: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(gold, Mapping):
        if "answer" not in gold:
            raise InvalidInput("a reasoning-gym entry as gold needs an `answer`")
        return {"question": "", "metadata": {}, **gold}
    from thrifty.bench.llm_judge import question

    return {"question": question(task), "answer": gold, "metadata": dict(task.get("extra", {}).get("metadata", {}))}


def _place(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Unsupported(f"this reasoning-gym verifier needs the package {package}")
    return os.path.realpath(Path(spec.origin).parents[1])
