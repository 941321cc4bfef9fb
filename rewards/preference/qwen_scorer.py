"""HPS v3's model: a Qwen2-VL-7B that reads instruction and picture, and a small head over one token of it.

Its folder has HPSv3.safetensors of MizzenAI/HPSv3; of Qwen/Qwen2-VL-7B-Instruct all but the weights (config.json,
preprocessor_config.json, chat_template.json and the tokenizer's files); and hpsv3/dataset/data_collator_qwen.py of the
project's source. That file is not run: the instruction with which the model was trained stands in it, as two texts.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deepgen.data.records import first_reserved
from deepgen.errors import UserError
from rewards.base import existing_folder
from rewards.published_weights import load_linear, load_model, model_config

FILE, TEXTS = "HPSv3.safetensors", "data_collator_qwen.py"
INSTRUCTION, QUESTION = "INSTRUCTION", "prompt_with_special_token"  # names of the texts in that file
PIXELS = 256 * 28 * 28  # of every picture, as nearly as its proportions allow
TOKEN = "<|Reward|>"  # the project's addition to the tokenizer
WIDTHS, PLACES = (1024, 16, 2), (0, 3, 5)  # of the head's linear layers, and their places in its Sequential


class QwenScorer:
    """Pictures and texts to scores.

    Args:
        path: the folder.
        key: setting that error messages name, such as rewards.hpsv3.path.

    Raises:
        UserError: a file is missing, or the weights are not those of an HPS v3.
    """

    def __init__(self, path: str | Path, *, key: str) -> None:
        from transformers import AutoProcessor

        folder = existing_folder(key, path, FILE, TEXTS, "config.json", "preprocessor_config.json", "tokenizer.json")
        self.instruction, self.question = _texts(folder / TEXTS, key)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(folder, padding_side="right")
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        self.token = int(self.processor.tokenizer.convert_tokens_to_ids(TOKEN))
        self.model, self.head = _load(folder, self.token, key, self.device)

    def reserved(self, text: str) -> str:
        """The first special token in a text, or "". It could end the question, or be read in the place of the score."""
        return first_reserved(text, [*self.processor.tokenizer.all_special_tokens, TOKEN])

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """The mean score of each uint8 [H, W, 3] image with the text at the same place."""
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._asked(text)}]}]
            for text in texts
        ]
        batch = self.processor(
            text=self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            images=[Image.fromarray(np.ascontiguousarray(image)) for image in images],
            images_kwargs={"size": {"shortest_edge": PIXELS, "longest_edge": PIXELS}},
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(**batch).last_hidden_state  # [B, N, D]
        at_token: Tensor = hidden[batch["input_ids"] == self.token]  # [B, D]
        means: list[float] = self.head(at_token.float())[:, 0].tolist()
        return means

    def _asked(self, text: str) -> str:
        return self.instruction.replace("{text_prompt}", text) + self.question


def _texts(file: Path, key: str) -> tuple[str, str]:
    """The instruction and the question in the project's source, which is parsed and not run."""
    found: dict[str, str] = {}
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{key}: {str(file)!r} is no Python source: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    for name, needed in ((INSTRUCTION, "{text_prompt}"), (QUESTION, TOKEN)):
        if needed not in found.get(name, ""):
            raise UserError(f"{key}: {str(file)!r} has no text {name} with {needed}")
    return found[INSTRUCTION], found[QUESTION]


def _load(folder: Path, token: int, key: str, device: torch.device) -> tuple[Any, nn.Sequential]:
    """The Qwen2-VL without its language head, and the score's head."""
    from transformers import Qwen2VLModel

    file = folder / FILE
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{key}: {str(file)!r} is no file of weights: {error}") from error
    state = {_renamed(name): value for name, value in weights.items() if not name.startswith(("rm_head.", "lm_head."))}
    embedding = state.get("language_model.embed_tokens.weight")
    rows = 0 if embedding is None else embedding.shape[0]
    if rows != token + 1:
        raise UserError(
            f"{key}: {str(file)!r} has embeddings of {rows:,} tokens, the tokenizer with {TOKEN} {token + 1:,}"
        )
    config = model_config(folder, "qwen2_vl", key=key)
    config.text_config.vocab_size = rows
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the project's, or what a CPU is fast in
    model = load_model(Qwen2VLModel, config, file, key=key, state=state, dtype=dtype)
    widths = pairwise((config.text_config.hidden_size, *WIDTHS))
    first, second, last = (
        load_linear(weights, f"rm_head.{place}", a, b, file, key=key)
        for place, (a, b) in zip(PLACES, widths, strict=True)
    )
    return model.to(device), nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(device)


def _renamed(name: str) -> str:
    """A name in transformers' Qwen2VLModel: without "model." and, as before version 4.52, also without its part."""
    if name.startswith("visual."):
        return name
    inner = name.removeprefix("model.")
    return inner if inner.startswith(("visual.", "language_model.")) else f"language_model.{inner}"
