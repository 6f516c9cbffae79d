from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.engines.limits import completion_limit, proved_too_long, truncated
from tidegate.messages.work import ChatPrompt, Finish, Generate, Prompt, Sampling, TextPrompt

counts = st.integers(0, 3000)
CHAT = ChatPrompt([])


def asks(max_tokens: int | None, prompt: Prompt = CHAT) -> Generate:
    return Generate(prompt, Sampling(seed=1, max_tokens=max_tokens))


@given(counts, st.none() | counts, st.integers(1, 2048))
def test_prompt_and_completion_never_exceed_the_context(
    prompt: int, max_tokens: int | None, context: int
) -> None:
    limit = completion_limit(prompt, asks(max_tokens), context)
    if isinstance(limit, Finish):
        assert limit.code == "ContextLengthExceeded"
        assert prompt + (1 if max_tokens is None else max_tokens) > context
    else:
        assert prompt + limit <= context
        assert max_tokens is None or limit == max_tokens


@given(counts, counts, st.integers(1, 2048))
def test_a_limit_that_may_be_clipped_is_what_there_is_room_for(
    prompt: int, max_tokens: int, context: int
) -> None:
    work = Generate(CHAT, Sampling(seed=1, max_tokens=max_tokens, clips_limit=True))
    limit = completion_limit(prompt, work, context)
    if isinstance(limit, Finish):
        assert prompt >= context
        assert f"resulted in {prompt} tokens" in limit.message  # nobody has asked for the others
    else:
        assert limit == min(max_tokens, context - prompt)


@given(counts, st.none() | counts, st.integers(1, 2048))
def test_with_an_encoder_prompt_and_completion_have_the_context_each(
    prompt: int, max_tokens: int | None, context: int
) -> None:
    limit = completion_limit(prompt, asks(max_tokens), context, has_encoder=True)
    if isinstance(limit, Finish):
        assert limit.code == "ContextLengthExceeded"
        assert prompt > context or (max_tokens or 0) > context
    else:
        assert prompt <= context
        assert limit == (context if max_tokens is None else max_tokens) <= context


@given(counts, st.integers(0, 20), st.integers(1, 200))
def test_characters_prove_too_many_tokens_only_where_even_the_longest_do_not_fit(
    characters: int, most: int, context: int
) -> None:
    proved = proved_too_long(characters, most, context)
    assert (proved is not None) is (most > 0 and characters / most > context)
    assert proved is None or proved.code == "ContextLengthExceeded"


def test_the_refusals_are_worded_as_openais() -> None:
    too_long = completion_limit(3000, asks(None), 2048)
    assert isinstance(too_long, Finish)
    assert too_long.message == (
        "This model's maximum context length is 2048 tokens. However, your messages resulted in 3000 tokens. "
        "Please reduce the length of the messages."
    )
    proved = proved_too_long(5_000_000, 128, 8192)
    assert proved is not None
    assert proved.message == (
        "This model's maximum context length is 8192 tokens. However, your prompt has 5000000 characters, "
        "which are at least 39063 tokens. Please reduce its length."
    )
    too_much = completion_limit(2000, asks(100), 2048)
    assert isinstance(too_much, Finish)
    assert too_much.message == (
        "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens (2000 in the "
        "messages, 100 in the completion). Please reduce the length of the messages or completion."
    )


def test_a_prompt_is_not_called_messages() -> None:
    too_long = completion_limit(3000, asks(None, TextPrompt("")), 2048)
    too_much = completion_limit(2000, asks(100, TextPrompt("")), 2048)
    assert isinstance(too_long, Finish) and isinstance(too_much, Finish)
    assert "your prompt resulted in 3000 tokens. Please reduce the length of the prompt." in too_long.message
    assert "(2000 in the prompt, 100 in the completion)" in too_much.message
    assert "messages" not in too_long.message + too_much.message


@given(counts, st.none() | st.integers(0, 3000), st.integers(1, 2048), st.none() | st.integers(-1, 3000))
def test_a_truncated_prompt_keeps_its_end_and_with_minus_one_always_fits(
    count: int, max_tokens: int | None, context: int, keep: int | None
) -> None:
    keep = keep or None
    kept = truncated(range(count), Sampling(seed=1, max_tokens=max_tokens, truncate_prompt=keep), context)
    assert list(kept) == list(range(count))[count - len(kept) :]
    if keep is None:
        assert len(kept) == count
    elif keep > 0:
        assert len(kept) == min(keep, count)
    elif max_tokens is None or max_tokens < context:
        assert isinstance(completion_limit(len(kept), asks(max_tokens), context), int) or context == 1
        assert len(kept) == min(count, max(1, context - (1 if max_tokens is None else max_tokens)))
