"""Prompt templates and their tokens (M1.2).

A prompt becomes one user turn and an open assistant turn, without a system turn. The think tokens follow it as
embeddings; they have no ids and are added in `vlm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from deepgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
TEXT_END = "<|endoftext|>"
# The special tokens of Qwen2.5-VL that we need. A tokenizer trained here has them as its first ids, in this order.
SPECIAL_TOKENS = (TEXT_END, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")
GENERATION_PREFIX = "Generate an image: "


class TokenBatch(NamedTuple):
    """Left-padded token ids [B, T] and their validity, bool [B, T]."""

    ids: Tensor
    mask: Tensor


def render(prompt: str, image_tokens: Sequence[int] = ()) -> str:
    """The text that the VLM reads.

    Args:
        prompt: caption, riddle or edit instruction; empty for the unconditional branch, which keeps the prefix of
            text-to-image and the images of editing.
        image_tokens: number of `<|image_pad|>` tokens for each reference image; empty means text-to-image.
    """
    if image_tokens:
        images = "".join(VISION_START + IMAGE_PAD * count + VISION_END for count in image_tokens)
        content = f"{images}\n{prompt}"
    else:
        content = GENERATION_PREFIX + prompt
    return f"{TURN_START}user\n{content}{TURN_END}\n{TURN_START}assistant\n"


def tokenize(tokenizer: Any, prompts: Sequence[str], image_tokens: Sequence[Sequence[int]]) -> TokenBatch:
    """Render and tokenise a batch, padded on the left to its longest member.

    Raises:
        UserError: a prompt contains one of the tokenizer's special tokens, which would be read as structure.
    """
    for prompt in prompts:
        found = [token for token in tokenizer.all_special_tokens if token in prompt]
        if found:
            raise UserError(f"prompt {prompt[:60]!r}: contains the reserved token {found[0]}; remove it")
    texts = [render(prompt, counts) for prompt, counts in zip(prompts, image_tokens, strict=True)]
    encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    return TokenBatch(encoded["input_ids"], encoded["attention_mask"].bool())


def count_long(tokenizer: Any, prompts: Sequence[str], limit: int) -> int:
    """How many prompts are longer than `limit` tokens with their template, images not counted."""
    # Only texts of more bytes than that can be: the bytes are counted first, which is much faster.
    texts = [text for text in map(render, prompts) if len(text.encode()) > limit]
    return sum(len(ids) > limit for ids in tokenizer(texts)["input_ids"]) if texts else 0


def check_tokenizer(tokenizer: Any, image_token_id: int, vocab_size: int) -> None:
    """Raise `UserError` if the tokenizer does not belong to a VLM with these ids."""
    missing = [t for t in (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD) if t not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"tokenizer: special tokens missing: {', '.join(missing)}")
    if tokenizer.pad_token_id is None:
        raise UserError("tokenizer: it has no pad token")
    given = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    if given != image_token_id:
        raise UserError(f"tokenizer: {IMAGE_PAD} has id {given}, but the VLM's image_token_id is {image_token_id}")
    if len(tokenizer) > vocab_size:
        raise UserError(f"tokenizer: {len(tokenizer)} tokens, but the VLM's vocabulary holds {vocab_size}")
