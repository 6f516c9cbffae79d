"""The shipped weights: they load, they are small, they answer, and their tokenizer loses nothing."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.demo import DemoModel, model_path, tools
from tidegate.demo.corpus import held_out, is_correct
from tidegate.demo.curriculum import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PER_FAMILY = 3
SHIPPED: tuple[DemoModel, ...] = ("tide-demo", "tide-demo-gptq")


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    # Two threads on cores shared with other tests wait for each other far longer than they save.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_path("tide-demo"))


def test_the_bf16_model_answers_held_out_questions_of_every_family(threads: None) -> None:
    from tidegate.demo.evaluate import answers, load

    model, tokenizer = load(model_path("tide-demo"))
    asked = [example for family in FAMILIES for example in held_out(family, PER_FAMILY)]
    given_answers = list(answers(model, tokenizer, asked))
    right = [
        example.family
        for example, answer in zip(asked, given_answers, strict=True)
        if is_correct(example, answer)
    ]
    # Rounding differs between CPUs, so one question of a family may tip over; a whole family may not.
    assert set(right) == set(FAMILIES)
    assert len(right) >= 0.9 * len(asked)


def test_the_shipped_files_stay_below_25_megabytes() -> None:
    files = [file for name in SHIPPED for file in model_path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_both_checkpoints_are_complete(name: DemoModel) -> None:
    folder = model_path(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == 1024
    assert ("quantization_config" in config) == (name == "tide-demo-gptq")
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / file).is_file()


@settings(deadline=None)
@given(text=st.text())
def test_the_tokenizer_is_lossless(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


@settings(deadline=None)
@given(number=st.integers(0, 10**12))
def test_digits_are_single_tokens(tokenizer: Any, number: int) -> None:
    assert len(tokenizer.encode(str(number))) == len(str(number))


def test_quoted_words_are_read_letter_by_letter(tokenizer: Any) -> None:
    assert tokenizer.tokenize('Reverse "tide"')[-6:] == ['Ġ"', "t", "i", "d", "e", '"']


def test_the_chat_template_renders_turns_and_refuses_roles_that_are_unknown_or_misplaced(
    tokenizer: Any,
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    more = [chat[0], {"role": "system", "content": "Be kind."}, chat[1]]
    assert tokenizer.apply_chat_template(
        more, tokenize=False, add_generation_prompt=True
    ) == rendered.replace("<|im_start|>user", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    with pytest.raises(Exception, match="unknown role 'robot'"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)
    with pytest.raises(Exception, match="must be the first"):
        tokenizer.apply_chat_template(chat[::-1], tokenize=False)


def test_the_chat_template_writes_tools_and_calls_as_the_model_learned_them(tokenizer: Any) -> None:
    offered = [
        tools.Tool("get_weather", {"city": "string", "days": "integer"}, "Get the weather."),
        tools.Tool("now", {}, "The time."),
    ]
    arguments: dict[str, str | int | bool] = {"city": "Zürich", "days": 2}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "How is it?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "fine"},
    ]

    def rendered(messages: list[dict[str, Any]]) -> str:
        definitions = [tool.definition() for tool in offered]
        return str(
            tokenizer.apply_chat_template(
                messages, tools=definitions, tokenize=False, add_generation_prompt=True
            )
        )

    called = tools.call("get_weather", arguments)
    turns = (
        f"<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n{called}<|im_end|>\n"
        "<|im_start|>tool\nfine<|im_end|>\n<|im_start|>assistant\n"
    )
    system = tools.offer(offered)["content"]
    assert rendered(chat) == f"<|im_start|>system\n{system}<|im_end|>\n{turns}"
    system = tools.offer(offered, "Be brief.")["content"]
    brief = {"role": "system", "content": "Be brief."}
    assert rendered([brief, *chat]) == f"<|im_start|>system\n{system}<|im_end|>\n{turns}"
