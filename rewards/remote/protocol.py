"""What a remote scorer is asked and what it answers: JSON over HTTP, documented in docs/remote-rewards.md.

    POST URL, application/json
    {"version": 1, "requests": [{"prompt": "...", "answer": "", "task": "t2i", "image": "iVBOR...", "references": []}]}
    200, application/json
    {"version": 1, "scorer": "clip 3", "scores": [{"score": 0.75}, {"missing": "too_long", "detail": "..."}]}

Images are PNG files in base64. Both sides distrust each other: sizes are checked before anything is decoded, and what
one request or one score has wrong costs only this one. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from deepgen.config.schema.sections import TASKS
from deepgen.data.images import decode_image, header_size
from deepgen.data.records import is_unicode
from deepgen.masking import masked
from rewards.base import REASONS, Missing, RewardRequest, Score, is_truth

VERSION = 1
MAX_REQUESTS = 256  # of one body
MAX_BODY = 128 << 20  # bytes
MAX_PIXELS = 1 << 24  # of one image: 4096 x 4096
MAX_BODY_PIXELS = 1 << 27  # of all images of a body together, 400 MB once they are decoded
MAX_LETTERS = 20_000  # of a prompt, and of an answer
MAX_REFERENCES = 8
MAX_VALUES = 1 << 18  # in one body, by its commas: each takes memory once it is read, however few bytes it has
MAX_DETAIL = 300  # letters
MAX_SCORER = 200  # letters of the scorer's version
MAX_ANSWER, MAX_SCORE = 1 << 14, 1 << 11  # bytes of a whole answer, besides so many for each score
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST = float(np.finfo(np.float32).max)  # in fp32 scores travel on

Text = Annotated[str, Field(max_length=MAX_LETTERS)]


class ProtocolError(ValueError):
    """A body that is no message of this protocol. The text is one line: what is wrong, what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WireRequest(_Part):
    """A `RewardRequest`; images are PNG files in base64."""

    prompt: Text
    answer: Text = ""
    task: Annotated[str, Field(max_length=100)]
    image: str
    references: Annotated[list[str], Field(max_length=MAX_REFERENCES)] = []


class _Question(_Part):
    version: int
    requests: Annotated[list[Any], Field(min_length=1, max_length=MAX_REQUESTS)]


class WireScore(BaseModel):
    """One score, or why there is none. Keys that this version does not know are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    score: float | None = None
    missing: str | None = None
    detail: str = ""


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    version: int
    scores: list[Any]
    scorer: Any = None


_ONE_REQUEST, _ONE_SCORE = TypeAdapter(WireRequest), TypeAdapter(WireScore)

# ---- questions ----


def fault(request: RewardRequest) -> Missing | None:
    """Why a request cannot be sent, or None."""
    for what, text in (("prompt", request.prompt), ("answer", request.answer)):
        if len(text) > MAX_LETTERS:
            return Missing("too_long", f"{what} of {len(text):,} letters; allowed: {MAX_LETTERS:,}")
        if not is_unicode(text):
            return Missing("refused", f"{what} with half a letter (a lone surrogate)")
    if len(request.references) > MAX_REFERENCES:
        return Missing("too_long", f"{len(request.references)} references; allowed: {MAX_REFERENCES}")
    for image in (request.image, *request.references):
        if _pixels(image) > MAX_PIXELS:
            return Missing("too_long", f"image of {_pixels(image):,} pixels; allowed: {MAX_PIXELS:,}")
    return None


def questions(requests: Sequence[RewardRequest]) -> Iterator[tuple[int, bytes]]:
    """How many of the requests, in their order, and the body that asks for them; as few bodies as the limits allow.

    The requests have no `fault`.
    """
    parts, size, pixels = list[bytes](), 0, 0
    for request in requests:
        part, more = _packed(request), sum(map(_pixels, (request.image, *request.references)))
        full = len(parts) == MAX_REQUESTS or size + len(part) > MAX_BODY - 100 or pixels + more > MAX_BODY_PIXELS
        if parts and full:
            yield len(parts), _body(parts)
            parts, size, pixels = [], 0, 0
        parts.append(part)
        size, pixels = size + len(part) + 1, pixels + more
    if parts:
        yield len(parts), _body(parts)


def read_question(body: bytes) -> list[RewardRequest | Missing]:
    """The requests in a body; `Missing` for those that cannot be read.

    Raises ProtocolError if the body as a whole cannot be read.
    """
    if len(body) > MAX_BODY:
        raise ProtocolError(f"body of {len(body):,} bytes; allowed: {MAX_BODY:,}")
    if (commas := body.count(b",")) > MAX_VALUES:
        raise ProtocolError(f"body with {commas:,} commas; allowed: {MAX_VALUES:,}")
    question = _read(_Question, body)
    _check_version(question.version)
    left, found = MAX_BODY_PIXELS, list[RewardRequest | Missing]()
    for given in question.requests:
        try:
            one = _ONE_REQUEST.validate_python(given)
            if one.task not in TASKS:
                raise ValueError(f"task: got {one.task!r}; allowed: {', '.join(TASKS)}")
            images = [_decoded(text) for text in (one.image, *one.references)]
            left -= sum(pixels for _, pixels in images)
            if left < 0:
                raise _TooLarge(f"images of one body with more than {MAX_BODY_PIXELS:,} pixels together")
            image, *references = (decode_image(data) for data, _ in images)
        except ValidationError as error:
            long = all(kind["type"] in ("string_too_long", "too_long") for kind in error.errors())
            found.append(Missing("too_long" if long else "refused", _first(error)))
        except _TooLarge as error:
            found.append(Missing("too_long", one_line(str(error))))
        except ValueError as error:
            found.append(Missing("refused", one_line(str(error))))
        else:
            found.append(RewardRequest(one.prompt, one.answer, one.task, image, tuple(references)))
    return found


class _TooLarge(ValueError):
    pass


def _pixels(image: np.ndarray) -> int:
    return int(image.shape[0] * image.shape[1])


def _packed(request: RewardRequest) -> bytes:
    images = [_png(image) for image in (request.image, *request.references)]
    texts = {"prompt": request.prompt, "answer": request.answer, "task": request.task}
    return json.dumps(texts | {"image": images[0], "references": images[1:]}).encode("ascii")


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _body(parts: Sequence[bytes]) -> bytes:
    return b'{"version": %d, "requests": [%s]}' % (VERSION, b",".join(parts))


def _decoded(text: str) -> tuple[bytes, int]:
    """A PNG file that is not too large, and its pixels by its header."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: no base64 ({error}); allowed: a PNG file in base64") from error
    if not data.startswith(_PNG):
        raise ValueError("image: no PNG file; allowed: a PNG file in base64")
    width, height = header_size(data)
    if width is None or height is None:
        raise ValueError("image: a PNG file without a readable header")
    if width * height > MAX_PIXELS:
        raise _TooLarge(f"image of {width * height:,} pixels; allowed: {MAX_PIXELS:,}")
    return data, width * height


# ---- answers ----


def answer_limit(count: int) -> int:
    """Most bytes of an answer with so many scores."""
    return MAX_ANSWER + count * MAX_SCORE


def write_answer(scores: Sequence[Score], scorer: str = "") -> bytes:
    """The body that answers with these scores. A score that is not finite is missing.

    scorer: a text that is another one whenever the same question may get other scores; "" is not sent.
    """
    told = {"scorer": scorer} if scorer else {}
    return json.dumps({"version": VERSION, **told, "scores": [_wire(score) for score in scores]}).encode("ascii")


def read_answer(body: bytes, count: int) -> tuple[list[float | Missing], str]:
    """`count` scores from a body, and what the scorer calls its version, "" if it does not say.

    What cannot be read is missing: one score, or all if the whole is wrong.
    """
    try:
        if len(body) > answer_limit(count):
            raise ProtocolError(f"answer of more than {answer_limit(count):,} bytes for {count} scores")
        answer = _read(_Answer, body)
        json.loads(body, object_pairs_hook=_once, parse_int=str)  # read already, so neither too deep nor too odd
        _check_version(answer.version)
        if len(answer.scores) != count:
            raise ProtocolError(f"answer of {len(answer.scores)} scores for {count} requests")
    except ProtocolError as error:
        return [Missing("parse", str(error))] * count, ""
    named = isinstance(answer.scorer, str) and len(answer.scorer) <= MAX_SCORER
    return [_score(given) for given in answer.scores], answer.scorer if named else ""


def one_line(text: str) -> str:
    """A text of the other side as we may log it: one line, printable, not long, without secrets."""
    words = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * MAX_DETAIL]).split()
    return masked(" ".join(words))[:MAX_DETAIL]


def _wire(score: Score) -> dict[str, Any]:
    if isinstance(score, Missing):
        return {"missing": score.reason, "detail": one_line(score.detail)}
    if score is None:
        return {"missing": "refused", "detail": "the reward gave no score"}
    if is_truth(score):
        return {"missing": "parse", "detail": f"the reward gave {score}, which is no number"}
    value = float(score)
    if not math.isfinite(value):
        return {"missing": "parse", "detail": f"the reward gave {value}"}
    return {"score": value}


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Raise ProtocolError for a JSON object that has a key twice: nobody knows which of the values is meant."""
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            raise ProtocolError(f"the key {one_line(key)!r} is there twice")
        seen.add(key)


def _score(given: Any) -> float | Missing:
    try:
        one = _ONE_SCORE.validate_python(given)
    except ValidationError as error:
        return Missing("parse", _first(error))
    if (one.score is None) == (one.missing is None):
        return Missing("parse", "neither score nor missing, or both; allowed: one of them")
    if one.score is not None:
        if abs(one.score) > _LARGEST:
            return Missing("parse", f"score {one.score:g}, which fp32 cannot hold")
        return one.score
    if one.missing not in REASONS:
        return Missing("parse", f"missing {one_line(str(one.missing))!r}; allowed: {', '.join(REASONS)}")
    return Missing(str(one.missing), one_line(one.detail))


# ---- both ----


def _read(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise ProtocolError(_first(error)) from error


def _check_version(version: int) -> None:
    if version != VERSION:
        raise ProtocolError(f"version {version}; allowed: {VERSION}")


def _first(error: ValidationError) -> str:
    """The first fault, in one line; not the input, which may be an image."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, fault["loc"]))
    return one_line(f"{where}: {fault['msg']}" if where else fault["msg"])
