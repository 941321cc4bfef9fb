"""VLM judge: the probability that a Qwen2.5-VL answers Yes to "Does this image show ...?".

vLLM runs inside this process (the pool's actor). The probability is sigmoid(log p(Yes) - log p(No)) of the first
generated token. So it is smooth where a sampled answer would be 0 or 1, and there is no text to parse. (The reference
parses a generated verdict and counts an unparsable one as half a win, M3.8 a.)

`judge_prompt` and `judge_image` define what the judge sees; a program that trains a judge uses the same two functions.

Left out in this version: references. The judge sees only the result of an edit and the description of that result.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from deepgen.config import InputPath, PoolSettings, Share, setting
from deepgen.data.records import first_reserved
from deepgen.errors import UserError
from rewards.base import RewardBroken, RewardRequest, TextLimit, existing_folder

if TYPE_CHECKING:
    from vllm import RequestOutput

log = logging.getLogger(__name__)

JUDGE_QUESTION = "Does this image show {answer}? Answer Yes or No."
JUDGE_PIXELS = 112 * 112
YES, NO = "Yes", "No"
PATCH = 28  # side of one visual token in pixels: patches of 14, merged 2 x 2
PROMPT_TOKENS = 512  # room for the prompt's text
CPU_KV_CACHE_BYTES = 64 << 20


def judge_prompt(answer: str) -> str:
    """The judge's whole input text, without a system turn; one `<|image_pad|>` stands for the image."""
    question = JUDGE_QUESTION.format(answer=answer)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return f"<|im_start|>user\n{image}\n{question}<|im_end|>\n<|im_start|>assistant\n"


def judge_image(image: np.ndarray, min_pixels: int = JUDGE_PIXELS, max_pixels: int = JUDGE_PIXELS) -> Image.Image:
    """The judge's input image: scaled into the range of areas, sides rounded to multiples of 28 (bicubic).

    Args:
        image: uint8 [H, W, 3], RGB.
        min_pixels, max_pixels: limits of the judge's image processor. The defaults make every square 112 x 112.
    """
    height, width = image.shape[:2]
    scale = math.sqrt(min(max(height * width, min_pixels), max_pixels) / (height * width))
    cells = [max(1, round(side * scale / PATCH)) for side in (height, width)]
    if cells[0] * cells[1] * PATCH**2 > max_pixels:
        cells = [max(1, math.floor(side * scale / PATCH + 1e-6)) for side in (height, width)]
        # A strip has one cell across, so that only its length can give way.
        cells = [min(cell, max(1, max_pixels // PATCH**2)) for cell in cells]
    size = (cells[1] * PATCH, cells[0] * PATCH)
    picture = Image.fromarray(np.ascontiguousarray(image))
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def fault(answer: str, tokenizer: Any) -> str:
    """Why the judge cannot be asked about this answer, or "".

    A special token in it could end the question and give the judge's verdict in its place.
    """
    if token := first_reserved(answer, tokenizer.all_special_tokens):
        return f"contains the reserved token {token}"
    if len(tokenizer(judge_prompt(answer)).input_ids) > PROMPT_TOKENS:
        return "is too long"
    return ""


class JudgeReward:
    """VLM judge on vLLM: the probability, 0..1, that it answers Yes when asked whether the image shows the answer.

    The image processor in the folder sets the range of pixels. Raises UserError when the folder is missing, when it
    holds another kind of model, or when its tokenizer has no single token for Yes or for No.
    """

    class Options(PoolSettings):
        path: InputPath = setting(
            "weights/judge", "Folder of a Qwen2.5-VL in transformers' layout, with tokenizer and image processor."
        )
        gpus: Share = setting(1.0, "GPUs of one replica; on a cluster without any none are asked for.", unit="GPUs")
        gpu_memory_share: float = setting(
            0.85, "Share of a GPU's memory that vLLM takes; less where a GPU is shared.", gt=0, le=1
        )

    def __init__(self, options: Options) -> None:
        self._pool, self._key = options.pool_name, options.dotted("path")
        folder = existing_folder(self._key, options.path, "config.json")
        prepare_process()
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        model_type = AutoConfig.from_pretrained(folder).model_type
        if model_type != "qwen2_5_vl":
            raise UserError(f"{self._key}: {str(folder)!r} holds a {model_type!r} model; wanted a 'qwen2_5_vl'")
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._yes, self._no = (self._single_token(word, folder) for word in (YES, NO))
        pixels = AutoImageProcessor.from_pretrained(folder).size
        self.pixel_range = (int(pixels["shortest_edge"]), int(pixels["longest_edge"]))
        self._engine = _engine(folder, options, self.pixel_range[1])

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        """True when there are words to ask about."""
        return bool(request.target.strip())

    @staticmethod
    def text_limit(options: Options) -> TextLimit:
        return TextLimit(Path(options.path), PROMPT_TOKENS, "scores none of their images", judge_prompt)

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """Probability of Yes for each request; None if the judge cannot be asked (`fault`)."""
        from vllm import SamplingParams, TextPrompt

        scores: list[float | None] = [None] * len(requests)
        prompts: dict[int, TextPrompt] = {}
        for index, request in enumerate(requests):
            if why := fault(request.target, self._tokenizer):
                log.warning("%s: a description of %d letters %s: not scored", self._pool, len(request.target), why)
                continue
            image = judge_image(request.image, *self.pixel_range)
            prompts[index] = TextPrompt(prompt=judge_prompt(request.target), multi_modal_data={"image": image})
        sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=2, logprob_token_ids=[self._yes, self._no])
        with engine_at_work():
            outputs = self._engine.generate(list(prompts.values()), sampling, use_tqdm=False)
        for index, output in zip(prompts, outputs, strict=True):
            scores[index] = self._probability(output)
        return scores

    def _probability(self, output: RequestOutput) -> float:
        """sigmoid(log p(Yes) - log p(No)) of the first generated token."""
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None  # `score` requests them in its sampling parameters
        first = logprobs[0]
        return 1.0 / (1.0 + math.exp(first[self._no].logprob - first[self._yes].logprob))

    def _single_token(self, word: str, folder: Path) -> int:
        ids = self._tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self._tokenizer.unk_token_id:
            raise UserError(f"{self._key}: the tokenizer in {str(folder)!r} has no single token for {word!r}: {ids}")
        return int(ids[0])


def prepare_process() -> None:
    """Set the environment variables vLLM reads on import. Variables that are already set keep their value."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in this process: dies with its actor, starts faster
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the rest of the run uses the same cores
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # hides messages about memory placement on NUMA nodes
        "VLLM_LOGGING_LEVEL": "ERROR",  # on a CPU vLLM logs many warnings, including one per image
    }
    for key, value in wanted.items():
        os.environ.setdefault(key, value)
    # On a CPU this logger reports a missing Triton at every start, before vLLM applies the level above.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)


@contextmanager
def engine_at_work() -> Iterator[None]:
    """vLLM computes. Raises RewardBroken if it fails, as it answers no more then. What it refuses is a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of any kind: the device's, the model's, or vLLM's own
        raise RewardBroken(f"vLLM has failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _engine(folder: Path, options: JudgeReward.Options, max_pixels: int) -> Any:
    """vLLM's offline engine. The type is Any because importing its class takes seconds and only replicas may do it."""
    import torch
    from vllm import LLM

    on_gpu = torch.cuda.is_available()
    device: dict[str, Any] = (
        {"dtype": "auto", "gpu_memory_utilization": options.gpu_memory_share}
        if on_gpu
        else {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    )
    return LLM(
        model=str(folder),
        distributed_executor_backend="uni",
        max_model_len=max_pixels // PATCH**2 + PROMPT_TOKENS + 1,
        max_num_seqs=options.batch_size,
        limit_mm_per_prompt={"image": 1, "video": 0},
        # `judge_image` has already resized the image; this keeps the processor from rounding its sides again.
        mm_processor_kwargs={"size": {"shortest_edge": PATCH**2, "longest_edge": max_pixels}},
        # Every image is new here: the pool's cache answers repeated requests.
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        seed=0,
        use_tqdm_on_load=False,
        **device,
    )
