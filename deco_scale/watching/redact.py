"""Taking secrets out of what is shown: values under telling names, strings that look like a credential, and the
secrets of this process's environment in whatever form they are written."""

import base64
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

REMOVED = "(removed)"

_NAMES = re.compile(
    r"secret|passw(or)?d|passphrase|credential|(api|access|private)[_-]?key|auth|signature|cookie|bearer|webhook"
    r"|(^|[_-])(token|pwd|key|sas|sig)$|session[_-]?token|[_-]token([_-]|$)",
    re.IGNORECASE,
)
# A path to a file of secrets, the name of a variable that holds one, and the working folder are no secrets.
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
_ASSIGNED = re.compile(
    r"(?i)(?<![\w\-])(?=[\w\-]{0,80}?(?:secret|passw(?:or)?d|api[_-]?key|access[_-]?key|token|credential|signature))"
    r"([\w\-]{1,100})([\"']?\s{0,9}[=:]\s{0,9})([\"']?)([^\s\"',;&]{6,})"
)
_SHORTEST = 8
_SHORTEST_IN_URL = 6
# A shorter value of the environment may be an ordinary word of a configuration.
_SHORTEST_REFUSED = 16


@lru_cache(maxsize=4096)
def telling(name: str) -> bool:
    """Whether a key's name says that its value is secret."""
    return _NAMES.search(name) is not None and _REFERENCES.search(name) is None


def looks_secret(name: str, value: str) -> bool:
    """Whether a dotted key or a variable, by its name or its value, seems to hold a credential.

    What is only likely to be one, as 40 hexadecimal digits, is taken out by :func:`scrub` and is none here.
    """
    return bool(value) and any(telling(part) for part in name.split(".")) or holds_secret(value)


def holds_secret(text: str) -> bool:
    """Whether a text has a credential in it, by its form or because the environment has it, too."""
    if _TOKENS.search(text) or _USER.search(text):
        return True
    for match in _URL.finditer(text):
        if match[1].lower().startswith("http") and _HOOK.search(match[3]):
            return True
        if any(telling(name) for name, value in _query(match[4] or "") if value):
            return True
    values = (value for name, value in os.environ.items() if telling(name) and not value.startswith("/"))
    return any(value in text for value in values if len(value) >= _SHORTEST_REFUSED)


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without credentials, user parts and queries of URLs, addresses of hooks, and the secrets of the
    ``environment`` (default: this process's, and what :func:`conceal` was told) of 8 characters and more."""
    return _scrubbed(text, _secrets(environment))


def scrub_known(text: str) -> str:
    """The text without the secrets of this process's environment alone: fast enough for large files."""
    return _without(text, _secrets(None))


def redacted(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A copy of nested settings in which values under telling names are gone and all other texts are scrubbed.

    Numbers, switches and empty values stay, whatever they are called.
    """
    return _redacted(value, _secrets(environment))


def redacted_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`redacted`, but names stay: they are this program's own, even where a secret is the same word."""
    secrets = _secrets(None)
    return {name: _redacted_item(name, item, secrets) for name, item in fields.items()}


_concealed: set[str] = set()


def conceal(value: str) -> None:
    """Also take this value out of texts from now on: a secret of the environment whose name does not tell."""
    _concealed.add(value)


def _secrets(environment: Mapping[str, str] | None) -> tuple[str, ...]:
    """What to look for, as it stands in the environment now; what takes time is done once for each value."""
    found = set() if environment is not None else set(_concealed)
    parts: set[str] = set()
    for name, value in (os.environ if environment is None else environment).items():
        if telling(name):
            found.add(value)
        elif "://" in value:
            parts.update(_inside(value))
    return _ordered(frozenset(found), frozenset(parts))


@lru_cache(maxsize=16)
def _ordered(values: frozenset[str], parts: frozenset[str]) -> tuple[str, ...]:
    """All forms of the values and of parts of URLs, the longest first."""
    forms = {form for value in values for form in _forms(value) if len(form) >= _SHORTEST}
    for value in values:
        parts |= set(_inside(value))
        if "://" in value:
            # Libraries tell of a URL's path and query without its host.
            path = value.partition("://")[2].partition("/")[2]
            forms.update(form for form in _forms(path) if len(form) >= _SHORTEST)
    forms.update(form for part in parts for form in _forms(part) if len(form) >= _SHORTEST_IN_URL)
    return tuple(sorted((form for form in forms if form not in REMOVED), key=len, reverse=True))


def _inside(url: str) -> Iterator[str]:
    """Secret parts of a URL: its password (or user, where there is none), values of telling names in its query."""
    match = re.search(r"://([^/\s]*)@", url)
    if match is not None:
        user, _, password = match[1].partition(":")
        yield from {password or user, unquote(password or user)}
    for name, value in _query(url):
        if telling(name):
            yield value


def _query(url: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(urlsplit(url).query)
    except ValueError:
        return []


def _forms(value: str) -> set[str]:
    """The value, its long lines, and both as they are escaped, percent-encoded and written in base64."""
    plain = {value, value.strip(), *(line for line in value.splitlines() if len(line) >= _SHORTEST_REFUSED)}
    forms = set(plain)
    for text in plain:
        raw = text.encode("utf-8", "surrogatepass")
        forms |= {repr(text)[1:-1], json.dumps(text)[1:-1], text.replace("'", "''")}
        percent = {quote(raw, safe=""), quote(raw), quote_plus(raw)}
        forms |= percent | {re.sub(r"%..", lambda m: m[0].lower(), each) for each in percent}
        forms |= set(_base64_forms(raw))
    return forms


def _base64_forms(raw: bytes) -> Iterator[str]:
    """What base64 of any text around ``raw`` has of it, where 8 characters or more depend on ``raw`` alone."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw).decode()
        # A character stands for 6 bits.
        first, end = -(-8 * before // 6), 8 * (before + len(raw)) // 6
        if end - first >= _SHORTEST:
            yield encoded[first:end]
            yield encoded[first:end].translate({ord("+"): "-", ord("/"): "_"})


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, REMOVED)
    return text


def _scrubbed(text: str, secrets: Iterable[str]) -> str:
    text = _URL.sub(_plain_url, _without(text, secrets))
    text = _HEX.sub(REMOVED, _TOKENS.sub(REMOVED, text))
    return _ASSIGNED.sub(
        lambda m: f"{m[1]}{m[2]}{m[3]}{REMOVED}" if telling(m[1]) and not _harmless(m[4]) else m[0], text
    )


def _plain_url(match: re.Match[str]) -> str:
    scheme, user, rest, query = match.groups()
    if _HOOK.search(rest) and scheme.lower().startswith("http"):
        return f"{scheme}{rest.split('/')[0]}/{REMOVED}"
    return f"{scheme}{REMOVED + '@' if user else ''}{rest}{'?' + REMOVED if query else ''}"


def _harmless(text: str) -> bool:
    return text.startswith(REMOVED) or re.fullmatch(r"[-+0-9.eE_]+", text) is not None


def _redacted(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            _scrubbed(str(key), secrets): _redacted_item(str(key), item, secrets) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, secrets) for item in value]
    return _scrubbed(value, secrets) if isinstance(value, str) else value


def _redacted_item(name: str, value: Any, secrets: tuple[str, ...]) -> Any:
    return REMOVED if telling(name) and _hides(value) else _redacted(value, secrets)


def _hides(value: Any) -> bool:
    return value not in ("", None, [], {}) and not isinstance(value, bool | int | float)


def install() -> None:
    """From now on this process's tracebacks, warnings and log lines are scrubbed, whoever writes them."""
    sys.excepthook = lambda kind, error, _: _tell(error)
    threading.excepthook = _tell_of_thread
    sys.unraisablehook = lambda found: _tell(found.exc_value) if found.exc_value is not None else None
    write = warnings.formatwarning
    warnings.formatwarning = lambda *a, **k: scrub(write(*a, **k))
    make = logging.getLogRecordFactory()

    def scrubbed_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
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


def scrubbed_traceback(error: BaseException) -> str:
    """The traceback with its causes, as Python prints it, without secrets and without a newline at its end."""
    return scrub("".join(traceback.format_exception(error)).rstrip("\n"))


def _tell(error: BaseException) -> None:
    print(scrubbed_traceback(error), file=sys.stderr, flush=True)


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        print(f"in thread {args.thread.name if args.thread else '?'}:", file=sys.stderr)
        _tell(args.exc_value)
