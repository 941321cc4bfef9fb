"""Train a small CLIP on the tiny world, and report its retrieval on held-out pictures.

    python -m stages.base.train_clip

Batches mix unrelated pictures with pictures that differ in one word (colour, tone, background, letter), so that the
similarity must depend on attributes and not only on the object.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from deepgen.data.parquet import read_records
from rewards.clip_encoder import CLIP_MEAN, CLIP_STD
from stages.base.train_vlm import Lessons, degrade
from stages.base.training import LESSONS, MODEL, REWARDS, load_split, training_steps, unique_pictures, update_ema

WIDTH = 160


def config(vocab: dict[str, int]) -> CLIPConfig:
    """Model config: 4 vision layers over 8 x 8 patches of 8 px and 3 text layers of width 160; 128 shared features."""
    common = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
    }
    end = vocab["<|endoftext|>"]  # not <|im_end|>: its id is 2, which for CLIPModel means "an old config"
    text = common | {
        "vocab_size": len(vocab),
        "num_hidden_layers": 3,
        "max_position_embeddings": 40,
        "eos_token_id": end,
        "bos_token_id": end,
        "pad_token_id": vocab["<|endoftext|>"],
    }
    vision = common | {"num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)


def make_tokenizer() -> Any:
    """The world's tokenizer. It ends every text with <|endoftext|>, where the text model pools."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer.padding_side, tokenizer.model_max_length = "right", 40
    return tokenizer


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> images normalised with CLIP's mean and deviation."""
    return ((x + 1) / 2 - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)


def rows_of_batch(lessons: Lessons, size: int) -> list[int]:
    """Distinct pictures, a third of them closely related to another picture in the batch."""
    rows: dict[int, None] = {}
    while len(rows) < size:
        i = lessons.picture()
        rows[i] = None
        near = [] if lessons.is_text[i] else lessons.same_thing[lessons.parts[i][0]]
        for j in lessons.rng.sample(near, min(len(near), 2)):
            rows[j] = None
    return list(rows)[:size]


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: Any, split: str) -> dict[str, float]:
    """Text-to-image recall at 1 over the split, and accuracy against one nearly right description."""
    records = load_split(split)
    if split == "heldout":
        records = [r for r in records if not r.id.endswith("/heldout")]
    p = unique_pictures(records)
    lessons = Lessons(records, 1)
    image = F.normalize(
        torch.cat([model.get_image_features(normalise(b)).pooler_output for b in lessons.images.split(64)]), dim=-1
    )
    wrong = [lessons.wrong_answer(i) for i in range(len(p.answers))]
    right_f, wrong_f = (text_features(model, tokenizer, t) for t in (p.answers, wrong))
    top = (right_f @ image.T).argmax(1) == torch.arange(len(image))
    two = (image * right_f).sum(1) > (image * wrong_f).sum(1)
    return {"recall_at_1": top.float().mean().item(), "two_way": two.float().mean().item(), "pictures": len(image)}


def text_features(model: CLIPModel, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    t = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    return F.normalize(model.get_text_features(t.input_ids, attention_mask=t.attention_mask).pooler_output, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--out", type=Path, default=REWARDS / "clip")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = make_tokenizer()
    model = CLIPModel(config(tokenizer.get_vocab()))
    model.set_attn_implementation("eager")
    lessons = Lessons(read_records(LESSONS), 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    ema = {n: q.detach().clone() for n, q in model.named_parameters()}
    for step, bar in training_steps(args.steps, "clip", optimizer, 1e-3):
        rows = rows_of_batch(lessons, 128)
        with torch.autocast("cpu", torch.bfloat16):
            pixels = normalise(degrade(lessons.images[rows], rng))
            image = F.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)
            text = text_features(model, tokenizer, [lessons.answers[i] for i in rows]).float()
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        target = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, 0.995, step)
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.load_state_dict(ema, strict=False)
    print({k: round(v, 3) for k, v in retrieval(model, tokenizer, "heldout").items()})
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
