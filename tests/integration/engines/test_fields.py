"""What vLLM's fields do to one request, measured against plain transformers."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import EOS, VOCABULARY
from tests.engine_requests import Result, a_request, run_one, run_steps
from tidegate.engines.base import Engine, Prepared
from tidegate.messages.work import (
    ChatPrompt,
    Detokenize,
    Finish,
    Generate,
    Prompt,
    Request,
    TextPrompt,
    Tokenize,
    TokenPrompt,
    Tokens,
)

PROMPT = "The gate opens when"
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The gate"}]
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% for document in documents or [] %}<{{ document['title'] }}>{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}no thoughts\n{% endif %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain(checkpoints: Callable[[str], Path]) -> tuple[Any, Any]:
    """The model and the tokenizer, as transformers alone loads them."""
    folder = checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def asking(prompt: Prompt, **sampling: Any) -> Request:
    request = a_request("r", "", **sampling)
    assert isinstance(request.work, Generate)
    return replace(request, work=replace(request.work, prompt=prompt))


def prepared(engine: Engine, request: Request) -> Prepared | Tokens | Finish:
    return asyncio.run(engine.prepare(request))


def generated(plain: tuple[Any, Any], tokens: list[int], count: int, **options: Any) -> list[int]:
    """Greedy, and past end tokens."""
    model, _ = plain
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    with torch.inference_mode():
        out = model.generate(torch.tensor([tokens]), max_new_tokens=count, min_new_tokens=count, **options)
    found: list[int] = out[0, len(tokens) :].tolist()
    return found


def shown(result: Result) -> Tokens:
    return result.log[0].output


def test_prompt_logprobs_and_ranks_are_those_of_the_plain_forward_pass(
    llama: Engine, plain: tuple[Any, Any]
) -> None:
    model, tokenizer = plain
    ids = tokenizer(PROMPT)["input_ids"]
    result = run_one(llama, a_request("r", PROMPT, max_tokens=3, prompt_logprobs=2, returns_prompt_ids=True))
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    first, *others = shown(result).prompt_logprobs
    assert shown(result).prompt_ids == ids
    assert (first.token_id, first.logprob, first.top) == (ids[0], None, [])
    assert [entry.token_id for entry in others] == ids[1:]
    for place, entry in enumerate(others):
        assert entry.logprob is not None
        assert math.isclose(entry.logprob, float(expected[place, entry.token_id]), abs_tol=1e-4)
        assert entry.rank == int((expected[place] > expected[place, entry.token_id]).sum()) + 1
        assert [other for other, *_ in entry.top] == expected[place].topk(2).indices.tolist()
    assert result.tokens == generated(plain, ids, 3)
    assert result.logprobs == []
    assert all(segment.output.prompt_logprobs == [] for segment in result.log[1:])


def test_a_prompt_is_shown_once_however_many_replicas_answer(llama: Engine) -> None:
    request = a_request("r", PROMPT, max_tokens=8, prompt_logprobs=0, returns_prompt_ids=True, top_logprobs=1)
    whole = run_one(llama, request)
    begun = run_steps(llama, request, 3)
    rest = run_one(llama, request, begun.log)
    assert begun.tokens + rest.tokens == whole.tokens
    assert shown(begun).prompt_ids == shown(whole).prompt_ids
    assert [entry.token_id for entry in shown(begun).prompt_logprobs] == shown(whole).prompt_ids
    assert all(not s.output.prompt_ids and not s.output.prompt_logprobs for s in rest.log)


def test_a_prompt_of_one_token_has_nothing_before_it(llama: Engine) -> None:
    result = run_one(llama, asking(TokenPrompt([5]), max_tokens=2, prompt_logprobs=1))
    [only] = shown(result).prompt_logprobs
    assert (only.token_id, only.logprob, only.rank) == (5, None, 0)


def test_only_allowed_tokens_come(llama: Engine, plain: tuple[Any, Any]) -> None:
    ids = plain[1](PROMPT)["input_ids"]
    allowed = [20, 21, 300, 301, 302]
    result = run_one(llama, a_request("r", PROMPT, max_tokens=12, allowed_token_ids=tuple(allowed)))
    expected = generated(plain, ids, 12, prefix_allowed_tokens_fn=lambda *_: allowed)
    assert result.tokens == expected
    drawn = a_request("r", PROMPT, max_tokens=12, temperature=2.0, allowed_token_ids=tuple(allowed))
    assert set(run_one(llama, drawn).tokens) <= set(allowed)


def test_a_bad_words_last_token_never_comes_behind_its_others(llama: Engine, plain: tuple[Any, Any]) -> None:
    _, tokenizer = plain
    ids = tokenizer(PROMPT)["input_ids"]
    free = generated(plain, ids, 20)
    words = [tokenizer.decode(free[3:4]), tokenizer.decode(free[6:8])]
    spelled = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in words]
    spelled += [tokenizer(" " + form.lstrip(), add_special_tokens=False)["input_ids"] for form in words]
    result = run_one(llama, a_request("r", PROMPT, max_tokens=20, bad_words=tuple(words)))
    assert result.tokens != free
    for word in words:
        banned = tokenizer(word.lstrip(), add_special_tokens=False)["input_ids"]
        spans = [result.tokens[at : at + len(banned)] for at in range(len(result.tokens))]
        assert banned not in spans
    ours = prepared(llama, a_request("r", PROMPT, bad_words=tuple(words)))
    assert isinstance(ours, Prepared)
    banned_ids = [list(word) for word in ours.bad_words]
    assert result.tokens == generated(plain, ids, 20, bad_words_ids=banned_ids)


def test_a_bad_word_counts_in_a_prompt_of_tokens_too(llama: Engine, plain: tuple[Any, Any]) -> None:
    ids = plain[1](PROMPT)["input_ids"]
    free = generated(plain, ids, 1)
    word = plain[1].decode(free)
    result = run_one(llama, asking(TokenPrompt(ids), max_tokens=5, bad_words=(word,)))
    assert result.tokens[0] != free[0]


@pytest.mark.parametrize("keep", [1, 4, 200])
@pytest.mark.parametrize("form", ["text", "tokens", "chat"])
def test_a_truncated_prompt_is_its_end(llama: Engine, plain: tuple[Any, Any], keep: int, form: str) -> None:
    tokenizer = plain[1]
    text = PROMPT * 3
    chat = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer(text)["input_ids"]
    prompt: Prompt = TextPrompt(text)
    if form == "tokens":
        prompt = TokenPrompt(ids)
    elif form == "chat":
        prompt = ChatPrompt(chat)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    result = run_one(llama, asking(prompt, max_tokens=5, truncate_prompt=keep, returns_prompt_ids=True))
    assert shown(result).prompt_ids == ids[-keep:]
    assert result.tokens == generated(plain, ids[-keep:], 5)


def test_a_prompt_above_the_context_is_cut_to_what_fits(llama: Engine, plain: tuple[Any, Any]) -> None:
    text = PROMPT * 500
    ids = plain[1](text)["input_ids"]
    too_long = prepared(llama, a_request("r", text, max_tokens=6))
    assert isinstance(too_long, Finish) and too_long.code == "ContextLengthExceeded"
    result = run_one(llama, a_request("r", text, max_tokens=6, truncate_prompt=-1, returns_prompt_ids=True))
    assert shown(result).prompt_ids == ids[-(256 - 6) :]
    assert len(result.tokens) == 6


def test_the_echo_of_a_truncated_prompt_is_what_is_left(llama: Engine, plain: tuple[Any, Any]) -> None:
    ids = plain[1](PROMPT)["input_ids"]
    result = run_one(llama, a_request("r", PROMPT, max_tokens=0, echo=True, truncate_prompt=2))
    assert result.text == plain[1].decode(ids[-2:])


def test_special_tokens_around_a_prompt(
    llama: Engine, plain: tuple[Any, Any], load: Any, tmp_path: Path
) -> None:
    """A tokenizer that puts `<s>` before a text does not where it is told so."""
    folder = shutil.copytree(Path(plain[1].name_or_path), tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    engine = load(folder)
    bare = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    for prompt, expected in (
        (TextPrompt(PROMPT), [tokenizer.bos_token_id, *bare]),
        (TextPrompt(PROMPT, add_special_tokens=False), bare),
    ):
        made = prepared(engine, asking(prompt))
        assert isinstance(made, Prepared) and list(made.prompt) == expected
    written = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    chat = tokenizer(written, add_special_tokens=False)["input_ids"]
    for wanted, expected in ((False, chat), (True, [tokenizer.bos_token_id, *chat])):
        made = prepared(engine, asking(ChatPrompt(CHAT, add_special_tokens=wanted)))
        assert isinstance(made, Prepared) and list(made.prompt) == expected


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (
            {"add_generation_prompt": False, "continue_final_message": True},
            {"continue_final_message": True},
        ),
        (
            {"template_args": {"enable_thinking": False}},
            {"add_generation_prompt": True, "enable_thinking": False},
        ),
        (
            {"template_args": {"documents": [{"title": "Tides"}], "unknown": {"a": [1]}}},
            {"add_generation_prompt": True, "documents": [{"title": "Tides"}]},
        ),
    ],
)
def test_the_template_writes_what_transformers_lets_it_write(
    plain: tuple[Any, Any], load: Any, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    folder = shutil.copytree(Path(plain[1].name_or_path), tmp_path / "template")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    made = prepared(load(folder), asking(ChatPrompt(CHAT, **changes)))
    expected = tokenizer.apply_chat_template(CHAT, return_dict=False, **options)
    assert isinstance(made, Prepared) and list(made.prompt) == expected


def test_special_tokens_are_shown_where_asked_for(llama: Engine, plain: tuple[Any, Any]) -> None:
    _, tokenizer = plain
    bias = tuple((token, 100.0) for token in range(3))  # <pad>, <s>, </s>
    request = a_request("r", PROMPT, max_tokens=6, logit_bias=bias, skips_special=False, top_logprobs=0)
    result = run_one(llama, request)
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=False) != ""
    assert b"".join(entry.raw for entry in result.logprobs).decode() == result.text
    assert run_one(llama, a_request("r", PROMPT, max_tokens=6, logit_bias=bias)).text == ""
    stopped = run_one(llama, replace_sampling(request, stop=(tokenizer.decode(result.tokens[1:2]),)))
    assert len(stopped.tokens) < 6


def replace_sampling(request: Request, **changes: Any) -> Request:
    assert isinstance(request.work, Generate)
    return replace(request, work=replace(request.work, sampling=replace(request.work.sampling, **changes)))


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_stop_string_is_kept_where_asked_for(llama: Engine, steps: int) -> None:
    text = run_one(llama, a_request("r", PROMPT, max_tokens=40)).text
    stop = text[12:17]
    request = a_request("r", PROMPT, max_tokens=40, stop=(stop,), includes_stop=True)
    begun = run_steps(llama, request, steps) if steps else Result()
    rest = run_one(llama, request, begun.log)
    assert begun.text + rest.text == text[: text.index(stop) + len(stop)]
    assert rest.finish is not None and rest.finish.reason == "stop"
    assert rest.finish.stopped_by == stop


@pytest.mark.parametrize(
    ("fields", "shows"),
    [
        ({}, ""),
        ({"includes_stop": True}, ""),
        ({"skips_special": False}, ""),
        ({"includes_stop": True, "skips_special": False}, "</s>"),
    ],
)
def test_an_end_token_is_shown_where_both_were_asked_for(
    llama: Engine, fields: dict[str, Any], shows: str
) -> None:
    request = a_request("r", PROMPT, max_tokens=9, ignore_eos=False, allowed_token_ids=(EOS,), **fields)
    result = run_one(llama, request)
    assert (result.tokens, result.text) == ([EOS], shows)
    assert result.finish is not None and result.finish.reason == "stop"


def test_a_stop_token_of_the_request_is_shown_with_its_text(llama: Engine, plain: tuple[Any, Any]) -> None:
    first, second = run_one(llama, a_request("r", PROMPT, max_tokens=2)).tokens
    for keeps, tokens in ((False, [first]), (True, [first, second])):
        request = a_request("r", PROMPT, max_tokens=9, stop_token_ids=(second,), includes_stop=keeps)
        assert run_one(llama, request).text == plain[1].decode(tokens)


@pytest.mark.parametrize("steps", [0, 3, 8])
def test_a_stop_string_among_the_least_tokens_is_passed_over(llama: Engine, steps: int) -> None:
    whole = run_one(llama, a_request("r", PROMPT, max_tokens=40))
    pieces = [segment.output.text for segment in whole.log]
    least = 6
    stop = "".join(pieces)[2:5]  # complete within the first tokens
    request = a_request("r", PROMPT, max_tokens=40, stop=(stop,), min_tokens=least)
    begun = run_steps(llama, request, steps) if steps else Result()
    rest = run_one(llama, request, begun.log)
    tokens, text = begun.tokens + rest.tokens, begun.text + rest.text
    assert tokens == whole.tokens[: len(tokens)] and len(tokens) > least
    searched = len("".join(pieces[:least]))
    later = whole.text.find(stop, max(0, searched + 1 - len(stop)))
    assert text == (whole.text if later < 0 else whole.text[:later])


def test_the_answer_to_a_continued_message_keeps_its_first_space(
    llama: Engine, plain: tuple[Any, Any]
) -> None:
    continued = ChatPrompt(CHAT, add_generation_prompt=False, continue_final_message=True)
    result = run_one(llama, asking(continued, max_tokens=6))
    ids = plain[1].apply_chat_template(CHAT, continue_final_message=True, return_dict=False)
    expected = generated(plain, ids, 6)
    assert result.tokens == expected
    assert result.text == plain[1].decode(ids + expected)[len(plain[1].decode(ids)) :]


@pytest.mark.parametrize("prompt", [TextPrompt(PROMPT), TextPrompt(""), ChatPrompt(CHAT)])
def test_tokenize_answers_without_a_step(llama: Engine, plain: tuple[Any, Any], prompt: Any) -> None:
    _, tokenizer = plain
    if isinstance(prompt, ChatPrompt):
        expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    else:
        expected = tokenizer(prompt.text)["input_ids"]
    request = replace(a_request("r", ""), work=Tokenize(prompt, has_strings=True))
    answer = prepared(llama, request)
    assert isinstance(answer, Tokens)
    assert answer.prompt_ids == expected
    strings = [entry.token for entry in answer.prompt_logprobs]
    assert strings == tokenizer.convert_ids_to_tokens(expected)
    assert not llama.has_work()


def test_tokenize_counts_what_is_longer_than_the_context(llama: Engine, plain: tuple[Any, Any]) -> None:
    text = PROMPT * 200
    answer = prepared(llama, replace(a_request("r", ""), work=Tokenize(TextPrompt(text))))
    assert isinstance(answer, Tokens)
    assert answer.prompt_ids == plain[1](text)["input_ids"]
    assert len(answer.prompt_ids) > 256 and answer.prompt_logprobs == []


def test_detokenize_shows_every_token(llama: Engine, plain: tuple[Any, Any]) -> None:
    for ids in ([], [1, 70, 300, 2], plain[1](PROMPT)["input_ids"]):
        answer = prepared(llama, replace(a_request("r", ""), work=Detokenize(TokenPrompt(ids))))
        assert isinstance(answer, Tokens)
        assert answer.text == (plain[1].decode(ids, skip_special_tokens=False) if ids else "")
    beyond = prepared(llama, replace(a_request("r", ""), work=Detokenize(TokenPrompt([VOCABULARY]))))
    assert isinstance(beyond, Finish)
    assert str(VOCABULARY) in beyond.message


@pytest.mark.parametrize("field", ["allowed_token_ids", "stop_token_ids"])
def test_a_named_token_that_the_model_has_not_is_refused(llama: Engine, field: str) -> None:
    refused = prepared(llama, a_request("r", PROMPT, **{field: (1, VOCABULARY)}))
    assert isinstance(refused, Finish) and refused.code == "InvalidPrompt"
    assert refused.message.startswith(f"{field}: token id {VOCABULARY} ")
