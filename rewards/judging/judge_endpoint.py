"""A judge behind a server with OpenAI's chat form: vLLM's, SGLang's, a gateway's.

A question is one POST to `chat/completions`. Images travel inside it as data URLs, so the server fetches nothing.
httpx and not the package `openai`: that one reads an answer of any size, and its time limit is one of silence, not of
the whole answer, so that a server that sends a byte a second holds a call for ever.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from rewards.base import Missing
from rewards.judging.questions import TOP_LOGPROBS, Answer, Question
from rewards.remote.caller import ONE_ANSWER, is_loopback

ATTEMPTS = 3
MAX_ANSWER_BYTES = 1 << 20
MAX_PAUSE_S = 10.0  # before another attempt, also where the server asks for more
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
# Options to blame for a status; a server that does not have a model answers 404, too.
_AT_FAULT = {401: ("token_env",), 403: ("token_env",), 404: ("endpoint", "model"), 405: ("endpoint",)}
_TOO_LONG = ("context length", "context_length", "maximum model length", "too long", "too many tokens")


class EndpointEngine:
    """Asks a server. It knows nothing of the server's tokenizer, so `reserved` is empty."""

    reserved: Sequence[str] = ()

    def __init__(
        self,
        base: str,
        model: str,
        *,
        token: str = "",
        deadline_s: float = 100.0,
        concurrency: int = 16,
        jpeg_quality: int = 0,
        backoff_s: float = 0.25,
    ) -> None:
        """base: address ending in /v1. token: sent as a bearer token. deadline_s: of one `ask`, all attempts together.

        jpeg_quality: of the images on the way; 0 sends PNG. backoff_s: pause before the second attempt, about.
        """
        self._url = base.rstrip("/") + "/chat/completions"
        self._model, self._token, self._deadline_s = model, token, deadline_s
        self._concurrency, self._quality, self._backoff_s = concurrency, jpeg_quality, backoff_s
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each question
        # Reading the certificates takes longer than many a call, so it is done once, and not for plain http.
        self._verify = httpx.create_ssl_context() if base.startswith("https:") else False
        # A proxy of the environment would look for its own loopback address, and get token and images on the way.
        self._proxies = not is_loopback(urlsplit(base).hostname or "")

    def ask(self, questions: Sequence[Question]) -> list[Answer | Missing]:
        """The server's answers, or why there is none: deadline, transport, refused, too_long or parse."""
        with ThreadPoolExecutor(1) as thread:  # the caller's may have a loop already, as a replica of Ray Serve has
            return thread.submit(asyncio.run, self._ask(questions)).result()

    async def _ask(self, questions: Sequence[Question]) -> list[Answer | Missing]:
        headers = {"Accept-Encoding": "identity", **ONE_ANSWER}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        turns = asyncio.Semaphore(self._concurrency)
        async with httpx.AsyncClient(
            headers=headers,
            verify=self._verify,
            trust_env=self._proxies,
            timeout=self._deadline_s,
            limits=httpx.Limits(max_connections=self._concurrency),
        ) as client:
            tasks = [asyncio.ensure_future(self._one(client, turns, question)) for question in questions]
            await asyncio.wait(tasks, timeout=self._deadline_s)
            late = Missing("deadline", f"no answer from {self._url} within {self._deadline_s:g} s")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [late if task.cancelled() else task.result() for task in tasks]

    async def _one(self, client: httpx.AsyncClient, turns: asyncio.Semaphore, question: Question) -> Answer | Missing:
        async with turns:
            body = await asyncio.to_thread(self._body, question)
            for attempt in range(ATTEMPTS):
                answer, pause = await self._post(client, body, question)
                if pause is None or attempt == ATTEMPTS - 1:
                    break
                wait = max(pause, self._backoff_s * 2**attempt * random.uniform(1, 2))
                await asyncio.sleep(min(wait, MAX_PAUSE_S))
        return answer

    async def _post(
        self, client: httpx.AsyncClient, body: bytes, question: Question
    ) -> tuple[Answer | Missing, float | None]:
        """An outcome, and the seconds to wait before another attempt; None if that would change nothing."""
        try:
            async with client.stream(
                "POST", self._url, content=body, headers={"Content-Type": "application/json"}
            ) as reply:
                content = await _bounded(reply)
                status, retry_after = reply.status_code, reply.headers.get("Retry-After", "")
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # refused, broken off, half an answer, not HTTP
            return Missing("transport", f"{self._url}: {self._clean(str(error) or type(error).__name__)}"), 0.0
        if content is None:
            return Missing("parse", f"{self._url}: an answer of more than {MAX_ANSWER_BYTES} bytes"), None
        if status in _TRY_AGAIN:
            return Missing("transport", f"{self._url}: status {status}: {self._said(content)}"), _seconds(retry_after)
        if status != 200:
            said = self._said(content)
            long = status == 413 or any(words in said.lower() for words in _TOO_LONG)
            options = ("endpoint",) if 300 <= status < 400 else _AT_FAULT.get(status, ())
            return Missing("too_long" if long else "refused", f"{self._url}: status {status}: {said}", options), None
        return read_answer(content, question.choices), None

    def _body(self, question: Question) -> bytes:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image, self._quality)}} for image in question.images
        ]
        turns = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
        if question.system:
            turns.insert(0, {"role": "system", "content": question.system})
        body: dict[str, Any] = {
            "model": self._model,
            "messages": turns,
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
        }
        if question.choices:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return json.dumps(body).encode()

    def _said(self, content: bytes) -> str:
        return self._clean(content.decode("utf-8", errors="replace")) or "no words"

    def _clean(self, text: str) -> str:
        """Words of the server for a log: one short line, without the token, which it may have repeated."""
        text = text.replace(self._token, "***") if self._token else text
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:200]


def data_url(image: np.ndarray, jpeg_quality: int = 0) -> str:
    """An image, uint8 [H, W, 3], as a data URL of PNG, or of JPEG if there is a quality."""
    buffer, picture = io.BytesIO(), Image.fromarray(np.ascontiguousarray(image))
    if jpeg_quality:
        picture.save(buffer, "JPEG", quality=jpeg_quality)
    else:
        picture.save(buffer, "PNG", compress_level=1)
    kind = "jpeg" if jpeg_quality else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_answer(content: bytes, choices: bool) -> Answer | Missing:
    """The answer in a server's reply. choices: whether log-probabilities were asked for."""
    try:
        (choice, *_) = json.loads(content)["choices"]
        if (ended := choice.get("finish_reason")) == "content_filter":
            return Missing("refused", "the server's content filter keeps the answer back")
        text = choice["message"]["content"]
        if choices and not choice.get("logprobs"):
            return Missing("parse", "the server gives no log-probabilities")
        first = choice["logprobs"]["content"][0]["top_logprobs"] if choices else []
        tokens = tuple((entry["token"], float(entry["logprob"])) for entry in first)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        return Missing("parse", f"not the reply of a chat: {type(error).__name__}")
    if not (text is None or isinstance(text, str)) or not all(
        isinstance(token, str) and not math.isnan(logprob) and logprob <= 1e-3 for token, logprob in tokens
    ):
        return Missing("parse", "not the reply of a chat: wrong types, or values that are no log-probabilities")
    return Answer(text or "", tokens, cut=ended == "length" and not choices)


async def _bounded(reply: httpx.Response) -> bytes | None:
    """The body of a reply as it was sent, so that nothing inflates; None if it is larger than it may be."""
    content = bytearray()
    async for chunk in reply.aiter_raw(65536):
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            return None
    return bytes(content)


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for. Dates count as 0: the pause then is our own."""
    return float(retry_after) if retry_after.isdecimal() else 0.0
