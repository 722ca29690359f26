"""Where laws are tried: an engine a method can run on, a ledger, one call, and what came of it.

`ENGINES` names the kinds of engine; a method runs on every one that has its needs. The tiny model is a random
Llama with three layers in the local engine: it says nothing of sense, and spends, forks, streams and is
cancelled as any local model does. White-box methods run on it; laws of theirs (padding, chunks, kept set)
join `law_table.LAWS`.

`SETTINGS` gives knobs with which a method fires on the call below, where its defaults would not: a law that
only ever saw a no-op shows nothing, so a method that does not fire fails the table."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thrifty import Account, Answer, Budget, Call, Delta, Method, Pipeline, Plan, Receipt, Sampling, Spend
from thrifty.call import text_of
from thrifty.engines.kinds import KNOWN
from thrifty.engines.scripted import PROVIDES, Draw, Reply, ScriptedEngine
from thrifty.ledger import MemoryLedger
from thrifty.spend import total_spend

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "adaptive-k": {"buffer": 1},
    "fixed-k": {"k": 3},
    "truncation": {"tokens": 30},
    "perplexity-compression": {"ratio": 0.4, "contrastive": True, "least": 20},
    "long-code-zip": {"ratio": 0.6, "least": 20},
    "ecorag": {"tokens": 30, "rounds": 2},
    "tcra": {"ratio": 0.3},
    "realm": {"k": 3, "calls": 4},
    "refiner": {"tokens": 40},
    "rcr-router": {"base": 30},
    "compaction": {"tokens": 40, "recent": 1, "older": "summary", "note": 32},
    "tool-output": {"tokens": 24},
    "tool-retrieval": {"k": 3},
    "plan-and-budget": {"plan_tokens": 24},
    "dynaicl": {"pack": str(Path(__file__).with_name("dynaicl.json")), "shots": 2.0},
    "pet-select": {"selector": str(Path(__file__).with_name("pet_select.json")), "ask_tokens": 24},
    "tale": {"fallback": 40, "estimate_tokens": 24},
    "sketch-of-thought": {"weights": str(Path(__file__).with_name("sketch_router.json")), "shots": 1},
    "no-thinking": {"unknown": "force"},
    "prompt-caching": {"provider": "anthropic", "minimum": 1, "turns": "always"},
    "beam": {"step_tokens": 4, "keep": 4},
    "self-certainty": {"step_tokens": 4, "keep": 4},
    "a-star-decoding": {"step_tokens": 4, "keep": 4},
    "latent-trajectory": {"samples": 2, "segment": 1, "threshold": 2.0},
    "answer-convergence": {
        "agree": 1,
        "boundary": "token",
        "cue": "",
        "keep": 1,
        "probe_tokens": 8,
        "chunk": 4,
        "unknown": "force",
        "begin": "prefix",
    },
    "thought-terminator": {
        "deadline": 2,
        "answer_tokens": 8,
        "last_words": "",
        "cue": "",
        "keep": 1,
        "unknown": "force",
        "begin": "prefix",
    },
    "budget-forcing": {"most": 1, "cue": "", "keep": 1, "unknown": "force", "begin": "prefix"},
    "cyclic-reflex": {"words": ["a", "e"], "period": 4, "keep": 0, "unknown": "force", "begin": "prefix"},
    "cgrs": {"threshold": 0.0, "words": ["a", "e"], "boundary": "token", "cue": "=", "probe_tokens": 1, "every": 4}
    | {"keep": 0, "unknown": "force", "begin": "prefix"},
    "adaptive-think": {"alpha": 1.0, "options": ["a", "e"], "boundary": "token", "merge": 0, "cue": "="}
    | {"closing": "+", "keep": 0, "unknown": "force", "begin": "prefix"},
    "budget-guidance": {"predictor": str(Path(__file__).with_name("budget_guidance.safetensors")), "most": 8}
    | {"closing": "+", "keep": 0, "unknown": "force", "begin": "prefix"},
    "soft-thinking": {"keep": 0, "unknown": "force", "begin": "prefix"},
    "swi-reasoning": {"keep": 0, "unknown": "force", "begin": "prefix"},
}

FACTS = (
    "cats purr",
    "the code is 42",
    "dogs bark",
    "rain falls",
    "the sun is hot",
    "owls hunt",
    "bees hum",
    "ice melts",
)
PASSAGES = tuple(f"Note {i}: {fact}, as everybody here knows." for i, fact in enumerate(FACTS))
QUESTION = "What is the code?"
IMAGE = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"},
    "x_unknown": 1,
}
TOOLS = ({"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}},)


def conversation() -> tuple[dict[str, Any], ...]:
    """An older exchange, with a tool's call and its result, before the question."""
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    lines = "\n".join(f"line {i}: nothing of note was found here" for i in range(40))
    return (
        {"role": "user", "content": "Look for the code, please, wherever it may be."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": lines},
        {"role": "assistant", "content": "There is nothing of note, as far as I can see. " * 3},
        {"role": "user", "content": QUESTION},
    )


def _catalogue() -> tuple[dict[str, Any], ...]:
    """A tool for each fact, with a description long enough to be worth leaving out."""
    tools = []
    for i, fact in enumerate(FACTS):
        told = f"Looks up whether {fact}. " + "It takes one text and gives one back."
        function = {"name": f"tool_{i}", "description": told, "parameters": {"type": "object", "properties": {}}}
        tools.append({"type": "function", "function": function})
    return tuple(tools)


CODE = "".join(
    f"def note_{i}(x):\n    # about: {fact}\n    first = x + {i}\n    second = first * {i}\n    third = second - 1\n"
    f"    total = first + second + third\n    print('{fact}', total)\n    return total\n\n\n"
    for i, fact in enumerate(FACTS)
)
"""A file with a function for each fact."""

CALLS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    "long-code-zip": lambda: {"context": (CODE,)},
    "compaction": lambda: {"messages": conversation()},
    "tool-output": lambda: {"messages": conversation()},
    "tool-retrieval": lambda: {"tools": _catalogue()},
}
"""What the call has besides, for methods that work on more than passages and a question."""


def speak(call: Call, draw: Draw) -> Reply:
    """A model of no great mind: it plans when asked to, thinks, and differs from seed to seed."""
    text = "\n".join(text_of(m) for m in call.messages)
    if "JSON only" in text and "Smaller questions" in text:
        return Reply(json.dumps({"level": 2, "credits": [60, 40]}))
    if "in double square brackets" in text:
        return Reply("Budget: [[30]]")
    if "in order; an easy question" in text:
        return Reply("1. Where is the code? (notes)\n2. What does it say? (read)")
    if "Is the solution correct?" in text:
        return Reply("Step 1: \\boxed{correct} Is the solution correct? yes")
    if "the best first, such as" in text:
        return Reply("B, then A.")
    if "Reply with one word: yes or no" in text:
        return Reply("no")
    if "If nothing helps, write NONE" in text:
        return Reply(f"1.1. ## Document 2\n{PASSAGES[1]}\nNobody wrote this.")
    words = ["so"] * draw.randint(2, 20)
    return Reply(" ".join(words) + f" #### {draw.choice(['42', '42', '7'])}", thinking="hm " * draw.randint(1, 6))


class Recorded:
    """An engine that remembers the calls it was asked for, as ScriptedEngine does by itself."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, call: Call) -> Answer:
        self.calls.append(call)
        return await self._engine.generate(call)

    async def open(self, call: Call) -> Any:
        self.calls.append(call)
        return await self._engine.open(call)


@functools.cache
def tiny_model(seed: int = 0) -> Any:
    """One local engine for all worlds; rows run alone, so that calls at the same time can be compared. Another seed is
    another model with the same tokens: a draft."""
    sys.path.append(str(Path(__file__).parents[1] / "engines" / "local"))
    from tiny_chat import TEMPLATE, make_folder

    from thrifty.engines.local.engine import LocalEngine

    template = TEMPLATE.replace("tools | length", "tools | tojson")  # so that a prompt is as long as its tools

    with tempfile.TemporaryDirectory(prefix="thrifty-laws-") as folder:
        made = make_folder(Path(folder) / "tiny", template, positions=4096, seed=seed)
        return LocalEngine.load(made, dtype="float32", deterministic=True)


TINY = "tiny model"
STOPS = ("a", "e", "o", "1", "T")
ENGINES: Mapping[str, Callable[[], Any]] = {
    "scripted": lambda: ScriptedEngine(speak),
    "scripted without branches": lambda: ScriptedEngine(speak, capabilities=PROVIDES - {"branch"}),
    TINY: lambda: Recorded(tiny_model()),
}
CAPABLE: dict[str, frozenset[str]] = {
    "scripted": PROVIDES,
    "scripted without branches": PROVIDES - {"branch"},
}
if importlib.util.find_spec("torch"):
    CAPABLE[TINY] = KNOWN["local"] - {"vision"}
"""What each kind provides, so that the table can be laid out without loading a model."""


def engines_for(method: type[Method]) -> list[str]:
    """The kinds of engine that have what a method needs."""
    return [kind for kind, has in CAPABLE.items() if method.needs <= has]


@dataclass
class World:
    """One method, or none, on one engine with one ledger."""

    method: type[Method]
    kind: str = "scripted"
    settings: Mapping[str, Any] | None = None
    budget: Budget = Budget()
    on_exceed: str = "degrade"
    without: bool = False
    """the same plan without the method"""
    below: tuple[Method, ...] = ()
    above: tuple[Method, ...] = ()
    deltas: list[Delta] = field(default_factory=list)

    def __post_init__(self) -> None:
        chosen = SETTINGS.get(self.method.name, {}) if self.settings is None else self.settings
        own = () if self.without else (self.method.from_settings(chosen),)
        self.plan = Plan("law", (*self.above, *own, *self.below), self.budget, on_exceed=self.on_exceed)  # type: ignore[arg-type]
        self.engine = ENGINES[self.kind]()
        wanted = {role for m in self.plan.methods for role in m.roles}
        roles = {r: tiny_model(seed=1) if r == "draft" else ScriptedEngine(speak, model=r) for r in wanted}
        self.pipeline: Pipeline = self.plan.build({**roles, "answer": self.engine})
        self.ledger = MemoryLedger()
        self.account = Account("law", ledger=self.ledger)

    def call(self, **changes: Any) -> Call:
        """The call that laws make: passages, a question, a seed."""
        sampling = Sampling(seed=5, temperature=0.5)
        if self.kind == TINY:  # it never ends by itself: a letter that it says often is its end
            sampling = replace(sampling, max_tokens=12, stop=STOPS)
        call = self.pipeline.call(QUESTION, self.account, context=PASSAGES, sampling=sampling)
        return replace(call, **{**CALLS.get(self.method.name, dict)(), **changes})

    def rich_call(self) -> Call:
        """A call with an image, tools, and fields that Thrifty does not know."""
        message = {
            "role": "user",
            "name": "ann",
            "x_field": [1],
            "content": [IMAGE, {"type": "text", "text": QUESTION}],
        }
        return self.call(messages=(message,), tools=TOOLS, extra={"x_extra": {"deep": 1}, "user": "u1"})

    async def emit(self, delta: Delta) -> None:
        self.deltas.append(delta)

    async def ask(self, **changes: Any) -> Answer:
        return await self.pipeline(self.call(**changes))

    def receipts(self, answer: Answer) -> list[Receipt]:
        """The method's own receipts."""
        return [r for r in answer.receipts if r.method == self.method.name]

    def entered(self, method: str | None = None) -> Spend:
        """The sum of the ledger's entries: all, or those under one method's name."""
        return total_spend(e.spend for e in self.ledger.entries() if method is None or e.labels.method == method)


async def turns(n: int, kind: str) -> None:
    """Lets every other task run n times; a model in a thread gets time instead."""
    if kind == TINY:
        await asyncio.sleep(n / 800)
        return
    for _ in range(n):
        await asyncio.sleep(0)
