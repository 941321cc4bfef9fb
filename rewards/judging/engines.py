"""What answers a judge's questions: vLLM in this process, or a server with OpenAI's chat form. One interface for both.

`JudgeOptions` are the options that all judges have. Both engines see the same pixels (PNG on the way to a server), use
the model's own chat template, and return the log-probabilities of the 20 likeliest first tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pydantic import model_validator

from deepgen.config import InputPath, PoolSettings, Share, setting
from rewards.base import Missing, RewardRequest, RewardUnavailable, existing_folder
from rewards.judging.questions import Answer, Question, bounded, filled

GIVE_UP = 0.9  # share of the pool's deadline after which questions without an answer are given up


class Engine(Protocol):
    """Something that answers questions."""

    @property
    def reserved(self) -> Sequence[str]:
        """Special tokens of its tokenizer, as far as they are known here."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Answer | Missing]:
        """One answer per question, in order, or why there is none."""
        ...


class JudgeOptions(PoolSettings):
    """Options of every judge: which model, where it runs, and the limits of a question and an answer."""

    path: InputPath = setting(
        "weights/vlm-judge", "Folder of a vision-language model that vLLM serves; not used with model or endpoint."
    )
    model: str = setting("", "Name of the model at the endpoint or, without one, on the hub.")
    endpoint: str = setting(
        "",
        "Base address of a server with OpenAI's chat form (vLLM, SGLang, ...); empty: vLLM in this process.",
        allowed="http://HOST:PORT/v1, or https",
    )
    token_env: str = setting(
        "", "Name of the environment variable with the endpoint's token; empty: no token.", allowed="a variable's name"
    )
    concurrency: int = setting(16, "Questions that wait for the endpoint at the same time.", ge=1, le=1024)
    jpeg_quality: int = setting(
        0, "Quality of JPEG on the way to the endpoint; 0 sends PNG, which loses nothing.", ge=0, le=100
    )
    gpus: Share = setting(
        1.0, "GPUs of one replica, over which the model is split; on a cluster without any none.", unit="GPUs"
    )
    gpu_memory_share: float = setting(
        0.85, "Share of a GPU's memory that vLLM takes; less where a GPU is shared.", gt=0, le=1
    )
    context: int = setting(
        0, "Longest question with its answer; 0: as the model and the memory allow.", unit="tokens", ge=0
    )
    max_pixels: int = setting(
        1024 * 1024, "Larger images are scaled down before the judge sees them.", unit="pixels", ge=32 * 32
    )
    sources: int = setting(
        0, "Source images of an edit that are shown before the result, at most; 0 shows none.", ge=0, le=16
    )
    system: str = setting("", "A system turn before the question; empty for none.")
    fence: bool = setting(True, "Put marks around the prompt's text and say that it is no instruction.")
    max_tokens: int = setting(1024, "Longest answer, where the verdict is read from text.", unit="tokens", ge=1)
    temperature: float = setting(0.0, "Of sampled answers; 0 takes the likeliest token.", ge=0, le=2)

    @model_validator(mode="after")
    def _check_endpoint(self) -> JudgeOptions:
        if not self.endpoint:
            return self
        parts = urlsplit(self.endpoint)
        if parts.username or parts.password:
            raise ValueError("endpoint: has a user or password in it; allowed: a token, in token_env's variable")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"endpoint: got {self.endpoint!r}; allowed: http://HOST:PORT/v1, or https")
        if not self.model:
            raise ValueError("model: got '' beside an endpoint; allowed: the model's name there")
        if self.gpus:  # the default: a GPU would stand idle
            raise ValueError(f"gpus: got {self.gpus:g} beside an endpoint; allowed: 0")
        return self

    def input_paths(self) -> dict[str, Path]:
        return {} if self.model else super().input_paths()


def compiled(pattern: str, key: str) -> re.Pattern[str]:
    """A pattern that finds a verdict. Raises ValueError, starting with `key`, unless it has exactly one group."""
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{key}: got {pattern!r}: {error}; allowed: a regular expression") from error
    if found.groups != 1:
        raise ValueError(f"{key}: got {pattern!r} with {found.groups} groups; allowed: one, around the verdict")
    return found


def build_engine(options: JudgeOptions, images: int) -> Engine:
    """The engine that the options describe. images: the most that one question shows.

    Raises:
        UserError: the folder is missing, the token's variable is not set, or vLLM does not serve the model.
    """
    # Imported here, because every process that reads settings imports this module.
    from rewards.judging.judge_endpoint import EndpointEngine
    from rewards.judging.judge_vllm import VllmEngine
    from rewards.remote.caller import read_token

    if options.endpoint:
        return EndpointEngine(
            options.endpoint,
            options.model,
            token=read_token(options.token_env, options.dotted("token_env")) if options.token_env else "",
            deadline_s=GIVE_UP * options.deadline_s,
            concurrency=options.concurrency,
            jpeg_quality=options.jpeg_quality,
        )
    key = options.dotted("model" if options.model else "path")
    model = options.model or str(existing_folder(key, options.path, "config.json"))
    return VllmEngine(
        model,
        key,
        images=images,
        gpus=options.gpus,
        gpu_memory_share=options.gpu_memory_share,
        context=options.context,
        parallel=options.batch_size,
    )


def ask_all(engine: Engine, questions: Sequence[Question | Missing]) -> list[Answer | Missing]:
    """Answers to those questions that may be asked, in order.

    Raises:
        RewardUnavailable: every question that was asked failed on the way, so that trying again later makes sense.
    """
    asked = [question for question in questions if isinstance(question, Question)]
    answers = engine.ask(asked) if asked else []
    lost = [answer for answer in answers if isinstance(answer, Missing) and answer.reason == "transport"]
    if asked and len(lost) == len(asked):
        raise RewardUnavailable(lost[0].detail)
    following = iter(answers)
    return [question if isinstance(question, Missing) else next(following) for question in questions]


def asked_about(
    requests: Sequence[RewardRequest], template: str, options: JudgeOptions, *, choices: bool
) -> Question | Missing:
    """A template's question about images of one prompt: the sources if they are shown, then the images in order."""
    sources = requests[0].references if options.sources else ()
    if options.sources and not sources:
        return Missing("refused", "the judge wants an edit's source, and there is none")
    if len(sources) > options.sources:
        return Missing("too_long", f"{len(sources)} source images; allowed: {options.sources}")
    images = (*sources, *(request.image for request in requests))
    return Question(
        text=filled(template, requests[0], fence=options.fence),
        images=tuple(bounded(image, options.max_pixels) for image in images),
        system=options.system,
        max_tokens=1 if choices else options.max_tokens,
        temperature=0.0 if choices else options.temperature,
        choices=choices,
    )
