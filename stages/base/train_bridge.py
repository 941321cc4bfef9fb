"""Train the VLM and a fresh bridge to produce the DiT's context, as its own text encoder did in training.

    python -m stages.base.train_bridge              # writes assets/tiny/model/{vlm,bridge}

On a cluster, alignment pre-training does this from scratch, with a VLM that knows every word and 200,000 iterations.
Here, a fresh bridge over a frozen VLM still ignored the prompt after 190 steps, and even regression onto the encoder's
outputs failed (docs/log.md). So here the VLM and the bridge both learn these outputs, and every sixth batch trains the
VLM on describing and judging, so that it does not forget. The DiT reads its context as a set, so the targets are the
encoder's outputs for prompt tokens, and their mean for all other positions (template, image, think tokens).
"""

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from deepgen.data.images import decode_image
from deepgen.data.loading.dataset import image_to_tensor
from deepgen.data.records import Record
from deepgen.models.bridge import BRIDGE_PREFIXES
from deepgen.models.chat_template import TURN_END, TURN_START
from deepgen.models.unified import UnifiedModel
from deepgen.models.weights_io.folder import load_vlm, save_bridge, save_vlm
from stages.base.train_dit import PromptEncoder
from stages.base.train_vlm import Batcher, Lessons, answer_logits, draw_batch
from stages.base.training import BACKBONE, MODEL, PROMPT_ENCODER, load_split, training_steps

SHARES = {"t2i": 0.45, "reasoning": 0.25, "text": 0.2, "edit": 0.1}
EMPTY = Record("empty", "t2i", "", "", None, (), "the unconditional prompt")


class Teacher:
    """The DiT's own text encoder, which gives the bridge's target outputs for a batch of records."""

    def __init__(self, encoder: PromptEncoder, think_tokens: int):
        self.encoder, self.tokenizer = encoder, AutoTokenizer.from_pretrained(MODEL / "tokenizer")
        suffix = self.tokenizer(f"{TURN_END}\n{TURN_START}assistant\n", add_special_tokens=False)["input_ids"]
        self.after = len(suffix) + think_tokens  # positions after the prompt's last token

    def ids(self, record: Record) -> list[int]:
        """Token ids of the bare prompt; a single pad token if the prompt is empty."""
        ids: list[int] = self.tokenizer(record.prompt, add_special_tokens=False)["input_ids"][:60]
        return ids or [self.tokenizer.pad_token_id]

    @torch.no_grad()
    def __call__(self, records: list[Record], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Context [B, length, D], pooled [B, D], and a mask of the prompt's positions, bool [B, length]."""
        pad, ids = self.tokenizer.pad_token_id, [self.ids(r) for r in records]
        longest = max(map(len, ids))
        padded = torch.tensor([x + [pad] * (longest - len(x)) for x in ids])
        valid = torch.tensor([[True] * len(x) + [False] * (longest - len(x)) for x in ids])
        outputs, pooled = self.encoder(padded, valid)
        context = pooled[:, None].repeat(1, length, 1)
        prompt = torch.zeros(len(ids), length, dtype=torch.bool)
        for i, row in enumerate(ids):
            prompt[i, length - self.after - len(row) : length - self.after] = True
            context[i, prompt[i]] = outputs[i, : len(row)]
        return context, pooled, prompt


class Draw:
    """Draws batches of records in the mixture SHARES. 4 % of the prompts are empty."""

    def __init__(self, records: list[Record], seed: int):
        self.rng = np.random.default_rng(seed)
        self.groups = {task: [r for r in records if r.task == task] for task in SHARES}

    def __call__(self, size: int) -> list[Record]:
        out = []
        for task in self.rng.choice(list(SHARES), size, p=list(SHARES.values())):
            group = self.groups[str(task)]
            out.append(EMPTY if self.rng.random() < 0.04 else group[self.rng.integers(len(group))])
        return out


@torch.no_grad()
def states(model: UnifiedModel, teacher: Teacher, records: list[Record]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The bridge's input: stacked hidden states [B, L, layers·W], their mask, and the part for each prompt's tokens."""
    images = [[image_to_tensor(decode_image(d), 64) for d in r.references] for r in records]
    with torch.autocast("cpu", torch.bfloat16):
        parts, mask = model.prompt_states([r.prompt for r in records], images)
    x = torch.cat(parts, dim=-1).float()
    prompt = teacher(records, x.shape[1])[2]
    return x, mask, [own[where] for own, where in zip(x, prompt, strict=True)]


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


@torch.no_grad()
def fit_projectors(model: UnifiedModel, teacher: Teacher, records: list[Record]) -> None:
    """Fit the bridge's projectors by least squares: the first to the encoder's input embeddings, two to its outputs.

    Directions of the hidden states differ in scale by a factor of 300. From a random start, training would spend most
    of its steps on that.
    """
    encoder, width = teacher.encoder, model.projector_1.in_features
    gram, cross = torch.zeros(width + 1, width + 1), torch.zeros(width + 1, model.projector_1.out_features)
    for start in range(0, len(records), 64):
        part = records[start : start + 64]
        for record, own in zip(part, states(model, teacher, part)[2], strict=True):
            ids = torch.tensor(teacher.ids(record))
            x, y = with_one(own), encoder.tokens(ids) + encoder.positions(torch.arange(len(ids)))
            gram, cross = gram + x.T @ x, cross + x.T @ y
    solution = torch.linalg.solve(gram + 1e-4 * gram.diagonal().diag(), cross)
    model.projector_1.weight.copy_(solution[:-1].T)
    model.projector_1.bias.copy_(solution[-1])
    some = records[:256]
    x, mask, _ = states(model, teacher, some)
    context, pooled, prompt = teacher(some, x.shape[1])
    x = model.connector(model.projector_1(x), mask)
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    for projector, inputs, targets in (
        (model.projector_3, x[prompt], context[prompt]),
        (model.projector_2, mean, pooled),
    ):
        inputs = with_one(inputs)
        solution = torch.linalg.solve(inputs.T @ inputs + torch.eye(inputs.shape[1]), inputs.T @ targets)
        projector.weight.copy_(solution[:-1].T)
        projector.bias.copy_(solution[-1])


@torch.no_grad()
def copy_layers(model: UnifiedModel, encoder: PromptEncoder) -> None:
    """Start the connector from the encoder's weights, as their layers have the same form."""
    pairs: Any = zip(model.connector.layers, encoder.layers.layers, strict=True)
    for ours, theirs in pairs:
        attention = theirs.self_attn
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            projection = getattr(ours.self_attn, name)
            projection.weight.copy_(attention.in_proj_weight.chunk(3)[i])
            projection.bias.copy_(attention.in_proj_bias.chunk(3)[i])
        for target, source in (
            (ours.self_attn.out_proj, attention.out_proj),
            (ours.layer_norm1, theirs.norm1),
            (ours.layer_norm2, theirs.norm2),
            (ours.mlp.fc1, theirs.linear1),
            (ours.mlp.fc2, theirs.linear2),
        ):
            target.load_state_dict(source.state_dict())


def losses(model: UnifiedModel, teacher: Teacher, records: list[Record]) -> dict[str, Tensor]:
    """Squared errors: of the context at the prompt's positions and at the others, and of the pooled vector."""
    images = [[image_to_tensor(decode_image(d), 64) for d in r.references] for r in records]
    with torch.autocast("cpu", torch.bfloat16):
        cond = model.encode_prompts([r.prompt for r in records], images)
    context, pooled, prompt = teacher(records, cond.context.shape[1])
    assert cond.mask is not None  # the default padding is masked
    rest = cond.mask & ~prompt
    return {
        "prompt": F.mse_loss(cond.context.float()[prompt], context[prompt]),
        "rest": F.mse_loss(cond.context.float()[rest], context[rest]),
        "pooled": F.mse_loss(cond.pooled.float(), pooled) / pooled.var(0).mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1300)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = UnifiedModel.from_folder(MODEL, preset="tiny", fresh_bridge=True)
    model.vlm = load_vlm(BACKBONE)
    model.vlm.set_attn_implementation("eager")  # bf16 SDPA has a slow backward on CPUs
    model.vlm.requires_grad_(True)
    encoder = PromptEncoder(len(model.tokenizer))
    encoder.load_state_dict(torch.load(PROMPT_ENCODER, weights_only=True))
    copy_layers(model, encoder.eval())
    records = load_split("train")
    draw, teacher = Draw(records, 6), Teacher(encoder, model.architecture.num_queries)
    fit_projectors(model, teacher, draw(4000))
    lessons, batcher, rng = Lessons(records, 7), Batcher(model.tokenizer), np.random.default_rng(7)
    bridge = [p for n, p in model.named_parameters() if n.startswith(BRIDGE_PREFIXES)]
    trained = [*bridge, *model.vlm.parameters()]
    groups: list[dict[str, Any]] = [{"params": bridge}, {"params": list(model.vlm.parameters()), "lr_scale": 0.4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    mean: dict[str, float] = {}
    for step, bar in training_steps(args.steps, "bridge", optimizer, 1e-3):
        if step % 6 == 5:
            kind = ("caption", "judge", "prompt", "edit")[step // 6 % 4]
            with torch.autocast("cpu", torch.bfloat16):
                logits, labels = answer_logits(model.vlm, draw_batch(kind, lessons, batcher, rng, 1.0, size=16))
            parts = {kind: F.cross_entropy(logits, labels)}
        else:
            parts = losses(model, teacher, draw(40))
        optimizer.zero_grad()
        sum(parts.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for name, loss in parts.items():
            mean[name] = 0.98 * mean.get(name, loss.item()) + 0.02 * loss.item()
        if step % 50 == 49:
            bar.set_postfix({k: f"{v:.3f}" for k, v in mean.items()})
    save_vlm(model.vlm, MODEL / "vlm")
    save_bridge(model, model.architecture, MODEL / "bridge")
    print("squared error: " + ", ".join(f"{name} {value:.4f}" for name, value in mean.items()))


if __name__ == "__main__":
    main()
