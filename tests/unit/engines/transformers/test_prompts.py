"""Prompts as tokens, with real tokenizers of every habit."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from tests.checkpoints import BOS, EOS, VOCABULARY, save_tokenizer
from tests.engine_requests import a_request, prompt_ids
from tidegate.engines.transformers.prompts import PromptError, input_ids
from tidegate.messages.work import Embed, Inputs, TextPrompt

BOTH = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", BOS), ("</s>", EOS)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def tokenizer(plain: Path) -> Any:
    """A fresh one, to change."""
    return AutoTokenizer.from_pretrained(plain)


def ids(prompt: Any, tokenizer: Any, vocabulary: int = VOCABULARY) -> list[int]:
    return prompt_ids(a_request("r", prompt), tokenizer, vocabulary)


def user(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def shown(form: str | dict[str, str], messages: list[dict[str, Any]], tokenizer: Any) -> str:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = form
    return str(tokenizer.decode(ids(messages, tokenizer)))


def refused(prompt: Any, tokenizer: Any, vocabulary: int = VOCABULARY) -> PromptError:
    with pytest.raises(PromptError) as caught:
        ids(prompt, tokenizer, vocabulary)
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", [BOS, "hello"]),
        ("<s>hello", [BOS, "hello"]),
        ("<s><s>hello", [BOS, BOS, "hello"]),
        ("hello</s>", [BOS, "hello", EOS]),  # what the client wrote stays
        ("", [BOS]),
        ("</s>", [BOS, EOS]),
    ],
)
def test_a_text_begins_once_and_does_not_end(tokenizer: Any, text: str, expected: list[Any]) -> None:
    hello = tokenizer("hello")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = BOTH
    wanted = [token for item in expected for token in (hello if item == "hello" else [item])]
    assert ids(text, tokenizer) == wanted


def test_what_a_tokenizer_puts_after_a_text_to_go_on_from_stays(tokenizer: Any) -> None:
    """ChatGLM writes [gMASK] and a start token there."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <pad> <s>", "$A $B", [("<s>", BOS), ("<pad>", 0)]
    )
    assert ids("hello", tokenizer)[-2:] == [0, BOS]


def test_a_template_that_writes_the_start_token_gets_no_second(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = BOTH
    tokens = ids(user("hello"), tokenizer)
    assert (tokens.count(BOS), tokens.count(EOS)) == (1, 0)
    assert tokens == tokenizer.apply_chat_template(
        user("hello"), add_generation_prompt=True, return_dict=False
    )


def test_a_cut_or_padding_that_the_file_holds_does_not_act(plain: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    rules["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    file.write_text(json.dumps(rules))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    text = "The tide rises and falls, twice a day, and the gate opens"
    expected = AutoTokenizer.from_pretrained(plain)(text)["input_ids"]
    cutting = AutoTokenizer.from_pretrained(tmp_path)
    assert ids(text, cutting) == expected
    assert len(ids(user(text), cutting)) > len(expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_input_that_is_cut_keeps_its_first_tokens(plain: Path, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain, truncation_side=side)
    text = "The tide rises and falls, twice a day, and the gate opens"
    work = Embed(Inputs([TextPrompt(text)]), truncate=3)
    assert input_ids(work, tokenizer, 256, VOCABULARY)[0] == [tokenizer(text)["input_ids"][:3]]


@pytest.mark.parametrize(
    "prompt", ["to <tool>", user("to <tool>"), [5, VOCABULARY]], ids=["text", "chat", "ids"]
)
def test_a_token_that_the_model_does_not_know_is_named(tokenizer: Any, prompt: Any) -> None:
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    error = refused(prompt, tokenizer)
    assert error.code == "InvalidPrompt"
    assert str(error) == "Token id 512 ('<tool>') is outside the vocabulary of 512 tokens."
    assert ids(prompt, tokenizer, VOCABULARY + 1)[-1 if prompt == "to <tool>" else 0] is not None


def test_a_start_token_that_the_model_does_not_know_is_refused(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    assert "<begin>" in str(refused("", tokenizer))


def test_a_template_that_writes_what_the_model_does_not_know_is_at_fault(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<turn>", special=True)])
    tokenizer.chat_template = "<turn>{{ messages[-1]['content'] }}"
    error = refused(user("hello"), tokenizer)
    assert error.code == "ChatTemplateInvalid"
    assert "'<turn>'" in str(error)
    assert ids("hello", tokenizer)


@pytest.mark.parametrize(
    "form",
    [
        "{% for m in messages %}{{ m.content }",
        "{{ messages | no_such_filter }}",
        "{{ messages[0].content.no.such.field }}",
        "{{ messages[0].text }}",
        {"tool_use": "{{ messages[0].content }}"},
    ],
    ids=["syntax", "filter", "undefined", "shows nothing", "no default"],
)
def test_a_broken_template_is_not_the_clients_fault(tokenizer: Any, form: Any) -> None:
    tokenizer.chat_template = form
    error = refused(user("hello"), tokenizer)
    assert error.code == "ChatTemplateInvalid"
    assert str(error).startswith("The chat template of the model 'tiny' is broken")
    assert ids("hello", tokenizer)


def test_the_templates_own_sentence_reaches_the_client(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ messages[-1].content }}"
    )
    error = refused([*user("be brief", "system"), *user("hello")], tokenizer)
    assert error.code == "InvalidPrompt"
    assert str(error) == "The chat template of 'tiny' refuses these messages: System role not supported"
    assert ids(user("hello"), tokenizer)


def test_a_template_that_wants_more_than_a_question_is_not_broken(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}"
        "{{ messages[0].content }}{{ messages[1].content }}"
    )
    assert refused(user("hello"), tokenizer).code == "InvalidPrompt"
    assert tokenizer.decode(ids([*user("A", "system"), *user("B")], tokenizer)) == "AB"


def template(content: str) -> str:
    return "{% for m in messages %}[{{ m.role }}]" + content + "{% endfor %}"


EACH_PART = "{% for p in m['content'] if p.type == 'text' %}{{ p.text }}{% endfor %}"
PARTS = template(EACH_PART)
SELECTED = template(
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}"
)
FIRST = template("{{ m.content[0].text }}")
EITHER = template("{% if m.content is string %}{{ m.content }}{% else %}" + EACH_PART + "{% endif %}")
TEXT = template("{{ m.content }}")
TRIMMED = template("{{ m.content | trim }}")
# As Pixtral's: only a user's content is parts.
MIXED = template("{% if m.role == 'user' %}" + EACH_PART + "{% else %}{{ m.content + '' }}{% endif %}")


@pytest.mark.parametrize("form", [PARTS, SELECTED, FIRST, EITHER, TEXT, TRIMMED, MIXED])
@pytest.mark.parametrize("in_parts", [True, False])
def test_a_template_gets_content_in_the_form_that_it_shows(tokenizer: Any, form: str, in_parts: bool) -> None:
    said = [("system", "be brief"), ("user", "hi"), ("assistant", "ho"), ("user", "and?")]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
        for role, text in said
    ]
    expected = "".join(f"[{role}]{text}" for role, text in said)
    assert shown(form, messages, tokenizer) == expected


@pytest.mark.parametrize("form", [PARTS, TEXT])
def test_content_may_be_null_and_names_are_shown(tokenizer: Any, form: str) -> None:
    messages = [*user("hi"), *user(None, "assistant"), {**user("ho")[0], "name": "Ann"}]
    assert shown(form, messages, tokenizer) == "[user]hi[assistant][user]ho"
    named = "{% for m in messages %}{{ m.name }}: {{ m.content }};{% endfor %}"
    assert shown(named, messages[2:], tokenizer) == "Ann: ho;"


def test_of_named_templates_the_default_is_used(tokenizer: Any) -> None:
    both = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    assert shown(both, user("x"), tokenizer) == "Dx"
