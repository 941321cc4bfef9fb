"""The tiny judge on vLLM in this process, and behind a server with OpenAI's chat form that this process is, too.

`python -m tests.helpers.offline_judge` prints both judges' scores as JSON. A process of its own, because vLLM changes
the one that hosts it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deepgen.config.schema.pools import make_pool
from deepgen.data.images import decode_image
from deepgen.data.parquet import read_records
from deepgen.errors import UserError
from rewards import Missing, RewardBroken, RewardRequest
from rewards.judge import JUDGE_QUESTION, judge_image
from rewards.judging.engines import Engine, build_engine
from rewards.judging.questions import Answer, Question
from rewards.judging.vlm_judge import VlmJudge
from tests.helpers.chat_server import chat_server, question_of, reply_of

FOLDER = "assets/tiny/rewards/judge"
WANTED: dict[str, Any] = {"path": FOLDER, "fence": False, "questions": [JUDGE_QUESTION]}
IMAGES = 12


def requests() -> list[RewardRequest]:
    """Held-out pictures of 112 px, which no processor scales again, half of them with another picture's words."""
    records = [
        record for record in read_records(Path("assets/tiny/data/heldout.parquet")) if isinstance(record.image, bytes)
    ]
    found = []
    for place, record in enumerate(records[:IMAGES]):
        other = records[(place + place % 2) % IMAGES]
        picture = judge_image(decode_image(record.image or b""))
        found.append(RewardRequest(other.prompt, other.answer, "t2i", np.asarray(picture)))
    return found


def behind(engine: Engine) -> Callable[[dict[str, Any]], tuple[int, bytes]]:
    """A server's answers, given by an engine, one at a time."""
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        with lock:
            (found,) = engine.ask([question_of(body)])
        return (
            (400, found.detail.encode()) if isinstance(found, Missing) else (200, json.dumps(reply_of(found)).encode())
        )

    return answer


def make_judge(**given: Any) -> Any:
    """The options of the tiny judge, with others in their place."""
    return make_pool("vlm_judge", WANTED | given)


def main() -> int:
    given = make_judge()
    engine = build_engine(given, images=2)
    asked = requests()
    asked[3] = replace(asked[3], answer="cat " * 1500)  # longer than the judge reads
    here = VlmJudge(given, engine).score(asked)
    with chat_server(behind(engine)) as (base, _):
        there = VlmJudge(make_judge(endpoint=base, model="judge", gpus=0.0)).score(asked)
    image = asked[0].image
    odd = engine.ask([Question("Yes or No?", (image,) * number) for number in (2, 3, 0)])
    written = engine.ask([Question("Say something.", (image,), max_tokens=4, choices=False)])
    wrong = ""
    try:
        build_engine(make_judge(path="assets/tiny/rewards/clip"), images=1)
    except UserError as error:
        wrong = str(error)
    broken = ""
    executor: Any = engine
    executor._engine.llm_engine.model_executor.execute_model = out_of_memory
    try:
        engine.ask([Question("Yes or No?", (image,))])
    except RewardBroken as error:
        broken = str(error)
    found: dict[str, list[Any]] = {"here": here, "there": there, "odd": odd, "written": written}
    print(json.dumps({"wrong": wrong, "broken": broken, **{name: plain(items) for name, items in found.items()}}))
    return 0


def out_of_memory(*given: Any, **options: Any) -> None:
    """What a failing GPU makes of a step of vLLM."""
    raise RuntimeError("CUDA error: out of memory")


def plain(found: list[Any]) -> list[Any]:
    """Scores as they are, why one is missing as its reason, and an answer as its words and number of tokens."""
    return [
        [item.text, len(item.first)] if isinstance(item, Answer) else getattr(item, "reason", item) for item in found
    ]


if __name__ == "__main__":
    sys.exit(main())
