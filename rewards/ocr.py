"""OCR reward: does the image show the quoted words, all of them and nothing else? (M3.8 d)

The targets are the segments of the prompt between straight double quotes. RapidOCR reads the image; a target is
compared with every recognised token, with two or three neighbouring tokens joined, and with everything joined. Upper
and lower case and spaces do not count, everything else does, in any script the recogniser knows (Latin with accents,
Chinese).

The score is 1 - edits / max(target characters, recognised characters), at least 0, where edits are the edit distances
of the targets to the tokens chosen for them plus every recognised character that no target uses. With one target this
is the normalised edit distance. So "SALE NOW" for "SALE" gets 4/7: the reference looks for the target inside
the recognised text and gives full credit for any amount of extra writing, which a policy learns to exploit.

Left out: the reference's folding of look-alikes (0 and o, 1 and l). It gives credit for wrong letters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from deepgen.data.records import quoted_words
from rewards.base import RewardRequest

LONGEST_NGRAM = 3


class OcrReward:
    """Share of the quoted text that can be read, 0..1; None for a prompt without quotes.

    It has no options: the models come with RapidOCR.
    """

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        # Detection on 192 px instead of 736 px: 25 ms an image instead of 154. Without the angle classifier, which
        # would turn words that stand on their heads before they are read.
        self._engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,
                "Det.limit_side_len": 192,
                "Det.limit_type": "min",
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    @staticmethod
    def applies(request: RewardRequest) -> bool:
        """True when the prompt quotes something."""
        return bool(target_words(request.prompt))

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """Scores in 0..1; None where the prompt has no quoted words."""
        return [self._score_one(request) for request in requests]

    def read(self, image: np.ndarray) -> list[str]:
        """The lines of text in an image (uint8 [H, W, 3], RGB), top to bottom; [] when there is none."""
        result = self._engine(np.ascontiguousarray(image[:, :, ::-1]))  # RapidOCR takes BGR, as OpenCV does
        return list(result.txts or ())

    def _score_one(self, request: RewardRequest) -> float | None:
        targets = target_words(request.prompt)
        if not targets:
            return None
        return text_accuracy(targets, self.read(request.image))


def target_words(prompt: str) -> list[str]:
    """The quoted segments of a prompt, normalised; quotes around nothing but spaces are dropped."""
    return [word for word in map(normalise, quoted_words(prompt)) if word]


def normalise(text: str) -> str:
    """Text without spaces, case and width variants (full-width letters become ordinary ones)."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_accuracy(targets: Sequence[str], lines: Sequence[str]) -> float:
    """How well recognised lines match the targets, 0..1 (rule in the module's docstring).

    Args:
        targets: normalised, not empty.
        lines: recognised text in reading order, as it was recognised.
    """
    tokens = [normalise(token) for line in lines for token in line.split()]
    recognised, wanted = "".join(tokens), "".join(targets)
    # Everything at once as well: words that were recognised without the space between them still match.
    edits = min(_assigned_edits(targets, tokens), edit_distance(wanted, recognised))
    return max(0.0, 1.0 - edits / max(len(wanted), len(recognised)))


def _assigned_edits(targets: Sequence[str], tokens: Sequence[str]) -> int:
    """Edits when every target gets tokens of its own, plus the characters of tokens that none took.

    Longest target first; a token is used once, so that one "HA" does not serve both of two.
    """
    free = list(range(len(tokens)))
    edits = 0
    for target in sorted(targets, key=len, reverse=True):
        best_cost, best_span = len(target), list[int]()
        for span in _spans(free):
            text = "".join(tokens[i] for i in span)
            # Taking tokens also spares their characters the penalty for being unused.
            cost = edit_distance(target, text) - len(text)
            if cost < best_cost:
                best_cost, best_span = cost, span
        edits += best_cost + sum(len(tokens[i]) for i in best_span)
        free = [i for i in free if i not in best_span]
    return edits + sum(len(tokens[i]) for i in free)


def _spans(free: list[int]) -> list[list[int]]:
    """Runs of 1 to LONGEST_NGRAM neighbouring free tokens, and all of them together."""
    runs = [
        free[start : start + length]
        for length in range(1, LONGEST_NGRAM + 1)
        for start in range(len(free) - length + 1)
        if free[start + length - 1] - free[start] == length - 1
    ]
    return [*runs, free] if len(free) > LONGEST_NGRAM else runs


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
