"""Hides secrets where settings and addresses become text: console, errors, MLflow, manifests, quarantine, recipes.

The values themselves stay as they are; only what is written or printed goes through here. An address keeps scheme,
user, host, path and harmless parameters; its password and all other parameters are hidden, as signatures have a
hundred names. Elsewhere a secret is known by the name it has (`api_key`), or by its form (`hf_...`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Names and schemes begin where no letter of theirs is before: a long word without an end is searched once.
# A password may have quotes or spaces in it, which it should not have; but a quote behind a port ends the address.
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z0-9+.-]+://)"
    r"((?:[^\s\"<>`/?#@:]*:(?!\d*[\s\"'<>`])[^\s/@]{1,200}(?: [^\s/@]{1,200}){0,3}@)?[^\s\"<>`]+)"
)
_CLOSING = "'),;:.]}!"  # punctuation of the sentence around an address
_HARMLESS = re.compile(  # parameters that are shown; the last ones are of MLflow's pages
    r"scheme|region|endpoint_override|w|h|width|height|size|format|fm|page|v|version|mode"
    r"|workflowtype|comparerunsmode|viewstatesharekey",
    re.IGNORECASE,
)
# A name is secret by its last words: api_key is, max_tokens and caption_key are not.
_SECRET_NAME = re.compile(
    r"(?:^|[^a-z])(?:password|passwd|passphrase|pwd|pass|secret|secrets|token|credential|credentials|auth|bearer|jwt"
    r"|authorization|cookie|sig|signature|sas|hmac|dsn|(?:api|access|secret|private|account|shared|signing|auth|service"
    r"|license)[^a-z]?key(?:[^a-z]?id)?|key[^a-z]?pair[^a-z]?id|connection[^a-z]?string|webhook)$"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]+)(?P<is>\s?=\s?|['\"]?: ?(?=['\"]))"
    r"(?P<value>'(?:[^'\\]|\\.){0,5000}'|\"(?:[^\"\\]|\\.){0,5000}\"|[^\s'\"&,;)}\]]+)"
)
_FORMS = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{30,}|dapi[0-9a-f]{28,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|\b(?P<how>Bearer|Basic) [\w.~+/=-]{8,}"
)
# As in a request: X-Api-Key: value. Names in small letters are also keys of settings, and words behind them no secrets.
_HEADER = re.compile(
    r"(?<![\w-])(?:(?P<name>X(?:-[A-Za-z0-9]+)*-(?:[Kk]ey|[Tt]oken|[Ss]ecret|[Ss]ignature|[Aa]uth)"
    r"|(?:Api|Subscription)-Key|(?:Proxy-)?Authorization): (?!(?:Bearer|Basic) )[^\s'\"]{6,}"
    r"|(?P<cookie>(?:Set-)?Cookie): [\w.-]+=[^\s'\"]+(?: [\w.-]+=[^\s'\"]+)*)"
)
_LOGIN = re.compile(  # an address without a scheme: user:password@host.org
    r"(?<![\w.+:/@-])(?P<user>[\w.+-]{1,64}):(?![/\s])[^\s:/@'\"]{3,200}@(?P<host>(?:[\w-]{1,63}\.)+[A-Za-z0-9]|localhost)"
)


def is_secret(name: str) -> bool:
    """Whether a key or parameter is named like a secret: api_key, X-Amz-Signature, trackerPassword."""
    return _SECRET_NAME.search(_CAMEL.sub("_", name).lower()) is not None


def masked(text: str) -> str:
    """The text with secrets hidden: in addresses, in assignments to secret names, and by their form."""
    text = _ADDRESS.sub(lambda match: match[1] + _masked_rest(match[2]), text)
    text = _LOGIN.sub(rf"\g<user>:{HIDDEN}@\g<host>", text)
    text = _HEADER.sub(lambda match: f"{match['name'] or match['cookie']}: {HIDDEN}", text)
    text = _ASSIGNED.sub(_masked_assignment, text)
    return _FORMS.sub(lambda match: f"{match['how']} {HIDDEN}" if match["how"] else HIDDEN, text)


def masked_value(key: str, value: Any) -> Any:
    """A setting, or a section of them, with secrets hidden in its texts. key: its name, dotted or not; "" for all."""
    if isinstance(value, Mapping):
        return {name: masked_value(f"{key}.{name}" if key else str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked_value(key, inner) for inner in value]
    if is_secret(key) and value and isinstance(value, str | int | float) and not isinstance(value, bool):
        return HIDDEN  # YAML reads a password of digits as a number
    return masked(value) if isinstance(value, str) else value


def _masked_assignment(match: re.Match[str]) -> str:
    if not is_secret(match["name"]) or match["value"].startswith(HIDDEN):
        return match[0]
    return f"{match['name']}{match['is']}{HIDDEN}"


def _masked_rest(rest: str) -> str:
    """What follows the scheme of an address, without password and parameters."""
    body = rest.rstrip(_CLOSING)
    authority = _authority(body)
    user, at, host = authority.rpartition("@")
    if at:
        name, colon, _ = user.partition(":")
        host = f"{name}:{HIDDEN}@{host}" if colon else f"{HIDDEN}@{host}"
    return host + _masked_parameters(body[len(authority) :]) + rest[len(body) :]


def _authority(body: str) -> str:
    """User, password, host and port, also where a password has a "/", "?" or "#" in it, which it should not have."""
    authority = re.split(r"[/?#]", body, maxsplit=1)[0]
    if "@" in authority or "@" not in body or re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", authority):
        return authority
    end = body.rindex("@") + 1
    return body[:end] + re.split(r"[/?#]", body[end:], maxsplit=1)[0]


def _masked_parameters(tail: str) -> str:
    """Path and parameters, after "?", ";" or "#". A fragment without "=" or "?" holds none."""
    path, *rest = re.split(r"([?&;#])", tail)
    if "=" not in tail and "?" not in tail:
        return tail
    return path + "".join(map(_masked_parameter, rest))


def _masked_parameter(part: str) -> str:
    name, equals, value = part.partition("=")
    if not equals:
        return part if len(part) < 12 or part.startswith("/") else HIDDEN  # ?v2 or #/page, but also ?<token>
    return part if _HARMLESS.fullmatch(name) or not value else f"{name}={HIDDEN}"
