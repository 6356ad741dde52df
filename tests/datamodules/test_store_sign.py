"""URLs made after a signed one are those that botocore would have signed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from datamodules.store.client import _endpoint, _filesystem, _secret
from datamodules.store.sign import Keys, Model, Signer

NAMES = ["x", "a/c/0/1", "with space+plus", "~tilde-_.", "ünïcode/ß", "q?a=b&c#d", "a//b", "(1)!*'", "percent%20"]
SETTINGS: dict[str, dict[str, Any]] = {
    "path": {"key": "AK/ID", "secret": "s/+=", "endpoint_url": "http://127.0.0.1:9999"},
    "host": {"key": "AKID", "secret": "secret", "client_kwargs": {"region_name": "eu-west-1"}},
    "token": {"key": "AKID", "secret": "secret", "token": "a/b+c==", "endpoint_url": "https://store.example"},
    "everyone": {"anon": True, "endpoint_url": "http://127.0.0.1:9999"},
}


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials in the environment."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ENDPOINT_URL", "REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def filesystem(settings: dict[str, Any]) -> Any:
    pytest.importorskip("s3fs")
    return _filesystem("s3", settings, "s3://bucket")


def signed_at(url: str) -> str:
    return parse_qs(urlsplit(url).query).get("X-Amz-Date", [""])[0]


@pytest.mark.parametrize("how", SETTINGS)
def test_the_same_url_as_botocore_makes(nobody: None, how: str) -> None:
    fs = filesystem(SETTINGS[how])
    model = fs.url("bucket/keel", expires=3600)
    for name in NAMES:
        theirs = fs.url(f"bucket/{name}", expires=3600)
        while signed_at(theirs) != signed_at(model):  # the second is over
            model, theirs = fs.url("bucket/keel", expires=3600), fs.url(f"bucket/{name}", expires=3600)
        ours = Model(model, _secret(fs)).url(name)
        split, other = urlsplit(ours), urlsplit(theirs)
        assert split[:3] == other[:3] and sorted(split.query.split("&")) == sorted(other.query.split("&"))


def test_credentials_of_the_environment_are_found(nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _secret(filesystem({"endpoint_url": "http://127.0.0.1:9999", "anon": True})) == ""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the environment")
    assert _secret(filesystem({"endpoint_url": "http://127.0.0.1:9999"})) == "of the environment"


@pytest.mark.parametrize(
    "given",
    [{}, {"client_kwargs": {"region_name": "eu-west-1"}}, {"config_kwargs": {"region_name": "eu-west-1"}}],
    ids=["environment", "client", "config"],
)
def test_the_region_is_that_of_the_options_or_of_the_environment(
    nobody: None, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    """AWS_REGION before AWS_DEFAULT_REGION, as the command line of AWS and its SDKs have it."""

    def region() -> str:
        url = filesystem({"key": "AKID", "secret": "s", **given}).url("bucket/x", expires=60)
        return parse_qs(urlsplit(url).query)["X-Amz-Credential"][0].split("/")[2]

    assert region() == ("eu-west-1" if given else "us-east-1")
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    assert region() == ("eu-west-1" if given else "ap-south-1")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert region() == ("eu-west-1" if given else "ap-south-1")


def test_one_signature_of_botocore_per_bucket_and_all_where_ours_differs(nobody: None) -> None:
    fs = filesystem(SETTINGS["path"])
    asked: list[str] = []

    def sign(key: str) -> str:
        asked.append(key)
        return str(fs.url(key, expires=3600))

    signer = Signer(sign, lambda: SETTINGS["path"]["secret"])
    assert len({signer(f"{bucket}/{i}") for i in range(5) for bucket in "ab"}) == 10
    assert asked == ["a/keel", "b/keel"]
    signer.forget("a/3")
    signer("a/3")
    assert asked == ["a/keel", "b/keel", "a/keel"]
    asked.clear()
    other = Signer(sign, lambda: "another secret")
    for i in range(3):
        assert urlsplit(other(f"a/{i}")).path == f"/a/{i}"
    assert asked == ["a/keel", "a/0", "a/1", "a/2"]


ENVIRONMENT = {"ACCESS_KEY_ID": "AK/ID", "SECRET_ACCESS_KEY": "s/+=", "ENDPOINT_URL": "http://127.0.0.1:9999/"}
GIVEN: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "path": (SETTINGS["path"], {}),
    "token": (SETTINGS["token"], {"REGION": "ap-south-1"}),
    "region": ({**SETTINGS["path"], "client_kwargs": {"region_name": "eu-west-1"}}, {"REGION": "ap-south-1"}),
    "environment": ({"connect_timeout": 1.0}, ENVIRONMENT),
    "token of the environment": ({}, {**ENVIRONMENT, "SESSION_TOKEN": "a/b+c=="}),
    "keys before the environment's": (SETTINGS["path"], {**ENVIRONMENT, "SESSION_TOKEN": "of other keys"}),
    "token of old": ({}, {**ENVIRONMENT, "SESSION_TOKEN": "a", "SECURITY_TOKEN": "b"}),
    "capitals": ({**SETTINGS["path"], "endpoint_url": "http://MinIO.Example:9000"}, {}),
    "one service's endpoint": ({}, {**ENVIRONMENT, "ENDPOINT_URL_S3": "https://store.example:443"}),
}


@pytest.mark.parametrize("how", GIVEN)
def test_keys_that_are_given_make_the_url_that_a_client_makes(
    nobody: None, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    options, environment = GIVEN[how]
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    keys, fs = Keys.given(options, _endpoint(options)), filesystem(options)
    assert keys is not None
    theirs, ours = "", ""
    while not ours or signed_at(theirs) != signed_at(ours):
        theirs, ours = fs.url("bucket/keel", expires=77), keys.url("bucket", 77)
    split, other = urlsplit(ours), urlsplit(theirs)
    assert split[:3] == other[:3] and sorted(split.query.split("&")) == sorted(other.query.split("&"))
    assert keys.secret == _secret(fs)
    assert "s/+=" not in repr(keys)
    assert urlsplit(Signer(None, None, 77, keys)("bucket/a b")).path == "/bucket/a%20b"  # type: ignore[arg-type]
    asked: list[str] = []
    Signer(lambda key: asked.append(key) or ours, lambda: "", 77, keys)("arn:aws:x/a")  # type: ignore[func-returns-value]
    assert asked[0] == "arn:aws:x/keel"


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (SETTINGS["host"], {}),  # AWS itself
        (SETTINGS["everyone"], {}),
        ({"endpoint_url": "http://127.0.0.1:9999"}, {}),  # from a file, or of the machine
        ({**SETTINGS["path"], "profile": "other"}, {}),
        ({**SETTINGS["path"], "config_kwargs": {"s3": {"addressing_style": "virtual"}}}, {}),
        ({**SETTINGS["path"], "endpoint_url": "http://127.0.0.1:9999/below"}, {}),
        (SETTINGS["path"], {"PROFILE": "other"}),
        ({}, {**ENVIRONMENT, "IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}),
        ({}, {**ENVIRONMENT, "CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z"}),
        ({**SETTINGS["path"], "client_kwargs": {"region_name": None}}, {}),
        (SETTINGS["path"], {"CONFIG_FILE": __file__}),  # which may say anything
    ],
)
def test_keys_that_must_be_looked_up_are_left_to_a_client(
    nobody: None, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    assert Keys.given(options, _endpoint(options)) is None
