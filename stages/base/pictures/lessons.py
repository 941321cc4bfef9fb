"""Draw the training pictures of the judge and CLIP: many more combinations and words than the world's training split.

    python -m stages.base.pictures.lessons --packages DIR

They show every object in every colour, on every background and turned both ways, every person in every tone, and
thousands of words. They exclude the held-out split, so the rewards are measured on combinations they never saw. Only
the rewards' training needs the file, so it stays in runs/base.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from stages.base.pictures import concepts as C
from stages.base.pictures.world import Icons, World, dejavu, draw_word, encode
from stages.base.training import LESSONS, load_split

WORDS = 5000
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def pictures(icons: Icons, forbidden: set[str]) -> Iterator[Record]:
    """Records of all combinations in the world whose description is not forbidden."""
    for p in World(icons, everything=True).pictures:
        if p.answer not in forbidden:
            yield Record(f"lesson/{p.key}", "t2i", p.answer, p.answer, p.image, (), "fluent-emoji-flat")


def words(forbidden: set[str], font: ImageFont.FreeTypeFont, rng: random.Random) -> Iterator[Record]:
    """Records of words with 2-4 letters in every ink, half of them English, without forbidden words."""
    english = [w for w in C.words() if w not in forbidden]
    for i in range(WORDS):
        word = rng.choice(english) if i % 2 else "".join(rng.choices(LETTERS, k=rng.choice((2, 3, 4, 4))))
        if word in forbidden:
            continue
        ink = rng.choice(sorted(C.INKS))
        answer = f'the word "{word}"' + ("" if ink == "black" else f" in {ink}")
        yield Record(f"lesson/{i}", "text", answer, answer, encode(draw_word(word, C.INKS[ink], font)), (), "words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked npm packages")
    args = parser.parse_args()
    held = [r for r in load_split("heldout") if not r.id.endswith("/heldout")]  # known things in other words
    forbidden = {r.answer for r in held if r.task != "reasoning"}
    forbidden |= {r.answer.split('"')[1] for r in held if r.task == "text"}
    font = ImageFont.truetype(str(dejavu()), 24)
    records = [*pictures(Icons(args.packages), forbidden), *words(forbidden, font, random.Random(11))]
    LESSONS.parent.mkdir(parents=True, exist_ok=True)
    write_records(LESSONS, records)
    print(f"{LESSONS}: {len(records)} pictures")


if __name__ == "__main__":
    main()
