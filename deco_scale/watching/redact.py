"""Taking secrets out of what is shown: values under telling names, and strings that look like a credential."""

import os
import re
from collections.abc import Mapping
from typing import Any

REMOVED = "(removed)"

_NAMES = re.compile(
    r"secret|passw(or)?d|passphrase|credential|(api|access|private)[_-]?key|auth|signature|cookie|bearer|webhook"
    r"|(^|[_-])(token|pwd|key|sas)$|session[_-]?token|[_-]token([_-]|$)",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"""
    \b(?:AKIA|ASIA)[0-9A-Z]{16}\b                                   # AWS access keys
    | \b(?:hf|ghp|gho|ghs|ghu|glpat|npm|pypi|github_pat)[_-][0-9A-Za-z_\-]{16,}   # hubs
    | \b(?:sk|pk|rk)[-_][0-9A-Za-z_\-]{16,}
    | \bxox[a-z]-[0-9A-Za-z\-]{8,}
    | \beyJ[0-9A-Za-z_\-]{8,}\.[0-9A-Za-z_\-]{4,}(?:\.[0-9A-Za-z_\-]*)?  # JSON web tokens
    | \bBearer\s+[0-9A-Za-z._~+/\-]{8,}=*
    | -----BEGIN[^-]*PRIVATE\ KEY-----[\s\S]*?(?:-----END[^-]*-----|\Z)
    | (?<![0-9A-Za-z+/=_\-])(?=[0-9A-Za-z+/_\-]*[0-9])(?=[0-9A-Za-z+/_\-]*[a-z])(?=[0-9A-Za-z+/_\-]*[A-Z])
      [0-9A-Za-z+_\-]{40}(?![0-9A-Za-z+/=_\-])                     # 40 mixed characters: AWS secret keys, wandb
    | \b[0-9a-f]{40}\b                                              # wandb's keys
    """,
    re.VERBOSE,
)
_URL = re.compile(r"\b([a-z][a-z0-9+.\-]*://)([^\s/@\"'<>]*@)?([^\s?#\"'<>]*)([?#][^\s\"'<>]*)?", re.IGNORECASE)
_HOOK = re.compile(r"(?:hooks?\.|webhook|/hooks?/|/services/)", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(?i)([\w\-]*(?:secret|passw(?:or)?d|api[_-]?key|access[_-]?key|token|credential|signature)[\w\-]*"
    r"[\"']?\s*[=:]\s*)([\"']?)([^\s\"',;&]{6,})"
)
_SHORTEST = 8


def telling(name: str) -> bool:
    """Whether a key's name says that its value is secret."""
    return _NAMES.search(name) is not None


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without credentials, user parts and queries of URLs, addresses of hooks, and the values of the
    ``environment``'s own secrets (default: this process's), as far as their form gives them away."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _SHORTEST and telling(name) and value in text:
            text = text.replace(value, REMOVED)
    text = _URL.sub(_plain_url, text)
    text = _TOKENS.sub(REMOVED, text)
    return _ASSIGNED.sub(lambda m: m[0] if _harmless(m[3]) else f"{m[1]}{REMOVED}", text)


def _plain_url(match: re.Match[str]) -> str:
    scheme, user, rest, query = match.groups()
    if _HOOK.search(rest) and scheme.lower().startswith("http"):
        return f"{scheme}{rest.split('/')[0]}/{REMOVED}"
    return f"{scheme}{REMOVED + '@' if user else ''}{rest}{'?' + REMOVED if query else ''}"


def _harmless(text: str) -> bool:
    return text == REMOVED or re.fullmatch(r"[-+0-9.eE_]+", text) is not None


def redacted(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A copy of nested settings in which values under telling names are gone and all other texts are scrubbed.

    Numbers, switches and empty values stay, whatever they are called.
    """
    if isinstance(value, Mapping):
        return {
            scrub(str(key), environment): REMOVED
            if telling(str(key)) and _hides(item)
            else redacted(item, environment)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item, environment) for item in value]
    return scrub(value, environment) if isinstance(value, str) else value


def _hides(value: Any) -> bool:
    return value not in ("", None, [], {}) and not isinstance(value, bool | int | float)
