"""Train the judge: the trained VLM learns to answer Yes to the right description and No to all others.

    python -m stages.base.train_judge               # writes assets/tiny/rewards/judge

Training on single questions taught only colours (docs/log.md): one bit per picture is too little to link "maple leaf"
with its visual tokens. So every picture of a batch is compared with every description of the batch, most of them close
relatives, and with one nearly right description. The right one has to win along rows and columns, and Yes means more
than half.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from deepgen.data.parquet import read_records
from rewards.judge import JUDGE_QUESTION
from stages.base.train_vlm import (
    JUDGE_SIZE,
    PATCH,
    Batcher,
    Dialogue,
    Lessons,
    degrade,
    heldout_pairs,
    judge_accuracy,
    patchify,
    save_with_processors,
)
from stages.base.training import BACKBONE, LESSONS, MODEL, REWARDS, TOWER, training_steps, update_ema

PICTURES = 12
READING = 400  # in these first steps the judge compares two texts; one of them replaces the picture


def relatives(lessons: Lessons, count: int) -> list[int]:
    """Distinct pictures: to each seed, add one of the same thing and two with the same attribute (words: two words)."""
    rows: dict[int, None] = {}
    while len(rows) < count:
        i = lessons.picture()
        rows[i] = None
        if lessons.is_text[i]:
            rows |= dict.fromkeys(int(j) for j in lessons.rng.sample(lessons.text_ids.tolist(), 2))
            continue
        thing, attribute = lessons.parts[i]
        for pool, number in ((lessons.same_thing[thing], 1), (lessons.same_attribute[attribute], 2)):
            rows |= dict.fromkeys(lessons.rng.sample(pool, min(number, len(pool))))
    return list(rows)[:count]


def look(model: Any, images: Tensor) -> Tensor:
    """Visual tokens [N, T, W] of pictures [N, 3, S, S]."""
    patches, grid = patchify(images)
    tokens: Tensor = model.model.visual(patches, grid_thw=grid).pooler_output
    return tokens.view(len(images), -1, tokens.shape[-1])


def read(model: Any, tokenizer: Any, answers: list[str], count: int) -> Tensor:
    """Stand-ins for visual tokens [N, count, W]: embeddings of each description's words in random order, plus noise."""
    embeddings = model.get_input_embeddings()
    encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    said = torch.stack([torch.tensor(ids * count)[:count][torch.randperm(count)] for ids in encoded])
    words: Tensor = embeddings(said).detach()
    return words + 0.5 * torch.randn_like(words)


def preference(model: Any, batcher: Batcher, features: Tensor, questions: list[list[str]]) -> Tensor:
    """log p(Yes) - log p(No), [N, K], for pictures given as visual tokens [N, T, W] and K descriptions of each."""
    count, side = len(questions[0]), JUDGE_SIZE // PATCH
    flat = [Dialogue(JUDGE_QUESTION.format(answer=a), "Yes", 0) for own in questions for a in own]
    batch = batcher.tokens(flat, features.shape[1])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    places = (ids == batcher.image_id)[..., None]
    embeds = embeds.masked_scatter(places, features.repeat_interleave(count, 0).to(embeds.dtype))
    positions, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=torch.tensor([[1, side, side]] * len(flat)),
        attention_mask=mask,
    )
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    asked = (batch["labels"] != -100).float().argmax(1) - 1  # position that predicts the answer's first token
    yes, no = (batcher.tokenizer.convert_tokens_to_ids(w) for w in ("Yes", "No"))
    direction = model.lm_head.weight[yes] - model.lm_head.weight[no]
    return (hidden[torch.arange(len(ids)), asked].float() @ direction.float()).view(len(features), count)


def judging_loss(scores: Tensor) -> Tensor:
    """Contrastive plus Yes/No loss. scores: [N, N + 1], right descriptions on the diagonal, nearly right ones last."""
    n = len(scores)
    truth = torch.arange(n)
    target = torch.zeros_like(scores)
    target[truth, truth] = 1
    weight = torch.where(target > 0, 0.5 / n, 0.3 / (n * (n - 1)))
    weight[:, n] = 0.2 / n
    yes_no = F.binary_cross_entropy_with_logits(scores, target, weight, reduction="sum")
    return yes_no + 0.5 * F.cross_entropy(scores, truth) + 0.25 * F.cross_entropy(scores[:, :n].T, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--out", type=Path, default=REWARDS / "judge")
    args = parser.parse_args()
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(BACKBONE, dtype=torch.float32).train()
    model.model.visual.load_state_dict(load_file(TOWER))  # this tower still expresses what it sees in word embeddings
    model.set_attn_implementation("eager")  # bf16 SDPA has a slow backward on CPUs
    lessons, batcher, held = Lessons(read_records(LESSONS), 0), Batcher(tokenizer), heldout_pairs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.98), weight_decay=0.02)
    ema = {n: q.detach().clone() for n, q in model.named_parameters()}
    seen = {"loss": 3.0, "first": 0.0, "near": 0.0}
    accuracy = 0.0
    for step, bar in training_steps(args.steps, "judge", optimizer, 6e-4):
        rows = relatives(lessons, PICTURES)
        images = degrade(lessons.images[rows], rng)
        images = F.interpolate(images, size=(JUDGE_SIZE,) * 2, mode="bilinear", antialias=True)
        right = [lessons.answers[i] for i in rows]
        with torch.autocast("cpu", torch.bfloat16):
            features = read(model, tokenizer, right, 16) if step < READING else look(model, images)
            scores = preference(model, batcher, features, [[*right, lessons.wrong_answer(i)] for i in rows])
        loss = judging_loss(scores)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, 0.998, step)
        own = scores.diagonal()
        figures = {
            "loss": loss.item(),
            "first": (scores.argmax(1) == torch.arange(PICTURES)).float().mean().item(),
            "near": (own > scores[:, PICTURES]).float().mean().item(),
        }
        seen = {k: 0.98 * seen[k] + 0.02 * v for k, v in figures.items()}
        if step % 250 == 249:
            accuracy = judge_accuracy(model, batcher, *held)
        if step % 25 == 24:
            bar.set_postfix({k: f"{v:.3f}" for k, v in seen.items()} | {"held-out": f"{accuracy:.3f}"})
    model.load_state_dict(ema, strict=False)
    print(f"judge accuracy on {len(held[1])} held-out pairs: {judge_accuracy(model, batcher, *held):.3f}")
    save_with_processors(model.to(torch.bfloat16), tokenizer, args.out)


if __name__ == "__main__":
    main()
