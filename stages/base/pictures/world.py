"""Draw the tiny world: emoji pictures, edits of them, and short words, as parquet records in three splits.

    python -m stages.base.pictures.world --packages DIR --out assets/tiny/data

DIR holds the unpacked npm packages `fluent-emoji-flat` (icons.json, chars.json) and `emojibase-data` (en/data.json).
No two splits share a prompt. Each *combination* (an object in a colour, a person with a skin tone, a mirrored object, a
set of riddle words, a word) belongs to exactly one of the splits train, rl, heldout. A held-out combination is never
drawn for training, either as a picture or as the target of an edit.
"""

import argparse
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFont

from deepgen.data.parquet import write_records
from deepgen.data.records import Record
from stages.base.pictures import concepts as C

SIZE = 64
WHITE = (255, 255, 255)
SPLITS = ("train", "rl", "heldout")
PLURAL = {
    "glasses",
    "sunglasses",
    "jeans",
    "gloves",
    "socks",
    "french fries",
    "pancakes",
    "cherries",
    "scissors",
    "eyes",
    "grapes",
}
MASS = {"fire", "popcorn", "sushi", "broccoli", "garlic", "bread", "soap", "yarn", "tennis", "bowling", "high voltage"}
OWN_COLOUR = {"red apple": "apple", "red heart": "heart", "locked": "padlock"}

# Wordings of training, held-out and RL prompts. All differ, but use only known words.
T2I_WORDINGS = ("{x}", "an icon of {x}", "a picture of {x}", "draw {x}")
T2I_HELDOUT_WORDINGS = ("draw a picture of {x}", "draw an icon of {x}")
RIDDLE_WORDINGS = ("the thing that goes with {w}", "what is meant by {w}?")
RIDDLE_HELDOUT_WORDINGS = ("draw the thing that goes with {w}",)
TEXT_WORDINGS = ('the word "{w}"{ink}', 'write "{w}"{ink}', 'a sign that says "{w}"{ink}')
TEXT_HELDOUT_WORDINGS = ('draw the word "{w}"{ink}', 'a picture of the word "{w}"{ink}')
RL_WORDINGS = {
    "t2i": ("make an icon of {x}", "make a picture of {x}", "paint a picture of {x}"),
    "reasoning": ("make the thing that goes with {x}", "a picture of the thing that goes with {x}"),
    "text": ("make {x}", "paint {x}", "an icon of {x}", "make a sign with {x}"),
}
RL_KNOWN = 200  # trained combinations among the RL prompts; half of all RL prompts are words


@dataclass(frozen=True)
class Picture:
    """One drawn image, and the plain description that a judge compares it with. `split`: the split it belongs to."""

    key: str
    answer: str
    image: bytes
    split: str
    kind: str  # base | paint | background | tone | hair | mirror | flip


@dataclass(frozen=True)
class Edit:
    """Source picture, instruction wordings (training, held-out) and target picture."""

    source: Picture
    target: Picture
    wordings: tuple[str, ...]
    heldout_wordings: tuple[str, ...]


def article(name: str) -> str:
    """`name` with a or an, if English needs an article."""
    noun = name.split(" on ")[0]
    if any(noun == w or noun.endswith(" " + w) for w in PLURAL | MASS):
        return name
    return ("an " if name[0].lower() in "aeiou" else "a ") + name


def encode(image: Image.Image) -> bytes:
    """Lossless WebP of an RGB image."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def place(rgba: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Put a transparent drawing on a plain background."""
    canvas = Image.new("RGBA", rgba.size, (*background, 255))
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB")


def paint(rgba: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Recolour by luminance: black stays black, mid-tones take the colour, white stays white."""
    a = np.asarray(rgba, dtype=np.float32)
    luma = (a[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None] / 255.0
    visible = a[..., 3] > 128
    low, high = np.percentile(luma[visible], [5, 95]) if visible.any() else (0.0, 1.0)
    t = np.clip((luma - low) / max(high - low, 0.15), 0, 1)  # stretch, so that dark and pale icons both take the colour
    c = np.array(colour, dtype=np.float32)
    rgb = np.where(t < 0.5, c * (0.45 + 1.1 * t), c + (255 - c) * (t - 0.5) * 1.1)
    return Image.fromarray(np.concatenate([np.clip(rgb, 0, 255), a[..., 3:]], axis=-1).astype(np.uint8), "RGBA")


class Icons:
    """The emoji packages: label -> drawing, tags and skin-tone variants."""

    def __init__(self, packages: Path):
        flat, base = packages / "fluent-emoji-flat", packages / "emojibase-data"
        self._svg = json.loads((flat / "icons.json").read_text(encoding="utf-8"))
        self._name = json.loads((flat / "chars.json").read_text(encoding="utf-8"))
        data = json.loads((base / "en" / "data.json").read_text(encoding="utf-8"))
        self.entry = {e["label"]: e for e in data}

    @cache  # noqa: B019  (the only instance lives as long as the program)
    def draw(self, hexcode: str) -> Image.Image:
        """RGBA drawing of one emoji, SIZE x SIZE."""
        icon = self._svg["icons"][self._name[hexcode.lower().replace("-fe0f", "")]]
        width, height = (icon.get(k, self._svg.get(k, 32)) for k in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
        return Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGBA")

    def label(self, label: str) -> Image.Image:
        return self.draw(self.entry[label]["hexcode"])

    def tones(self, label: str) -> dict[str, Image.Image]:
        """The five skin-tone variants of a person or hand."""
        skins = {s["tone"]: s for s in self.entry[label]["skins"] if isinstance(s["tone"], int)}
        return {tone: self.draw(skins[i + 1]["hexcode"]) for i, tone in enumerate(C.TONES)}


def split_of(rng: random.Random, rl: float = 0.08, heldout: float = 0.10) -> str:
    u = rng.random()
    return "heldout" if u < heldout else "rl" if u < heldout + rl else "train"


class World:
    """All pictures and edits of the tiny world, drawn once from a seed.

    `everything`: draw every object in every colour and on every background. By default the world draws a selection.
    """

    def __init__(self, icons: Icons, seed: int = 7, *, everything: bool = False):
        self.icons, self.rng, self.everything = icons, random.Random(seed), everything
        self.pictures: list[Picture] = []
        self.edits: list[Edit] = []
        for label in C.names(C.OBJECTS):
            self._object(label)
        for label in C.names(C.TONED):
            self._toned(label, label, {"yellow": icons.label(label)} | icons.tones(label), {})
        for who in C.HAIRED:
            self._haired(who)

    def _add(self, key: str, answer: str, image: Image.Image, split: str, kind: str) -> Picture:
        self.pictures.append(Picture(key, answer, encode(image), split, kind))
        return self.pictures[-1]

    def _edit(self, source: Picture, target: Picture, wordings: tuple[str, ...], heldout: tuple[str, ...]) -> None:
        if source.split == "train":  # a source picture must be one that the model may have seen
            self.edits.append(Edit(source, target, wordings, heldout))

    def _object(self, label: str) -> None:
        rgba, name = self.icons.label(label), OWN_COLOUR.get(label, label)
        shown = "padlock" if label == "locked" else label
        base = self._add(label, article(shown), place(rgba), "train", "base")
        if self.everything or label in C.names(C.PAINTABLE):
            for colour, rgb in C.COLOURS.items():
                if label.startswith(colour):
                    continue
                text = article(f"{colour} {name}")
                target = self._add(f"{label}/{colour}", text, place(paint(rgba, rgb)), split_of(self.rng), "paint")
                self._edit(base, target, (f"make it {colour}", f"paint it {colour}"), (f"change it to {colour}",))
        for colour in self.rng.sample(sorted(C.BACKGROUNDS), len(C.BACKGROUNDS) if self.everything else 2):
            text = article(f"{shown} on a {colour} background")
            image = place(rgba, C.BACKGROUNDS[colour])
            target = self._add(f"{label}/on {colour}", text, image, split_of(self.rng), "background")
            wordings = (f"put it on a {colour} background", f"make the background {colour}")
            self._edit(base, target, wordings, (f"change the background to {colour}",))
        self._geometry(base, rgba)

    def _geometry(self, base: Picture, rgba: Image.Image) -> None:
        """Add mirrored and upside-down targets if the difference is visible."""
        plain = np.asarray(place(rgba), dtype=np.float32)
        turns = (
            (
                "mirror",
                np.asarray(rgba)[:, ::-1],
                "mirrored",
                ("mirror it", "flip it left to right"),
                ("mirror it left to right",),
            ),
            (
                "flip",
                np.asarray(rgba)[::-1],
                "upside down",
                ("turn it upside down", "flip it upside down"),
                ("make it upside down",),
            ),
        )
        for kind, pixels, word, wordings, heldout in turns:
            image = place(Image.fromarray(np.ascontiguousarray(pixels), "RGBA"))
            if np.abs(np.asarray(image, dtype=np.float32) - plain).mean() < 12:
                continue
            target = self._add(f"{base.key}/{kind}", f"{base.answer}, {word}", image, split_of(self.rng), kind)
            self._edit(base, target, wordings, heldout)

    def _toned(
        self, key: str, name: str, drawings: dict[str, Image.Image], split: dict[str, str]
    ) -> dict[str, Picture]:
        """Add a person or hand in yellow and five skin tones, and edits from each trained tone to two others."""
        done = {}
        for tone, rgba in drawings.items():
            plain = tone == "yellow"
            text = name if plain else f"{name}, {tone} skin tone"
            where = split.get(tone) or ("train" if plain else split_of(self.rng))
            done[tone] = self._add(f"{key}/{tone}", text, place(rgba), where, "tone" if not plain else "base")
        for source in done.values():
            for tone in self.rng.sample([t for t in C.TONES if done[t] is not source], 2):
                wordings = (f"give it a {tone} skin tone", f"change the skin tone to {tone}")
                self._edit(source, done[tone], wordings, (f"make it a {tone} skin tone",))
        return done

    def _haired(self, who: str) -> None:
        people = {"": self._toned(who, who, {"yellow": self.icons.label(who)} | self.icons.tones(who), {})}
        for style, text in C.HAIR.items():
            label = f"{who}: {text}"
            drawings = {"yellow": self.icons.label(label)} | self.icons.tones(label)
            name = f"bald {who}" if style == "bald" else f"{who} with {text}"
            people[style] = self._toned(label, name, drawings, {})
        for style, text in C.HAIR.items():
            it = "make the person bald" if style == "bald" else f"give the person {text}"
            for tone in people[""]:
                self._edit(people[""][tone], people[style][tone], (it, it + ", keep the rest"), (f"change it: {it}",))


def riddles(icons: Icons, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Riddles as (label, words, split): sets of 2 or 3 emojibase tags that fit only one concept and do not name it."""
    labels = C.names(C.OBJECTS)
    tags = {}
    for label in labels:
        own = set(label.lower().split())
        tags[label] = [
            t for t in icons.entry[label].get("tags", []) if t.isalpha() and t.islower() and t not in own and len(t) > 2
        ]
    for label in labels:
        unique = [
            words
            for size in (2, 3)
            for words in itertools.combinations(tags[label], size)
            if not any(set(words) <= set(tags[other]) for other in labels if other != label)
        ]
        rng.shuffle(unique)
        for i, words in enumerate(unique[:7]):
            split = "heldout" if i == 5 else "rl" if i == 6 else "train"
            text = " and ".join([", ".join(words[:-1]), words[-1]])
            yield label, text, split


def draw_word(word: str, ink: tuple[int, int, int], font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw a short word in bold capitals, centred on white."""
    image = Image.new("RGB", (SIZE, SIZE), WHITE)
    ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), word, fill=ink, font=font, anchor="mm")
    return image


def text_records(rng: random.Random, font: ImageFont.FreeTypeFont) -> Iterator[tuple[Record, str]]:
    """Records of words with 2-4 letters, each in one split: English words and, except in heldout, random strings."""
    words = C.words()
    rng.shuffle(words)
    heldout = words[:60]
    letters = "ABCDEFGHIJKLMNOPRSTUVWXYZQ"

    def strings(count: int) -> set[str]:
        lengths = (rng.choice((2, 3, 3, 4, 4, 4)) for _ in range(count))
        return {"".join(rng.choice(letters) for _ in range(length)) for length in lengths} - set(words)

    def records(split: str, group: list[str]) -> Iterator[tuple[Record, str]]:
        for word in group:
            ink = rng.choice(sorted(C.INKS)) if rng.random() < 0.5 else "black"
            wording = rng.choice(TEXT_HELDOUT_WORDINGS if split == "heldout" else TEXT_WORDINGS)
            prompt = wording.format(w=word, ink="" if ink == "black" else f" in {ink}")
            answer = f'the word "{word}"' + ("" if ink == "black" else f" in {ink}")
            image = encode(draw_word(word, C.INKS[ink], font))
            yield Record(f"text/{split}/{word}", "text", prompt, answer, image, (), "drawn words"), split

    train = sorted(set(words[100:]) | strings(900))
    yield from records("train", train)
    yield from records("heldout", heldout)
    yield from records("rl", words[60:100] + sorted(strings(600) - set(train)))


def picture_records(world: World, rng: random.Random) -> Iterator[tuple[Record, str]]:
    """Text-to-image and editing records of every picture, each with the split of its combination."""
    for p in world.pictures:
        if p.kind in ("mirror", "flip"):
            continue  # appears only as the target of an edit
        wordings: tuple[str, ...] = T2I_HELDOUT_WORDINGS if p.split == "heldout" else T2I_WORDINGS
        some = rng.sample(wordings, 2 if p.split == "train" and p.kind == "base" else 1)
        for wording in some:
            prompt = wording.format(x=p.answer)
            yield (
                Record(
                    f"t2i/{p.key}/{wordings.index(wording)}", "t2i", prompt, p.answer, p.image, (), "fluent-emoji-flat"
                ),
                p.split,
            )
        if p.kind == "base":  # known concepts in other words, for RL and the held-out set
            prompt = rng.choice(T2I_HELDOUT_WORDINGS).format(x=p.answer)
            yield Record(f"t2i/{p.key}/heldout", "t2i", prompt, p.answer, p.image, (), "fluent-emoji-flat"), "heldout"
    for e in world.edits:
        words = e.heldout_wordings if e.target.split == "heldout" else e.wordings
        prompt = rng.choice(words)
        name = f"edit/{e.source.key}>{e.target.key}"
        yield (
            Record(name, "edit", prompt, e.target.answer, e.target.image, (e.source.image,), "fluent-emoji-flat"),
            e.target.split,
        )


def riddle_records(world: World, rng: random.Random) -> Iterator[tuple[Record, str]]:
    base = {p.key: p for p in world.pictures if p.kind == "base"}
    for i, (label, text, split) in enumerate(riddles(world.icons, rng)):
        wording = rng.choice(RIDDLE_HELDOUT_WORDINGS if split == "heldout" else RIDDLE_WORDINGS)
        p = base[label]
        yield (
            Record(
                f"reasoning/{label}/{i}", "reasoning", wording.format(w=text), p.answer, p.image, (), "emojibase tags"
            ),
            split,
        )


def as_prompt(record: Record, rng: random.Random) -> Record:
    """The record as an RL prompt: without its target and, except for edits, in a wording that no other split uses."""
    if record.task == "edit":
        return replace(record, image=None)
    x = record.answer
    if record.task == "reasoning":
        x = next(w for f in RIDDLE_WORDINGS for w in re.findall(re.escape(f).replace(r"\{w\}", "(.+)"), record.prompt))
    return replace(record, prompt=rng.choice(RL_WORDINGS[record.task]).format(x=x), image=None)


def build(packages: Path, font_path: Path, seed: int = 7) -> dict[str, list[Record]]:
    """All records by split. Raises ValueError if training contains a held-out prompt or target."""
    rng = random.Random(seed + 1)
    world = World(Icons(packages), seed)
    font = ImageFont.truetype(str(font_path), 24)
    out: dict[str, list[Record]] = {s: [] for s in SPLITS}
    for record, split in itertools.chain(
        picture_records(world, rng), riddle_records(world, rng), text_records(rng, font)
    ):
        out[split].append(record)
    seen = {r.prompt for r in out["train"] if r.task != "edit"} | {r.prompt for r in out["rl"] if r.task != "edit"}
    clash = [r.prompt for r in out["heldout"] if r.task != "edit" and r.prompt in seen]
    pairs = {(r.references, r.image) for s in ("train", "rl") for r in out[s] if r.task == "edit"}
    clash += [r.id for r in out["heldout"] if r.task == "edit" and (r.references, r.image) in pairs]
    if clash:
        raise ValueError(f"{len(clash)} held-out prompts are also in training, first: {clash[:3]}")
    # RL prompts: untrained combinations and some trained ones. No trained words, as the model already draws them right.
    known = rng.sample([r for r in out["train"] if r.task != "text"], RL_KNOWN)
    out["rl"] = [as_prompt(r, rng) for r in out["rl"] + known]
    for s in SPLITS:
        rng.shuffle(out[s])
    return out


def dejavu() -> Path:
    """Path of DejaVu Sans Mono Bold (free licence), which matplotlib ships."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the unpacked npm packages")
    parser.add_argument("--out", type=Path, default=Path("assets/tiny/data"), help="where the parquet files go")
    args = parser.parse_args()
    splits = build(args.packages, dejavu())
    args.out.mkdir(parents=True, exist_ok=True)
    for split, name in zip(SPLITS, ("train", "rl_prompts", "heldout"), strict=True):
        records = splits[split]
        write_records(args.out / f"{name}.parquet", records)
        tasks = {t: sum(r.task == t for r in records) for t in ("t2i", "reasoning", "text", "edit")}
        print(f"{name}: {len(records)} records {tasks}")


if __name__ == "__main__":
    main()
