"""Pictures of evaluation results."""

from __future__ import annotations

from PIL import Image

from deepgen.data.images import decode_image
from deepgen.evaluation.choose import ROW_PROMPTS, choose_records
from deepgen.evaluation.results import Evaluation
from deepgen.tracking.grids import GridRow, image_grid


def grid(evaluation: Evaluation, title: str) -> Image.Image:
    """Grid of the first sample of each prompt, with caption, scores and the source of an edit."""
    records = evaluation.records
    return image_grid(
        [images[0] for images in evaluation.images],
        [record.prompt for record in records],
        [evaluation.prompt_scores(i) for i in range(len(records))],
        columns=4,
        title=title,
        sources=[decode_image(record.references[0]) if record.references else None for record in records],
    )


def grid_rows(before: Evaluation, after: Evaluation, prompts: int = ROW_PROMPTS) -> list[GridRow]:
    """Rows of the before/after grid: the same prompts in both, taken from the tasks in turn."""
    chosen = {record.id for record in choose_records(before.records, prompts, seed=0)}
    return [
        GridRow(
            prompt=record.prompt,
            before=list(before.images[i][:2]),
            after=list(after.images[i][:2]),
            before_scores=before.prompt_scores(i),
            after_scores=after.prompt_scores(i),
            references=[decode_image(data) for data in record.references],
            task=record.task,
        )
        for i, record in enumerate(before.records)
        if record.id in chosen
    ]
