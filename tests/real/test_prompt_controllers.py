"""PET-Select and DynaICL on the embedded real models: kinds of query told apart by MiniLM in words not trained on, and
plans answered by SmolLM2, their spend on one account."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thrifty import Account, Plan, Sampling
from thrifty.ledger.entry import Labels
from thrifty.methods.prompt.dynaicl import DynaICL, Pack, fit
from thrifty.methods.prompt.pet_select import PetSelect
from thrifty.methods.prompt.pet_select import fit as fit_selector

pytestmark = pytest.mark.real

SIMPLE = (
    "Write a function that returns the sum of two numbers.",
    "Write a function that adds one to a number.",
    "Write a function that returns the length of a text.",
    "Write a function that doubles a number.",
    "Write a function that returns the first member of a list.",
    "Write a function that says whether a number is even.",
    "Write a function that turns a text into upper case.",
    "Write a function that returns the larger of two numbers.",
    "Write a function that returns the last letter of a word.",
    "Write a function that multiplies three numbers.",
)
COMPLEX = (
    "Write a function that finds the shortest path through a weighted graph with negative edges.",
    "Write a function that solves the knapsack problem for items with weights and values.",
    "Write a parser for arithmetic expressions with brackets and operator precedence.",
    "Write a function that finds the longest common subsequence of two texts by dynamic programming.",
    "Write a function that finds all solutions of the eight queens puzzle by backtracking.",
    "Write a function that sorts the nodes of a directed graph topologically and detects cycles.",
    "Write a function that finds the minimum spanning tree of a graph with a union-find structure.",
    "Write a regular expression matcher with stars and dots by recursion.",
    "Write a function that computes the edit distance of two texts with a table.",
    "Write a function that schedules tasks with dependencies and deadlines.",
)

NEW_SIMPLE = (
    "Write a function that subtracts two numbers.",
    "Write a function that reverses a text.",
    "Write a function that returns the smallest number of a list.",
    "Write a function that says whether a text is empty.",
    "Write a function that squares a number.",
    "Write a function that joins two words with a space.",
)
NEW_COMPLEX = (
    "Write a function that finds the maximum flow through a network of pipes.",
    "Write a function that solves a sudoku by constraint propagation and search.",
    "Write an interpreter for a small language with loops and functions.",
    "Write a balanced binary search tree with insertion and deletion.",
    "Write a function that computes the convex hull of points in the plane.",
    "Write a function that compresses data with a Huffman tree and restores it.",
)
"""Never trained on."""


async def vectors_of(engine: Any, texts: list[str]) -> Any:
    return (await engine.embed(texts, Account("t"), Labels())).vectors


def split() -> tuple[list[str], list[str], Any, Any]:
    return [*SIMPLE, *COMPLEX], [*NEW_SIMPLE, *NEW_COMPLEX], np.repeat([0.0, 1.0], 10), np.repeat([0.0, 1.0], 6)


async def test_a_selector_tells_kinds_of_tasks_apart(minilm: Any, smollm2: Any, tmp_path: Path) -> None:
    train, held, hard, truth = split()
    passed = np.stack([hard == 0, np.ones(20, bool)], axis=1)
    tokens = np.tile([100, 400], (20, 1))
    vectors, unseen = await vectors_of(minilm, train), await vectors_of(minilm, held)
    for triplet_epochs, right in ((0, 11), (20, 8)):  # of 12; the triplet loss does not help on a frozen encoder
        selector = fit_selector(
            vectors,
            list(hard),
            passed,
            tokens,
            ("zero-shot", "self-planning"),
            triplet_epochs=triplet_epochs,
            epochs=400,  # 20 queries are one batch, so as many steps
            embedder=minilm.model,
        )
        chances = selector.chances(unseen)[:, 1]
        assert ((chances > 0.5) == truth).sum() >= right
        assert chances[truth > 0].min() > chances[truth == 0].max()
    selector.save(tmp_path / "selector.json")
    plan = Plan("pet", (PetSelect(selector=str(tmp_path / "selector.json"), ask_tokens=16),))
    pipeline, account = plan.build({"answer": smollm2, "embedder": minilm}), Account("t")
    for task, technique, calls in ((SIMPLE[0], "zero-shot", 2), (COMPLEX[0], "self-planning", 3)):
        answer = await pipeline.ask(task, account, sampling=Sampling(max_tokens=8))
        assert answer.receipts[0].detail["technique"] == technique and answer.spend.calls == calls
    assert account.settled.calls == 5 and not account.held


async def test_a_controller_gives_examples_to_the_kind_that_needs_them(
    minilm: Any, smollm2: Any, tmp_path: Path
) -> None:
    train, held, hard, truth = split()
    scores = np.where(hard[:, None] > 0, np.arange(5) >= 3, True).astype(float)  # planted: 0 or 3 of 4
    controller = fit(await vectors_of(minilm, train), scores, epochs=300)
    predicted = np.array(controller.predict(await vectors_of(minilm, held)))
    assert predicted[truth > 0].min() > predicted[truth == 0].max()
    Pack(controller=controller, embedder=minilm.model).save(tmp_path / "pack.json")
    plan = Plan("icl", (DynaICL(pack=str(tmp_path / "pack.json"), shots=1.5),))
    pipeline, account = plan.build({"answer": smollm2, "embedder": minilm}), Account("t")
    simple = await pipeline.ask(SIMPLE[0], account, sampling=Sampling(max_tokens=4))
    complex_ = await pipeline.ask(COMPLEX[0], account, sampling=Sampling(max_tokens=4))
    assert simple.receipts[0].detail["shots"] == 0 and complex_.receipts[0].detail["shots"] == 3
    assert account.settled == simple.spend + complex_.spend and not account.held
