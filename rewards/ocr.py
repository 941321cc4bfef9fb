"""OCR reward: does the image show all quoted words and no other text? (M3.8 d)

The targets are the quotations of the prompt that a person would call words to draw (`deepgen.data.quotes`). RapidOCR
reads the image. Each target is compared with every recognised token, with up to `ngram` neighbouring tokens joined, and
with all tokens joined. Spaces are ignored, case, too, unless `match_case`; all other characters count, in any script
the recogniser knows (Latin, Greek, Chinese, Japanese; not Cyrillic). `TextRules` says which of them are equal.

The score is 1 - edits / max(target characters, recognised characters), but at least 0. `edits` is the sum of the edit
distances between the targets and the tokens chosen for them, plus the number of recognised characters that no target
uses. So several targets weigh by their lengths. With one target the score is 1 minus the normalised edit distance: an
image that says "SALE NOW" scores 4/7 for the target "SALE". The reference instead looks for the target inside the
recognised text and gives full credit however much else the image says; a policy learns to exploit that.

The reference treats look-alikes (0 and o, 1 and l) as equal. Here that is an option (`look_alikes`) and off: it gives
credit for wrong letters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgen.config import PoolSettings, setting
from deepgen.data.quotes import quoted_words
from rewards.base import Missing, RewardRequest, Score, strip_fault
from rewards.look_alikes import fold_look_alikes

MAX_ASPECT = 32  # the reader shrinks a longer strip to nothing, an error, or blows it up to gigabytes: 192 px across
# Marks that typographers and keyboards write in several ways.
_ONE_WAY = str.maketrans(dict.fromkeys("’‘‛`´ʼ′", "'") | dict.fromkeys("“”„‟«»″", '"') | dict.fromkeys("‐‑‒–—―−", "-"))


@dataclass(frozen=True)
class TextRules:
    """Which texts are equal, and how many neighbouring tokens (`ngram`) may be read as one."""

    match_case: bool = False
    punctuation: bool = True
    look_alikes: bool = False
    ngram: int = 3


PLAIN = TextRules()


class OcrReward:
    """Share of the quoted text that is readable, 0..1; None for a prompt without quotes.

    RapidOCR brings its own models.
    """

    class Options(PoolSettings):
        match_case: bool = setting(False, "Whether upper and lower case differ.")
        punctuation: bool = setting(True, "Whether punctuation counts, in the target and in what is read.")
        look_alikes: bool = setting(
            False, "Whether characters of one shape are equal: 0 and O, 1, l and I, Latin, Cyrillic and Greek A."
        )
        ngram: int = setting(3, "Neighbouring words on the image that may be read as one.", unit="words", ge=1, le=10)

    def __init__(self, options: Options | None = None) -> None:
        """options: None is all defaults."""
        self._rules = PLAIN
        if options is not None:
            self._rules = TextRules(options.match_case, options.punctuation, options.look_alikes, options.ngram)
        import onnxruntime
        from rapidocr import RapidOCR

        onnxruntime.disable_telemetry_events()  # on by default in its wheels
        # Detection at 192 px takes 25 ms per image, at the default 736 px it takes 154. The angle classifier is off:
        # it would turn upside-down words the right way up before reading them.
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
        """True if the prompt has quoted words."""
        return bool(target_words(request.prompt))

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """One score in 0..1 per request; None if the prompt has no quoted words, Missing for a strip."""
        return [strip_fault(request.image, MAX_ASPECT) or self._score_one(request) for request in requests]

    def read(self, image: np.ndarray) -> list[str]:
        """The lines of text in an image (uint8 [H, W, 3], RGB), top to bottom; [] if it has no text."""
        result = self._engine(np.ascontiguousarray(image[:, :, ::-1]))  # RapidOCR expects BGR, like OpenCV
        return list(result.txts or ())

    def _score_one(self, request: RewardRequest) -> Score:
        targets = target_words(request.prompt, self._rules)
        if targets:
            return text_accuracy(targets, self.read(request.image), self._rules)
        if self.applies(request):
            return Missing("refused", f"only punctuation is quoted in {request.prompt[:80]!r}")
        return None


def target_words(prompt: str, rules: TextRules = PLAIN) -> list[str]:
    """The quoted words of a prompt, normalised."""
    return [word for quoted in quoted_words(prompt) if (word := normalise(quoted, rules))]


def normalise(text: str, rules: TextRules = PLAIN) -> str:
    """The text as it is compared.

    Letters of full and half width are the same (NFKC), accents may be letters of their own or part of one, quotes and
    dashes may be straight or typographic. Spaces and characters that nobody sees are left out; case, punctuation
    (Unicode's categories P, which % and & are of) and look-alikes are as the rules say.
    """
    text = unicodedata.normalize("NFKC", text.translate(_ONE_WAY))
    if not rules.match_case:
        text = unicodedata.normalize("NFKC", text.casefold())
    text = "".join(letter for letter in text if _counts(letter, rules))
    return fold_look_alikes(text, match_case=rules.match_case) if rules.look_alikes else text


def _counts(letter: str, rules: TextRules) -> bool:
    kind = unicodedata.category(letter)
    unseen = letter.isspace() or kind == "Cf" or "\ufe00" <= letter <= "\ufe0f"  # the last: variation selectors
    return not unseen and (rules.punctuation or not kind.startswith("P"))


def text_accuracy(targets: Sequence[str], lines: Sequence[str], rules: TextRules = PLAIN) -> float:
    """How well recognised lines match the targets, 0..1. The module's docstring gives the rule.

    Args:
        targets: normalised words, at least one.
        lines: recognised text in reading order, not normalised.
        rules: those by which the targets were normalised.
    """
    tokens = [token for line in lines for word in line.split() if (token := normalise(word, rules))]
    recognised, wanted = "".join(tokens), "".join(targets)
    # Also compare all text at once, so that words recognised without the space between them still match.
    edits = min(_assigned_edits(targets, tokens, rules.ngram), edit_distance(wanted, recognised))
    return max(0.0, 1.0 - edits / max(len(wanted), len(recognised)))


def _assigned_edits(targets: Sequence[str], tokens: Sequence[str], ngram: int) -> int:
    """Edits when each target is matched with its own tokens, plus the characters of tokens left unmatched.

    The longest target chooses first. A token is used once, so one "HA" in the image cannot match two targets "HA".
    """
    free = list(range(len(tokens)))
    edits = 0
    for target in sorted(targets, key=len, reverse=True):
        best_cost, best_span = len(target), list[int]()
        for span in _spans(free, ngram):
            text = "".join(tokens[i] for i in span)
            # A used token saves its characters from the penalty for unused ones, hence the minus.
            cost = edit_distance(target, text) - len(text)
            if cost < best_cost:
                best_cost, best_span = cost, span
        edits += best_cost + sum(len(tokens[i]) for i in best_span)
        free = [i for i in free if i not in best_span]
    return edits + sum(len(tokens[i]) for i in free)


def _spans(free: list[int], longest: int) -> list[list[int]]:
    """All runs of 1 to `longest` neighbouring free tokens, and the run of all free tokens."""
    runs = [
        free[start : start + length]
        for length in range(1, longest + 1)
        for start in range(len(free) - length + 1)
        if free[start + length - 1] - free[start] == length - 1
    ]
    return [*runs, free] if len(free) > longest else runs


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
