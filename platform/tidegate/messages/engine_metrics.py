"""Metrics that an engine keeps under names of its own, on their way from its process to who scrapes them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import msgspec

MOST_BYTES = 64 << 10  # of one replica, packed; vLLM's are a tenth of it
MOST_UNPACKED_BYTES = 2 << 20


class Family(msgspec.Struct, frozen=True, array_like=True):
    """All of one engine that has one name, in Prometheus' text format: its HELP and TYPE, and its samples."""

    name: str
    head: str
    samples: str


encode_families = msgspec.msgpack.Encoder().encode
_families = msgspec.msgpack.Decoder(list[Family])


def pack(families: bytes) -> bytes:
    """Pack encoded families as they are stored; empty where they are more than a replica may tell."""
    found = zlib.compress(families) if len(families) <= MOST_UNPACKED_BYTES else b""
    return found if len(found) <= MOST_BYTES else b""


def exposition(replicas: Iterable[bytes]) -> str:
    """Return what replicas have packed as one text, in which a name stands once, as the format wants it."""
    heads: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    for text in replicas:
        for family in _families.decode(zlib.decompress(text)):
            heads.setdefault(family.name, family.head)
            samples.setdefault(family.name, []).append(family.samples)
    return "".join(head + "".join(samples[name]) for name, head in heads.items())
