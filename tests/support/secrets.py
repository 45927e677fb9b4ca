"""Redaction as in a process with another environment."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

from deco_scale.observability import redact


def scrub(text: str, environment: Mapping[str, str]) -> str:
    with _in(environment):
        return redact.scrub(text)


def redacted(value: Any, environment: Mapping[str, str]) -> Any:
    with _in(environment):
        return redact.redacted(value)


def _in(environment: Mapping[str, str]) -> Any:
    return mock.patch.multiple(redact, _registered=set(), os=mock.Mock(environ=environment))
