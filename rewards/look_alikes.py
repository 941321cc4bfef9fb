"""Characters that look the same in most fonts, in groups: for a reader of pictures that cannot tell which was drawn.

The groups are of Unicode's confusables.txt (UTS #39): digits, Latin, Cyrillic and Greek letters that share one shape.
Left out: letters of which only one case looks like a Latin letter that the other case does not (Greek nu is N and v),
as they would make two Latin letters equal; and shapes of several letters (rn and m).
"""

from __future__ import annotations

from functools import cache

_GROUPS = (
    *("AАΑ", "BВΒ", "CС", "EЕΕ", "HНΗ", "JЈ", "KКΚ", "MМΜ", "NΝ", "0OОΟ", "PРΡ", "SЅ", "TТΤ", "XХΧ", "YУΥ", "ZΖ"),
    *("1lI|ІΙӀ", "3З"),
    *("aаα", "cс", "eе", "hһ", "iіι", "jј", "oоο", "pрρ", "sѕ", "xх", "yу"),
)  # fmt: skip


def fold_look_alikes(text: str, *, match_case: bool) -> str:
    """The text with one character for each group. Without `match_case` it must be in lower case already.

    Then groups that share a letter in either case are one: 1, l, I, L and i are equal.
    """
    return text.translate(_table(match_case))


@cache
def _table(match_case: bool) -> dict[int, str]:
    table: dict[int, str] = {}
    for group in _GROUPS:
        letters = group if match_case else group.casefold()
        one = next((table[ord(letter)] for letter in letters if ord(letter) in table), letters[0])
        table |= {ord(letter): one for letter in letters}
    return table
