"""Add faded copies to the training records, so that they have mixed quality like collected pictures.

    python -m stages.base.pictures.fade

Run this after the stand-ins for public weights have been trained on clean pictures, and before fine-tuning. The
fine-tuned model then draws a prompt sometimes well and sometimes washed out, by chance, so reinforcement learning has
something to improve. Running it again replaces the copies.
"""

import argparse
import random
from dataclasses import replace

import numpy as np
from PIL import Image

from deepgen.data.images import decode_image
from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from stages.base.pictures.world import encode
from stages.base.training import DATA, FADED, load_split

COPIES = {"t2i": 750, "reasoning": 400, "text": 600, "edit": 300}
LEAST, MOST = 0.25, 0.65  # share of white mixed in


def fade(record: Record, share: float) -> Record:
    """A copy of the record with `share` of white mixed into its target. An edit's source stays unchanged."""
    assert record.image is not None
    pixels = decode_image(record.image).astype(np.float32)
    faded = Image.fromarray((pixels + share * (255 - pixels)).round().astype(np.uint8))
    source = FADED["edit" if record.task == "edit" else "t2i"]
    return replace(record, id=f"faded/{record.id}", image=encode(faded), source=source)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rng = random.Random("fade")
    clean = load_split("train")
    copies = [
        fade(record, rng.uniform(LEAST, MOST))
        for task, count in COPIES.items()
        for record in rng.sample([r for r in clean if r.task == task], count)
    ]
    path = DATA / "train.parquet"
    write_records(path, clean + copies)
    print(f"{path}: {len(clean)} clean records and {len(copies)} faded copies, {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
