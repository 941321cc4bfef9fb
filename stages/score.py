"""Score a folder of pictures with any rewards, our own or yours, as a run would.

    python stages/score.py --rewards ocr,clip rewards.clip.path=weights/clip --images DIR --out OUT
    python stages/score.py --rewards my.module:Class --images DIR --prompts prompts.jsonl --out OUT
    python stages/score.py --recipe tiny-rl --images DIR --prompts "a red cat" --out OUT

Pictures of stages/generate.py say their prompts themselves. For others --prompts is one prompt for all, or a list
(docs/own-data.md) whose rows name a picture's file as `image`, or whose id begins the file's name: ID.png, ID-0.png.

OUT gets scores.parquet and scores.html, thumbnails sorted by score. A score that is missing has a reason and is no 0.
The same command scores only what has no score yet.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's code, wherever the program is called from

from deepgen.cluster.resources import pool_placement  # noqa: E402
from deepgen.config import PoolSettings, Settings, UserError, run_program  # noqa: E402
from deepgen.config.schema.paths import argument  # noqa: E402
from deepgen.errors import writing  # noqa: E402
from deepgen.file_lock import file_lock  # noqa: E402
from stages.generate import Parser, whole  # noqa: E402
from stages.scoring.reward_choice import add_arguments, chosen, needs_of  # noqa: E402

if TYPE_CHECKING:
    from actors.experience.scoring.reward_pool import RewardPool
    from rewards import RewardRequest
    from stages.scoring.picture_list import Picture
    from stages.scoring.score_table import Scored

TABLE, SHEET, JOURNAL, LOCK = "scores.parquet", "scores.html", "journal", ".lock"
TOGETHER = 64  # pictures in one call of the pools, unless a reward compares those of a prompt
AT_ONCE = 256  # pictures in memory, unless one prompt has more
PIXELS = 1 << 28  # of all pictures in memory, 800 MB, unless one call has more
THEN = "run the same command again"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--images", type=argument, required=True, metavar="DIR")
    parser.add_argument("--prompts", metavar="FILE|PROMPT")
    parser.add_argument("--out", type=argument, required=True, metavar="OUT")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="score the first N pictures only")
    parser.add_argument("--allow", action="append", default=[], metavar="PLACE", help="as data.allow; can be repeated")
    return parser.parse_intermixed_args(argv)


def main() -> int:
    args = parse(sys.argv[1:])
    settings, pools = chosen(args)
    from deepgen.cluster.connect import connect
    from stages.scoring.picture_list import find_pictures, one_line

    found = find_pictures(args.images, args.prompts, args.allow)
    for line in found.left_out:
        print(f"left out: {one_line(line)}", flush=True)
    pictures, names = found.pictures[: args.limit], [pool.pool_name for pool in pools]
    with file_lock(args.out / LOCK, "--out", "the scores", lambda who: _taken(args.out, who), THEN):
        gpus = connect(settings, needs_of(pools), code_root=ROOT)
        scoring = Scoring(pools, args.out / JOURNAL, settings, gpus=gpus)
        rows = asyncio.run(scoring.run(pictures))
        if not rows:
            raise UserError(f"--images: none of the {len(pictures):,} pictures can be read")
        write(args.out, rows, names, f"{one_line(args.images.resolve().name)}, scored by {', '.join(names)}")
    return 0


def _taken(out: Path, who: str) -> str:
    return f"--out: scores are being written into {out}, {who}; allowed: another folder, or this one after it"


def write(out: Path, rows: Sequence[Scored], names: Sequence[str], title: str) -> None:
    """Write table and sheet, and print the table."""
    from stages.scoring.score_sheet import sheet_html
    from stages.scoring.score_table import console_text, parquet_bytes

    files = {TABLE: parquet_bytes(rows, names), SHEET: sheet_html(rows, names, title).encode("utf-8", "replace")}
    for name, content in files.items():
        with writing("the scores", out / name, THEN, "--out"):
            aside = out / f".{name}.tmp"
            aside.write_bytes(content)
            aside.replace(out / name)
    print(f"{console_text(rows, names)}\n\n{len(rows):,} pictures: {out / TABLE}; look at {out / SHEET}", flush=True)


class Scoring:
    """The pools of the chosen rewards. Scores are kept in a journal, so that none is asked for twice.

    Journals of the runs below `run.dir` are read as well.
    """

    def __init__(self, pools: Sequence[PoolSettings], journal: Path, settings: Settings, *, gpus: bool) -> None:
        from actors.experience.scoring.reward_pool import RewardPool

        self._settings = {pool.pool_name: pool for pool in pools}
        self._pools: dict[str, RewardPool] = {
            pool.pool_name: RewardPool(
                pool,
                placement=pool_placement(settings.cluster, pool, gpus=gpus),
                start_deadline_s=settings.cluster.start_deadline_s,
                journal=journal,
                runs=settings.run.dir,
            )
            for pool in pools
        }
        self._compares = any(hasattr(pool.reward_class(), "score_groups") for pool in pools)

    async def run(self, pictures: Sequence[Picture]) -> list[Scored]:
        """Score the pictures; what cannot be read is told and left out. Raises UserError if a reward fails."""
        from tqdm import tqdm

        from actors.experience.scoring.pool_parts import RewardPoolError

        parts = parts_of(pictures, by_prompt=self._compares)
        turns = asyncio.Semaphore(at_once(parts))
        rows: dict[Path, Scored] = {}
        try:
            await asyncio.gather(*(pool.start() for pool in self._pools.values()))
            with tqdm(total=len(pictures), unit="picture") as bar:

                async def one(part: Sequence[Picture]) -> None:
                    async with turns:
                        for picture, row in zip(part, await self._score(part), strict=True):
                            if row is not None:
                                rows[picture.file] = row
                    bar.update(len(part))

                async with asyncio.TaskGroup() as tasks:
                    for part in parts:
                        tasks.create_task(one(part))
        except* (RewardPoolError, TimeoutError) as failed:
            raise UserError(f"--rewards: {_first(failed)}") from failed
        finally:
            for pool in self._pools.values():
                pool.stop()
        return [rows[picture.file] for picture in pictures if picture.file in rows]

    async def _score(self, part: Sequence[Picture]) -> list[Scored | None]:
        import ray

        from actors.experience.reward_requests import request_key
        from rewards import applies
        from stages.scoring.score_sheet import thumbnail
        from stages.scoring.score_table import Scored

        read = [await asyncio.to_thread(_read, picture) for picture in part]
        requests = [request for request in read if request is not None]
        keys, reference = [request_key(request) for request in requests], ray.put(requests)

        async def of(name: str, pool: RewardPool) -> list[float | tuple[str, str]]:
            settings = self._settings[name]
            asked = [key if applies(settings, one) else None for key, one in zip(keys, requests, strict=True)]
            got = await pool.score(reference, asked)
            return [_told(value, why) for value, why in zip(got.values, got.reasons, strict=True)]

        found = await asyncio.gather(*(of(name, pool) for name, pool in self._pools.items())) if requests else []
        columns = [iter(column) for column in found]
        rows: list[Scored | None] = []
        for picture, request in zip(part, read, strict=True):
            if request is None:
                rows.append(None)
                continue
            scores = {name: next(column) for name, column in zip(self._pools, columns, strict=True)}
            record = picture.record
            rows.append(Scored(picture.name, record.id, record.prompt, record.task, scores, thumbnail(request.image)))
        return rows


def parts_of(pictures: Sequence[Picture], *, by_prompt: bool) -> list[list[Picture]]:
    """The pictures in pieces that are scored together: all of a prompt, or as many as make good batches."""
    if not by_prompt:
        parts: list[list[Picture]] = []
        left = 0
        for picture in pictures:
            if not parts or len(parts[-1]) == TOGETHER or picture.pixels > left:
                parts.append([])
                left = PIXELS * TOGETHER // AT_ONCE
            parts[-1].append(picture)
            left -= picture.pixels
        return parts
    groups: dict[tuple[str, str], list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    return list(groups.values())


def at_once(parts: Sequence[Sequence[Picture]]) -> int:
    """How many parts may be in memory together."""
    largest = max(sum(picture.pixels for picture in part) for part in parts)
    return max(1, min(AT_ONCE // max(map(len, parts)), PIXELS // max(1, largest)))


def _read(picture: Picture) -> RewardRequest | None:
    try:
        return picture.request()
    except ValueError as error:
        from tqdm import tqdm

        from stages.scoring.picture_list import one_line

        tqdm.write(f"left out: {one_line(picture.file)}: {error}", file=sys.stdout)
        return None


def _told(value: float | None, why: object) -> float | tuple[str, str]:
    """A score, or the pool's reason for its absence."""
    if value is not None:
        return value
    return str(getattr(why, "reason", "no score")), str(getattr(why, "detail", why))


def _first(group: BaseExceptionGroup[BaseException]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


if __name__ == "__main__":
    run_program(main, resumes=False)
