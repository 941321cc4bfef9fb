"""Report on the base model: a grid of drawn images for each task, and the matching figures.

    python -m stages.base.base_report            # writes docs/images/base_<task>.webp and docs/base_figures.json

Every grid shows held-out prompts beside training prompts. The images come from the ODE sampler with fixed seeds.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPModel, Qwen2_5_VLForConditionalGeneration

from actors.experience.policy.policy_sampler import PolicySampler
from deepgen.config import load_settings
from deepgen.config.recipes import find_recipe
from deepgen.config.settings import TASKS
from deepgen.data.images import decode_image
from deepgen.data.records import Record
from deepgen.drawing.request import DrawRequest
from deepgen.tracking.grids import image_grid
from rewards.base import RewardRequest
from rewards.ocr import OcrReward
from stages.base.pictures.world import TEXT_WORDINGS
from stages.base.train_clip import retrieval
from stages.base.train_vae import psnr
from stages.base.train_vlm import Batcher, heldout_pairs, judge_accuracy
from stages.base.training import MODEL, REWARDS, load_split, to_float, unique_pictures


def draw(sampler: PolicySampler, records: list[Record]) -> list[np.ndarray]:
    """One image, uint8 [64, 64, 3], per record. The record's id seeds its noise."""
    request = DrawRequest(tuple(records), (0,), seed=0, image_size=64, num_steps=20, shift=3.0)
    return [images[0] for images in sampler.draw(request)]


def choose(split: str, task: str, count: int) -> list[Record]:
    records = [r for r in load_split(split) if r.task == task]
    return random.Random(f"{split}{task}").sample(records, min(count, len(records)))


def grids(sampler: PolicySampler, out: Path, count: int) -> None:
    """Draw a sheet for each task: held-out prompts on the left half, training prompts on the right."""
    out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        held, train = choose("heldout", task, count), choose("train", task, count)
        rows = [r for k in range(0, count, 6) for r in held[k : k + 6] + train[k : k + 6]]
        sources = [decode_image(r.references[0]) if r.references else None for r in rows]
        captions = [f"{'held-out' if r in held else 'train'}: {r.prompt}" for r in rows]
        image_grid(draw(sampler, rows), captions, columns=12, sources=sources).save(
            out / f"base_{task}.webp", quality=88
        )


def in_trained_wording(record: Record, number: int) -> Record:
    """The record with a training wording for the same word and ink."""
    _, word, ink = record.prompt.split('"')
    return replace(record, prompt=TEXT_WORDINGS[number % len(TEXT_WORDINGS)].format(w=word, ink=ink))


def ocr_rate(sampler: PolicySampler) -> dict[str, float]:
    """Share of drawn words that RapidOCR reads exactly, and the mean OCR score.

    For held-out words in held-out wordings, held-out words in trained wordings, and trained words.
    """
    reward = OcrReward()
    out: dict[str, float] = {}
    held = choose("heldout", "text", 60)
    asked = {
        "heldout": held,
        "heldout_words_trained_wordings": [in_trained_wording(record, i) for i, record in enumerate(held)],
        "train": choose("train", "text", 60),
    }
    for split, records in asked.items():
        scores = reward.score(
            [RewardRequest(r.prompt, r.answer, r.task, i) for r, i in zip(records, draw(sampler, records), strict=True)]
        )
        known = np.array([np.nan if s is None else s for s in scores], dtype=float)
        out |= {f"{split}_read_exactly": float(np.nanmean(known > 0.999)), f"{split}_score": float(np.nanmean(known))}
    return out


def judge_figures() -> dict[str, float]:
    """The judge's accuracy on held-out pictures with their own description, another picture's, or a near miss."""
    judge = Qwen2_5_VLForConditionalGeneration.from_pretrained(REWARDS / "judge", dtype=torch.float32).eval()
    batcher = Batcher(AutoTokenizer.from_pretrained(REWARDS / "judge"))
    images, answers, _ = heldout_pairs()
    n = len(answers) // 2
    own, near = answers[:n], answers[n:]
    rng = random.Random(2)
    other = [rng.choice([a for a in own if a != mine]) for mine in own]
    matched, mismatched, missed = (
        judge_accuracy(judge, batcher, images[:n], said, [said is own] * n) for said in (own, other, near)
    )
    return {
        "pictures": n,
        "matched": matched,
        "mismatched": mismatched,
        "matched_and_mismatched": (matched + mismatched) / 2,
        "near_misses": missed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--count", type=int, default=24, help="prompts of each kind and task in a grid")
    args = parser.parse_args()
    sampler = PolicySampler(load_settings(find_recipe("tiny-rl"), [f"model.weights={args.model}"]))
    grids(sampler, args.docs / "images", args.count)
    clip = CLIPModel.from_pretrained(REWARDS / "clip", dtype=torch.float32).eval()
    held = to_float(unique_pictures(load_split("heldout")).images)
    figures = {
        "vae_psnr_db": psnr(AutoencoderKL.from_pretrained(args.model / "vae").eval(), held),
        "judge": judge_figures(),
        "clip": retrieval(clip, AutoTokenizer.from_pretrained(REWARDS / "clip"), "heldout"),
        "ocr": ocr_rate(sampler),
    }
    (args.docs / "base_figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
