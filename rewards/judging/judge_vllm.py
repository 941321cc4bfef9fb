"""vLLM's offline engine in this process: any vision-language model that vLLM serves, asked in its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from deepgen.errors import UserError
from rewards.base import Missing
from rewards.judge import CPU_KV_CACHE_BYTES, engine_at_work, prepare_process
from rewards.judging.questions import TOP_LOGPROBS, Answer, Question

AS_LONG_AS_FITS = -1  # vLLM's word for the longest context that model and memory allow


class VllmEngine:
    """vLLM's `LLM`, with no list of models of our own.

    Raises UserError when vLLM cannot serve the model.
    """

    def __init__(
        self,
        model: str,
        key: str,
        *,
        images: int,
        gpus: float,
        gpu_memory_share: float,
        context: int,
        parallel: int,
    ) -> None:
        """model: folder or hub name, which setting `key` gave. images: of one question. gpus: to split the model over.

        context: tokens of the longest question with its answer, or 0. parallel: questions in work at the same time.
        """
        prepare_process()
        import torch
        from vllm import LLM

        split = max(1, int(gpus)) if torch.cuda.is_available() else 1
        device: dict[str, Any] = (
            {"dtype": "auto", "gpu_memory_utilization": gpu_memory_share}
            if torch.cuda.is_available()
            else {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
        )
        try:
            self._engine = LLM(
                model=model,
                runner="generate",  # or else a CLIP would be taken, and refuse every question
                tensor_parallel_size=split,
                distributed_executor_backend="uni" if split == 1 else "mp",
                max_model_len=context or AS_LONG_AS_FITS,
                max_num_seqs=parallel,
                limit_mm_per_prompt={"image": images, "video": 0},
                mm_processor_cache_gb=0,  # images are new in every step; the pool's cache answers repeated requests
                max_logprobs=TOP_LOGPROBS,
                seed=0,
                use_tqdm_on_load=False,
                **device,
            )
        except (ValueError, OSError) as error:  # an unknown architecture, no such model, a context that does not fit
            why = " ".join(str(error).split())[:400]
            raise UserError(f"{key}: vLLM cannot serve {model!r}: {why}") from error
        if not self._engine.model_config.is_multimodal_model:
            raise UserError(f"{key}: {model!r} reads no images; allowed: a vision-language model")
        self.reserved = reserved_tokens(self._engine.get_tokenizer())

    def ask(self, questions: Sequence[Question]) -> list[Answer | Missing]:
        """Answers of the model. A question that vLLM does not take is missing and disturbs no other."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        found: list[Answer | Missing] = []
        taken: list[int] = []
        for place, question in enumerate(questions):
            sampling = SamplingParams(
                max_tokens=question.max_tokens,
                temperature=question.temperature,
                logprobs=TOP_LOGPROBS if question.choices else None,
            )
            found.append(Missing("died", "vLLM gave no answer"))
            try:
                self._engine.enqueue_chat([_turns(question)], sampling, use_tqdm=False)
            except (VLLMClientError, ValueError) as error:
                found[place] = _refusal(error)
            except Exception:  # a bug; what is queued must not be among the answers to the next call
                self._engine.wait_for_completion(use_tqdm=False)
                raise
            else:
                taken.append(place)
        with engine_at_work():
            outputs = self._engine.wait_for_completion(use_tqdm=False) if taken else []
        for place, output in zip(taken, outputs, strict=True):  # vLLM returns them in the order of the requests
            found[place] = _answer(output)
        return found


def reserved_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer turns into a token with a meaning of its own, such as the end of a turn."""
    marks = [token for token in tokenizer.get_added_vocab() if token[:1] in "<[" and token[-1:] in ">]"]
    return tuple(token for token in dict.fromkeys([*tokenizer.all_special_tokens, *marks]) if token.strip())


def _turns(question: Question) -> list[dict[str, Any]]:
    images = [
        {"type": "image_pil", "image_pil": Image.fromarray(np.ascontiguousarray(image))} for image in question.images
    ]
    user = {"role": "user", "content": [*images, {"type": "text", "text": question.text}]}
    return [{"role": "system", "content": question.system}, user] if question.system else [user]


def _refusal(error: Exception) -> Missing:
    why = " ".join(str(error).split())[:200]
    # vLLM names the parameter where it counts tokens; its later check of the whole input has only words.
    long = getattr(error, "parameter", None) == "input_tokens" or "longer than the maximum model length" in why
    return Missing("too_long" if long else "refused", why)


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    first = completion.logprobs[0] if completion.logprobs else {}
    tokens = tuple((entry.decoded_token or "", float(entry.logprob)) for entry in first.values())
    return Answer(completion.text, tokens, cut=completion.finish_reason == "length" and not tokens)
