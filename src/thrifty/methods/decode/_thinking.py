"""What methods that stop, stretch or steer thinking share: their delimiters, and a policy that knows where a branch is.

A `ThinkingPolicy` follows its branch token by token. Invariants: `thought` counts every token that the engine counts as
thinking, drawn or forced; `think` is asked once for each token drawn while thinking goes on, and `closed` once each
time that thinking has ended; whatever they say, thinking is closed while the answer still has `keep` tokens (or, where
there never were as many, at once), and never by text that does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from thrifty.call import Branch, Call, Receipt
from thrifty.engines.finishing import Pieces, Shape
from thrifty.engines.generation import Generation
from thrifty.errors import InvalidInput, Unsupported
from thrifty.method import Policies, knob
from thrifty.policy import CONTINUE, DecodePolicy, Force, Policy, Stop, Verdict
from thrifty.thinking import CLOSING, OPENING, check_tags, has_tags, left_open, no_tags

BOUNDARIES: Mapping[str, str] = {
    "token": "",
    "line": r"\n",
    "paragraph": r"\n[^\S\n]*\n",
    "sentence": r"[.!?][\"')\]]*\s|\n",
}
"""Named step boundaries; any other text is a regular expression. A step ends where a match ends."""

_LONGEST_STEP = 20_000


@dataclass(frozen=True, kw_only=True)
class ThinkingMethod(Policies):
    """Base of methods that act on thinking through a policy; subclasses write `policy`.

    What a method does about a model that is known to lack the tags stands in `ready`. Subclasses that change logits
    add that to `needs`."""

    needs = frozenset({"text", "branch"})

    opening: str = knob(OPENING, "what opens the model's thinking block")
    closing: str = knob(CLOSING, "what closes it")
    unknown: str = knob("refuse", "when the model is known to lack the tags", choices=("refuse", "skip", "force"))
    begin: str = knob(
        "model",
        "who opens the thinking block: the model, its template, a prefix",
        choices=("model", "template", "prefix"),
    )
    keep: int = knob(64, "tokens that thinking leaves for the answer; 0: it does not guard", low=0, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tags(self.name, self.opening, self.closing)

    def policy(self, call: Call) -> ThinkingPolicy:
        """A new policy for one call."""
        raise NotImplementedError(f"{type(self).__name__} attaches nothing")

    def policies(self, call: Call) -> tuple[Policy, ...]:
        return (self.policy(call),)

    def ready(self, call: Call) -> tuple[Call, str | None]:
        """The call with its thinking begun, and None; or the call as it was, and why this method leaves it alone.

        Raises PlanError when the model is known to lack the tags and `unknown` is "refuse".
        """
        if has_tags(call, self.opening, self.closing) is False:
            if self.unknown == "refuse":
                raise no_tags(self.name, call.engines["answer"].model, self.opening, self.closing)
            if self.unknown == "skip":
                return call, f"{self.opening} and {self.closing} are no tokens of the model: it does not think"
        if self.begin != "prefix":
            return call, None
        if call.draft is not None:
            return call, "the call drafts first, and a prefix that opens thinking comes after that"
        if call.prefix is None:
            return replace(call, prefix=f"{self.opening}\n"), None
        if left_open(call.prefix, self.opening, self.closing):
            return call, None
        return call, "the call has a prefix of its own: its answer has begun, so there is no thinking"

    def _attach(self, call: Call) -> Call:
        begun, idle = self.ready(call)
        if idle is not None:
            return call.with_receipt(Receipt(self.name, False, idle))
        return super()._attach(begun)


class ThinkingPolicy(DecodePolicy):
    """Follows one branch; subclasses write `think`, `closed` or `answering`, and `outcome` for the receipt.

    `boundary`: what ends a step of thinking, a name of `BOUNDARIES` or a regular expression. Public attributes are
    settings and part of `key`; state stands in attributes that begin with an underscore, and is read by the properties
    (a subclass keeps its own state so too: lists, dicts and sets are copied when a branch forks)."""

    def __init__(
        self, opening: str = OPENING, closing: str = CLOSING, keep: int = 0, boundary: str = "paragraph"
    ) -> None:
        self.opening, self.closing, self.keep, self.boundary = opening, closing, keep, boundary
        self._pattern = step_pattern(boundary)
        self._pieces: Pieces | None = None
        self._shape: Shape | None = None  # where the engine does not tell these tags apart
        self._read = self._reasoning = self._thought = self._steps = self._blocks = 0
        self._inside = self._was_inside = self._stepped = False
        self._since = self._last_step = ""
        self._closed_why = self._no_room = ""

    # -- what subclasses write ---------------------------------------------------------------------------------

    def think(self, branch: Branch, token: int) -> Verdict:
        """About a token just drawn, after which thinking goes on. It may be the end of the model's text
        (`self.ending(branch)`): Force takes that back."""
        return CONTINUE

    def closed(self, branch: Branch, token: int) -> Verdict:
        """About the token with which thinking was seen to have ended: the model's closing tag, or the first token
        after a forced one."""
        return CONTINUE

    def answering(self, branch: Branch, token: int) -> Verdict:
        """About every other token outside of thinking."""
        return CONTINUE

    def outcome(self, branch: Branch) -> tuple[bool, str, dict[str, Any]]:
        """Fired or not, why, and details: the method's own part of the receipt."""
        return False, "nothing to do", {}

    # -- what they may read ------------------------------------------------------------------------------------

    @property
    def inside(self) -> bool:
        """Whether the branch is inside a thinking block, as of the last token followed."""
        return self._inside

    @property
    def blocks(self) -> int:
        """Thinking blocks begun so far."""
        return self._blocks

    @property
    def thought(self) -> int:
        """Thinking tokens so far."""
        return self._thought

    @property
    def steps(self) -> int:
        """Steps of thinking completed so far."""
        return self._steps

    @property
    def stepped(self) -> bool:
        """Whether the last token completed a step."""
        return self._stepped

    @property
    def step_text(self) -> str:
        """The last completed step, its boundary included."""
        return self._last_step

    @property
    def since_step(self) -> str:
        """The thinking since the last completed step."""
        return self._since

    def ending(self, branch: Branch) -> bool:
        """Whether the model chose to end its text with the last token."""
        return generation(branch).chose_end

    # -- what they may do --------------------------------------------------------------------------------------

    def cost(self, branch: Branch, text: str) -> int:
        """Output tokens of a forced text."""
        return len(generation(branch).codec.encode(text))

    def closing_text(self, cue: str = "") -> str:
        """What is forced to end thinking; `cue` begins the answer."""
        return f"\n{self.closing}\n\n{cue}"

    def close(self, branch: Branch, why: str, cue: str = "") -> Verdict:
        """The verdict that ends thinking, without the cue where that does not fit. Where the tag does not fit either
        it is Continue, and the receipt says so."""
        left = min(room(branch), reasoning_room(branch))
        for text in dict.fromkeys((self.closing_text(cue), self.closing_text(), self.closing)):
            if self.cost(branch, text) <= left:
                self._closed_why = self._closed_why or why
                self._no_room = ""
                return Force(text)
        self._no_room = f"{self.closing} costs {self.cost(branch, self.closing)} tokens and {left:g} are left"
        return CONTINUE

    def must_close(self, branch: Branch, cue: str = "") -> bool:
        """Whether one token more of thinking would take what the closing text and the answer's `keep` tokens need."""
        if not self.keep:
            return False
        n = self.cost(branch, self.closing_text(cue))
        return room(branch) < n + self.keep + 1 or reasoning_room(branch) < n + 1

    def can_probe(self, branch: Branch, text: str, max_tokens: int) -> bool:
        """Whether the budget holds a probe, and after it the closing text and the answer's `keep` tokens."""
        run = generation(branch)
        left = run.call.account.remaining()
        if not left:
            return True
        shared = run.tab.prompt.input + run.output
        said = self.cost(branch, text) + max_tokens
        answer = self.cost(branch, self.closing_text()) + max(1, self.keep)
        more = max(0, answer - (run.tab.held - run.output))
        needs = {"calls": 1, "input": shared, "output": said + more, "tokens": shared + said + more}
        return all(left[r] >= n for r, n in needs.items() if r in left)

    # -- the policy itself -------------------------------------------------------------------------------------

    def follow(self, branch: Branch) -> None:
        """Takes in the tokens since the last call. `after` does it; a subclass's `logits` may do it before."""
        run = generation(branch)
        if self._pieces is None:
            self._begin(run)
        new = run.tokens[self._read :]
        if not new or self._pieces is None:
            return
        piece = self._pieces.add(new)
        self._was_inside = self._inside
        if self._shape is None:
            # a fork's own reasoning begins at 0: what was forced just before it was forked is told by its tokens
            inherited = max(0, run.inherited - self._read) if self._inside else 0
            self._thought += run.reasoning - self._reasoning + inherited
            self._reasoning = run.reasoning
            self._inside = run.shape.inside
        else:
            self._thought += len(new) if self._inside else 0
            self._shape.add(piece)
            self._inside = self._shape.inside
        self._read += len(new)
        self._blocks += int(self._inside and not self._was_inside)
        self._stepped = False
        if self._inside:
            self._take(piece if self._was_inside else piece.partition(self.opening)[2])

    def after(self, branch: Branch, token: int) -> Verdict:
        self.follow(branch)
        if not self._inside:
            return self.closed(branch, token) if self._was_inside else self.answering(branch, token)
        verdict = self.think(branch, token)
        closes = isinstance(verdict, Stop) or (isinstance(verdict, Force) and self.closing in verdict.text)
        if not closes and self.must_close(branch):
            return self.close(branch, "what was left is the answer's")
        return verdict

    def fork(self) -> Self:
        twin = super().fork()
        twin._pieces = self._pieces and self._pieces.fork()
        twin._shape = self._shape and self._shape.fork()
        twin._reasoning = 0
        return twin

    def receipt(self, branch: Branch) -> Receipt:
        self.follow(branch)
        fired, reason, detail = self.outcome(branch)
        if self._closed_why:
            fired = True
            reason = reason if self._closed_why in reason else f"{reason}; thinking was closed: {self._closed_why}"
        if self._no_room:
            reason += f"; no room to close thinking: {self._no_room}"
        return Receipt(self.method, fired, reason, None, self._thought, detail=detail)

    # -- details -----------------------------------------------------------------------------------------------

    def _begin(self, run: Generation) -> None:
        self._pieces = Pieces(run.codec.decode)
        if run.shape.tags == (self.opening, self.closing):
            # asked after the first token, its count tells where that token was drawn
            self._inside = run.reasoning > 0 if run.tokens else run.shape.inside
        else:
            self._inside = run.call.draft is None and left_open(run.call.prefix, self.opening, self.closing)
            self._shape = Shape(tags=(self.opening, self.closing), thinking=self._inside)
        self._blocks = int(self._inside)

    def _take(self, piece: str) -> None:
        self._since += piece
        while self._since:
            if self._pattern is None or len(self._since) > _LONGEST_STEP:
                end = len(self._since)
            else:
                found = self._pattern.search(self._since)
                if found is None:
                    return
                end = found.end()
            step, self._since = self._since[:end], self._since[end:]
            if step.strip() or self._pattern is None:
                self._steps, self._last_step, self._stepped = self._steps + 1, step, True


def step_pattern(boundary: str) -> re.Pattern[str] | None:
    """What ends a step, compiled; None for "token". Raises InvalidInput for what is no regular expression, or
    matches where nothing is."""
    text = BOUNDARIES.get(boundary, boundary)
    if boundary == "token":
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InvalidInput(f"boundary {boundary!r}: one of {', '.join(BOUNDARIES)}, or a pattern: {error}") from error
    if pattern.search("") or not text:
        raise InvalidInput(f"boundary {boundary!r} matches an empty text: write a pattern that needs a character")
    return pattern


def generation(branch: Branch) -> Generation:
    """The branch as the engines build it. Raises Unsupported for another kind."""
    if not isinstance(branch, Generation):
        raise Unsupported(f"engine {branch.engine.name}: methods that act on thinking need a built-in engine's branch")
    return branch


def room(branch: Branch) -> float:
    """Output tokens that a branch may still produce: by max_tokens, and by what its account still holds or has."""
    run = generation(branch)
    left = math.inf if run.limit is None else run.limit - len(run.tokens)
    account = run.call.account.remaining()
    ahead = run.tab.held - run.output
    for resource in ("output", "tokens"):
        if resource in account:
            left = min(left, ahead + account[resource])
    if "usd" in account:
        each = run.tab.spend(run.output + 1, run.reasoning).usd - run.tab.spend(run.output, run.reasoning).usd
        left = min(left, ahead + account["usd"] // each) if each > 0 else left
    return max(0, left)


def reasoning_room(branch: Branch) -> float:
    """Thinking tokens that the account still allows; a forced closing tag is one of them."""
    run = generation(branch)
    left = run.call.account.remaining().get("reasoning")
    return math.inf if left is None else max(0, run.tab.thinking - run.reasoning + left)
