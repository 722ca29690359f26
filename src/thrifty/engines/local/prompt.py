"""From a Call to token ids: context, chat template, tools, prefix, images.

The context is rendered first (`thrifty.context.render`). A tokenizer with a chat template renders the messages and the
generation prompt; the prefix follows it as the beginning of the assistant's turn. A tokenizer without a template joins
the texts of all messages by blank lines, whatever their roles, and the model continues that text.

An image is a content part of type `image` with `pixel_values` [3, H, W] or a PIL `image`, or an `image_url` that holds
a `data:` URL. Nothing is fetched. It stands in the prompt as one placeholder token, which `Prompt.spread` repeats.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrifty.call import Call, Message, text_of
from thrifty.context import render
from thrifty.engines.finishing import THINK
from thrifty.errors import InvalidInput, Unsupported

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|end_of_text|>")
"""Tokens that end a turn in common templates: they count as ends where the model's own template uses them."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: token ids, how it ends, the images that stand in it."""

    tokens: list[int]
    thinking: bool = False
    """the template opened a thinking block"""
    images: tuple[Any, ...] = ()
    """content parts, in the order of their placeholders"""
    holder: int | None = None
    """the placeholder's token id"""

    def spread(self, sizes: Sequence[int]) -> list[int]:
        """The tokens with the placeholder of image i repeated `sizes[i]` times."""
        out: list[int] = []
        left = list(sizes)
        for token in self.tokens:
            out.extend([token] * left.pop(0) if token == self.holder and left else [token])
        return out


@dataclass(frozen=True, slots=True)
class Eyes:
    """What prompts need to know of a vision model. `patches`: visual tokens of an image, as the config has it."""

    holder: int
    patches: int
    processor: Any = None


class TextCodec:
    """A transformers tokenizer, safe to use from several threads."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around a whole text."""
        if not text:
            return []
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        with self._lock:
            return str(
                self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **fields: Any) -> str:
        """The chat template's text. Raises InvalidInput when the template refuses the messages."""
        import jinja2

        try:
            with self._lock:
                return str(
                    self.tokenizer.apply_chat_template(
                        [_plain(m) for m in messages], tools=list(tools) or None, tokenize=False, **fields
                    )
                )
        except jinja2.TemplateError as error:
            raise InvalidInput(f"the model's chat template refuses these messages: {error}") from error


class Prompter:
    """Makes prompts for one model. `positions`: the model's context length, None where it has none."""

    def __init__(self, codec: TextCodec, model: str, positions: int | None, eyes: Eyes | None = None) -> None:
        self.codec, self.model, self.positions, self.eyes = codec, model, positions, eyes
        self.mark = codec.tokenizer.convert_ids_to_tokens(eyes.holder) if eyes else ""
        self.template = getattr(codec.tokenizer, "chat_template", None)

    def __call__(self, call: Call, *, counting: bool = False) -> Prompt:
        """The prompt of a call. Raises InvalidInput when it is empty, or longer than the model's context unless it is
        only to be counted: a context method must be able to measure what it is to shorten."""
        messages = render(call)
        images = tuple(image for m in messages for image in images_of(m))
        if images and self.eyes is None:
            raise Unsupported(f"model {self.model} sees no images: {len(images)} were given; use a vision model")
        if images:
            messages = tuple(self._marked(m) for m in messages)
        prefix = call.prefix if call.prefix and call.draft is None else ""
        if self.template:
            text, thinking = self._chat(call, messages, prefix)
            tokens = self.codec.encode(text)
        else:
            if call.tools:
                raise Unsupported(f"model {self.model} has no chat template, so it takes no tools")
            thinking = False
            text = "\n\n".join([*(t for m in messages if (t := text_of(m))), *([prefix] if prefix else [])])
            tokens = self.codec.encode(text, special=True)
        if not tokens:
            raise InvalidInput("an empty prompt: give at least one message with text")
        holder = self.eyes.holder if self.eyes else None
        marks = sum(token == holder for token in tokens)
        if images and marks != len(images):
            raise InvalidInput(f"{len(images)} images for {marks} times {self.mark!r} in the prompt")
        prompt = Prompt(tokens, thinking, images, holder)
        size = self.size(prompt)
        if self.positions is not None and size >= self.positions and not counting:
            raise InvalidInput(
                f"the prompt has {size:,} tokens and model {self.model} reads {self.positions:,} "
                "with its answer: shorten it, or put a context method into the plan"
            )
        return prompt

    def size(self, prompt: Prompt) -> int:
        """Input tokens of a prompt, each image counted as the config has it."""
        return len(prompt.tokens) + len(prompt.images) * (self.eyes.patches - 1 if self.eyes else 0)

    def _marked(self, message: Message) -> Message:
        """Images as the template's own parts where it knows images, else as placeholders in the text."""
        if not images_of(message) or "image" in str(self.template):
            return message
        parts = [text_of({"content": [p]}) if p.get("type") == "text" else self.mark for p in message["content"]]
        return {**message, "content": "".join(parts)}

    def _chat(self, call: Call, messages: Sequence[Message], prefix: str) -> tuple[str, bool]:
        text = self.codec.render(messages, call.tools, add_generation_prompt=True)
        opened = text.rstrip().endswith(THINK[0])
        if not prefix:
            return text, opened
        if not opened:
            return text + prefix, False
        # a template that makes its model think first: the prefix belongs behind that, in the answer
        unfinished = [*messages, {"role": "assistant", "content": prefix}]
        return self.codec.render(unfinished, call.tools, continue_final_message=True), False


def ends_of(tokenizer: Any, model: Any) -> frozenset[int]:
    """Every token that ends an answer: the generation config's, the tokenizer's, and the template's turn end."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        vocabulary = tokenizer.get_vocab()
        found.update(vocabulary[t] for t in TURN_ENDS if t in template and t in vocabulary)
    return frozenset(int(i) for i in found)


def images_of(message: Message) -> list[Any]:
    """The image parts of one message, in order."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return []
    return [part for part in content if part.get("type") in ("image", "image_url")]


def eyes_of(model: Any, tokenizer: Any, folder: Any) -> Eyes | None:
    """What a LLaVA-like model needs for images; None for a model without them."""
    config = model.config
    holder, vision = getattr(config, "image_token_id", None), getattr(config, "vision_config", None)
    if holder is None or vision is None or not hasattr(model, "get_image_features"):
        return None
    side = int(vision.image_size) // int(vision.patch_size)
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
    processor = None
    if folder is not None:
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        except (OSError, ValueError, ImportError):
            processor = None  # pixel values can still be given; an image that needs it is refused by name
    return Eyes(int(holder), side * side + int(whole), processor)


def pixels(images: Sequence[Mapping[str, Any]], eyes: Eyes) -> Tensor:
    """Pixel values [N, 3, H, W] of content parts. Raises InvalidInput for what is no image."""
    found = [_pixels(part, eyes) for part in images]
    if len({tuple(t.shape) for t in found}) > 1:
        raise InvalidInput("images of one call must have the same size after preprocessing")
    return torch.stack(found)


def _pixels(part: Mapping[str, Any], eyes: Eyes) -> Tensor:
    given = part.get("pixel_values")
    if given is not None:
        tensor = torch.as_tensor(given)
        tensor = tensor[0] if tensor.dim() == 4 and len(tensor) == 1 else tensor
        if tensor.dim() != 3:
            raise InvalidInput(f"pixel_values of shape {list(tensor.shape)}: [3, height, width] is needed")
        return tensor
    image = part.get("image")
    if image is None:
        image = _decoded(part)
    if eyes.processor is None:
        raise Unsupported("this model's folder has no image processor: give pixel_values")
    made: Tensor = eyes.processor(images=image, return_tensors="pt")["pixel_values"][0]
    return made


def _decoded(part: Mapping[str, Any]) -> Any:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise InvalidInput("an image_url must be a data:image/...;base64, URL: the local engine fetches nothing")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise Unsupported("images in data: URLs need Pillow: install it, or give pixel_values") from error
    try:
        data = base64.b64decode(url.partition(";base64,")[2], validate=True)
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"an image could not be read: {error}") from error


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text parts joined into one string where no image stands between them."""
    if isinstance(message.get("content"), (list, tuple)) and not images_of(message):
        return {**message, "content": text_of(message)}
    return dict(message)
