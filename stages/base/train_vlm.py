"""Train a small Qwen2.5-VL on the tiny world: to describe and judge pictures, solve riddles and predict edits.

    python -m stages.base.train_vlm                 # writes assets/tiny/model/vlm, and runs/base/vlm for later steps

There are four kinds of dialogue; the loss covers only the assistant's words:
  judge    picture + "Does this image show …?"        -> Yes | No     (JUDGE_QUESTION, at 112 px)
  caption  picture + "What does this image show? …"   -> description  (56 or 112 px)
  prompt   "Generate an image: …" (captions, riddles) -> description
  edit     source picture + instruction               -> description of the target (56 px)
The last two put the picture to draw into the hidden states that the bridge reads. Only training records are used. Most
wrong descriptions differ from the right one in a single word.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from deepgen.data.images import decode_image
from deepgen.data.records import Record
from rewards.judge import JUDGE_QUESTION
from stages.base.pictures.concepts import BACKGROUNDS, COLOURS, HAIR, TONES
from stages.base.training import (
    BACKBONE,
    MODEL,
    TOWER,
    load_split,
    to_float,
    training_steps,
    unique_pictures,
    update_ema,
)

CAPTION_QUESTION = "What does this image show? Answer in a few words."
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
ATTRIBUTES = {*COLOURS, *BACKGROUNDS, *" ".join(HAIR.values()).split(), *TONES}
ATTRIBUTES |= {"with", "hair", "skin", "tone", "on", "background", "mirrored", "upside", "down"}
JUDGE_SIZE, SMALL_SIZE, PATCH, MERGE = 112, 56, 14, 2


def config(vocab: dict[str, int]) -> Qwen2_5_VLConfig:
    """The tiny preset's VLM: 6 decoder layers of width 192, 4 vision layers of width 128."""
    text = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 1024,
        "vocab_size": len(vocab),
        "rope_parameters": {
            "rope_type": "default",
            "type": "default",
            "mrope_section": [8, 12, 12],
            "rope_theta": 10000.0,
        },
        "bos_token_id": vocab["<|endoftext|>"],
        "eos_token_id": vocab["<|im_end|>"],
        "pad_token_id": vocab["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 192,
        "in_channels": 3,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=vocab["<|image_pad|>"],
        video_token_id=vocab["<|video_pad|>"],
        vision_start_token_id=vocab["<|vision_start|>"],
        vision_end_token_id=vocab["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def make_vlm(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised VLM, the same at every call, with token embeddings of size 1.

    With transformers' initial size (0.02) the embeddings end up 400 times smaller than the first layer's output. Then
    neither the bridge nor a judge can recognise the words (docs/log.md).
    """
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config(tokenizer.get_vocab()))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    layers = model.model.language_model.layers
    with torch.no_grad():
        for layer in layers:
            for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                out.weight *= (2 * len(layers)) ** -0.5
    return model


def patchify(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, 3, S, S] in [-1, 1] -> Qwen's flattened patches [N·g·g, 3·2·14·14] and grid_thw [N, 3]."""
    n, _, size, _ = images.shape
    g = size // PATCH
    x = ((images + 1) / 2 - MEAN) / STD
    x = x.view(n, 3, g // MERGE, MERGE, PATCH, g // MERGE, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(n * g * g, -1), torch.tensor([[1, g, g]] * n)


def degrade(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Add small faults that do not change what a picture shows: noise, blur, tint, shift."""
    if rng.random() < 0.3:
        return x
    if rng.random() < 0.5:
        x = torch.roll(x, rng.integers(-3, 4, size=2).tolist(), dims=(-2, -1))
    if rng.random() < 0.5:
        factor = float(rng.uniform(1.2, 2.2))
        x = F.interpolate(
            F.interpolate(x, scale_factor=1 / factor, mode="bilinear"), size=x.shape[-2:], mode="bilinear"
        )
    sigma = float(rng.uniform(0, 0.25)) if rng.random() < 0.6 else 0.0
    grain = torch.from_numpy(rng.normal(size=x.shape)).float() * sigma
    gain = torch.from_numpy(rng.uniform(0.85, 1.1, size=(x.shape[0], 3, 1, 1))).float()
    return (x * gain + grain).clamp(-1, 1)


@dataclass
class Dialogue:
    """One training example: question, answer, and `picture`, the index in the image array (-1 = text only)."""

    question: str
    answer: str
    picture: int


class Lessons:
    """Draws dialogues of each kind from the training records."""

    def __init__(self, records: list[Record], seed: int):
        self.rng = random.Random(seed)
        p = unique_pictures(records)
        self.images, self.answers, self.is_text = to_float(p.images), p.answers, p.is_text
        self.prompts = [r for r in records if r.task != "edit"]
        self.edits = [r for r in records if r.task == "edit"]
        sources = [decode_image(r.references[0]) for r in self.edits]
        self.sources = to_float(np.stack(sources)) if sources else self.images[:0]
        self.parts = [split_description(a) for a in self.answers]
        self.same_thing, self.same_attribute = (self.grouped(i) for i in (0, 1))
        self.text_ids = np.flatnonzero(self.is_text)
        self.other_ids = np.flatnonzero(~self.is_text)

    def grouped(self, part: int) -> dict[str, list[int]]:
        """Pictures without words, grouped by thing (`part` 0) or by attribute (`part` 1)."""
        groups: dict[str, list[int]] = {}
        for i, parts in enumerate(self.parts):
            if not self.is_text[i]:
                groups.setdefault(parts[part], []).append(i)
        return groups

    def picture(self) -> int:
        return int(self.rng.choice(self.text_ids if self.rng.random() < 0.25 else self.other_ids))

    def wrong_answer(self, index: int) -> str:
        """A wrong description, in most cases a nearly right one.

        For example the same thing in another colour, tone or position, another thing with the same attribute, or a
        word with a letter changed.
        """
        answer, u = self.answers[index], self.rng.random()
        if self.is_text[index] and u < 0.7:
            return misspell(answer, self.rng)
        thing, attribute = self.parts[index]
        pool: Any = self.text_ids if self.is_text[index] and u < 0.9 else self.other_ids
        if not self.is_text[index] and u < 0.8:
            pool = self.same_thing[thing] if u < 0.4 else self.same_attribute[attribute]
        for _ in range(8):
            if (other := self.answers[int(self.rng.choice(pool))]) != answer:
                return other
        return self.answers[int(self.rng.choice(self.other_ids[self.other_ids != index]))]  # `pool` has no other answer

    def judge(self) -> Dialogue:
        i = self.picture()
        yes = self.rng.random() < 0.5
        answer = self.answers[i] if yes else self.wrong_answer(i)
        return Dialogue(JUDGE_QUESTION.format(answer=answer), "Yes" if yes else "No", i)

    def caption(self) -> Dialogue:
        i = self.picture()
        return Dialogue(CAPTION_QUESTION, self.answers[i], i)

    def prompt(self) -> Dialogue:
        r = self.rng.choice(self.prompts)
        return Dialogue(f"Generate an image: {r.prompt}", r.answer, -1)

    def edit(self) -> Dialogue:
        i = self.rng.randrange(len(self.edits))
        return Dialogue(self.edits[i].prompt, self.edits[i].answer, i)


def split_description(answer: str) -> tuple[str, str]:
    """Thing and attribute: "a red pear" -> ("pear", "red"), "girl, dark skin tone" -> ("girl", "dark skin tone")."""
    words = answer.replace(",", "").split()
    described = {"skin", "background", "mirrored", "upside", "hair", "bald"} & set(words)
    attributes = ATTRIBUTES if described else set(COLOURS)
    thing = [w for w in words if w not in attributes and w not in ("a", "an")]
    return " ".join(thing), " ".join(w for w in words if w in attributes)


def misspell(answer: str, rng: random.Random) -> str:
    """Change one letter of the quoted word, or swap two."""
    head, word, tail = answer.split('"')
    letters = list(word)
    i = rng.randrange(len(letters))
    if rng.random() < 0.2 and letters[i] != letters[i - 1]:
        letters[i], letters[i - 1] = letters[i - 1], letters[i]
    else:
        letters[i] = rng.choice([c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c != letters[i]])
    return f'{head}"{"".join(letters)}"{tail}'


class Batcher:
    """Turns dialogues into model inputs: right-padded ids, labels on the assistant's words, and pictures' patches."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.image_id = tokenizer, tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, dialogues: list[Dialogue], images: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Model inputs. images: [N, 3, S, S] in [-1, 1], one per dialogue, or None."""
        if images is None:
            return self.tokens(dialogues, 0)
        batch = self.tokens(dialogues, (images.shape[-1] // (PATCH * MERGE)) ** 2)
        batch["pixel_values"], batch["image_grid_thw"] = patchify(images)
        return batch

    def tokens(self, dialogues: list[Dialogue], count: int) -> dict[str, torch.Tensor]:
        """Only ids, labels and masks, with room for `count` visual tokens per dialogue."""
        block = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>\n" if count else ""
        asked = [f"<|im_start|>user\n{block}{d.question}<|im_end|>\n<|im_start|>assistant\n" for d in dialogues]
        q = self.tokenizer(asked, add_special_tokens=False)["input_ids"]
        a = [
            [*ids, self.end]
            for ids in self.tokenizer([d.answer for d in dialogues], add_special_tokens=False)["input_ids"]
        ]
        length = max(len(x) + len(y) for x, y in zip(q, a, strict=True))
        ids = torch.full((len(q), length), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (x, y) in enumerate(zip(q, a, strict=True)):
            ids[i, : len(x) + len(y)] = torch.tensor(x + y)
            labels[i, len(x) : len(x) + len(y)] = torch.tensor(y)
            mask[i, : len(x) + len(y)] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if count:
            batch["mm_token_type_ids"] = (ids == self.image_id).int()
        return batch


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [M, V] at the assistant's words, and the words [M]. Other positions are not projected to logits."""
    labels = batch["labels"]
    hidden = model.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
    where = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][where]).float(), labels[:, 1:][where]


def draw_batch(
    kind: str, lessons: Lessons, batcher: Batcher, rng: np.random.Generator, small_share: float, size: int = 32
) -> dict[str, torch.Tensor]:
    """A batch of dialogues. `small_share`: share of the captioned pictures that are shown at SMALL_SIZE."""
    dialogues = [getattr(lessons, kind)() for _ in range(size)]
    if kind == "prompt":
        return batcher(dialogues, None)
    source = lessons.sources if kind == "edit" else lessons.images
    images = degrade(source[[d.picture for d in dialogues]], rng)
    small = kind == "edit" or (kind == "caption" and rng.random() < small_share)
    side = SMALL_SIZE if small else JUDGE_SIZE
    return batcher(dialogues, F.interpolate(images, size=(side, side), mode="bilinear", antialias=True))


@torch.no_grad()
def judge_accuracy(model: Any, batcher: Batcher, images: torch.Tensor, answers: list[str], truth: list[bool]) -> float:
    """Share of (picture, description) pairs that the model judges correctly; images [N, 3, 64, 64]."""
    yes, no = (batcher.tokenizer.convert_tokens_to_ids(w) for w in ("Yes", "No"))
    right = 0
    for s in range(0, len(answers), 64):
        batch = batcher(
            [Dialogue(JUDGE_QUESTION.format(answer=a), "Yes", 0) for a in answers[s : s + 64]],
            F.interpolate(images[s : s + 64], size=(JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=True),
        )
        logits, labels = answer_logits(model, batch)
        first = logits[labels == yes]
        said = (first[:, yes] > first[:, no]).tolist()
        right += sum(a == b for a, b in zip(said, truth[s : s + 64], strict=True))
    return right / len(answers)


def heldout_pairs(seed: int = 1) -> tuple[torch.Tensor, list[str], list[bool]]:
    """Held-out pictures with right and wrong descriptions. The wrong ones are drawn as in training."""
    held = [r for r in load_split("heldout") if not r.id.endswith("/heldout")]  # pictures that training never showed
    lessons = Lessons(held, seed)
    index = list(range(len(lessons.answers)))
    answers = [lessons.answers[i] for i in index] + [lessons.wrong_answer(i) for i in index]
    return torch.cat([lessons.images] * 2), answers, [True] * len(index) + [False] * len(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    model = make_vlm(tokenizer)
    model.model.visual.load_state_dict(load_file(TOWER))
    model.set_attn_implementation("eager")  # bf16 SDPA has a slow backward on CPUs
    lessons, batcher, held = Lessons(load_split("train"), 0), Batcher(tokenizer), heldout_pairs()
    tower = set(model.model.visual.parameters())  # already trained to see
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p not in tower]},
        {"params": [p for p in model.parameters() if p in tower], "lr_scale": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    ema = {n: q.detach().clone() for n, q in model.named_parameters()}
    kinds = ["judge", "prompt", "caption", "judge", "prompt", "judge", "edit", "judge", "prompt", "caption"]
    seen: dict[str, float] = {}
    for step, bar in training_steps(args.steps, "vlm", optimizer, 1e-3):
        kind = kinds[step % len(kinds)]
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = answer_logits(model, draw_batch(kind, lessons, batcher, rng, small_share=0.5))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, 0.998, step)
        seen[kind] = 0.98 * seen.get(kind, loss.item()) + 0.02 * loss.item()
        if step % 250 == 249:
            bar.set_postfix(
                {k: f"{v:.3f}" for k, v in seen.items()} | {"held-out": f"{judge_accuracy(model, batcher, *held):.3f}"}
            )
    model.load_state_dict(ema, strict=False)
    print(f"judge accuracy on {len(held[1])} held-out pairs: {judge_accuracy(model, batcher, *held):.3f}")
    model.to(torch.bfloat16)
    for out in (BACKBONE, MODEL / "vlm"):
        save_with_processors(model, tokenizer, out)


def save_with_processors(model: Any, tokenizer: Any, out: Path) -> None:
    """Save a folder that transformers and vLLM can open. Its processor resizes every square picture to 112 px."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"shortest_edge": JUDGE_SIZE**2, "longest_edge": JUDGE_SIZE**2}  # areas
    Qwen2VLImageProcessor(size=size).save_pretrained(out)
    Qwen2VLVideoProcessor(size=size).save_pretrained(out)  # never used, but vLLM requires it


if __name__ == "__main__":
    main()
