"""Train a visual tower before it joins a language model: to see the thing, its colour or pose, and the letters.

    python -m stages.base.train_tower               # writes runs/base/tower.safetensors

A tower trained on a language model's loss, or on yes/no questions, learned colours and backgrounds but no shapes
(docs/log.md). So this program trains it with classifiers, which are discarded afterwards. The tower also learns to
express what it sees in the language model's embeddings: for each word of the description, above all for rare ones,
some visual token must be close to the word's embedding. (Any token may be the one: Qwen's tower knows the relative
positions of its patches, but not which patch is the first.)
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from deepgen.data.parquet import read_records
from stages.base.train_vlm import JUDGE_SIZE, Lessons, degrade, make_vlm, patchify
from stages.base.training import LESSONS, MODEL, TOWER, training_steps

LETTERS = " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LENGTH = 4  # letters in the longest word
WORD = "word"


class Labels:
    """Class indices of every picture: thing [N], attribute [N], letters [N, LENGTH] (blank if it shows no word)."""

    def __init__(self, lessons: Lessons):
        parts = [
            (WORD, answer.rpartition('"')[2]) if text else part
            for answer, part, text in zip(lessons.answers, lessons.parts, lessons.is_text, strict=True)
        ]
        words = [a.split('"')[1] if text else "" for a, text in zip(lessons.answers, lessons.is_text, strict=True)]
        self.things, self.attributes = (sorted({p[i] for p in parts}) for i in (0, 1))
        self.thing = torch.tensor([self.things.index(p[0]) for p in parts])
        self.attribute = torch.tensor([self.attributes.index(p[1]) for p in parts])
        self.letters = torch.tensor([[LETTERS.index(c) for c in word.ljust(LENGTH)] for word in words])


class Words:
    """The words of each picture's description, as shares [N, V] that are larger for rarer words.

    Also measures how close visual tokens are to the words' embeddings.
    """

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration, answers: list[str]):
        tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
        embeddings = vlm.get_input_embeddings().weight.detach().clone()
        self.directions, self.norm = F.normalize(embeddings, dim=-1), embeddings.norm(dim=-1).mean()
        said = torch.zeros(len(answers), len(embeddings))
        for own, ids in zip(said, tokenizer(answers, add_special_tokens=False)["input_ids"], strict=True):
            own[ids] = 1
        rarity = (len(answers) / said.sum(0).clamp(min=1)).log() * said
        self.shares = rarity / rarity.sum(-1, keepdim=True)

    def logits(self, x: Tensor) -> Tensor:
        """Similarity of each word to its closest visual token, [B, V]: soft maximum of cosines over x [B, T, W]."""
        return (20 * F.normalize(x, dim=-1) @ self.directions.T).logsumexp(1)

    def found(self, logits: Tensor, rows: list[int]) -> float:
        """The fraction, weighted by share, of a description's K words that are among the K closest to visual tokens."""
        shares = self.shares[rows]
        ranks = (-logits).argsort(-1).argsort(-1)
        return (shares * (ranks < (shares > 0).sum(-1, keepdim=True))).sum(-1).mean().item()


class Classifiers(nn.Module):
    """Linear classifiers on the merged visual tokens [B, T, W]."""

    def __init__(self, tokens: int, width: int, labels: Labels):
        super().__init__()
        self.thing = nn.Linear(tokens * width, len(labels.things))
        self.attribute = nn.Linear(tokens * width, len(labels.attributes))
        self.letters = nn.Linear(tokens * width, LENGTH * len(LETTERS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.flatten(1).float()
        return self.thing(x), self.attribute(x), self.letters(x).view(-1, LENGTH, len(LETTERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(5)
    lessons = Lessons(read_records(LESSONS), 5)
    labels = Labels(lessons)
    vlm = make_vlm(AutoTokenizer.from_pretrained(MODEL / "tokenizer"))
    vlm.set_attn_implementation("eager")
    tower = vlm.model.visual.train()
    heads = Classifiers((JUDGE_SIZE // 28) ** 2, vlm.config.text_config.hidden_size, labels)
    trained = nn.ModuleDict({"tower": tower, "heads": heads})
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    words = Words(vlm, lessons.answers)
    right = {"thing": 0.0, "attribute": 0.0, "letter": 0.0, "word": 0.0}
    for step, bar in training_steps(args.steps, "tower", optimizer, 1e-3):
        rows = [lessons.picture() for _ in range(64)]
        x = degrade(lessons.images[rows], rng)
        patches, grid = patchify(F.interpolate(x, size=(JUDGE_SIZE,) * 2, mode="bilinear", antialias=True))
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(patches, grid_thw=grid).pooler_output.view(len(rows), -1, heads.thing.in_features // 16)
        thing, attribute, letters = heads(features)
        is_word = torch.from_numpy(lessons.is_text[rows])
        said = words.logits(features.float())
        loss = F.cross_entropy(thing, labels.thing[rows]) + F.cross_entropy(attribute, labels.attribute[rows])
        loss = loss - 2 * (said.log_softmax(-1) * words.shares[rows]).sum(-1).mean()
        right["word"] += 0.02 * (words.found(said, rows) - right["word"])
        if is_word.any():
            loss = loss + F.cross_entropy(letters[is_word].flatten(0, 1), labels.letters[rows][is_word].flatten())
            hit = (letters.argmax(-1) == labels.letters[rows])[is_word].float().mean().item()
            right["letter"] += 0.02 * (hit - right["letter"])
        for name, logits, truth in (("thing", thing, labels.thing), ("attribute", attribute, labels.attribute)):
            right[name] += 0.02 * ((logits.argmax(-1) == truth[rows]).float().mean().item() - right[name])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            bar.set_postfix({k: f"{v:.3f}" for k, v in right.items()})
    with torch.no_grad():  # give visual tokens the size of word embeddings
        last = tower.merger.mlp[-1]
        for parameter in (last.weight, last.bias):
            parameter *= words.norm / features.float().norm(dim=-1).mean()
    TOWER.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tower.state_dict().items()}, TOWER)
    print(", ".join(f"{name} right {share:.3f}" for name, share in right.items()))


if __name__ == "__main__":
    main()
