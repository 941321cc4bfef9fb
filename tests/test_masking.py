"""Secrets are hidden where settings and addresses become text, and what is no secret stays."""

from __future__ import annotations

import pickle
import time

import pytest

from deepgen.config import UserError
from deepgen.data.records import RecordError
from deepgen.data.uris import UriError
from deepgen.errors import print_traceback
from deepgen.masking import HIDDEN, is_secret, masked, masked_value

S = "hunter2-Pl4nted"  # the secret in all of these
TEXTS = [
    f"http://user:{S}@host:5000/path",
    f"https://{S}@host/path",
    f"got 'http://user:{S}@host'; allowed: a server",
    f"http://user:p@ss{S}@host/a@b.png",
    f"http://user:pa/{S}@host/a.png",
    f"http://user:pa#{S}?@host",
    f"http://user:it's{S}@host/",
    f'http://user:it"s{S}@host/',
    f"http://user:a<b>`{S}@host/ and more",
    f"http://user:my own {S}@host:80/path",
    f"{{'password': 'it\\'s {S}', \"token\": \"a\\\"{S}\"}}",
    f"postgresql+psycopg2://mlflow:{S}@db:5432/mlflow?sslmode=require",
    f"s3://AKID:{S}@bucket/a b.png?region=eu",
    f"https://acct.blob.core.windows.net/c/a.png?sv=2020&sp=r&sig={S}",
    f"https://b.s3.amazonaws.com/a.png?X-Amz-Credential={S}&X-Amz-Signature={S}&X-Amz-Security-Token={S}",
    f"https://storage.googleapis.com/b/a.png?GoogleAccessId=x&Signature={S}",
    f"https://cdn/a.png?w=512&unheard-of={S}",
    f"https://cdn/a.png?{S}",
    f"https://cdn/a.png;session={S}",
    f"https://cdn/cb#access_token={S}",
    f"wss://host/?token={S}",
    f"//nothing here but password={S}",
    f"tracking.password={S} --api-key={S}",
    f"{{'api_key': '{S}', 'clientSecret': \"{S}\"}}",
    f"MLFLOW_TRACKING_TOKEN={S} AWS_SECRET_ACCESS_KEY={S}",
    f"password = '{S} {S}'",
    f"Authorization: Bearer {S}{S}",
    f"X-Api-Key: {S}",
    f"curl -H 'X-Auth-Token: {S}' and -H 'Cookie: id=1; session={S}'",
    f"cannot reach judge:{S}@host.example.org:8000",
    f"mlflow:{S}@localhost/db is no address",
    f"http://one:{S}@a/ and http://two:{S}@b/",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_secret_stays_in_a_text(text: str) -> None:
    shown = masked(text)
    assert "unter2" not in shown and HIDDEN in shown
    assert masked(shown) == shown
    for error in (UserError(text), RecordError("file, row 1", text), UriError(text, text)):
        assert "unter2" not in str(error) and "unter2" not in repr(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "unter2" not in RecordError("file, row 1", text).reason


@pytest.mark.parametrize(
    "text",
    [
        *("sk-proj-abcdefghijklmnopqrstuv", "hf_abcdefghijklmnopqrstuvwx", "ghp_0123456789abcdefghijklmn"),
        *("AKIAIOSFODNN7EXAMPLE", "xoxb-123456789012-abcdef", "glpat-abcdefghijklmnopqrst"),
    ],
)
def test_secrets_are_known_by_their_form(text: str) -> None:
    assert masked(f"the key {text} is wrong") == f"the key {HIDDEN} is wrong"


@pytest.mark.parametrize(
    "text",
    [
        "train.steps: got 0 on the command line; allowed: whole number >= 1",
        "no answer from http://host:5000/path (Connection refused); give another",
        "http://host/a@b.png?w=512&height=3",
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART",
        "s3://bucket/a b#c.png?region=eu-west-1&endpoint_override=minio:9000&scheme=http",
        "file:///data/a b.png, row 3: prompt contains the reserved token <|im_end|>; remove it",
        "http://[::1]:8080/a@b",
        "{'a': 'http://host:80', 'b': 'me@x.org'}",
        "no answer from http://host:5000 for me@x.org",
        "api_key: whatever is given here; x-api-key: allowed is text; Key: a sign; Token: words; cookie: chocolate",
        'a sign that says "Cookie: please"; write to us: me@x.org; at 12:30 @home.org',
        "model.tokenizer=x max_tokens=5 --caption-key=caption data.weights={photos: 2} rollout.same_noise=true",
        "sqlite:////data/runs/mlflow.db",
        "a cat: 'password' is written on the wall",
        "--column image=jpg",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


LONG = [
    "a",
    "a='",
    "a='\\'",
    "http://",
    "http://u:p@h?a=b&",
    "a://b:",
    "a://b:c d ",
    "iVBOR+/=",
    "token=",
    "eyJ",
    "a-",
    "X-",
    "a:b",
    "a.",
    "Cookie: a; ",
    "a:bcd@e.",
]


@pytest.mark.parametrize("part", LONG)
def test_long_texts_take_no_time(part: str) -> None:
    begun = time.monotonic()
    masked(part * (300_000 // len(part)))
    assert time.monotonic() - begun < 10  # a search from every letter on would take minutes


def test_a_name_in_an_error_is_cut() -> None:
    error = UriError("iVBOR" * 1_000_000, "no\tsuch\x1b[2Jfile")
    assert len(str(error)) < 300 and "\x1b" not in str(error) and str(error).isprintable()


def test_tracebacks_of_programs(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(f"no answer from http://user:{S}@host/")
    error.__cause__ = ValueError(f"password={S}")
    print_traceback(RuntimeError, error, None)
    said = capsys.readouterr().err
    assert "unter2" not in said and "ValueError: password=" in said and "RuntimeError: no answer from http://" in said


def test_settings_are_hidden_by_their_keys() -> None:
    pool = {
        "api_key": S,
        "max_tokens": 5,
        "token_limit": "many",
        "url": f"http://a:{S}@b/v1",
        "headers": [f"x?token={S}"],
    }
    assert masked_value("", {"password": 12345678, "token": 0, "auth": True}) == {
        "password": HIDDEN,
        "token": 0,
        "auth": True,
    }
    weights = {"t2i": {"judge": 1.0}}
    content = {"rewards": {"judge": pool, "weights": weights}, "tracking": {"uri": "", "password": S}}
    shown = masked_value("", content)
    assert "unter2" not in str(shown)
    assert shown["rewards"]["judge"] | {"headers": 0} == {
        "api_key": HIDDEN,
        "max_tokens": 5,
        "token_limit": "many",
        "url": f"http://a:{HIDDEN}@b/v1",
        "headers": 0,
    }
    assert shown["rewards"]["weights"] == weights
    for name in (
        "accessKey",
        "hf_token",
        "X-Amz-Signature",
        "secret_access_key",
        "tracking.password",
        "OPENAI_API_KEY",
    ):
        assert is_secret(name)
    for name in ("max_tokens", "tokenizer", "caption_key", "keys", "author", "run.seed", "signature_of_it_all"):
        assert not is_secret(name)
