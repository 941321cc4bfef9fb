"""Draw pictures from prompts, or edit pictures, with any weights of ours.

    python stages/generate.py --weights MODEL --prompts "a red cat" --out DIR
    python stages/generate.py --weights RUN --prompts prompts.txt --out DIR --samples 4 --steps 50 --guidance 4
    python stages/generate.py --weights MODEL --prompts "make it blue" --images cat.png --out DIR

MODEL: a component folder (a run's model/, or what stages/export.py writes). A run, finished or not, or one of its
checkpoints is taken as well. --prompts: a prompt, or a file: text with one prompt a line, JSON, JSON lines, CSV,
parquet records (docs/own-data.md). All GPUs of the cluster draw; without one, the CPU does.

DIR gets a PNG for each picture, with prompt, seed, settings and the weights' fingerprint inside, sheet.png and
pictures.parquet. What a picture shows depends on its prompt, --seed and the settings alone. The same command draws what
is still missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

import numpy as np  # noqa: E402

from deepgen.algorithms.rules import DETERMINISTIC_SAMPLERS, ETA_MAX  # noqa: E402
from deepgen.config import UserError, load_settings, run_program  # noqa: E402
from deepgen.config.schema.paths import argument  # noqa: E402
from deepgen.models.presets import PADDINGS  # noqa: E402
from deepgen.registry import SAMPLERS  # noqa: E402

if TYPE_CHECKING:
    from deepgen.data.records import Record
    from deepgen.drawing.picture_files import PictureFolder
    from deepgen.drawing.request import DrawRequest
    from deepgen.models.presets import Architecture

TOLD = (  # settings of a request that are written beside and into the pictures
    *("seed", "sampler", "num_steps", "shift", "eta", "guidance_scale", "negative_prompt", "image_size", "size"),
)
DEFAULT_SIDE = 512  # of pictures, as the published models were trained; smaller ones have their own
SIDE = 16  # sides are multiples of it: VAE and patches of the DiT together


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)  # one line, as for every other user error


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=argument, required=True, help="component folder, run or checkpoint")
    parser.add_argument("--ema", action="store_true", help="of a run, the averages (train.ema_decay)")
    parser.add_argument("--base", type=argument, help="where the model.weights of a run lie now, if they have moved")
    parser.add_argument("--prompts", required=True, metavar="FILE|PROMPT")
    parser.add_argument("--images", type=argument, nargs="+", default=[], metavar="FILE", help="pictures to edit")
    parser.add_argument("--out", type=argument, required=True, metavar="DIR")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="draw the first N prompts only")
    parser.add_argument("--samples", type=whole(1), default=1, help="pictures of each prompt (default: 1)")
    parser.add_argument("--seed", type=whole(0), default=42, help="(default: 42)")
    parser.add_argument("--size", type=size, metavar="SIDE|WxH", help="pixels; default: of the first source, or --area")
    parser.add_argument(
        "--aspect", type=aspect, metavar="W:H", help="sides in this ratio, with about as many pixels as --area squared"
    )
    parser.add_argument(
        "--area",
        type=side,
        metavar="SIDE",
        help="of a square as large as the picture (default: the model's, 512 or less)",
    )
    parser.add_argument("--steps", type=whole(1), default=50, help="of the sampler (default: 50)")
    parser.add_argument("--guidance", type=scale, default=4.0, help="scale; 1 is off and half the work (default: 4)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--sampler", default="ode", help="(default: ode)")
    parser.add_argument("--eta", type=float, default=1.0, help="noise of the other samplers (default: 1)")
    parser.add_argument("--shift", type=float, default=3.0, help="of the noise levels (default: 3)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="(default: bf16 on GPUs, fp32 on CPUs)")
    parser.add_argument("--padding", choices=PADDINGS, help="as model.padding (default: the run's, else masked)")
    parser.add_argument("--batch", type=whole(1), default=8, help="pictures in one forward (default: 8)")
    parser.add_argument("--allow", action="append", default=[], metavar="PLACE", help="as data.allow; can be repeated")
    parser.add_argument("--address", default="auto-local", help="Ray cluster, as cluster.address")
    args = parser.parse_args(argv)
    if args.sampler not in SAMPLERS:
        raise UserError(f"--sampler: got {args.sampler!r}; allowed: {', '.join(SAMPLERS)}")
    if args.size and args.aspect:
        raise UserError("--aspect: got with --size; allowed: one of them")
    if not 0 < args.shift <= 100:
        raise UserError(f"--shift: got {args.shift:g}; allowed: a number above 0, at most 100")
    limit = ETA_MAX.get(args.sampler, 100)
    if args.sampler in DETERMINISTIC_SAMPLERS:
        args.eta = 0.0
    elif not 0 < args.eta <= limit:
        raise UserError(f"--eta: got {args.eta:g} with {args.sampler}; allowed: a number above 0, at most {limit:g}")
    return args


def whole(low: int) -> Any:
    """An argument type: a whole number, from low on, as torch and numpy hold it."""

    def parsed(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number from {low} to {2**31 - 1}")
        return int(text)

    return parsed


def scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a number from 1 (off) to 100")
    return value


def side(text: str) -> int:
    """Pixels of a side."""
    if not text.isdecimal() or int(text) % SIDE or not 32 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: from 32 to 4096, a multiple of {SIDE}")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """Height and width of 512 or 768x512 (width first, as on screens)."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a side, as 512, or WIDTHxHEIGHT, as 768x512")
    width, height = side(parts[0]), side(parts[-1])
    return height, width


def aspect(text: str) -> float:
    """Width by height."""
    width, colon, height = text.partition(":")
    try:
        ratio = float(width) / float(height) if colon else float(width)
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 1 / 8 <= ratio <= 8:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: as 16:9, from 1:8 to 8:1")
    return ratio


def main() -> int:
    args = parse(sys.argv[1:])
    from deepgen.drawing.picture_files import PictureFolder
    from deepgen.drawing.prompts import Reader, read_wanted
    from deepgen.models.weights_io.folder import read_architecture
    from stages.exporting.drawn_weights import component_folder

    PictureFolder(args.out).check()
    with component_folder(args.weights, args.out, averages=args.ema, base=args.base) as weights:
        architecture = read_architecture(weights, None)
        request = read_request(args, architecture)
        tokens, tokenizer = architecture.max_prompt_tokens, weights / "tokenizer"
        reader = Reader(tokenizer, tokens, architecture.max_side, request.image_size)
        try:
            reader.check_text(args.negative)
        except ValueError as error:
            raise UserError(f"--negative: {error}") from error
        records, bad = read_wanted(args.prompts, args.images, reader, allow=args.allow, limit=args.limit)
        for one in bad:
            print(f"left out: {one.place}: {one.reason}", flush=True)
        if not records:
            raise UserError(f"--prompts: no row of {args.prompts} can be drawn")
        draw(args, weights, request, records)
    return 0


def draw(args: argparse.Namespace, weights: Path, request: DrawRequest, records: Sequence[Record]) -> None:
    """Draw what is missing in --out. Raises UserError at the end if the numbers of some pictures are not finite."""
    from actors.draw_pool import Model, draw_all
    from deepgen.cluster.connect import connect
    from deepgen.drawing.picture_files import SHEET, PictureFolder
    from deepgen.drawing.pixels import is_picture
    from deepgen.fingerprint import fingerprint
    from stages.exporting.export_run import padding_of

    gpus = connect(load_settings(None, [f"cluster.address={args.address}"]), no_needs, code_root=ROOT)
    precision, padding = args.precision or ("bf16" if gpus else "fp32"), args.padding or padding_of(args.weights)
    told = {key: getattr(request, key) for key in TOLD}
    pictures, lost = PictureFolder(args.out), 0
    with pictures.opened({"weights": fingerprint(weights), "precision": precision, "padding": padding, **told}):
        jobs = list(jobs_of(request, records, pictures, args.batch))
        model = Model(weights.absolute(), padding, precision, args.batch)
        try:
            for record, sample, picture in progress(draw_all(jobs, model, gpus=gpus), jobs):
                if is_picture(picture):
                    pictures.save(record, sample, picture)
                else:
                    lost += 1
        finally:
            count, wanted = pictures.finish(records, request.samples), len(records) * len(request.samples)
            look = f"; look at {args.out / SHEET}" if count else ""
            print(f"{count:,} of {wanted:,} pictures are in {args.out}{look}", flush=True)
    if lost:
        raise UserError(
            f"--weights: {lost:,} pictures were not drawn, because their numbers are not finite; are the weights "
            "damaged, or --guidance or --shift too large?"
        )


def read_request(args: argparse.Namespace, architecture: Architecture) -> DrawRequest:
    """All that decides the pictures, without prompts. Raises UserError for a size that the model cannot draw."""
    from deepgen.drawing.request import DrawRequest

    trained = int(architecture.transformer["sample_size"]) * architecture.vae_downsample
    area = args.area or min(DEFAULT_SIDE, trained)
    given = args.size or (args.aspect and sides(area, args.aspect))
    if max(given or [area]) > architecture.max_side:
        height, width = given or (area, area)
        raise UserError(
            f"{'--size' if args.size else '--area'}: got {width}x{height} px; allowed: sides of at most "
            f"{architecture.max_side} px, for which this model has positions"
        )
    return DrawRequest(
        records=(),
        samples=tuple(range(args.samples)),
        seed=args.seed,
        image_size=area,
        num_steps=args.steps,
        shift=args.shift,
        sampler=args.sampler,
        eta=args.eta,
        guidance_scale=args.guidance,
        negative_prompt=args.negative,
        size=given or None,
    )


def sides(area: int, ratio: float) -> tuple[int, int]:
    """Height and width with about area^2 pixels, width / height about `ratio`, in multiples of SIDE."""
    height, width = (max(32, round(area * factor / SIDE) * SIDE) for factor in (ratio**-0.5, ratio**0.5))
    return height, width


def jobs_of(
    request: DrawRequest, records: Sequence[Record], pictures: PictureFolder, batch: int
) -> Iterator[DrawRequest]:
    """What is still to be drawn, in pieces of one forward or less."""
    missing: dict[tuple[int, ...], list[Record]] = {}
    for record in records:
        samples = pictures.missing(record, request.samples)
        for start in range(0, len(samples), batch):
            missing.setdefault(samples[start : start + batch], []).append(record)
    for samples, own in missing.items():
        count = batch // len(samples)
        for start in range(0, len(own), count):
            yield replace(request, records=tuple(own[start : start + count]), samples=samples)


def no_needs(settings: Any, *, gpus: bool) -> list[Any]:
    return []


def progress(
    found: Iterator[tuple[Record, int, np.ndarray]], jobs: Sequence[DrawRequest]
) -> Iterator[tuple[Record, int, np.ndarray]]:
    from tqdm import tqdm

    yield from tqdm(found, total=sum(len(job.records) * len(job.samples) for job in jobs), unit="picture")


if __name__ == "__main__":
    run_program(main, resumes=False)
