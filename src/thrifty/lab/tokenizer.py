"""The thinker's tokenizer: every printable ASCII character, and the words that traces and prompts often use.

A unigram model whose pieces are all characters and a few words, so that any ASCII text goes in and comes out as it was,
digits and letters of problems are always single tokens, and no merge table is needed. Characters outside ASCII become
`<unk>`. `<think>` and `</think>` are single tokens that decoding shows (engines look for them in the text); `<bos>`,
`<eos>`, `<pad>` and the marks of the roles are special and are left out of decoded text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")
TAGS = ("<think>", "</think>")

WORDS = (
    *("\n\n", "Wait", "Alternatively", "So", "Yes", "No", "Answer", "Final", "The", "Let", "Okay", "Hmm", "But"),
    *(" let", " me", " check", " is", " right", " same", " as", " before", " not", " the", " other", " way", " again"),
    *("Compute", "Count", "Sort", "Path", "Gates", "Hanoi", "Jump", " in", " letters", " item", " to", " give"),
    *(" answer", " final", " think", " step", " by", " and", " of", " be", " you", " your", " with", " a", " I", " it"),
    *(" thinking", " thought", " solution", " need", " more", " this", " that", " have", " can", " will", " should"),
    *(
        " at",
        " most",
        " words",
        " tokens",
        " use",
        " then",
        " please",
        "Please",
        "Think",
        " for",
        " question",
        " problem",
    ),
    *(" problem:", "**", "\\boxed{", " Answer", " each", " only", " finished", " reasoning", " steps"),
)
"""Pieces of more than one character. A digit is never part of one."""

TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<assistant>{{ m['content'].split('</think>')[-1].lstrip('\\n') }}<eos>"
    "{% elif m['role'] == 'system' %}<system>{{ m['content'] }}"
    "{% elif m['role'] in ('user', 'tool') %}<user>{{ m['content'] }}"
    "{% else %}{{ raise_exception('roles are system, user, assistant and tool') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""The model opens its thinking itself; what it thought in earlier turns is left out."""


def prompt(question: str) -> str:
    """The template's text of one user message, where the model's turn begins."""
    return f"<bos><user>{question}<assistant>"


def build() -> Any:
    """The `tokenizers.Tokenizer`. Raises ImportError without the package (the extra `local`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    characters = ["\n", *(chr(i) for i in range(32, 127))]
    pieces = [(token, 0.0) for token in (*SPECIAL, *TAGS)]
    pieces += [(character, -10.0) for character in characters]
    # fewer pieces always win; among as many, the longer first one does not matter, but the choice has to be one
    pieces += [(word, -10.0 - 0.001 * i) for i, word in enumerate(dict.fromkeys(WORDS))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    return tokenizer


def save(folder: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template as transformers reads them."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=build(),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
