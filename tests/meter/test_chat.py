"""Chat requests: against transformers' chat templates, OpenAI's rule worked by hand, and forms that must be refused."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.errors import InvalidInput
from thrifty.meter.chat import UNKNOWN_SIDE, count_chat
from thrifty.meter.images import openai
from thrifty.meter.tokenizers import ESTIMATE, Tokenizer, from_path

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "unit": {"type": "string", "description": "Of what", "enum": ["C", "F"]},
            },
        },
    },
}


class Words:
    """A tokenizer whose tokens are words and signs, so that a test can count by hand."""

    def encode_batch_flat(self, inputs: list[str], split_special_tokens: bool = True) -> tuple[bytes, bytes]:
        import re

        return bytes(4 * sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in inputs)), b""


def words(name: str) -> Tokenizer:
    return Tokenizer(name, Words())


def data_url(width: int, height: int) -> str:
    head = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    return "data:image/png;base64," + base64.b64encode(head).decode()


def test_openai_by_hand() -> None:
    messages = [
        {"role": "system", "content": "Be brief"},  # 3 + 1 + 2
        {"role": "user", "name": "ann", "content": "Is it wet ?"},  # 3 + 1 + 4 + 1 + 1
    ]
    counted = count_chat({"messages": messages}, words("o200k"), "gpt-4o")
    assert (counted.text, counted.total, counted.tools, counted.notes) == (6, 6 + 10 + 3, 0, ())
    # weather:Tells the weather (5), city:string:Where (5), unit:string:Of what (6), C and F (1 each)
    expected = 12 + 7 + 5 + 3 + (3 + 5) + (3 + 6) + (3 + 1) + (3 + 1) - 3
    assert count_chat({"messages": messages, "tools": [TOOL]}, words("o200k"), "gpt-4o").tools == expected
    assert count_chat({"messages": messages, "tools": [TOOL]}, words("cl100k"), "gpt-4").tools == expected + 3


def test_images_of_a_chat() -> None:
    parts = [
        {"type": "text", "text": "What is this"},
        {"type": "image_url", "image_url": {"url": data_url(2048, 4096), "detail": "high"}},
        {"type": "image_url", "image_url": {"url": data_url(2048, 4096), "detail": "low"}},
        {"type": "input_image", "image_url": data_url(1024, 1024)},
        {"type": "image", "source": {"type": "base64", "data": data_url(300, 300).partition(",")[2]}},
    ]
    counted = count_chat([{"role": "user", "content": parts}], words("o200k"), "gpt-4o")
    assert counted.visual == 1105 + 85 + 765 + openai(300, 300).tokens
    assert counted.text == 3 and not counted.notes
    away = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}]}]
    counted = count_chat(away, words("o200k"), "gpt-4o")
    assert counted.visual == openai(UNKNOWN_SIDE, UNKNOWN_SIDE).tokens and "address" in counted.notes[0]
    with pytest.raises(InvalidInput, match="--model"):
        count_chat(away, words("o200k"))
    with pytest.raises(InvalidInput, match="no image rule"):
        count_chat(away, words("mistral"), "mistral-large")
    broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
    with pytest.raises(InvalidInput, match="no image whose size can be read"):
        count_chat(broken, words("o200k"), "gpt-4o")


def test_claude_and_mistral() -> None:
    body = {"system": "Be brief", "messages": [{"role": "user", "content": "Is it wet"}], "tools": [TOOL]}
    counted = count_chat(body, words("claude"), "claude-opus-4-7")
    forced = count_chat({**body, "tool_choice": {"type": "any"}}, words("claude"), "claude-opus-4-7")
    assert forced.tools - counted.tools == 804 - 675 and len(counted.notes) == 2
    # Be brief Is it wet, Human: and Assistant:
    assert counted.text == 5 and counted.overhead == 4
    assert count_chat(body, words("claude"), "claude-3-5-haiku").tools == counted.tools - 675 + 264
    turns = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Is it wet"},
        {"role": "assistant", "content": "No"},
    ]
    counted = count_chat(turns, words("mistral"), "mistral-large")
    assert (counted.text, counted.overhead) == (6, 1 + 2 + 2 + 1) and not counted.notes


def test_anything_else_is_estimated_and_says_so() -> None:
    counted = count_chat([{"role": "user", "content": "x" * 33}], ESTIMATE)
    assert counted.total == 10 + 4 + 3 and "no chat template" in counted.notes[0]


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours from a folder, and transformers from the same folder."""
    pytest.importorskip("fastokens")
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Reference

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Reference(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<|im_start|>", "<|im_end|>", "<s>"]
    made.add_special_tokens([AddedToken(t, special=True) for t in specials])
    folder: Path = tmp_path_factory.mktemp("chat")
    made.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return from_path(folder), transformers.AutoTokenizer.from_pretrained(folder)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT})


@settings(max_examples=100, deadline=None)
@given(
    messages=st.lists(TURN, min_size=1, max_size=5),
    tools=st.sampled_from([[], [TOOL], [TOOL, TOOL]]),
    call=st.booleans(),
)
def test_a_template_counts_as_transformers_does(
    templated: tuple[Tokenizer, Any], messages: list[dict[str, Any]], tools: list[Any], call: bool
) -> None:
    ours, reference = templated
    if call:
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm & Bonn é"}}}]
        messages = [*messages, {"role": "assistant", "content": "", "tool_calls": calls}]
    expected = reference.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, tokenize=True)
    ids = expected["input_ids"] if hasattr(expected, "keys") else expected
    counted = count_chat({"messages": messages, "tools": tools}, ours)
    assert counted.total == len(ids)
    assert counted.text == sum(
        len(reference.encode(m["content"], add_special_tokens=False, split_special_tokens=True)) for m in messages
    )
    assert (counted.tools > 0) == bool(tools) and not counted.notes


def test_templates_are_not_trusted(tmp_path: Path, templated: tuple[Tokenizer, Any]) -> None:
    ours, _ = templated
    assert ours.folder is not None
    (tmp_path / "tokenizer.json").write_bytes((ours.folder / "tokenizer.json").read_bytes())
    for template, told in (
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ messages[0].content", "unexpected"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(InvalidInput, match=rf"chat template refuses this chat: .*{told}"):
            count_chat([{"role": "user", "content": "hi"}], from_path(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InvalidInput, match="cannot be read"):
        count_chat([{"role": "user", "content": "hi"}], from_path(tmp_path))


@pytest.mark.parametrize(
    "body",
    [None, 3, "text", [], {}, {"messages": []}, {"messages": [3]}, {"messages": "x"}, [{"role": "user", "content": 3}],
     {"messages": [{"role": "user", "content": "x"}], "tools": {"a": 1}},
     {"messages": [{"role": "user", "content": "x"}], "tools": [{"function": 3}]}],
)  # fmt: skip
def test_refused(body: Any) -> None:
    with pytest.raises(InvalidInput):
        count_chat(body, words("o200k"), "gpt-4o")


def test_odd_parts_are_counted_as_their_text() -> None:
    parts = [
        {"type": "video", "url": "a"},
        "plain",
        {"type": "tool_result", "content": [{"type": "text", "text": "one two"}]},
    ]
    counted = count_chat([{"role": "user", "content": parts}], words("o200k"), "gpt-4o")
    assert "'video'" in counted.notes[0]
    assert counted.text == 1 + 2 + words("x").count('{"type":"video","url":"a"}')
