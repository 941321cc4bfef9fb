"""The prompts of an rl run: reads them, checks them, and says what they are before anything starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from actors.experience.prompt_order import check_state
from actors.learner.checkpoints.checkpoint_store import Manifest
from deepgen.config import Settings, UserError
from deepgen.config.settings import TASKS
from deepgen.data.quotes import quoted_words
from deepgen.data.records import Record
from deepgen.data.usable import Place, usable_records
from deepgen.models.chat_template import render
from deepgen.models.presets import Architecture
from rewards import RewardRequest, TextLimit, applies, text_limit
from rewards.ocr import OcrReward
from stages.rl_report import say


def check_prompts(settings: Settings, checkpoint: Manifest | None) -> None:
    """Say what the prompts are. Raises UserError for prompts that cannot be used or are not the checkpoint's.

    The stream reads its own.
    """
    found = read_prompts(settings)
    records = [record for _, record in found]
    for line in [*about_prompts(found), *about_applying(settings, found), *about_lengths(settings, records)]:
        say(line)
    if checkpoint:
        check_state(settings, records, checkpoint.source)


def read_prompts(settings: Settings) -> list[tuple[Place, Record]]:
    """Usable RL prompts (`usable_records`). Raises UserError, naming file and row, for a task that has no reward."""
    found = usable_records(settings, "data.prompts")
    for (file, row), record in found:
        if not any(weight > 0 for weight in settings.rewards.weights.get(record.task, {}).values()):
            raise UserError(
                f"{file}, row {row}: task {record.task} has no weight above 0 in rewards.weights; "
                f"allowed: tasks with a reward, so remove it or set e.g. rewards.weights.{record.task}.judge=1"
            )
    return found


def about_prompts(found: list[tuple[Place, Record]]) -> list[str]:
    """Lines for the console: prompts by task, and what is taken for words to draw, which is a guess from quotes."""
    counts = Counter(record.task for _, record in found)
    lines = [f"prompts: {', '.join(f'{counts[task]:,} {task}' for task in TASKS if counts[task])}"]
    texts = ((record.prompt, quoted_words(record.prompt)) for _, record in found if record.task == "text")
    example = next(((prompt, words) for prompt, words in texts if words), None)
    if example:
        shown = " and ".join(map(repr, example[1]))
        lines.append(f"words to draw, for example: {shown} in {_shortened(example[0])!r}")
    return lines


def about_applying(settings: Settings, found: list[tuple[Place, Record]]) -> Iterator[str]:
    """Lines that say how many prompts of a task have a reward that cannot score them, as OCR without quoted words."""
    for name in settings.rewards.used():
        pool = settings.rewards.pools[name]
        for task in TASKS:
            if not settings.rewards.weights.get(task, {}).get(name, 0) > 0:
                continue
            asked = [(place, record) for place, record in found if record.task == task]
            if without := [place for place, record in asked if not applies(pool, _request(record))]:
                file, row = without[0]
                why = ": they quote no words to draw" if issubclass(pool.reward_class(), OcrReward) else ""
                yield (
                    f"{len(without):,} of {len(asked):,} {task} prompts get no score from rewards.{name}, which does "
                    f"not apply to them{why}; first {file}, row {row}"
                )


def _request(record: Record) -> RewardRequest:
    """What a reward may look at to say whether it applies: the pictures do not matter, but how many there are."""
    none = np.zeros((1, 1, 3), dtype=np.uint8)
    return RewardRequest(record.prompt, record.answer, record.task, none, (none,) * len(record.references))


def about_lengths(settings: Settings, records: Sequence[Record]) -> Iterator[str]:
    """Lines that say how many prompts are longer than the policy or a reward reads."""
    bridge = Path(settings.model.weights) / "bridge" / "config.json"
    sizes = json.loads(bridge.read_text(encoding="utf-8")) if bridge.is_file() else {}
    tokens = sizes.get("max_prompt_tokens", Architecture.max_prompt_tokens)
    policy = TextLimit(Path(settings.model.weights) / "tokenizer", tokens, "does not read their beginning", render)
    yield from _about_length("the policy", policy, [record.prompt for record in records])
    for name in settings.rewards.used():
        asked = [record for record in records if settings.rewards.weights.get(record.task, {}).get(name, 0) > 0]
        if limit := text_limit(settings.rewards.pools[name]):
            yield from _about_length(f"rewards.{name}", limit, [record.answer or record.prompt for record in asked])


def _about_length(name: str, limit: TextLimit, texts: Sequence[str]) -> Iterator[str]:
    from tokenizers import Tokenizer

    file = limit.folder / "tokenizer.json"
    # A text has no more tokens than bytes, beside one for its start and one for its end: most are short enough at once.
    long = [text for text in map(limit.asked, texts) if len(text.encode()) + 2 > limit.tokens]
    if not long or not file.is_file():
        return
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    if count := sum(len(encoding.ids) > limit.tokens for encoding in tokenizer.encode_batch(long)):
        yield (
            f"{count:,} of {len(texts):,} prompts are too long for {name}: it {limit.beyond} "
            f"(more than {limit.tokens:,} tokens)"
        )


def _shortened(prompt: str, longest: int = 120) -> str:
    return prompt if len(prompt) <= longest else f"{prompt[:longest]}…"
