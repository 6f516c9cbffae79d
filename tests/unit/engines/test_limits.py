from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.limits import completion_limit
from tidegate.messages.work import Finish

counts = st.integers(0, 3000)


@given(counts, st.none() | counts, st.integers(1, 2048))
def test_prompt_and_completion_never_exceed_the_context(
    prompt: int, max_tokens: int | None, context: int
) -> None:
    limit = completion_limit(prompt, max_tokens, context)
    if isinstance(limit, Finish):
        assert limit.code == "ContextLengthExceeded"
        assert prompt + (1 if max_tokens is None else max_tokens) > context
    else:
        assert prompt + limit <= context
        assert max_tokens is None or limit == max_tokens


def test_the_refusals_are_worded_as_openais() -> None:
    too_long = completion_limit(3000, None, 2048)
    assert isinstance(too_long, Finish)
    assert too_long.message == (
        "This model's maximum context length is 2048 tokens. However, your messages resulted in 3000 tokens. "
        "Please reduce the length of the messages."
    )
    too_much = completion_limit(2000, 100, 2048)
    assert isinstance(too_much, Finish)
    assert too_much.message == (
        "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens (2000 in the "
        "messages, 100 in the completion). Please reduce the length of the messages or completion."
    )
