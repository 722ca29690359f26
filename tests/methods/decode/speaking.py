"""A decode policy that writes a text: what the model would have said, had it any sense."""

from __future__ import annotations

from typing import Any

from thrifty.call import Branch
from thrifty.policy import DecodePolicy


class Say(DecodePolicy):
    """The model's next token is the next of `text`, by a lead of `lead` nats; after the text it ends. What others force
    is not of the text, so it goes on where it was. Put it first in the call's policies.

    Its place in the text moves on when its own token was drawn; a token that a later policy put in its place is
    skipped over as said (`suppressed`)."""

    method = "say"

    def __init__(self, text: str, lead: float = 50.0) -> None:
        self.text, self.lead = text, lead
        self._at = 0
        self._ids: list[int] | None = None
        self.offered: list[int] = []

    def logits(self, branch: Branch, logits: Any) -> Any:
        codec = branch.codec  # type: ignore[attr-defined]
        if self._ids is None:
            self._ids = codec.encode(self.text)
        token = self._ids[self._at] if self._at < len(self._ids) else min(codec.ends)
        self._at += 1
        self.offered.append(token)
        logits.clamp_(-20, 20)
        logits[token] = float(logits.max()) + self.lead
        return logits
