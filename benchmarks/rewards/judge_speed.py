"""Questions a second of a judge in its pool, behind Ray Serve and behind vLLM's own server.

The floor is a bare vLLM `LLM` in a process of its own that gets all questions at once, in one `chat`; what Ray needs to
bring them there is not counted. Ours is the pool's whole call. Pictures are new in each repetition, so nothing is in
any cache. The model is the tiny world's judge.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from actors.experience.reward_requests import request_key
from actors.experience.scoring.reward_pool import RewardPool
from actors.reward_service import Hosting, start_services, stop_services
from benchmarks.timing import ROOT, Result, seconds
from deepgen.config.schema.pools import make_pool
from deepgen.config.schema.sections import ClusterSettings
from rewards import RewardRequest
from rewards.judge import JUDGE_QUESTION
from rewards.judging.engines import build_engine
from rewards.judging.questions import TOP_LOGPROBS

QUESTIONS, AT_ONCE, SIDE = 128, 64, 112
FOLDER = ROOT / "assets" / "tiny" / "rewards" / "judge"
START_S = 300.0
JUDGE: dict[str, Any] = {
    "class": "vlm_judge",
    "path": str(FOLDER),
    "batch_size": AT_ONCE,
    "fence": False,
    "questions": [JUDGE_QUESTION],
}


class BareEngine:
    """vLLM's `LLM` as the judge configures it, without the judge."""

    def __init__(self) -> None:
        options: Any = make_pool("bare", JUDGE)
        self._engine: Any = build_engine(options, images=1)

    def answer(self, requests: list[RewardRequest]) -> float:
        """Seconds for all answers."""
        from PIL import Image
        from vllm import SamplingParams

        turns = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_pil", "image_pil": Image.fromarray(request.image)},
                        {"type": "text", "text": JUDGE_QUESTION.format(answer=request.prompt)},
                    ],
                }
            ]
            for request in requests
        ]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=TOP_LOGPROBS)
        return seconds(lambda: self._engine._engine.chat(turns, sampling, use_tqdm=False))


def results(repeats: int) -> Iterator[Result]:
    """One result for each way to a judge."""
    bare = ray.remote(num_cpus=0.05)(BareEngine).remote()
    ray.get(bare.__ray_ready__.remote(), timeout=START_S)
    for name, served in {"in the pool": in_pool, "behind Ray Serve": by_serve, "vLLM's server": by_vllm}.items():
        with served() as options:
            yield asyncio.run(_measure(f"judge, {name}", bare, options, repeats))
    ray.kill(bare)


@contextmanager
def in_pool() -> Iterator[dict[str, Any]]:
    """The options of a judge whose engine is in the pool's replica."""
    yield JUDGE


@contextmanager
def by_serve() -> Iterator[dict[str, Any]]:
    """Options of the reward `remote` for a judge that Ray Serve hosts."""
    hosting = Hosting("127.0.0.1", _free_port(), "", 1)
    try:
        addresses = start_services(
            [make_pool("judge", JUDGE)], hosting, ClusterSettings(start_deadline_s=START_S), gpus=False
        )
        yield {"class": "remote", "url": addresses["judge"], "batch_size": AT_ONCE}
    finally:
        stop_services()


@contextmanager
def by_vllm() -> Iterator[dict[str, Any]]:
    """Options of a judge behind vLLM's own server, which has the same model and limits."""
    port = _free_port()
    flags = {
        "--model": str(FOLDER),
        "--served-model-name": "judge",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-num-seqs": str(AT_ONCE),
        "--generation-config": "vllm",
        "--limit-mm-per-prompt": '{"image": 1, "video": 0}',
        "--mm-processor-cache-gb": "0",
        "--kv-cache-memory-bytes": str(64 << 20),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *itertools.chain(*flags.items())]
    with subprocess.Popen(
        [*command, "--enforce-eager"], env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}, stdout=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server)
            endpoint = {"endpoint": f"http://127.0.0.1:{port}/v1", "model": "judge", "gpus": 0.0}
            yield JUDGE | endpoint | {"concurrency": AT_ONCE}
        finally:
            server.terminate()


async def _measure(name: str, bare: Any, options: dict[str, Any], repeats: int) -> Result:
    pool = RewardPool(make_pool("judge", options), start_deadline_s=START_S, cache_size=0)
    await pool.start()
    loop = asyncio.get_running_loop()

    async def score(requests: list[RewardRequest]) -> None:
        found = await pool.score(ray.put(requests), [request_key(request) for request in requests])
        # To noise the tiny judge has no answer, which takes as long as one. All else would be another measurement.
        assert {why.reason for why in found.reasons if why} <= {"parse"}, found.reasons

    def ours(requests: list[RewardRequest]) -> float:
        return seconds(lambda: asyncio.run_coroutine_threadsafe(score(requests), loop).result())

    try:
        return await asyncio.to_thread(_compare, name, ours, bare, repeats)
    finally:
        pool.stop()


def _compare(name: str, ours: Callable[[list[RewardRequest]], float], bare: Any, repeats: int) -> Result:
    times = []
    for number in range(repeats + 1):
        requests = _requests(number)
        times.append((ours(requests), ray.get(bare.answer.remote(requests), timeout=START_S)))
    measured = times[1:]  # the first warms up
    shapes = f"{QUESTIONS} questions, {AT_ONCE} at once, {SIDE} px"
    return Result(name, shapes, QUESTIONS, tuple(t[0] for t in measured), tuple(t[1] for t in measured))


def _requests(number: int) -> list[RewardRequest]:
    pictures = np.random.default_rng(number).integers(0, 256, (QUESTIONS, SIDE, SIDE, 3), dtype=np.uint8)
    return [RewardRequest(f"thing number {n}", "", "t2i", picture) for n, picture in enumerate(pictures)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None or time.monotonic() > end:
                raise TimeoutError(f"vLLM's server is not there: {error}") from error
        time.sleep(0.5)
