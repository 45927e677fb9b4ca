"""Secrets: none survives in a text, none is taken from a configuration, and no error repeats one."""

import base64
import dataclasses
import os
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from deco_scale.config import ConfigError, RunConfig, build_config, load_config
from deco_scale.observability.redact import REMOVED, is_secret_name, looks_secret
from tests.conftest import ROOT
from tests.support.secrets import redacted, scrub

CONFIGS = ROOT / "configs"
TINY = CONFIGS / "t2i_tiny.yaml"
HUB = "hf_plantedPlanted0123456789"
HEX = "0123456789abcdef0123456789abcdef01234567"
AWS = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEYab"[:40]

# What the replacement is made of cannot be told from it.
_TEXT = st.text(max_size=60)
_SECRET = st.text(
    st.characters(exclude_characters="()", exclude_categories=["Cs"]), min_size=8, max_size=60
).filter(lambda text: text not in REMOVED)


@given(_SECRET, _TEXT, _TEXT, st.sampled_from(["A_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "X_WEBHOOK"]))
@example("https://x/y?z=planted1", "see ", ".", "X_WEBHOOK")
@example("http://[planted", "", "", "A_TOKEN")
@settings(max_examples=300, deadline=None)
def test_no_secret_of_the_environment_survives(secret: str, before: str, after: str, name: str) -> None:
    text = f"{before}{secret}{after}"
    environment = {"HOME": "/home/me", name: secret}
    assert secret not in scrub(text, environment)
    shown = redacted({"a": [{"b": text}, text], text: 1}, environment)
    assert secret not in shown["a"][0]["b"] and secret not in shown["a"][1]
    assert not any(secret in key for key in shown)


@given(_SECRET, st.binary(max_size=10), st.binary(max_size=10))
@settings(max_examples=200, deadline=None)
def test_nor_in_another_form(secret: str, before: bytes, after: bytes) -> None:
    environment = {"A_TOKEN": secret}
    raw = secret.encode()
    for written in (
        quote(raw, safe=""),
        quote_plus(raw),
        repr(secret)[1:-1],
        re.sub("%..", lambda m: m[0].lower(), quote(raw)),
    ):
        assume(written not in REMOVED)
        assert written not in scrub(f"x={written} ", environment)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        shown = scrub(f"said: {encode(before + raw + after).decode()}", environment)
        # Most of what the secret alone decides is gone: with 8 bytes that is 9 of 11 characters.
        inner = encode(bytes(len(before)) + raw)[len(before) * 4 // 3 + 2 :][: len(raw) * 4 // 3 - 3].decode()
        assert inner not in shown


def test_parts_of_urls_in_the_environment_are_secret() -> None:
    environment = {
        "HTTPS_PROXY": "http://me:pl%2Fanted@proxy:3128",
        "ARTIFACT": "https://h/x?X-Amz-Signature=plantedsignature&part=ordinary1",
        "THE_WEBHOOK": "https://h/alerts/plantedpath",
    }
    for text in (
        "pl/anted",
        "pl%2Fanted",
        "plantedsignature",
        "POST /alerts/plantedpath 404",
        "/alerts/plantedpath",
    ):
        assert "anted" not in scrub(f"error: {text}!", environment)
    assert scrub("ordinary1 proxy:3128", environment) == "ordinary1 proxy:3128"


@pytest.mark.parametrize(
    "text",
    [
        f"key {AWS} here", f"wandb: {HEX}", f"token {HUB}", "AKIAPLANTEDPLANTED00", "http://me:pw@127.0.0.1:9/x",
        "https://h/x?X-Amz-Signature=abc", "Authorization: Basic bWU6cGxhbnRlZA==",
        "aws_session_token = 'plantedtoken'",
        "-----BEGIN RSA PRIVATE KEY-----\nplanted\n-----END RSA PRIVATE KEY-----",
        "https://hooks.slack.com/services/T/B/x",
        "https://me:p@nted@host/x", "Bearer plantedplanted", "IQoJb3JpZ2luX2VjPlanted/planted+planted==",
    ],
)  # fmt: skip
def test_forms_of_credentials_are_known(text: str) -> None:
    shown = scrub(text, {})
    for part in (AWS, HEX, HUB, "AKIA", "me:", "nted", "abc", "bWU6", "services/T"):
        assert part not in shown


@pytest.mark.parametrize(
    "text",
    [
        f"/cache/models--q--q/snapshots/{HEX}", f"at commit {HEX}", f"image@{HEX}",
        "hf-internal-testing/tiny-random-model", "model.text_tokens: sixteen",
        "/data/runs/T2I_XXL/2024/checkpoints/step00012", "risk-of-something-rather-long",
        "monitor.webhook_env=THE_HOOK", "data wait 3 ms, norm 1.25, ETA 0:10:00",
    ],
)  # fmt: skip
def test_what_only_looks_like_one_stays(text: str) -> None:
    environment = {"PWD": "/data/runs/T2I_XXL", "AWS_SHARED_CREDENTIALS_FILE": "/cache/models--q--q"}
    assert scrub(text, environment) == text


@pytest.mark.parametrize("piece", ["token-", "a.", "://", "A1b/", "-----BEGIN ", "x@", "token=", " ", "eyJ", "\\"])
def test_long_lines_take_no_long_time(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    began = os.times().user
    scrub(text, {"A_TOKEN": "planted-planted"})
    looks_secret("x", text)
    assert os.times().user - began < 3


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "AWS_SECRET_ACCESS_KEY", "Password", "api-key", "webhook_url"]
)
def test_values_under_secret_names_go_and_numbers_stay(name: str) -> None:
    assert redacted({name: "x", "inner": [{name: ["y"]}]}, {}) == {name: REMOVED, "inner": [{name: REMOVED}]}
    assert redacted({name: 5, "steps": 5, "flag": True, "none": None}, {}) == {
        name: 5, "steps": 5, "flag": True, "none": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "loss 0.5 at step 100 on node-7.cluster.local",
        "s3://bucket/prefix/shard-000123.tar",
        "/data/runs/t2i_xxl/checkpoints/step_00012000",
        "text_tokens: 16, max_tokens=300",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert scrub(text, {}) == text


@given(st.text(max_size=200))
def test_scrubbing_twice_changes_no_more(text: str) -> None:
    once = scrub(text, {})
    assert scrub(once, {}) == once


# --- The configuration ---


def _fields(kind: Any, prefix: str = "") -> typing.Iterator[str]:
    for name, inner in typing.get_type_hints(kind).items():
        if not name.startswith("_"):
            yield f"{prefix}{name}"
            options = (
                typing.get_args(inner)
                if isinstance(inner, types.UnionType) or typing.get_args(inner)
                else (inner,)
            )
            for option in options:
                if dataclasses.is_dataclass(option):
                    yield from _fields(option, f"{prefix}{name}.")


def test_no_key_of_a_configuration_is_taken_for_a_secret() -> None:
    names = list(_fields(RunConfig))
    assert "monitor.webhook_env" in names and "text_encoder.max_tokens" in names and "stages.lr" in names
    assert not [name for name in names if any(is_secret_name(part) for part in name.split("."))]
    for path in CONFIGS.glob("*.yaml"):
        load_config(path)
    assert load_config(TINY, ["monitor.webhook_env=THE_HOOK"]).monitor.webhook_env == "THE_HOOK"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.url=https://me:planted@h/x", "data.url"),
        ("data.url=s3://b/x?X-Amz-Signature=planted", "data.url"),
        ("data.url='https://h/x?a=1&X-Amz-Credential=planted'", "data.url"),
        (f"wandb.name={HUB}", "wandb.name"),
        ("run.dir=runs/AKIAPLANTEDPLANTED00", "run.dir"),
        (f"wandb.project={AWS}", "wandb.project"),
        ("wandb.api_key=planted", "wandb.api_key"),
        ("data.auth={user: me, word: planted}", "data.auth.user"),
        ("data.mixture=[{url: 'http://me:planted@h/'}]", "data.mixture.0.url"),
        ("monitor.webhook_env=https://hooks.example/services/T0/planted", "monitor.webhook_env"),
        ("monitor.webhook=https://example.com/planted", "monitor.webhook"),
        ("wandb.name=is-planted-in-the-environment-too", "wandb.name"),
        (f"{HUB}=1", "a key of the configuration"),
    ],
)
def test_a_secret_is_refused_by_its_key(override: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    with pytest.raises(ConfigError, match=f"{key} looks like a secret.*environment") as caught:
        load_config(TINY, [override])
    for planted in ("planted", "PLANTED", AWS):
        assert planted not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        f"run.seed=[{HUB}", f"run.seed='{HUB}\" x", f"run.seed=&{HUB} *{HUB}a", f"run.seed=!{HUB} 1", HUB,
        "https://me:planted@h/x", "=planted-in-the-environment", f"run.seed.x={HUB}", f"stages.{HUB}.lr=1",
        "wandb.password=[planted", f"run.seed={{a: 1, ? {HUB}", f"run.seed={{{HUB}: 1, {HUB}: 2}}",
        "run.seed=\"planted-in-the-environment\x07\"", "optimizer.eps=.nan", f"run.seed.{HUB}=1",
    ],
)  # fmt: skip
def test_no_error_repeats_a_secret(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    assert "planted" not in str(caught.value) and caught.value.__cause__ is None


@given(st.text(max_size=30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_no_file_makes_an_error_that_repeats_one(text: str, at: int) -> None:
    secret = "planted-in-the-environment"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_API_KEY", secret)
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"secrets-{os.getpid()}.yaml"
        try:
            path.write_text(f"run: {{dir: x}}\n{text[:at]}{secret}{text[at:]}", encoding="utf-8")
            with pytest.raises(ConfigError) as caught:
                load_config(path)
        finally:
            path.unlink(missing_ok=True)
    assert secret not in str(caught.value) and "planted-in" not in str(caught.value)


def test_a_checkpoint_with_a_secret_does_not_show_it_in_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"run": {"dir": 5, "seed": HUB}, "wandb": {"mode": f"x {HUB}"}}, source="meta.json")
    assert "run.seed" in str(caught.value) and "planted" not in str(caught.value)


# --- What Python itself prints ---

PROGRAM = """
import logging, os, sys, threading, warnings
from deco_scale.observability.redact import install
install()
secret = os.environ["SOME_API_KEY"]
handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
other = logging.getLogger("other")
other.propagate = False
other.addHandler(handler)
other.error("said %s", secret)
other.error("said %d", secret)
logging.warning("root %s", secret)
try:
    raise ValueError(f"caught {secret}")
except ValueError:
    other.exception("it failed")
warnings.warn(f"careful {secret}")
def work():
    raise KeyError(f"thread {secret}")
thread = threading.Thread(target=work)
thread.start()
thread.join()
class Odd:
    def __del__(self):
        raise OSError(f"never {secret}")
Odd()
try:
    raise RuntimeError(f"cause {secret}")
except RuntimeError as error:
    raise RuntimeError(f"last http://me:{secret}@h/x") from error
"""


def test_tracebacks_warnings_and_log_lines_are_scrubbed() -> None:
    secret = "planted/in+the=environment"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "SOME_API_KEY": secret, "PYTHONPATH": str(ROOT)},
        text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "planted" not in done.stdout + done.stderr
    for said in (
        f"other: said {REMOVED}", "a log line of other whose arguments do not fit", f"root {REMOVED}",
        f"ValueError: caught {REMOVED}", f"careful {REMOVED}", f"thread {REMOVED}", f"OSError: never {REMOVED}",
        f"RuntimeError: cause {REMOVED}", "direct cause", f"RuntimeError: last http://{REMOVED}@h/x",
    ):  # fmt: skip
        assert said in done.stderr, said
