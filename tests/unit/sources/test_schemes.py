"""The table of schemes: each is usable, and each mistake has its remedy."""

from __future__ import annotations

from importlib import import_module

import pytest

from tidegate.sources.schemes import KNOWN_SCHEMES, SCHEMES, mistake_in, scheme_of


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme_has_a_module_that_fetches(name: str) -> None:
    scheme = SCHEMES[name]
    assert callable(import_module(f"tidegate.sources.{scheme.module}").fetch)
    assert scheme_of(scheme.example) == name
    assert mistake_in(scheme.example) is None


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("ftp://host/path", KNOWN_SCHEMES),
        ("hf://only-a-name", "write hf://owner/name or hf://owner/name@revision"),
        ("s3://Bucket/x", "write s3://bucket/prefix"),
        ("gs://Bucket/x", "write gs://bucket/prefix"),
        ("gs://bucket/with space", "write gs://bucket/prefix"),
        ("pvc://Claim/x", "write pvc://claim/path"),
        ("file://relative", "write file:///absolute/path"),
        ("../a/path", None),
        ("gs://my_bucket.example.com/llama/8b", None),
    ],
)
def test_a_mistake_is_told_with_what_to_write(uri: str, remedy: str | None) -> None:
    assert mistake_in(uri) == remedy


def test_all_schemes_are_named() -> None:
    assert KNOWN_SCHEMES == (
        "use a path, file:///path, hf://owner/name, s3://bucket/prefix, gs://bucket/prefix or pvc://claim/path"
    )
