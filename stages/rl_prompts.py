"""The prompts of an rl run: reads them, checks them, and says what they are before anything starts."""

from __future__ import annotations

from collections import Counter

from actors.experience.prompt_order import check_state
from actors.learner.checkpoints.checkpoint_store import Manifest
from deepgen.config import Settings, UserError
from deepgen.config.settings import TASKS
from deepgen.data.quotes import quoted_words
from deepgen.data.records import Record
from deepgen.data.usable import Place, usable_records
from stages.rl_report import say


def check_prompts(settings: Settings, checkpoint: Manifest | None) -> None:
    """Say what the prompts are. Raises UserError for prompts that cannot be used or are not the checkpoint's.

    The stream reads its own.
    """
    found = read_prompts(settings)
    for line in about_prompts(found):
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


def _shortened(prompt: str, longest: int = 120) -> str:
    return prompt if len(prompt) <= longest else f"{prompt[:longest]}…"
