"""An HTML page of thumbnails sorted by score: one file that needs nothing else, no script and no network.

Prompts, file names and what services say are strangers' texts: all are escaped, and the page's policy lets it load
nothing. The order for each reward is a CSS variable of each picture, and a button for each reward chooses one.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from stages.scoring.score_table import Scored, sorted_by

SIDE = 160  # pixels of a thumbnail's longer side
SHOWN = 2000  # pictures on a page, the best and the worst by the first reward
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #1d2129; background: #fff; }
main { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure { margin: 0; width: 190px; padding: 8px; border: 1px solid #d5d9e0; box-sizing: border-box; }
img { display: block; max-width: 100%; margin: 0 auto 6px; outline: 1px solid #d5d9e0; }
figcaption { overflow-wrap: anywhere; font-size: 12px; }
p { margin: 0 0 4px; max-height: 5.6em; overflow: auto; }
table { border-collapse: collapse; width: 100%; }
td { padding: 0 4px 0 0; vertical-align: top; } td + td { text-align: right; white-space: nowrap; }
.missing { color: #c62828; } .file { color: #6a7280; }
"""


def thumbnail(image: np.ndarray) -> bytes:
    """A small JPEG of an image, uint8 [H, W, 3]."""
    small, stream = Image.fromarray(image), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def sheet_html(rows: Sequence[Scored], rewards: Sequence[str], title: str) -> str:
    """The page. Pictures without a score come last, in red with the reason, and the detail under the pointer."""
    ranked = sorted_by(rows, rewards[0])
    shown = ranked if len(ranked) <= SHOWN else [*ranked[: SHOWN // 2], *ranked[-SHOWN // 2 :]]
    ranks = [{id(row): place for place, row in enumerate(sorted_by(shown, reward))} for reward in rewards]
    choices, rules = [], []
    for number, reward in enumerate(rewards):
        checked = "" if number else " checked"
        choices.append(
            f'<input type="radio" name="by" id="by{number}"{checked}><label for="by{number}">{escape(reward)}</label> '
        )
        rules.append(f"#by{number}:checked ~ main figure {{ order: var(--o{number}); }}")
        rules.append(f"#by{number}:checked ~ main .r{number} {{ font-weight: 600; }}")
    figures = [_figure(row, rewards, [rank[id(row)] for rank in ranks]) for row in shown]
    half = f"{SHOWN // 2:,}"
    left = f"; the best {half} and the worst {half} by {escape(rewards[0])} are shown" if len(shown) < len(rows) else ""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{escape(title)}</title><style>{_STYLE}{' '.join(rules)}</style></head><body>",
            f"<h1>{escape(title)}</h1><div>{len(rows):,} pictures{left}. Best first by: </div>",
            *choices,
            "<main>",
            *figures,
            "</main></body></html>\n",
        ]
    )


def _figure(row: Scored, rewards: Sequence[str], places: Sequence[int]) -> str:
    orders = ";".join(f"--o{number}:{place}" for number, place in enumerate(places))
    image = base64.b64encode(row.thumbnail).decode("ascii")
    cells = "".join(
        f'<tr class="r{number}"><td>{escape(reward)}</td>{_cell(row.scores[reward])}</tr>'
        for number, reward in enumerate(rewards)
    )
    return (
        f'<figure style="{orders}"><img alt="" src="data:image/jpeg;base64,{image}"><figcaption>'
        f'<p>{escape(row.prompt)}</p><table>{cells}</table><span class="file">{escape(row.file)}</span>'
        "</figcaption></figure>"
    )


def _cell(score: float | tuple[str, str]) -> str:
    if isinstance(score, tuple):
        reason, detail = score
        return f'<td class="missing" title="{escape(detail)}">{escape(reason)}</td>'
    return f"<td>{score:.4f}</td>"
