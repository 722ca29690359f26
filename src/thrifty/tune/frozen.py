"""What a search froze before any calibration example was seen: the plans to test, in their order, and why no others.

Kept in `search.json`. Once the calibration examples have been opened against it, it is not searched again: a second run
in the same folder, with a larger budget too, tests what was frozen, and is the same use of the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from thrifty.bench.key import digest
from thrifty.errors import InvalidInput
from thrifty.plan import Plan
from thrifty.tune.calibration import Claim
from thrifty.tune.certificate import write_whole
from thrifty.tune.found import Found
from thrifty.tune.losses import Losses

FORMAT = 1
_JSON = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
HOPELESS_Z = 1.2816
"""Standard errors by which a plan's loss on the search examples has to pass alpha before it is left out (one-sided
90%)."""


@dataclass(frozen=True)
class Frozen:
    """See the top of the module. `hash` covers the order, the claim and all that led to them."""

    request: str
    """digest of what the search was asked: the same request may go on from this file"""
    hash: str
    reference: Plan
    order: tuple[Plan, ...]
    """to be tested, safest first; without the reference where it needs no test"""
    left_out: tuple[tuple[str, str], ...]
    """plans of the search's order that are not tested, and why"""
    search_losses: Mapping[str, float]
    """mean loss on the search examples by plan hash"""
    found: Mapping[str, Any]
    """the search as `Found.to_dict` has it"""
    claim: Claim
    space: int
    """plans of the space that these engines can run, the reference counted; of a space that was not expanded its
    choices"""
    opened: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "thrifty_search": FORMAT,
            "request": self.request,
            "hash": self.hash,
            "opened": self.opened,
            "claim": asdict(self.claim),
            "space": self.space,
            "reference": self.reference.to_dict(),
            "order": [plan.to_dict() for plan in self.order],
            "left_out": [list(pair) for pair in self.left_out],
            "search_losses": dict(self.search_losses),
            "found": dict(self.found),
        }

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises ThriftyError when it cannot be written."""
        write_whole(path, orjson.dumps(self.to_dict(), option=_JSON))

    def with_opened(self, opened: bool) -> Frozen:
        """The same, its calibration examples opened or not."""
        return replace(self, opened=opened)


def load(path: Path) -> Frozen | None:
    """Reads `search.json`; None where there is none. Raises InvalidInput for a file that is not one of ours."""
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: cannot be read as a frozen search: {error}: give another --out") from error
    try:
        if data["thrifty_search"] != FORMAT:
            raise KeyError("thrifty_search")
        frozen = Frozen(
            request=str(data["request"]),
            hash=str(data["hash"]),
            reference=Plan.from_dict(data["reference"]),
            order=tuple(Plan.from_dict(plan) for plan in data["order"]),
            left_out=tuple((str(name), str(why)) for name, why in data["left_out"]),
            search_losses={str(k): float(v) for k, v in data["search_losses"].items()},
            found=dict(data["found"]),
            claim=Claim(**data["claim"]),
            space=int(data["space"]),
            opened=data["opened"] is True,
        )
        fixed = _hash(frozen.found["frozen"], frozen.order, frozen.claim)
    except (KeyError, TypeError, ValueError, AttributeError, InvalidInput) as error:
        raise InvalidInput(
            f"{path}: is no frozen search that can be read here ({type(error).__name__}: {error}): give another --out"
        ) from error
    if fixed != frozen.hash:
        raise InvalidInput(
            f"{path}: what it froze was changed, or this Thrifty has other versions of its methods: give another --out"
        )
    return frozen


def freeze(found: Found, claim: Claim, request: str, losses: Mapping[str, Losses], space: int) -> Frozen:
    """Fixes what is tested, from the search alone.

    Under `drop` and `disagree` the reference loses nothing and needs no test, and plans that spend as much as it are
    pointless: only what is cheaper is tested. What the search examples show to lose more than alpha is left out too: a
    failed test ends the sequence, so it would cost a run on all examples and block what stands behind it. Both rules
    bear on what may be found; none on whether a certificate is right, for they never see a calibration example.
    """
    axis = {candidate.plan.hash: candidate.axis for candidate in found.ranked}
    base = axis.get(found.reference.hash)
    order: list[Plan] = []
    left_out: list[tuple[str, str]] = []
    for plan in found.order:
        loss = losses.get(plan.hash)
        if plan.hash == found.reference.hash:
            if claim.loss == "error":
                order.append(plan)
        elif claim.loss != "error" and base is not None and axis[plan.hash] >= base:
            left_out.append((plan.name, f"takes no less {found.settings.axis} than the reference"))
        elif loss is not None and _least(loss) > claim.alpha:
            why = f"loses {loss.mean:.3f} on the {loss.n} groups searched on: too much for alpha {claim.alpha:g}"
            left_out.append((plan.name, why))
        else:
            order.append(plan)
    return Frozen(
        request=request,
        hash=_hash(found.frozen, order, claim),
        reference=found.reference,
        order=tuple(order),
        left_out=tuple(left_out),
        search_losses={name: each.mean for name, each in losses.items()},
        found=found.to_dict(),
        claim=claim,
        space=space,
    )


def request_of(
    reference: Plan, space: str, data: Sequence[str], settings: Any, claim: Claim, engines: Any, sampling: Any
) -> str:
    """Digest of what a search is asked. `space`: its hash; `data`: hashes of the three parts."""
    return digest([reference.hash, space, list(data), asdict(settings), asdict(claim), engines, sampling])


def _hash(search: str, order: Sequence[Plan], claim: Claim) -> str:
    return digest([search, [plan.hash for plan in order], asdict(claim)])


def _least(losses: Losses) -> float:
    """A lower bound of the mean loss, about one-sided 90%; the mean itself where all losses are alike."""
    if losses.n < 2:
        return losses.low
    return losses.mean - HOPELESS_Z * float(np.std(losses.values, ddof=1)) / losses.n**0.5
