"""Removing secrets from logs, files and errors: values under names such as ``password``, strings that look like a
credential, and the secrets of this process's environment in any encoding."""

import base64
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

REMOVED = "(removed)"

_ALWAYS = "secret|passw(?:or)?d|passphrase|credential|(?:api|access|private)[_-]?key|signature|cookie"
_NAMES = re.compile(
    rf"{_ALWAYS}|auth|bearer|webhook|(^|[_-])(token|pwd|key|sas|sig)$|session[_-]?token|[_-]token([_-]|$)",
    re.IGNORECASE,
)
# The path of a file of secrets, the name of a variable that holds one and the working folder are no secrets.
_REFERENCES = re.compile(r"_(file|path|dir|env)$|^(old)?pwd$", re.IGNORECASE)
_TOKENS = re.compile(
    r"""
    \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                                   # AWS access keys
    | \b(?:FwoGZXIvYXdz|IQoJb3JpZ2lu)[0-9A-Za-z+/=%_\-]{16,}         # AWS session tokens
    | \b(?:hf|gh[oprsu]|npm)_[0-9A-Za-z]{16,}                        # hubs
    | \b(?:github_pat_|wandb_v1_|glpat-|pypi-AgE)[0-9A-Za-z_\-]{16,}
    | \b[spr]k[-_](?=[0-9A-Za-z_\-]*[0-9])[0-9A-Za-z_\-]{16,}
    | \bxox[a-z]-[0-9A-Za-z\-]{8,}
    | \beyJ[0-9A-Za-z_\-]{8,}\.[0-9A-Za-z_\-]{4,}(?:\.[0-9A-Za-z_\-]*)?  # JSON web tokens
    | \bBearer\s+[0-9A-Za-z._~+/\-]{8,}=*
    | \bAuthorization["']?[:=]\s*["']?Basic\s+[0-9A-Za-z+/\-_]{4,}=*
    | -----BEGIN[^-]*PRIVATE\ KEY-----[\s\S]*?(?:-----END[^-]*-----|\Z)
    | (?<![0-9A-Za-z+/=_\-])(?=[A-Za-z+/]*[0-9])(?=[0-9A-Z+/]*[a-z])(?=(?:[0-9a-z+/]*[A-Z]){5})
      [0-9A-Za-z+/]{40}(?![0-9A-Za-z+/=_\-])                       # AWS secret keys; paths have fewer capitals
    """,
    re.VERBOSE,
)
# wandb's keys. Commits look alike, and stand in paths, after "@" or after their name.
_HEX = re.compile(r"(?<![\w/@])(?<!commit )(?<!commit: )(?<!revision )[0-9a-f]{40}(?![\w/])")
_URL = re.compile(
    r"\b([a-z][a-z0-9+.\-]{0,30}://)([^\s/\"'<>]*@)?([^\s?#\"'<>]*)([?#][^\s\"'<>]*)?", re.IGNORECASE
)
_USER = re.compile(r"://([^/\s@]*:[^/\s]*|[^/\s@]{16,})@")
_HOOK = re.compile(r"(?:hooks?\.|webhook|/hooks?/|/services/)", re.IGNORECASE)
# In a sentence, "key:" and "author:" are ordinary words.
_ASSIGNED = re.compile(
    rf"(?i)(?<![\w\-])(?=[\w\-]{{0,80}}?(?:{_ALWAYS}|token|auth(?![a-z])))"
    r"([\w\-]{1,100})([\"']?\s{0,9}[=:]\s{0,9})([\"']?)((?<=[\"'])[^\"'\n]{6,}|[^\s\"',;&]{6,})"
)
_MIN_CHARS = 8
_MIN_CHARS_IN_URL = 6
# A shorter value of the environment may be an ordinary word of a configuration.
_MIN_CHARS_REFUSED = 16


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key's name says that its value is secret."""
    return _NAMES.search(name) is not None and _REFERENCES.search(name) is None


def looks_secret(name: str, value: str) -> bool:
    """Whether a dotted key or a variable, by its name or its value, seems to hold a credential.

    What is only likely to be one, such as 40 hexadecimal digits, is removed by :func:`scrub` but is none here.
    """
    return bool(value) and any(map(is_secret_name, name.split("."))) or holds_secret(value)


def holds_secret(text: str) -> bool:
    """Whether the text contains a credential, by its form or because the environment has it."""
    if _TOKENS.search(text) or _USER.search(text):
        return True
    for match in _URL.finditer(text):
        if match[1].lower().startswith("http") and _HOOK.search(match[3]) or _query_secrets(match[4] or ""):
            return True
    values = (value for name, value in os.environ.items() if is_secret_name(name) and not value.startswith("/"))
    return any(value in text for value in values if len(value) >= _MIN_CHARS_REFUSED)


def scrub(text: str) -> str:
    """The text without credentials, user parts and queries of URLs, addresses of webhooks, and the secrets of this
    process's environment and of :func:`register_secret` that have 8 characters and more."""
    text = _TOKENS.sub(REMOVED, _URL.sub(_scrub_url, scrub_known(text)))
    return _ASSIGNED.sub(_scrub_assignment, _HEX.sub(REMOVED, text))


def scrub_known(text: str) -> str:
    """The text without the secrets of this process's environment alone: fast enough for large files."""
    for secret in _known_secrets():
        text = text.replace(secret, REMOVED)
    return text


def redacted(value: Any, name: str = "") -> Any:
    """A copy of nested settings without values under secret names, and with all other strings scrubbed.

    Numbers, booleans and empty values stay, whatever they are called. ``name`` is that of the value itself.
    """
    if is_secret_name(name) and value not in ("", None, [], {}) and not isinstance(value, bool | int | float):
        return REMOVED
    if isinstance(value, Mapping):
        return {scrub(str(key)): redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return scrub(value) if isinstance(value, str) else value


def redacted_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`redacted`, but names stay: they are this program's own, even where a secret is the same word."""
    return {name: redacted(item, name) for name, item in fields.items()}


_registered: set[str] = set()


def register_secret(value: str) -> None:
    """Remove this value, too, from now on: a secret of the environment whose variable has an ordinary name."""
    _registered.add(value)


def _known_secrets() -> tuple[str, ...]:
    """All strings to remove, as the environment is now; computed once for each set of values."""
    secrets = {value for name, value in os.environ.items() if is_secret_name(name)}
    urls = {value for name, value in os.environ.items() if "://" in value and not is_secret_name(name)}
    return _spellings(frozenset(secrets | _registered), frozenset(urls))


@lru_cache(maxsize=16)
def _spellings(secrets: frozenset[str], urls: frozenset[str]) -> tuple[str, ...]:
    """All encodings of secrets, and of the secret parts of URLs, the longest first."""
    # Libraries mention a URL's path and query without its host.
    paths = {value.partition("://")[2].partition("/")[2] for value in secrets if "://" in value}
    forms = {form for value in secrets | paths for form in _encodings(value) if len(form) >= _MIN_CHARS}
    parts = set().union(*map(_url_secrets, secrets | urls))
    forms |= {form for part in parts for form in _encodings(part) if len(form) >= _MIN_CHARS_IN_URL}
    return tuple(sorted((form for form in forms if form not in REMOVED), key=len, reverse=True))


def _url_secrets(url: str) -> set[str]:
    """Secret parts of a URL: its password (or user, where there is none), values of secret names in its query."""
    secrets = _query_secrets(url)
    if match := re.search(r"://([^/\s]*)@", url):
        user, _, password = match[1].partition(":")
        secrets |= {password or user, unquote(password or user)}
    return secrets


def _query_secrets(url: str) -> set[str]:
    try:
        return {value for name, value in parse_qsl(urlsplit(url).query) if is_secret_name(name) and value}
    except ValueError:
        return set()


def _encodings(value: str) -> set[str]:
    """The value, its long lines, and both escaped, percent-encoded and in base64."""
    forms = {value, value.strip(), *(line for line in value.splitlines() if len(line) >= _MIN_CHARS_REFUSED)}
    for text in list(forms):
        raw = text.encode("utf-8", "surrogatepass")
        percent = {quote(raw, safe=""), quote(raw), quote_plus(raw)}
        forms |= {repr(text)[1:-1], json.dumps(text)[1:-1], text.replace("'", "''"), *_base64_forms(raw)}
        forms |= percent | {re.sub(r"%..", lambda m: m[0].lower(), form) for form in percent}
    return forms


def _base64_forms(raw: bytes) -> Iterator[str]:
    """What base64 of any text around ``raw`` has of it, where 8 characters or more depend on ``raw`` alone."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw).decode()
        # A character stands for 6 bits.
        first, end = -(-8 * before // 6), 8 * (before + len(raw)) // 6
        if end - first >= _MIN_CHARS:
            yield encoded[first:end]
            yield encoded[first:end].translate({ord("+"): "-", ord("/"): "_"})


def _scrub_url(match: re.Match[str]) -> str:
    scheme, user, rest, query = match.groups()
    if _HOOK.search(rest) and scheme.lower().startswith("http"):
        return f"{scheme}{rest.split('/')[0]}/{REMOVED}"
    return f"{scheme}{REMOVED + '@' if user else ''}{rest}{'?' + REMOVED if query else ''}"


def _scrub_assignment(match: re.Match[str]) -> str:
    name, sign, quotation, value = match.groups()
    harmless = value.startswith(REMOVED) or re.fullmatch(r"[-+0-9.eE_]+", value)
    return match[0] if harmless or not is_secret_name(name) else f"{name}{sign}{quotation}{REMOVED}"


def install() -> None:
    """From now on this process's tracebacks, warnings and log lines are scrubbed, whoever writes them."""

    def scrubbed_traceback(error: BaseException) -> str:
        return scrub("".join(traceback.format_exception(error)).rstrip("\n"))

    def show(error: BaseException | None, where: str = "") -> None:
        if error is not None and not isinstance(error, SystemExit):
            print(where + scrubbed_traceback(error), file=sys.stderr, flush=True)

    sys.excepthook = lambda kind, error, _: show(error)
    sys.unraisablehook = lambda args: show(args.exc_value)
    threading.excepthook = lambda args: show(
        args.exc_value, f"in thread {args.thread.name if args.thread else '?'}:\n"
    )
    format_warning, make_record = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = lambda *args, **kwargs: scrub(format_warning(*args, **kwargs))

    def scrubbed_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            record.msg = scrub(record.getMessage())
        except Exception:  # whatever a caller's arguments do when they are formatted
            record.msg = f"a log line of {record.name} whose arguments do not fit"
        record.args = ()
        if record.exc_info and record.exc_info[1] is not None:
            # Handlers show this in place of what they would format themselves.
            record.exc_text = scrubbed_traceback(record.exc_info[1])
        return record

    logging.setLogRecordFactory(scrubbed_record)
