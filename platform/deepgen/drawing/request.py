"""What decides a picture besides the model's weights, in one type for all that draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepgen.config import Settings
from deepgen.data.records import Record


@dataclass(frozen=True)
class DrawRequest:
    """Pictures of N prompts, the same samples of each.

    A picture's noise comes from `seed`, `epoch`, the record's id and the number of the sample alone: the same request
    draws the same pictures in rollouts, in evaluations and outside of training, on whatever actor and in whatever batch
    (up to the rounding of matrix kernels, which may depend on the batch size).
    """

    records: tuple[Record, ...]
    samples: tuple[int, ...]  # numbers of the samples of each prompt, from 0
    seed: int
    image_size: int  # sources are scaled to about image_size^2 pixels; the target's side without a source
    num_steps: int
    shift: float  # of the noise levels (M3.3)
    epoch: int = 0
    sampler: str = "ode"
    eta: float = 0.0
    guidance_scale: float = 1.0  # 1 is off
    negative_prompt: str = ""  # text of the unconditional branch of guidance
    size: tuple[int, int] | None = None  # height and width of the target; None: of the first source, or a square
    same_noise: bool = False  # the samples of a prompt start from one noise
    sde_window: str = "all"
    kept_steps: tuple[int, ...] = ()  # sampler steps to keep for training

    @classmethod
    def of_evaluation(cls, settings: Settings, records: Sequence[Record], samples: int) -> DrawRequest:
        """As the section evaluation says: by the ODE, whose only noise is the start noise."""
        evaluation = settings.evaluation
        return cls(
            records=tuple(records),
            samples=tuple(range(samples)),
            seed=evaluation.seed,
            image_size=settings.data.image_size,
            num_steps=evaluation.num_steps,
            shift=settings.rollout.shift,
            guidance_scale=evaluation.guidance_scale,
            negative_prompt=evaluation.negative_prompt,
        )
