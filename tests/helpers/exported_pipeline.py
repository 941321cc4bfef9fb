"""Loads an exported diffusers folder with diffusers, as its users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline


def load_pipeline(folder: Path, code: Path, **options: Any) -> Any:
    """code: the folder that diffusers copies the pipeline's code to before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(code))
        pipe = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=str(folder), trust_remote_code=True, local_files_only=True, **options
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
