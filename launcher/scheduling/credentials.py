"""Nothing that looks like a secret is written into a job; jobs name where secrets lie."""

from deco_scale.errors import ConfigError
from deco_scale.watching.redact import holds_secret, looks_secret


def refuse_secret(name: str, value: str, *, instead: str) -> None:
    """Raises :class:`ConfigError` that names the key, never the value, and says what to do ``instead``."""
    if looks_secret(name, value):
        raise ConfigError(f"{name} looks like a secret, which would be written in plain text; {instead}")


def refuse_secret_text(text: str, *, where: str) -> None:
    """The same for a whole file, whose values alone are looked at; names the line."""
    for number, line in enumerate(text.splitlines(), start=1):
        if holds_secret(line):
            raise ConfigError(f"{where}, line {number}, looks like a secret, which would be written in plain text")
