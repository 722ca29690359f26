"""The semantic cache on MiniLM: paraphrases are served, and what MiniLM cannot tell apart is not."""

from __future__ import annotations

from typing import Any

import pytest

from thrifty import Account, Plan
from thrifty.call import Call
from thrifty.engines.scripted import Draw, ScriptedEngine
from thrifty.methods.route.semantic_cache import SemanticCache


@pytest.mark.parametrize(
    ("asked", "again", "guard", "served"),
    [
        ("How do I reset my password?", "How can I reset my password?", True, True),
        ("How do I cancel my subscription?", "I want to cancel my subscription, how do I do that?", True, True),
        ("flights from Paris to London", "flights from London to Paris", True, False),
        ("flights from Paris to London", "flights from London to Paris", False, True),
        ("What was revenue in Q1 2024?", "What was revenue in Q1 2023?", True, False),
        ("How do I sort a list ascending in Python?", "How do I sort a list descending in Python?", True, False),
        ("x = 1; " * 200 + "What is x?", "x = 1; " * 200 + "What is y?", True, False),
    ],
)
async def test_what_is_served(minilm: Any, asked: str, again: str, guard: bool, served: bool) -> None:
    def say(call: Call, draw: Draw) -> str:
        return f"about {call.question()}"

    engine = ScriptedEngine(say)
    pipeline = Plan("cached", (SemanticCache(guard=guard),)).build({"answer": engine, "embedder": minilm})
    account = Account("ann")
    await pipeline.ask(asked, account)
    answer = await pipeline.ask(again, account)
    assert (answer.text == f"about {asked}") == served == (len(engine.calls) == 1)
