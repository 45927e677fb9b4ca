"""Prompts from a file."""

from pathlib import Path

from deco_scale.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """The file of ``--prompts``, one prompt per line; raises :class:`ConfigError` where it holds none."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: {error}") from error
    prompts = [p for p in prompts if p]
    if not prompts:
        raise ConfigError(f"--prompts {path}: no prompt in it")
    return prompts
