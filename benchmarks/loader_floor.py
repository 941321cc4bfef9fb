"""The cost of reading training records on top of decoding their images: the batch source against bare PIL.

Ours: parquet in row groups, the mixture's plan, checks, decoding, resizing, tensors. Floor: PIL decodes and resizes the
same encoded bytes from memory. Left out: the VAE and the cache of its results, which saves all of this work.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import Result, compare, recipe
from deepgen.data.conversion.convert_units import ROW_GROUP
from deepgen.data.loading.buckets import fixed_area_size
from deepgen.data.loading.collate import collate
from deepgen.data.loading.dataset import TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ParquetStore
from deepgen.data.parquet import write_records
from deepgen.data.records import Record

RECORDS, IMAGE_SIZE, STEPS = 256, 512, 8
SIDES = ((640, 480), (480, 640), (768, 512), (600, 600))


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """Generation and editing records in the mixture of pretraining, at 512 px, in one process."""
    settings = recipe("tiny-pretrain", weights, f"data.image_size={IMAGE_SIZE}", "data.micro_batch=4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.parquet"
        write_records(path, make_records(), row_group_size=ROW_GROUP)
        data = TrainingSet(ParquetStore(path), IMAGE_SIZE)
        mixture = Mixture.from_settings(settings, data.store, settings.data.micro_batch)
        plans = [micro for step in range(STEPS) for micro in mixture.plan(step, 0, 1)]
        blobs = [b for micro in plans for i in micro.members for b in images_of(data.store.read(i))]

        def ours() -> None:
            for step in range(STEPS):
                for planned in mixture.plan(step, 0, 1):
                    collate(data, planned, seed=0, step=step)

        def floor() -> None:
            for blob in blobs:
                bare_decode(blob)

        return [compare("loader", f"JPEG of about {IMAGE_SIZE} px", len(blobs), ours, floor, repeats)]


def bare_decode(blob: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(blob), formats=("JPEG",)).convert("RGB")
    height, width = fixed_area_size(image.height, image.width, IMAGE_SIZE)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def images_of(record: Record) -> Sequence[bytes]:
    return [image for image in (record.image, *record.references) if isinstance(image, bytes)]


def make_records() -> list[Record]:
    """Smooth random pictures. A quarter of the records are edits with one source image."""
    rng = np.random.default_rng(0)

    def picture(i: int) -> bytes:
        width, height = SIDES[i % len(SIDES)]
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    records = []
    for i in range(RECORDS):
        edit = i % 4 == 0
        references = (picture(i),) if edit else ()
        records.append(Record(str(i), "edit" if edit else "t2i", f"picture {i}", "", picture(i), references, "made"))
    return records
