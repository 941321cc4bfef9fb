"""The prompts of an rl run: reads them, checks them, and says what they are before anything starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from actors.experience.prompt_order import check_state
from actors.learner.checkpoints.checkpoint_store import Manifest
from deepgen.config import Settings, UserError
from deepgen.config.schema.reward_weights import BY_SOURCE, ever_positive
from deepgen.config.settings import TASKS
from deepgen.data.quotes import quoted_words
from deepgen.data.records import Record
from deepgen.data.usable import Place, usable_records
from deepgen.errors import nearest
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
    about = [about_prompts(found), about_rows(settings, found), about_applying(settings, found)]
    for line in chain(*about, about_lengths(settings, records)):
        say(line)
    if checkpoint:
        check_state(settings, records, checkpoint.source)


def read_prompts(settings: Settings) -> list[tuple[Place, Record]]:
    """Usable RL prompts (`usable_records`). Raises UserError for one without rewards, and for a row without prompts."""
    found, rewards = usable_records(settings, "data.prompts"), settings.rewards
    for (file, row), record in found:
        if not any(map(ever_positive, rewards.weights_of(record.task, record.source).values())):
            title = rewards.row_of(record.task, record.source)
            raise UserError(
                f"{file}, row {row}: {'task ' if title == record.task else ''}{title} has no weight above 0 in "
                f"rewards.weights; allowed: prompts with a reward, so remove it or set e.g. "
                f"rewards.weights.{title}.judge=1"
            )
    sources = sorted({record.source for _, record in found})
    for title in rewards.weights:
        if title.startswith(BY_SOURCE) and (name := title.removeprefix(BY_SOURCE)) not in sources:
            raise UserError(
                f"rewards.weights.{title}: no prompt of data.prompts has the source {name!r}; "
                f"allowed: {_some(sources)}{nearest(name, sources)}"
            )
    return found


def about_rows(settings: Settings, found: list[tuple[Place, Record]]) -> list[str]:
    """A line that says how many prompts each row of rewards.weights is for, if data sets have rows of their own."""
    rewards = settings.rewards
    if not any(title.startswith(BY_SOURCE) for title in rewards.weights):
        return []
    counts = Counter(rewards.row_of(record.task, record.source) for _, record in found)
    return [f"rewards.weights: {', '.join(f'{counts[row]:,} by {row}' for row in rewards.weights if counts[row])}"]


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
            asked = [
                (place, record) for place, record in found if record.task == task and _asks(settings, record, name)
            ]
            if without := [place for place, record in asked if not applies(pool, _request(record))]:
                file, row = without[0]
                why = ": they quote no words to draw" if issubclass(pool.reward_class(), OcrReward) else ""
                yield (
                    f"{len(without):,} of {len(asked):,} {task} prompts get no score from rewards.{name}, which does "
                    f"not apply to them{why}; first {file}, row {row}"
                )


def _asks(settings: Settings, record: Record, name: str) -> bool:
    row = settings.rewards.weights_of(record.task, record.source)
    return name in settings.rewards.held_out() or ever_positive(row.get(name, 0.0))


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
        asked = [record for record in records if _asks(settings, record, name)]
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


def _some(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _shortened(prompt: str, longest: int = 120) -> str:
    return prompt if len(prompt) <= longest else f"{prompt[:longest]}…"
