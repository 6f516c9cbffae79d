"""Turns a request's prompt into token ids, with the checkpoint's own chat template and tokenizer.

A prompt of any kind is what the client wrote, behind what the tokenizer puts before a text: an end token that
some tokenizers put after every text would end the prompt before it goes on, and a start token that the client
or the template wrote is not put there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tidegate.engines.transformers import chat_templates
from tidegate.engines.transformers.chat_templates import MessagesRefused, TemplateFault
from tidegate.engines.transformers.formats import is_built_in
from tidegate.errors import MOST_CHARACTERS, shortened
from tidegate.messages.work import (
    ChatPrompt,
    Embed,
    Generate,
    PairPrompt,
    Prompt,
    Request,
    Score,
    TextPrompt,
    TokenPrompt,
)
from tidegate.replica_args import CHAT_FORMATS

# Formats are not guessed from a model's name: a wrong one answers badly and says nothing.
CHAT_REMEDY = (
    "set spec.chatTemplate of its Model to the format that it was trained on "
    f"({', '.join(CHAT_FORMATS)}), or to the text of a template"
)


class PromptError(Exception):
    """The prompt cannot be rendered. The message is for the client."""

    def __init__(self, message: str, code: str = "InvalidPrompt") -> None:
        super().__init__(message)
        self.code = code


def check_token_ids(request: Request, tokenizer: Any, vocabulary_size: int) -> None:
    """Refuse token ids that the model has not. Raises `PromptError`."""
    named_by: dict[str, Sequence[int]] = {}
    if isinstance(request.work, Generate):
        sampling = request.work.sampling
        named_by = {
            "logit_bias": [token for token, _ in sampling.logit_bias],
            "stop_token_ids": sampling.stop_token_ids,
            "allowed_token_ids": sampling.allowed_token_ids,
        }
    for name, named in named_by.items():
        if (highest := max(named, default=0)) >= vocabulary_size:
            raise PromptError(
                f"{name}: token id {highest} is outside the vocabulary of {vocabulary_size} tokens."
            )
    if isinstance(request.work.prompt, TokenPrompt):
        check_known(request.work.prompt.token_ids, tokenizer, vocabulary_size)


def check_no_prompt_asked(request: Request) -> None:
    """Refuse what asks for a prompt that an encoder reads as if the answer went on from it. Raises
    `PromptError`."""
    if not isinstance(request.work, Generate):
        return
    sampling = request.work.sampling
    for name, is_asked in (
        ("echo", sampling.echo),
        ("prompt_logprobs", sampling.prompt_logprobs is not None),
    ):
        if is_asked:
            raise PromptError(
                f"{name}: {request.model!r} is an encoder-decoder. Its answer does not go on from the "
                f"prompt, whose tokens have no log probabilities; leave {name} out."
            )


def render(prompt: TextPrompt | ChatPrompt, tokenizer: Any, model: str) -> str:
    """Return the text to tokenize. Raises `PromptError`."""
    if isinstance(prompt, TextPrompt):
        return prompt.text
    if not tokenizer.chat_template:
        raise PromptError(f"The model {model!r} has no chat template: use /v1/completions, or {CHAT_REMEDY}.")
    try:
        return chat_templates.render(prompt, tokenizer)
    except TemplateFault as error:
        raise broken_template(model, str(error)) from error
    except MessagesRefused as error:
        why = shortened(str(error), MOST_CHARACTERS // 2)  # a template may raise with all of the messages
        raise PromptError(f"The chat template of {model!r} refuses these messages: {why}") from error


def tokenize(
    text: str, prompt: TextPrompt | ChatPrompt, tokenizer: Any, *, has_encoder: bool = False
) -> list[int]:
    """Return the ids of what `render` made of `prompt`. May be empty (see `usable`). A built-in format serves
    many tokenizers, so it leaves to each what that puts around a text; other templates write it. What an
    encoder reads is a whole text, which nothing goes on from: it has all of that."""
    is_framed = prompt.add_special_tokens or (isinstance(prompt, ChatPrompt) and is_built_in(tokenizer))
    if has_encoder:
        return encoded(text, tokenizer, add_special_tokens=is_framed)
    return text_ids(text, tokenizer) if is_framed else encoded(text, tokenizer)


def usable(ids: list[int], prompt: Prompt, tokenizer: Any, model: str, vocabulary_size: int) -> list[int]:
    """Return the ids, or where there are none the token that texts start from. Raises `PromptError`, also for
    one that the model has no embedding for."""
    ids = ids or start_ids(tokenizer)
    try:
        check_known(ids, tokenizer, vocabulary_size)
    except PromptError as error:
        if isinstance(prompt, ChatPrompt) and outside(ids, vocabulary_size) in plain_chat_ids(tokenizer):
            raise broken_template(model, str(error)) from error
        raise
    return ids


def check_known(ids: Sequence[int], tokenizer: Any, vocabulary_size: int) -> None:
    if (token := outside(ids, vocabulary_size)) is not None:
        raise PromptError(
            f"{known_as(token, tokenizer)} is outside the vocabulary of {vocabulary_size} tokens."
        )


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Encode a text that is to go on."""
    before, after = frame(tokenizer)
    ids = encoded(text, tokenizer)
    return [*(() if tuple(ids[: len(before)]) == before else before), *ids, *after]


@lru_cache(maxsize=4)
def frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer puts before and after a text, but for one that ends it."""
    text = encoded("a", tokenizer)
    whole = [int(token) for token in tokenizer("a")["input_ids"]]
    start = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return tuple(whole[:start]), tuple(token for token in whole[start + len(text) :] if token not in ends)


def input_ids(
    work: Embed | Score, tokenizer: Any, context_length: int, vocabulary_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Encode inputs, each whole with what the tokenizer puts around it; of pairs also which text each token
    is of. Raises `PromptError` for one that is too long and not to be cut, or holds what the model does not
    know."""
    items, first, truncate = work.prompt.items, work.prompt.first, work.truncate
    most = None if truncate is None else min(context_length, truncate if truncate > 0 else context_length)
    found = [list(item.token_ids[:most]) for item in items if isinstance(item, TokenPrompt)]
    types: list[list[int]] = []
    if not found:
        pairs = [item.pair for item in items if isinstance(item, PairPrompt)]
        is_framed = all(item.add_special_tokens for item in items if isinstance(item, TextPrompt))
        around = tokenizer.num_special_tokens_to_add(pair=bool(pairs)) if is_framed else 0
        if most is not None and most <= around:
            raise PromptError(
                f"truncate_prompt_tokens: {truncate}: send at least {around + 1}.", "TruncatedTooFar"
            )
        tokenizer.truncation_side = "right"  # whatever the checkpoint's is; nothing else cuts with it
        made = tokenizer(
            [item.text for item in items if isinstance(item, TextPrompt | PairPrompt)],
            pairs or None,
            add_special_tokens=is_framed,
            truncation=most is not None,
            max_length=most,
            return_attention_mask=False,
            return_token_type_ids=None if pairs else False,  # as the tokenizer would
            verbose=False,
        )
        found, types = made["input_ids"], made.get("token_type_ids") or []
    for place, ids in enumerate(found, first):
        if not ids:
            raise PromptError(f"Input {place} has no tokens.")
        if len(ids) > context_length:
            raise PromptError(
                f"This model's maximum context length is {context_length} tokens. However, input {place} has "
                f"{len(ids)} tokens. Please reduce its length, or send truncate_prompt_tokens.",
                "ContextLengthExceeded",
            )
        check_known(ids, tokenizer, vocabulary_size)
    return found, types


def encoded(text: str, tokenizer: Any, *, add_special_tokens: bool = False) -> list[int]:
    """Encode a text and, if not told otherwise, nothing around it."""
    found = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [int(token) for token in found["input_ids"]]


def start_ids(tokenizer: Any) -> list[int]:
    """Return the token that an empty prompt goes on from. Raises `PromptError`."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise PromptError("The prompt is empty, and the model's tokenizer has no token to start from.")
    return [int(start)]


def outside(ids: Sequence[int], vocabulary_size: int) -> int | None:
    """Return the first token that the model has no embedding for."""
    if not ids or (min(ids) >= 0 and max(ids) < vocabulary_size):
        return None
    return next(token for token in ids if not 0 <= token < vocabulary_size)


def known_as(token: int, tokenizer: Any) -> str:
    name = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    return f"Token id {token}" + (f" ({name!r})" if name is not None else "")


def plain_chat_ids(tokenizer: Any) -> list[int]:
    """Encode the least chat: what is in it, no client can leave out."""
    try:
        least = ChatPrompt([{"role": "user", "content": ""}])
        return encoded(chat_templates.render(least, tokenizer), tokenizer)
    except (TemplateFault, MessagesRefused):
        return []


def bad_word_ids(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return each word's tokens, and those that it has behind a space where these are as many but others."""
    found = []
    for word in words:
        alone, spaced = (encoded(space + word.lstrip(), tokenizer) for space in ("", " "))
        found.append(alone)
        if len(spaced) == len(alone) and spaced[:1] != alone[:1]:
            found.append(spaced)
    return [ids for ids in found if ids]


def broken_template(model: str, fault: str) -> PromptError:
    return PromptError(
        f"The chat template of the model {model!r} is broken, so it serves /v1/completions only: {fault}",
        "ChatTemplateInvalid",
    )
