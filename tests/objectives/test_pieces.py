"""A step that reaches the learner group by group: the same gradient as that of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.experience.policy.policy_sampler import pack_samples
from actors.learner.protocols import HeldLoss
from actors.messages import Group, RankBatch
from actors.objectives.experience_source import RLBatch, _corrections
from actors.objectives.mr_grpo import MRGRPO
from deepgen.algorithms.advantages import AdvantageResult, group_advantages
from deepgen.config import Settings, load_settings
from tests.objectives.test_policy_losses import CONTEXT, Dit, make

GROUPS, SIZE = 6, 4


def advantages(settings: Settings, scores: np.ndarray, *, alone: bool) -> AdvantageResult:
    """Of [groups, G, K] scores: of each group's own part, or with the batch's."""
    count, size, rewards = scores.shape
    return group_advantages(
        settings.algorithm.advantage,
        torch.from_numpy(scores.reshape(-1, rewards)),
        torch.tensor([0.7, 0.3]).expand(count * size, rewards),
        torch.arange(count).repeat_interleave(size),
        whiten="none" if alone else settings.algorithm.whiten,
        clip=None if alone and settings.overlap().held else settings.algorithm.advantage_clip,
    )


def gradient(objective: MRGRPO, batches: list[RLBatch], factor: float) -> tuple[Tensor, float]:
    """Gradient and loss as the learner's loop makes them from the pieces of a batch."""
    dit = Dit(0.5)
    held, total = torch.zeros(()), 0.0
    for batch in batches:
        for micro in objective.prepare(SimpleNamespace(transformer=dit), batch, CONTEXT):  # type: ignore[arg-type]
            loss, _ = objective.loss(SimpleNamespace(transformer=dit), micro, CONTEXT)  # type: ignore[arg-type]
            if isinstance(loss, HeldLoss):
                (part,) = torch.autograd.grad(loss.held.loss, [dit.weight], retain_graph=loss.now is not None)
                held, total, rest = held + part, total + factor * float(loss.held.loss.detach()), loss.now
            else:
                rest = loss
            if rest is not None:
                rest.backward()
                total += float(rest.detach())
    return factor * held + (0 if dit.weight.grad is None else dit.weight.grad), total


@pytest.mark.parametrize("clip", [5.0, 0.9])
@pytest.mark.parametrize("own", [[], ["algorithm.kl=none"], ["algorithm.advantage=grpo"], ["algorithm.whiten=none"]])
def test_pieces_have_the_gradient_of_the_whole_batch(own: list[str], clip: float) -> None:
    """With a clip of 0.9 a good part of the advantages is clamped, which is not in proportion to the factor."""
    settings, group, samples = make(
        "clipped_ratio",
        "algorithm.kl_beta=0.1",
        f"algorithm.advantage_clip={clip}",
        "experience.overlap=on",
        "algorithm.sft_coef=0",
        *own,
    )
    assert settings.overlap().pieces and settings.overlap().held == (own in ([], ["algorithm.kl=none"]))
    scores = np.random.default_rng(0).standard_normal((GROUPS, SIZE, 2)).astype(np.float32)
    scores[1] = 0.5  # a group that learns nothing
    scores[2, 1] = np.nan  # a sample that nobody could judge
    reference: Any = None if own == ["algorithm.kl=none"] else Dit(0.3)
    objective = MRGRPO(settings, reference, None)
    whole = advantages(settings, scores, alone=False)
    rows = whole.advantages.reshape(GROUPS, SIZE).numpy()
    packed = replace(group, trajectory=pack_samples(samples))
    groups = tuple(replace(packed, number=n, advantages=row) for n, row in enumerate(rows))
    expected, loss = gradient(objective, [RLBatch(groups, ())], 1.0)

    alone = [advantages(settings, one[None], alone=True).advantages.numpy() for one in scores]
    came: list[Group] = [replace(packed, number=n, advantages=row) for n, row in enumerate(alone)]
    held = settings.overlap().held
    pieces = [RLBatch((one,), (), share=1 / GROUPS, held=held) for one in came]
    if held:
        clamped = int((np.abs(rows) >= clip).any(axis=1).sum())
        assert (clamped > 0) == (clip < 1)
        end = RankBatch(groups, {}, {}, whole.factor, clamped)
        pieces.append(RLBatch((), (), share=1 / GROUPS, corrections=_corrections(came, end)))
    found, total = gradient(objective, pieces, whole.factor if held else 1.0)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
    assert total == pytest.approx(loss, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["experience.overlap=off"], "experience.overlap is off"),
        (["experience.max_staleness=1"], "experience.max_staleness 1"),
        (["algorithm.updates_per_batch=2"], "algorithm.updates_per_batch 2"),
        (["algorithm.advantage=reinforcepp"], "algorithm.advantage reinforcepp"),
        (["algorithm.advantage=grpo_global_std"], "algorithm.advantage grpo_global_std"),
        (["algorithm.whiten=rank"], "algorithm.whiten rank"),
        (["algorithm.policy_loss=diffusion_nft"], "algorithm.policy_loss diffusion_nft"),
        (["train.zero_stage=3", "algorithm.kl=none"], "train.zero_stage 3"),
        ([], "second backward pass"),
    ],
)
def test_the_reason_to_wait_is_given(overrides: list[str], reason: str) -> None:
    chosen = load_settings(None, overrides).overlap()
    assert not chosen.pieces and reason in chosen.why


def test_nothing_is_held_back_without_need() -> None:
    assert load_settings(None, ["algorithm.kl=none"]).overlap()[:2] == (True, True)
    assert load_settings(None, ["algorithm.whiten=none"]).overlap()[:2] == (True, False)
    assert load_settings(None, ["algorithm.advantage=grpo"]).overlap()[:2] == (True, False)
