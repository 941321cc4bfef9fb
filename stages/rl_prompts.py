"""The prompts of an rl run: reads them, checks them, and says what they are before anything starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.experience.prompt_order import check_state
from actors.learner.checkpoints.checkpoint_store import Manifest
from deepgen.config import Settings, UserError
from deepgen.config.settings import TASKS
from deepgen.data.quotes import quoted_words
from deepgen.data.records import Record
from deepgen.data.usable import Place, usable_records
from deepgen.models.chat_template import render
from deepgen.models.presets import Architecture
from rewards import TextLimit, text_limit
from stages.rl_report import say


def check_prompts(settings: Settings, checkpoint: Manifest | None) -> None:
    """Say what the prompts are. Raises UserError for prompts that cannot be used or are not the checkpoint's.

    The stream reads its own.
    """
    found = read_prompts(settings)
    for line in [*about_prompts(found), *about_lengths(settings, [record for _, record in found])]:
        say(line)
    if checkpoint:
        check_state(settings, [record for _, record in found], checkpoint.source)


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
    texts = [(place, record.prompt, quoted_words(record.prompt)) for place, record in found if record.task == "text"]
    example = next(((prompt, words) for _, prompt, words in texts if words), None)
    if example:
        shown = " and ".join(map(repr, example[1]))
        lines.append(f"words to draw, for example: {shown} in {_shortened(example[0])!r}")
    if without := [place for place, _, words in texts if not words]:
        file, row = without[0]
        lines.append(
            f"{len(without):,} of the {counts['text']:,} text prompts quote no words to draw, so the OCR reward does "
            f"not apply to them: first {file}, row {row}"
        )
    return lines


def about_lengths(settings: Settings, records: Sequence[Record]) -> Iterator[str]:
    """Lines that say how many prompts are longer than the policy or a reward reads."""
    bridge = Path(settings.model.weights) / "bridge" / "config.json"
    sizes = json.loads(bridge.read_text(encoding="utf-8")) if bridge.is_file() else {}
    tokens = sizes.get("max_prompt_tokens", Architecture.max_prompt_tokens)
    policy = TextLimit(Path(settings.model.weights) / "tokenizer", tokens, "does not read their beginning", render)
    yield from _about_length("the policy", policy, [record.prompt for record in records])
    for name in settings.rewards.used():
        tasks = settings.rewards.tasks_of(name) or TASKS  # held out: all
        asked = [record for record in records if record.task in tasks]
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
