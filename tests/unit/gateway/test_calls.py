"""From a body to the requests of one call."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from tests.engine_requests import sampling_of
from tidegate.gateway.calls import build_requests, new_id, new_seed
from tidegate.gateway.dialects.base import AnswerHead, Dialect
from tidegate.gateway.dialects.chat import Chat
from tidegate.gateway.dialects.completions import Completions
from tidegate.messages.codec import decode_request, encode_request
from tidegate.messages.registry import Key
from tidegate.messages.work import ChatPrompt, Request

HEAD = AnswerHead("cmpl-x", 100, "m", "r1")
ORIGIN: dict[str, Any] = {"key": Key("key_1", "ci", "acme", 0.0), "gateway": "gw-1"}


def requests_of(body: dict[str, Any], random_seed: int = 7) -> list[Request]:
    raw = orjson.dumps({"model": "m"} | body)
    dialect: Dialect = Chat() if "messages" in body else Completions()
    call = dialect.read(raw)
    return build_requests(call, HEAD, **ORIGIN, created=100.0, deadline=160.0, random_seed=random_seed)


def test_defaults_are_resolved() -> None:
    [request] = requests_of({"messages": [{"role": "user", "content": "x" * 40}]})
    assert (request.id, request.tenant, request.model, request.revision) == ("cmpl-x.0", "acme", "m", "r1")
    assert (request.created, request.deadline, request.gateway) == (100.0, 160.0, "gw-1")
    assert request.work.prompt == ChatPrompt([{"role": "user", "content": "x" * 40}])
    assert (sampling_of(request).seed, sampling_of(request).max_tokens) == (7, None)
    assert (sampling_of(request).temperature, sampling_of(request).top_p, sampling_of(request).stop) == (
        1.0,
        1.0,
        (),
    )
    assert request.cost == 10 + 4 + 256


def test_one_stop_text_is_a_list_of_one() -> None:
    [request] = requests_of({"prompt": "x", "stop": "END"})
    assert sampling_of(request).stop == ("END",)


def test_costs_count_input_and_output() -> None:
    assert requests_of({"prompt": [1, 2, 3], "max_tokens": 5})[0].cost == 8
    assert requests_of({"prompt": "x" * 8, "max_tokens": 5})[0].cost == 8


@given(
    prompts=st.integers(1, 5),
    n=st.integers(1, 5),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_choices_have_seeds_of_their_own_that_fit_and_ids_follow_openais_order(
    prompts: int, n: int, seed: int
) -> None:
    requests = requests_of({"prompt": [f"p{i}" for i in range(prompts)], "n": n, "seed": seed})
    assert [request.id for request in requests] == [f"cmpl-x.{i}" for i in range(prompts * n)]
    seeds = [sampling_of(request).seed for request in requests]
    assert len(set(seeds[:n])) == n
    assert seeds == seeds[:n] * prompts
    assert all(0 <= value < 2**63 for value in seeds)
    assert [request.work.prompt for request in requests] == [
        requests[i * n].work.prompt for i in range(prompts) for _ in range(n)
    ]
    assert [decode_request(encode_request(request)) for request in requests] == requests


def test_ids_and_seeds_are_new_each_time() -> None:
    assert len({new_id() for _ in range(100)}) == 100
    assert len(new_id()) == 22
    assert len({new_seed() for _ in range(100)}) == 100
