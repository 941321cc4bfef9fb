"""Convert a data set to parquet shards that the stages read.

    python stages/convert.py SOURCE OUT [--form FORM] [--task TASK]
    python stages/convert.py --check SOURCE

SOURCE: a file or folder in one of the forms of docs/own-data.md: parquet or Arrow, WebDataset tars, JSON, JSON lines or
CSV, pictures with captions, prompts. The form is guessed unless --form gives it. --check says from a sample, within
seconds, which form it is and what would be kept and dropped, and writes nothing. Every image is decoded once. Unusable
samples (truncated, too small, absurd shape, empty caption, ...) go to OUT/quarantine with the reason, and above
--max-bad-share the conversion stops. The same command continues a conversion that was stopped. OUT/report.json has the
counts; histograms.png and samples.png show the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from deepgen.config import UserError, load_settings, run_program  # noqa: E402
from deepgen.config.schema.paths import argument  # noqa: E402
from deepgen.config.settings import TASKS  # noqa: E402
from deepgen.data.conversion import convert_units as convert  # noqa: E402
from deepgen.data.conversion.convert_units import Limits, Tally  # noqa: E402
from deepgen.data.conversion.look import look  # noqa: E402
from deepgen.data.conversion.raw_data import FORMS, guess_form, notes_of, plan_units, source_files  # noqa: E402
from deepgen.data.conversion.readers.raw_sample import RawData, Unit  # noqa: E402
from deepgen.data.images import MAX_ASPECT, MAX_PIXELS  # noqa: E402
from deepgen.reading.reach import check_allowed  # noqa: E402

LOOK_AFTER = 200  # the share of bad samples is checked only after this many


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)  # one line, as for every other user error


def number(kind: type[int] | type[float], low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argument type: a number from low to high."""

    def parsed(text: str) -> float:
        allowed = f"from {low:,} to {high:,}" if high < float("inf") else f"from {low:,} on"
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {kind.__name__} {allowed}")
        return value

    return parsed


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=argument)
    parser.add_argument("out", type=argument, nargs="?")
    parser.add_argument("--check", action="store_true", help="say what would be kept and dropped; OUT is not needed")
    parser.add_argument("--form", choices=list(FORMS))
    parser.add_argument("--task", choices=TASKS, help="of these samples; default: t2i")
    parser.add_argument("--name", help="of the data set, for the column source; default: SOURCE's")
    parser.add_argument("--images", type=argument, help="folder that relative image paths start from")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PLACE",
        help="folder, host, address or network that its images may be read from, besides files under SOURCE and "
        "--images and public addresses; as in data.allow, can be repeated",
    )
    parser.add_argument("--caption-key", help="of captions in JSON; default: caption")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="hf, pairs: image, prompt or references; prompts: prompt",
    )
    parser.add_argument("--min-side", type=number(int, 1), default=Limits.min_side, help="pixels, both sides")
    parser.add_argument(
        "--max-aspect",
        type=number(float, 1, MAX_ASPECT),
        default=Limits.max_aspect,
        help=f"longer by shorter side; training takes up to {MAX_ASPECT:g}",
    )
    parser.add_argument("--max-pixels", type=number(int, 1, MAX_PIXELS), default=Limits.max_pixels, help="of one image")
    parser.add_argument("--rows", type=number(int, 1), default=1000, help="samples of a shard")
    parser.add_argument(
        "--max-bad-share",
        type=number(float, 0, 1),
        default=0.1,
        help="stop above this share of unusable samples",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order within shards")
    parser.add_argument("--address", default="auto-local", help="Ray cluster, as cluster.address")
    return parser.parse_intermixed_args()  # OUT may stand behind options


def main() -> int:
    args = parse()
    if bool(args.out) == args.check:
        raise UserError("--check writes nothing; leave OUT out" if args.check else "give the folder OUT, or --check")
    if args.out:
        convert.check_folders(args.source, args.out)
    raw = raw_data(args)
    limits = convert.Limits(args.min_side, args.max_aspect, args.max_pixels)
    if args.check:
        for line in look(raw, limits, args.max_bad_share):
            print(line, flush=True)
        return 0
    found = source_files(raw)  # once: a folder may have millions
    for note in notes_of(raw, found):
        print(note, flush=True)
    units = plan_units(raw, args.rows, found.files)
    convert.write_plan(args.out, raw, limits, args.rows, args.seed, units)
    todo = convert.unfinished(args.out, units)
    print(f"{args.source}: form {raw.form}, {len(units)} units, {len(units) - len(todo)} already done", flush=True)
    run(raw, todo, args.out.resolve(), limits, args)
    total = convert.write_report(args.out)
    print(f"kept {total.kept:,} of {total.total:,} samples: {dict(total.tasks)}")
    for reason, count in total.top_reasons().items():
        print(f"  dropped {count:,}: {reason}")
    check_share(total, args, least=0)
    if not total.kept:
        raise UserError(f"{args.source}: not one of {total.total:,} samples can be used; see {args.out / 'quarantine'}")
    key = "data.prompts" if raw.form == "prompts" else "data.train"
    sheets = f"; look at {args.out / 'samples.png'} and histograms.png" if total.sides else ""
    print(f"the stages take {key}={args.out}{sheets}")
    return 0


def raw_data(args: argparse.Namespace) -> RawData:
    """What the arguments ask for. Raises UserError for an option that would have no effect on this form."""
    form = args.form or guess_form(args.source)
    used_by = {
        "--images": (args.images, set(FORMS) - {"webdataset", "folder"}),
        "--allow": (args.allow, set(FORMS) - {"webdataset"}),
        "--column": (args.column, {"hf", "pairs", "prompts"}),
        "--caption-key": (args.caption_key, {"captions", "webdataset", "folder"}),
        "--task": (args.task, set(FORMS) - {"records", "edits"}),
    }
    for option, (given, forms) in used_by.items():
        if given and form not in forms:
            useful = ", ".join(name for name in FORMS if name in forms)
            raise UserError(f"{option}: has no effect on form {form}; allowed with: {useful}")
    if args.images and not args.images.is_dir():
        raise UserError(f"--images: {args.images} is no folder")
    return RawData(
        args.source,
        form,
        args.task or ("" if form == "prompts" else "t2i"),
        args.images,
        args.caption_key or "caption",
        columns(args.column, form),
        args.name or args.source.resolve().stem,
        allowed(args.allow),
    )


def check_share(total: Tally, args: argparse.Namespace, least: int) -> None:
    """Raise UserError if there are at least `least` samples and too many of them cannot be used."""
    if total.total >= least and total.bad_share > args.max_bad_share:
        raise UserError(
            f"{args.source}: {total.bad_share:.1%} of {total.total} samples cannot be used "
            f"(mostly: {total.dropped.most_common(1)[0][0]}; see {args.out / 'quarantine'}); allowed: "
            f"{args.max_bad_share:.1%} (--max-bad-share)"
        )


def columns(given: Sequence[str], form: str) -> dict[str, str]:
    pairs = dict(pair.partition("=")[::2] for pair in given)
    roles = ("prompt",) if form == "prompts" else ("image", "prompt", "references")
    if wrong := set(pairs) - set(roles):
        raise UserError(f"--column {sorted(wrong)[0]}=...: allowed with form {form}: {', '.join(roles)}")
    return pairs


def allowed(given: Sequence[str]) -> tuple[str, ...]:
    for entry in given:
        try:
            check_allowed(entry)
        except ValueError as error:
            raise UserError(f"--allow: {error}") from error
    return tuple(given)


def run(raw: RawData, units: Sequence[Unit], out: Path, limits: Limits, args: argparse.Namespace) -> None:
    """Convert the units on the cluster, with a progress bar. Stops if the share of bad samples is too high."""
    if not units:
        return
    from deepgen.cluster.connect import connect

    total = convert.total_tally(out)
    check_share(total, args, LOOK_AFTER)  # what stopped the last run stops this one
    connect(load_settings(None, [f"cluster.address={args.address}"]), no_needs, code_root=ROOT)
    for tally in progress(converted(raw, units, out, limits, args.seed), len(units)):
        total.add(tally)
        check_share(total, args, LOOK_AFTER)


def no_needs(settings: Any, *, gpus: bool) -> list[Any]:
    return []


def converted(raw: RawData, units: Sequence[Unit], out: Path, limits: Limits, seed: int) -> Iterator[Tally]:
    """Tallies of the units, in the order in which the units finish, through Ray Data."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # our own bar counts units

    def one(row: dict[str, Any]) -> dict[str, Any]:
        try:
            tally = convert.convert_unit(raw, row["item"], out, limits, seed)
            return {"tally": json.dumps(tally.to_dict()), "error": ""}  # Ray warns about types unknown to Arrow
        except UserError as error:  # returned as data: Ray would bury it in its own tracebacks
            return {"tally": "", "error": str(error).encode(errors="backslashreplace").decode()}

    rows = ray.data.from_items(list(units), override_num_blocks=len(units)).map(one, num_cpus=1)
    for row in rows.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield Tally.from_dict(json.loads(row["tally"]))


def progress(tallies: Iterator[Tally], count: int) -> Iterator[Tally]:
    from tqdm import tqdm

    bar = tqdm(tallies, total=count, unit="unit", mininterval=1)
    samples = 0
    for tally in bar:
        samples += tally.total
        bar.set_postfix_str(f"{samples:,} samples")
        yield tally


if __name__ == "__main__":
    run_program(main, resumes=False)
