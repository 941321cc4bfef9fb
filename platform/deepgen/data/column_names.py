"""Which column of a table, or key of JSON, holds what, by the names that people use.

`Caption`, `TEXT` and `Image Path` are read as `caption`, `text` and `image_path`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Usual names, the most telling first.
IMAGE_NAMES = (
    *("image", "jpg", "jpeg", "png", "webp", "image_path", "image_file", "image_name", "file_name", "filename"),
    *("img", "img_path", "path", "file", "file_path", "filepath", "image_url", "img_url", "url"),
)
TEXT_NAMES = (  # of the caption of a picture
    *("caption", "text", "prompt", "txt", "instruction", "description", "captions", "text_prompt", "comment"),
)
PROMPT_NAMES = ("prompt", *(name for name in TEXT_NAMES if name != "prompt"))
_EDIT_TEXTS = (
    *("edit_prompt", "edit_instruction", "editing_prompt", "editing_instruction", "instruction", "edit"),
    *("edited_prompt_list", *PROMPT_NAMES),
)
_PICTURE = r"_?(?:images?|imgs?|pictures?|photos?)(?:_?(?:path|file|file_?name|url))?"
_SOURCE = re.compile(rf"(?:source|src|input|original|orig|before){_PICTURE}")
_TARGET = re.compile(rf"(?:target|tgt|output|edited|after|result){_PICTURE}")


def normal(name: str) -> str:
    """A column's name as compared: in lower case, words joined by "_"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\s_-]+", "_", words).lower()


def normal_keys(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A row by normal names. Of columns that differ in capitals only, the one with the normal name counts."""
    return {normal(str(key)): value for key, value in row.items()} | {str(key): value for key, value in row.items()}


def first_of(usual: Iterable[str], names: Iterable[str]) -> str | None:
    """The column that has the first of the usual names, None if none has one."""
    found: dict[str, str] = {}
    for name in names:
        if name == normal(name) or normal(name) not in found:
            found[normal(name)] = name
    return next((found[name] for name in usual if name in found), None)


def source_column(names: Iterable[str]) -> str | None:
    """The column of the source image of edits, such as `original_image` or `src_img`."""
    return next((name for name in names if _SOURCE.fullmatch(normal(name))), None)


def edit_columns(names: Iterable[str]) -> dict[str, str]:
    """The columns of edits, with both images, by role: image, references, prompt if there is one. {} if it has none."""
    names = list(names)
    target = next((name for name in names if _TARGET.fullmatch(normal(name))), None)
    source = source_column(names) or first_of(("image",), names)
    if target is None or source is None:
        return {}
    text = first_of(_EDIT_TEXTS, names)
    return {"image": target, "references": source} | ({"prompt": text} if text else {})
