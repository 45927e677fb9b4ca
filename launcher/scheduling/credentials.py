"""Nothing that looks like a secret is written into a job; jobs name where secrets lie."""

import re

from deco_scale.errors import ConfigError

_NAMES = re.compile(
    r"secret|passw|api_?key|access_?key|private_?key|credential|signature|(^|[^a-z])(auth|token)$", re.IGNORECASE
)
# A path to a file of secrets is a reference, not a secret.
_REFERENCES = re.compile(r"_(file|path|dir)$", re.IGNORECASE)
_VALUES = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bhf_[A-Za-z0-9]{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.eyJ"
    r"|X-Amz-(Signature|Credential|Security-Token)="
    r"|://[^/\s:@]+:[^/\s@]+@"
)


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable or key, by its name or its value, seems to hold a credential."""
    named = bool(_NAMES.search(name)) and not _REFERENCES.search(name)
    return (named and bool(value)) or bool(_VALUES.search(value))


def refuse_secret(name: str, value: str, *, instead: str) -> None:
    """Raises :class:`ConfigError` that names the key, never the value, and says what to do ``instead``."""
    if looks_secret(name, value):
        raise ConfigError(f"{name} looks like a secret, which would be written in plain text; {instead}")


def refuse_secret_text(text: str, *, where: str) -> None:
    """The same for a whole file, whose values alone are looked at; names the line."""
    for number, line in enumerate(text.splitlines(), start=1):
        if _VALUES.search(line):
            raise ConfigError(f"{where}, line {number}, looks like a secret, which would be written in plain text")
