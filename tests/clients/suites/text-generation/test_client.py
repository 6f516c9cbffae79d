"""The client of text-generation-inference, as its README uses it."""

from __future__ import annotations

import os

import pytest
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar

PROMPT = "<|im_start|>user\nCount from 1 to 10.<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
URL = f"{os.environ['CLIENTS_URL']}/models/{os.environ['CLIENTS_MODEL']}"
HEADERS = {"Authorization": f"Bearer {os.environ['CLIENTS_KEY']}"}


@pytest.fixture
def client() -> Client:
    return Client(URL, headers=HEADERS, timeout=60)


def test_generate(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=64, decoder_input_details=True)

    assert ANSWER in answer.generated_text
    assert answer.details.finish_reason in ("eos_token", "stop_sequence")
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert (
        "".join(token.text for token in answer.details.tokens if not token.special) == answer.generated_text
    )
    assert all(token.logprob is not None and token.logprob <= 0 for token in answer.details.tokens)
    assert [token.text for token in answer.details.prefill][1:3] == ["user", "\n"]
    assert answer.details.prefill[0].logprob is None
    assert all(token.logprob < 0 for token in answer.details.prefill[1:] if token.logprob is not None)


def test_generate_ends_with_its_length(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=3, seed=7, do_sample=True, temperature=0.5)

    assert answer.details.finish_reason == "length"
    assert answer.details.generated_tokens == 3
    assert answer.details.seed == 7


def test_generate_ends_with_a_stop_sequence(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=64, stop_sequences=[" 4"], return_full_text=True)

    assert answer.generated_text.startswith(PROMPT)
    assert answer.generated_text.endswith("3, 4")
    assert answer.details.finish_reason == "stop_sequence"


def test_generate_tells_the_likeliest_tokens(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=4, top_n_tokens=3)

    assert [len(tokens) for tokens in answer.details.top_tokens] == [3] * 4
    for token, likeliest in zip(answer.details.tokens, answer.details.top_tokens, strict=True):
        assert token.id == likeliest[0].id


def test_generate_under_a_grammar(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=8, grammar=Grammar(type="regex", value="[a-c]{3}"))

    assert len(answer.generated_text) == 3
    assert set(answer.generated_text) <= set("abc")


def test_generate_stream(client: Client) -> None:
    parts = list(client.generate_stream(PROMPT, max_new_tokens=64))

    assert ANSWER in "".join(part.token.text for part in parts if not part.token.special)
    *before, last = parts
    assert all(part.generated_text is None and part.details is None for part in before)
    assert ANSWER in last.generated_text
    assert last.details.generated_tokens == len(parts)
    assert last.details.finish_reason in ("eos_token", "stop_sequence")


async def test_generate_stream_async() -> None:
    client = AsyncClient(URL, headers=HEADERS, timeout=60)
    whole = await client.generate(PROMPT, max_new_tokens=64)
    text = ""
    async for part in client.generate_stream(PROMPT, max_new_tokens=64):
        if not part.token.special:
            text += part.token.text

    assert text == whole.generated_text
    assert ANSWER in text


def test_chat(client: Client) -> None:
    answer = client.chat([{"role": "user", "content": "Count from 1 to 10."}], max_tokens=64, temperature=0)

    assert ANSWER in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage["completion_tokens"] > 10


def test_chat_stream(client: Client) -> None:
    messages = [{"role": "user", "content": "Count from 1 to 10."}]
    chunks = client.chat(messages, max_tokens=64, temperature=0, stream=True)

    assert ANSWER in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_chat_calls_a_tool(client: Client) -> None:
    function = {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    answer = client.chat(
        [{"role": "user", "content": "What is the weather in Paris?"}],
        max_tokens=64,
        temperature=0,
        tools=[{"type": "function", "function": function}],
        tool_choice="auto",
    )

    (call,) = answer.choices[0].message.tool_calls
    assert call["function"]["name"] == "get_weather"
    assert "Paris" in str(call["function"]["arguments"])


def test_a_wrong_parameter_is_the_clients_own_error() -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        Client(URL, headers=HEADERS, timeout=60).generate(PROMPT, max_new_tokens=-1)
