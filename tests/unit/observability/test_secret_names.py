"""Every name that tells of a secret hides its value, whatever the value looks like, and no other name does."""

from typing import Any

import pytest

from deco_scale.observability.redact import REMOVED, is_secret_name, looks_secret
from tests.support.secrets import redacted, scrub

PLAIN = "sunflower"
"""A word like any other: only the name beside it says that it is secret."""
ANYWHERE = (
    "secret", "passwd", "password", "passphrase", "credential", "api_key", "api-key", "apikey", "access_key",
    "access-key", "accesskey", "private_key", "private-key", "privatekey", "auth", "signature", "cookie", "bearer",
    "webhook", "session_token", "session-token", "sessiontoken",
)  # fmt: skip
"""Parts that tell wherever they stand in a name."""
WORDS = ("token", "pwd", "key", "sas", "sig")
"""Those that tell only as a name's whole last word: within others they are harmless."""
NAMES = (
    *(form for part in ANYWHERE for form in (part, part.upper(), f"my_{part}", f"{part}_2", f"x{part}s")),
    *(form for word in WORDS[:1] + WORDS[2:] for form in (word, word.upper())),
    *(form for word in WORDS for form in (f"my_{word}", f"my-{word}", f"MY_{word.upper()}")),
    "hub_token_2", "hub-token-2",
)  # fmt: skip
HARMLESS = (
    "text_tokens", "max_tokens", "tokenizer", "keyboard", "monkey", "keys", "sasha", "signal", "design", "pwds",
    "user", "url", "name", "path", "PWD", "OLDPWD",
)  # fmt: skip
IN_TEXT = ("secret", "passwd", "password", "api_key", "api-key", "apikey", "access_key", "access-key", "accesskey",
           "auth_token", "credential", "signature", "passphrase", "private_key", "private-key", "privatekey",
           "auth", "oauth", "cookie")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_value_under_a_telling_name_is_hidden(name: str) -> None:
    assert is_secret_name(name) and looks_secret(name, PLAIN) and looks_secret(f"data.{name}.value", PLAIN)
    nested: dict[str, Any] = {"a": [{"b": {name: PLAIN}}], name: [PLAIN], "c": ({name: {"d": PLAIN}},)}
    shown = redacted(nested, {})
    assert PLAIN not in repr(shown)
    assert shown["a"][0]["b"][name] == shown[name] == shown["c"][0][name] == REMOVED


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_s_plain_secrets_are_taken_out_of_texts(name: str) -> None:
    assert PLAIN not in scrub(f"cannot log in with {PLAIN}!", {name: PLAIN})
    assert PLAIN not in str(redacted({"a": f"with {PLAIN}"}, {name: PLAIN}))


@pytest.mark.parametrize("name", HARMLESS)
def test_a_plain_value_under_another_name_stays(name: str) -> None:
    assert not is_secret_name(name) and not looks_secret(name, PLAIN)
    assert redacted({name: PLAIN}, {}) == {name: PLAIN}
    assert scrub(f"{name}={PLAIN}", {name: PLAIN}) == f"{name}={PLAIN}"


@pytest.mark.parametrize("suffix", ["file", "path", "dir", "env", "FILE"])
@pytest.mark.parametrize("part", ["password", "private_key", "token", "api_key"])
def test_where_a_secret_is_kept_is_none(part: str, suffix: str) -> None:
    name = f"{part}_{suffix}"
    assert not is_secret_name(name) and redacted({name: PLAIN}, {}) == {name: PLAIN}


@pytest.mark.parametrize("value", ["", None, 0, 1.5, True, [], {}])
def test_numbers_switches_and_empty_values_stay(value: Any) -> None:
    assert redacted({"password": value}, {}) == {"password": value}


@pytest.mark.parametrize("form", ["{}={}", "{}: {}", "'{}': '{}'", '{{"{}": "{}"}}', "my_{}={}", "{} = {},"])
@pytest.mark.parametrize("name", IN_TEXT)
def test_a_plain_value_assigned_in_a_text_is_hidden(name: str, form: str) -> None:
    for written in (name, name.upper()):
        assert PLAIN not in scrub(f"said: {form.format(written, PLAIN)}", {})


@pytest.mark.parametrize(
    "text", ["unknown key: sampler.steps", "author: somebody", "key=sunflower", "auth_file=/etc/auth"]
)
def test_an_ordinary_word_before_a_colon_hides_nothing(text: str) -> None:
    assert scrub(text, {}) == text


@pytest.mark.parametrize("name", ["X-Amz-Signature", "sig", "token", "api_key", "private_key", "password", "auth"])
def test_a_query_with_a_telling_name_is_hidden_and_refused(name: str) -> None:
    url = f"https://host/x?part=1&{name}={PLAIN}"
    assert looks_secret("data.url", url) and PLAIN not in scrub(f"GET {url}", {})
    assert not looks_secret("data.url", f"https://host/x?part={PLAIN}")
    assert PLAIN not in scrub(f"said {PLAIN}", {"ARTIFACT": url})


TAIL = "planted0planted1planted2"


@pytest.mark.parametrize(
    "form",
    [
        "AKIAPLANTED0PLANTED1", "ASIAPLANTED0PLANTED1", f"FwoGZXIvYXdz{TAIL}", f"IQoJb3JpZ2lu{TAIL}", f"hf_{TAIL}",
        *(f"gh{letter}_{TAIL}" for letter in "oprsu"), f"npm_{TAIL}", f"github_pat_{TAIL}", f"wandb_v1_{TAIL}",
        f"glpat-{TAIL}", f"pypi-AgE{TAIL}", *(f"{letter}k{dash}{TAIL}" for letter in "spr" for dash in "-_"),
        f"xoxb-{TAIL}", f"xoxp-{TAIL}", "eyJhbGciOiJI.planted0.planted1", "eyJhbGciOiJI.planted0",
        f"Bearer {TAIL}",
        "Authorization: Basic cGxhbnRlZA==", "-----BEGIN PRIVATE KEY-----\nplanted", f"http://me:{TAIL}@host/x",
        f"http://{TAIL}@host/x", f"https://hooks.slack.com/services/{TAIL}", f"https://host/hooks/{TAIL}",
        f"https://webhook.host/{TAIL}",
    ],
)  # fmt: skip
def test_each_form_of_credential_is_hidden_and_refused(form: str) -> None:
    assert looks_secret("name", form)
    for text in (form, f"said: {form} and", f"({form})"):
        assert "planted" not in scrub(text, {}).lower()
