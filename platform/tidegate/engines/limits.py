"""Bounds the tokens that a request may generate, and refuses it where its prompt leaves no room."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.messages.work import ChatPrompt, Finish, Generate, Sampling


def truncated(
    ids: Sequence[int], sampling: Sampling, context_length: int, *, has_encoder: bool = False
) -> Sequence[int]:
    """Keep the last tokens of a prompt, as many as the request says. See `completion_limit`."""
    keep = sampling.truncate_prompt
    if keep is None:
        return ids
    if keep < 0:
        wanted = None if sampling.clips_limit else sampling.max_tokens
        answer = 1 if wanted is None else wanted
        keep = context_length if has_encoder else max(1, context_length - answer)
    return ids[-keep:]


def completion_limit(
    prompt_tokens: int, work: Generate, context_length: int, *, has_encoder: bool = False
) -> int | Finish:
    """Return the most tokens to generate, or the error that refuses the request, worded as OpenAI's API does.

    `max_tokens` None means up to the context length, of which at least one token must be left. With an
    encoder, prompt and answer have the context length each.
    """
    max_tokens = work.sampling.max_tokens
    what = "messages" if isinstance(work.prompt, ChatPrompt) else "prompt"
    shares_room = not has_encoder or prompt_tokens > context_length
    room = context_length - prompt_tokens if shares_room else context_length
    if max_tokens is not None and max_tokens <= room:
        return max_tokens
    if max_tokens is None or work.sampling.clips_limit:
        if room >= 1:
            return room
        asked = f"your {what} resulted in {prompt_tokens} tokens. Please reduce the length of the {what}."
    else:
        asked = (
            f"you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {what}, "
            f"{max_tokens} in the completion). Please reduce the length of the {what} or completion."
        )
    return refusal(
        "ContextLengthExceeded",
        f"This model's maximum context length is {context_length} tokens"
        f"{f', for the {what} and for the answer each' if has_encoder else ''}. However, {asked}",
        prompt_tokens,
    )


def proved_too_long(characters: int, most_characters_per_token: int, context_length: int) -> Finish | None:
    """Refuse a text whose length alone proves that its tokens exceed the context, before they are counted.
    `most_characters_per_token` 0 proves nothing."""
    if characters <= most_characters_per_token * context_length or not most_characters_per_token:
        return None
    return refusal(
        "ContextLengthExceeded",
        f"This model's maximum context length is {context_length} tokens. However, your prompt has "
        f"{characters} characters, which are at least {-(-characters // most_characters_per_token)} tokens. "
        "Please reduce its length.",
    )


def refusal(code: str, message: str, prompt_tokens: int = 0) -> Finish:
    """Make the finish of a request that cannot run."""
    return Finish("error", code=code, message=message, prompt_tokens=prompt_tokens)
