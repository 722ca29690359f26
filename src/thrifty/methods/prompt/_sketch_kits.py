"""What Sketch-of-Thought shows a model for each paradigm: how to sketch, and worked examples.

All of it is OURS, written from the paper's description of the paradigms (section 3); the paper's own prompts are about
five times as long. A sketch holds no sentence, and each example keeps to the rule that it teaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thrifty.methods.prompt._sketch_router import PARADIGMS


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A question, its sketch and its answer."""

    question: str
    sketch: str
    answer: str


@dataclass(frozen=True, slots=True)
class Kit:
    """One paradigm's instruction and exemplars."""

    rule: str
    exemplars: tuple[Exemplar, ...]


_CHUNKED = Kit(
    "Reason in equations, not in sentences. Name the quantities as variables, with units where there are any, then "
    "write one computation a line. Do not restate the question; write nothing that the result does not need.",
    (
        Exemplar(
            "A car drives 150 km in 2 hours and then 90 km in 1 hour. What is its average speed?",
            "d = 150 + 90 = 240 km\nt = 2 + 1 = 3 h\nv = 240 / 3 = 80 km/h",
            "80 km/h",
        ),
        Exemplar(
            "A shirt costs 40 dollars. It is reduced by 25%, and a tax of 10% is added. What is paid?",
            "p = 40\ns = 40 * 0.75 = 30\nt = 30 * 1.1 = 33",
            "33 dollars",
        ),
        Exemplar(
            "Solve 3x + 5 = 26. A) 5 B) 6 C) 7 D) 8",
            "3x = 26 - 5 = 21\nx = 21 / 3 = 7",
            "C",
        ),
    ),
)
_CHAINING = Kit(
    "Reason in key terms joined by arrows (→), each following from the one before it. No sentences; do not restate the "
    "question; only terms that lead to the answer.",
    (
        Exemplar(
            "What is the currency of the country where the Eiffel Tower stands?",
            "Eiffel Tower → Paris → France → euro",
            "euro",
        ),
        Exemplar(
            "Could someone born in 1990 have met Mozart?",
            "Mozart → died 1791 → before 1990",
            "no",
        ),
        Exemplar(
            "Where does one wait for a train? A) harbour B) platform C) runway",
            "train → station → platform",
            "B",
        ),
    ),
)
_LEXICONS = Kit(
    "Reason in the notation of the field: its symbols, abbreviations and units (such as ∴, ∝, Δ, ↑, pH, O(n), Dx). "
    "No sentences; do not restate the question; only what the conclusion rests on.",
    (
        Exemplar(
            "A patient has crushing chest pain, ST elevation in II, III and aVF, and raised troponin. "
            "What is the diagnosis?",
            "CP + ↑Tn → MI; STE II/III/aVF → inferior; ∴ inferior STEMI (RCA)",
            "inferior STEMI",
        ),
        Exemplar(
            "Why does binary search need sorted data, and what is its complexity?",
            "cmp(mid) ⇒ discard ½ iff order; T(n) = T(n/2) + O(1) → O(log n)",
            "each comparison rules out one half only if the data are in order; O(log n)",
        ),
        Exemplar(
            "What happens to the volume of a gas at constant temperature when its pressure doubles? "
            "A) doubles B) halves C) stays",
            "PV = nRT; T const ⇒ V ∝ 1/P; P×2 → V×½",
            "B",
        ),
    ),
)

KITS: Mapping[str, Kit] = dict(zip(PARADIGMS, (_CHUNKED, _CHAINING, _LEXICONS), strict=True))
