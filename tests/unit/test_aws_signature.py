"""Requests are signed as botocore signs them (the signatures are what botocore 1.43 makes of the same)."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tidegate.aws_signature import Credentials, encoded_path, encoded_query, signed_headers

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("path", "query", "headers", "token", "names", "signature_end"),
    [
        (
            "/bucket",
            {"prefix": "a b/ü+/", "list-type": "2"},
            {},
            "",
            "host;x-amz-content-sha256;x-amz-date",
            "37ab6db42d69b96c7ed5",
        ),
        (
            "/bucket/a b/model+ü.safetensors",
            {},
            {"if-match": '"abc"'},
            "tok",
            "host;if-match;x-amz-content-sha256;x-amz-date;x-amz-security-token",
            "23f6a51c055bf5ba0be8",
        ),
    ],
)
def test_as_botocore_does(
    path: str, query: dict[str, str], headers: dict[str, str], token: str, names: str, signature_end: str
) -> None:
    credentials = Credentials("AK", "SK/+x", token)
    found = signed_headers("GET", "127.0.0.1:9000", path, query, headers, credentials, "eu-west-1", NOW)
    assert found["x-amz-date"] == "20260102T030405Z"
    assert "Credential=AK/20260102/eu-west-1/s3/aws4_request" in found["authorization"]
    assert f"SignedHeaders={names}," in found["authorization"]
    assert found["authorization"].endswith(signature_end)


def test_what_is_sent_is_what_is_signed() -> None:
    assert encoded_path("/b/a b/ü+") == "/b/a%20b/%C3%BC%2B"
    assert encoded_query({"b": "/", "a": "x y"}) == "a=x%20y&b=%2F"


def test_a_secret_is_not_shown() -> None:
    assert "SK" not in repr(Credentials("AK", "SK"))
