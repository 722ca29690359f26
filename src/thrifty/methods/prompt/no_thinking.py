"""Skips the thinking of a model that thinks, by telling it that it has thought."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.call import Call, Receipt
from thrifty.method import Rewrite, knob
from thrifty.methods.prompt._system import prompt_tokens
from thrifty.thinking import CLOSING, OPENING, check_tags, has_tags


@dataclass(frozen=True, kw_only=True)
class NoThinking(Rewrite):
    """Starts the answer with an empty thinking block, so that the model writes its solution at once.

    The block is the paper's: `<think>`, "Okay, I think I have finished thinking.", `</think>`. It goes before
    whatever prefix the call has. It does nothing, and says so, when the call drafts first (its prefix comes
    after the draft, too late for a thinking block), and when the model is known not to have the tags: an
    engine with its own tokenizer (capability `logits`) counts them, and a model trained to think has each as
    one token. Of a server that can not be known; there the block is sent, and the receipt says that it is not
    known."""

    name = "no-thinking"
    paper = "Reasoning Models Can Be Effective Without Thinking (Ma et al. 2025, arXiv:2504.09858)"
    needs = frozenset({"text", "continue"})
    no_identity = "an answer that starts with a thinking block is another prompt, whatever the block says"

    opening: str = knob(OPENING, "what opens the model's thinking block")
    closing: str = knob(CLOSING, "what closes it")
    thought: str = knob("Okay, I think I have finished thinking.", "what the block says; may be empty")
    unknown: str = knob("skip", "when the model is known to lack the tags", choices=("skip", "force"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tags(self.name, self.opening, self.closing)

    async def rewrite(self, call: Call) -> Call:
        if call.draft is not None:
            return call.with_receipt(
                Receipt(self.name, False, "the call drafts first, and its prefix comes after that")
            )
        known = has_tags(call, self.opening, self.closing)
        if known is False and self.unknown == "skip":
            reason = f"{self.opening} and {self.closing} are no tokens of the model: it has no thinking to skip"
            return call.with_receipt(Receipt(self.name, False, reason))
        before = prompt_tokens(call)
        changed = replace(call, prefix=empty_block(self.opening, self.closing, self.thought) + (call.prefix or ""))
        tags = "the model has the tags" if known else "forced although the model lacks the tags"
        if known is None:
            tags = "whether the model has the tags is not known"
        reason = f"began with an empty thinking block; {tags}"
        return changed.with_receipt(Receipt(self.name, True, reason, before, prompt_tokens(changed)))


def empty_block(opening: str = OPENING, closing: str = CLOSING, thought: str = "") -> str:
    """The thinking block that the answer begins with.

    >>> empty_block(thought="Done.")
    '<think>\\nDone.\\n</think>\\n\\n'
    """
    return f"{opening}\n{thought}\n{closing}\n\n"
