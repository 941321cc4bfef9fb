"""What the rewards are asked about images. Made where the images are, so that no other process has to read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from deepgen.config.schema.reward_weights import weight_at
from deepgen.config.schema.sections import RewardSettings
from deepgen.data.images import decode_image
from deepgen.data.records import Record
from deepgen.drawing.pixels import is_picture
from rewards import RewardRequest, applies

_NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)  # whether a reward applies depends on the prompt alone


def make_requests(record: Record, images: Iterable[np.ndarray]) -> list[RewardRequest]:
    """One request an image, uint8 [H, W, 3] each. They share the record's decoded source images."""
    references = tuple(decode_image(data) for data in record.references)
    return [RewardRequest(record.prompt, record.answer, record.task, image, references) for image in images]


def request_key(request: RewardRequest) -> bytes | None:
    """Cache key: a hash of everything that a reward may use. None where there is no picture to ask about."""
    if not is_picture(request.image):
        return None
    key = hashlib.blake2b(digest_size=16)
    for text in (request.prompt, request.answer, request.task):
        key.update(f"{len(text)}:{text}".encode())
    for image in (request.image, *request.references):
        key.update(repr(image.shape).encode())
        key.update(np.ascontiguousarray(image).data)
    return key.digest()


def reward_weights(rewards: RewardSettings, record: Record, request: RewardRequest, step: int | None) -> np.ndarray:
    """Weight in a training step of each of the K used rewards for a record, float32 [K]; 0 = not trained on.

    It is 0 where the record's row has no weight for a reward, or none yet, or the reward does not apply to the prompt.
    It depends on nothing else, so a group has the same weights whenever and wherever it is drawn.

    request: one of the record's. step: None for an evaluation, whose weights are those after all warm-ups.
    """
    row = rewards.weights_of(record.task, record.source)
    return _applying(rewards, {name: weight_at(weight, step) for name, weight in row.items()}, request)


def held_out_weights(rewards: RewardSettings, request: RewardRequest) -> np.ndarray:
    """Weight of each of the K used rewards that is held out, float32 [K]; 0 for those of `reward_weights`."""
    return _applying(rewards, rewards.held_out(), request)


def _applying(rewards: RewardSettings, row: Mapping[str, float], request: RewardRequest) -> np.ndarray:
    prompt = replace(request, image=_NO_IMAGE)
    weights = {name: row.get(name, 0.0) for name in rewards.used()}
    asked = [weight if weight and applies(rewards.pools[name], prompt) else 0.0 for name, weight in weights.items()]
    return np.array(asked, dtype=np.float32)
