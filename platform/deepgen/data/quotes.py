"""Which words of a prompt the image should show: those in quotes, as a person reads quotes.

All common quotation marks count. Inch marks, apostrophes, titles (`a scene from "Alien"`) and a prompt that is one
quotation as a whole do not.
"""

from __future__ import annotations

import re

# Each opening mark, and the marks that close it.
_PAIRS = {
    '"': '"', "'": "'", "＂": "＂", "“": "”", "‘": "’", "„": "“”", "‚": "‘’", "”": "”", "«": "»", "»": "«", "‹": "›",
    "›": "‹", "「": "」", "『": "』", "｢": "｣", "〝": "〞〟", "﹁": "﹂", "﹃": "﹄",
}  # fmt: skip
_TWO_WAYS = '"＂”»›'  # marks that open or close, by the spaces around them
_APOSTROPHES = "'‘"  # opening marks that are also apostrophes
_ELIDED = re.compile(r"(?:\d0s|n|em|til|tis|twas|cause|bout|round)\b", re.IGNORECASE)  # '90s, rock 'n' roll
_INCHES = re.compile(r"[\d½¼¾⅛]$|[\d½¼¾⅛]\s$")  # before the mark: 19", or 19 " if a space follows, too
_CONTEXT = 80  # longest text before a mark that says what the quotation is
_WORKS = (
    r"films?|movies?|novels?|songs?|musicals?|operas?|sitcoms?|anime|mangas?|video ?games?|tv shows?|(?:tv )?series|"
    r"(?:style|scenes?|stills?|characters?|cast|world|fan ?art) (?:of|from|in)|"
    r"inspired by|based on|adaptation of|reminiscent of"
)
_CJK_WORKS = "电影|電影|映画|小说|小說|小説|歌曲|动画|動画|アニメ|漫画|漫畫|游戏|遊戲|ゲーム|电视剧|電視劇|ドラマ"
_TITLE_BEFORE = re.compile(
    rf"(?:\b(?:{_WORKS})(?:,? (?:called|named|titled|entitled))?(?: the| a)?[\s,:]*|(?:{_CJK_WORKS})[の：:]?)$",
    re.IGNORECASE,
)
_TITLE_AFTER = re.compile(r"(?:[\s-]+(?:styled?|inspired|themed|films?|movies?|novels?)\b|-like\b)", re.IGNORECASE)
_CSV = re.compile(r'"(?:[^"]|"")*"')  # a field of a CSV file, with its quotes


def quoted_words(prompt: str) -> list[str]:
    """The words that the image should show, quotation by quotation. A comma before the closing mark is left out."""
    text = prompt.strip()
    if _CSV.fullmatch(text):
        return quoted_words(text[1:-1].replace('""', '"'))
    found = _quotations(text)
    if len(found) == 1 and not re.search(r"\w", text[: found[0][0]] + text[found[0][1] :]):
        return quoted_words(text[found[0][0] + 1 : found[0][1] - 1])
    words = [
        text[start + 1 : end - 1].strip().rstrip(",;，、；").rstrip()
        for start, end in found
        if not _TITLE_BEFORE.search(text[max(0, start - _CONTEXT) : start]) and not _TITLE_AFTER.match(text, end)
    ]
    return [word for word in words if word]


def _quotations(text: str) -> list[tuple[int, int]]:
    """Start and end of every quotation, with its marks. Quotations within another one do not count."""
    found, at = list[tuple[int, int]](), 0
    while at < len(text):
        end = _end(text, at) if text[at] in _PAIRS and _opens(text, at) else None
        if end is not None:
            found.append((at, end))
        at = at + 1 if end is None else end
    return found


def _opens(text: str, at: int) -> bool:
    """Whether the mark at this place opens a quotation, by what stands around it."""
    mark, before, after = text[at], text[max(0, at - 2) : at], text[at + 1 : at + 2]
    spaced = not before or before[-1].isspace()
    if mark in _APOSTROPHES:
        free = spaced or not (before[-1].isalnum() or before[-1] in _APOSTROPHES) or _is_cjk(before[-1])
        return free and bool(after.strip()) and not _ELIDED.match(text, at + 1)
    if mark not in _TWO_WAYS:
        return True
    inches = _INCHES.search(before)
    if inches and (not spaced or not after.strip()):
        return False
    return bool(after) and (spaced or not after.isspace())


def _end(text: str, start: int) -> int | None:
    """Where the quotation that opens at `start` ends, after its closing mark; None if nothing closes it."""
    opening, closing = text[start], _PAIRS[text[start]]
    depth = 0
    for at in range(start + 1, len(text)):
        mark = text[at]
        if mark in closing and not (opening in _APOSTROPHES and _is_apostrophe(text, at)):
            if not depth:
                return at + 1
            depth -= 1
        elif mark == opening and opening not in _APOSTROPHES:
            depth += 1
    return None


def _is_apostrophe(text: str, at: int) -> bool:
    """Whether this mark is an apostrophe: a letter follows it (don't), or a space stands before it ('90s)."""
    after = text[at + 1 : at + 2]
    return (after.isalnum() and not _is_cjk(after)) or text[at - 1].isspace()


def _is_cjk(letter: str) -> bool:
    """Whether a letter is of a script that is written without spaces between words (Chinese, Japanese)."""
    return "\u3040" <= letter <= "\u9fff" or "\uf900" <= letter <= "\ufaff"
