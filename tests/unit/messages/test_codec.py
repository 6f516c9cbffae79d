"""Bytes and back, also those that the version before (commit 512f17d) wrote."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tidegate.messages.codec import (
    decode_request,
    decode_segments,
    encode_prompt,
    encode_request,
    encode_segments,
)
from tidegate.messages.work import (
    ChatPrompt,
    Finish,
    Generate,
    Request,
    Sampling,
    Segment,
    TokenLogprob,
    Tokens,
)

REQUEST = Request(
    id="cmpl-1.0",
    tenant="team-a",
    model="tide",
    revision="0123456789",
    gateway="gw-1",
    created=1000.5,
    deadline=1300.0,
    priority=3,
    cost=42,
    work=Generate(
        ChatPrompt([{"role": "user", "content": "hé"}]),
        Sampling(
            seed=7,
            max_tokens=20,
            temperature=0.5,
            top_p=0.9,
            stop=("\n",),
            presence_penalty=0.1,
            frequency_penalty=0.2,
            top_logprobs=2,
        ),
    ),
)
SEGMENTS = [
    Segment(
        "cmpl-1.0",
        0,
        output=Tokens([5, 6], "ab", [TokenLogprob(5, "a", -0.5, b"a", [(6, "b", -1.0, b"b")])]),
        prompt_tokens=9,
    ),
    Segment("cmpl-1.0", 1, Finish("stop", prompt_tokens=9, completion_tokens=2)),
]
# What encode_request and encode_segments of commit 512f17d gave for the same values.
REQUEST_BEFORE = bytes.fromhex(
    "9ba8636d706c2d312e30a67465616d2d61a474696465aa30313233343536373839a467772d31cb408f440000000000"
    "cb4094500000000000032a92a4636861749182a4726f6c65a475736572a7636f6e74656e74a368c3a99a0714cb3fe0"
    "000000000000cb3feccccccccccccd91a10acb3fb999999999999acb3fc999999999999a02c2c2"
)
SEGMENTS_BEFORE = bytes.fromhex(
    "0000003597a8636d706c2d312e3000920506a26162919505a161cbbfe0000000000000c40161919406a162cbbff000"
    "0000000000c4016209c00000001997a8636d706c2d312e300190a0900095a473746f70a0a00902"
)


def test_what_is_written_is_read() -> None:
    assert decode_request(encode_request(REQUEST)) == REQUEST
    assert decode_segments(encode_segments(SEGMENTS)) == SEGMENTS


def test_what_the_version_before_left_in_redis_is_read() -> None:
    assert decode_request(REQUEST_BEFORE) == REQUEST
    assert decode_segments(SEGMENTS_BEFORE) == SEGMENTS
    mixed = SEGMENTS_BEFORE + encode_segments(SEGMENTS)
    assert decode_segments(mixed) == [*SEGMENTS, *SEGMENTS]
    assert decode_segments(mixed, from_seq=1) == [SEGMENTS[1], SEGMENTS[1]]


class FinishWithoutCache(msgspec.Struct, array_like=True):
    """`Finish` of commit 989dd8d."""

    reason: str
    code: str = ""
    message: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stopped_by: str = ""


def test_gateways_and_replicas_may_know_of_cached_tokens_or_not() -> None:
    before, now = FinishWithoutCache("stop", "", "", 9, 2, "END"), Finish("stop", "", "", 9, 2, "END", 4)
    encode = msgspec.msgpack.encode
    assert msgspec.msgpack.decode(encode(before), type=Finish) == replace(now, cached_tokens=0)
    assert msgspec.msgpack.decode(encode(now), type=FinishWithoutCache) == before


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


HUGE = [1 << 64, -(1 << 63) - 1, 1 << 127, -(1 << 127), 10**4000, -(10**4000)]


@pytest.mark.parametrize("number", HUGE, ids=lambda number: f"{number.bit_length()} bits")
def test_whole_numbers_beyond_64_bits_come_through(number: int) -> None:
    """JSON has them; msgpack does not."""
    messages = [{"role": "user", "more": [1, {"n": number}], "deep": nested(number, 400)}]
    prompt = ChatPrompt(messages, template_args={"size": number, "fits": [(1 << 64) - 1, -(1 << 63), True]})
    request = replace(REQUEST, work=replace(REQUEST.work, prompt=prompt))
    assert decode_request(encode_request(request, encode_prompt(prompt))) == request
    assert prompt.template_args["size"] == number, "the caller's own is untouched"


def test_an_extension_of_another_version_is_refused() -> None:
    prompt = ChatPrompt([], template_args={"x": msgspec.msgpack.Ext(9, b"?")})
    with pytest.raises(msgspec.ValidationError):
        decode_request(encode_request(replace(REQUEST, work=replace(REQUEST.work, prompt=prompt))))


def test_other_bytes_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_request(msgspec.msgpack.encode(["only", "this"]))
