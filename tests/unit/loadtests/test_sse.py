from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from loadtests.direct import chunk
from loadtests.sse import AnswerReader, Phase, count_events

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROLE = b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}}\n\n'
)
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"


def token(text: str) -> bytes:
    return b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


def stream(*events: bytes) -> bytes:
    return HEAD + b"".join(map(chunk, events)) + LAST


WHOLE = stream(ROLE, token(" ba"), token(" de"), token(" ki"), USAGE, DONE)


def read(pieces: list[bytes]) -> AnswerReader:
    reader = AnswerReader()
    counted = sum(reader.feed(piece) for piece in pieces)
    assert counted == reader.events
    return reader


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_a_stream_reads_the_same_wherever_the_network_cuts_it(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    reader = read([WHOLE[start:end] for start, end in itertools.pairwise(edges)])
    assert (reader.status, reader.events, reader.tokens) == (200, 3, 3)
    assert reader.phase is Phase.COMPLETE
    assert not reader.failed_in_stream


def test_several_events_in_one_chunk_count_each() -> None:
    reader = read([HEAD, chunk(ROLE + token("a") + token("b")), chunk(DONE) + LAST])
    assert reader.events == 2
    assert reader.tokens is None


def test_an_error_in_the_stream_is_seen() -> None:
    failed = b'data: {"error":{"message":"The engine failed.","type":"server_error","code":null}}\n\n'
    reader = read([stream(ROLE, token("a"), failed)])
    assert reader.failed_in_stream
    assert reader.phase is Phase.COMPLETE


def test_a_whole_answer_ends_with_its_length() -> None:
    body = b'{"choices":[{"message":{"role":"assistant","content":" ba"}}],"usage":{"completion_tokens":1}}'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader = read([head + body[:20], body[20:]])
    assert (reader.status, reader.events, reader.tokens) == (200, 1, 1)
    assert reader.phase is Phase.COMPLETE


def test_a_refusal_keeps_its_headers() -> None:
    body = b'{"error":{"message":"Full."}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader = read([head, body])
    assert reader.status == 429
    assert reader.headers[b"retry-after"] == b"7"
    assert reader.phase is Phase.COMPLETE


def test_an_empty_body_is_complete_with_its_head() -> None:
    reader = read([b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n"])
    assert reader.phase is Phase.COMPLETE


def test_the_empty_content_of_the_role_is_no_token() -> None:
    assert count_events(ROLE) == 0
    assert count_events(ROLE + token("a")) == 1
