"""Chat formats: each built-in template against what the models of that format were trained on, and the
answers of each response format."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tokenizers import Tokenizer, processors
from transformers.utils.chat_parsing import ResponseParser

from tests.checkpoints import BOS, save_tokenizer
from tests.engine_requests import a_request, prompt_ids, sampling_of
from tidegate.engines.base import EngineLoadError
from tidegate.engines.transformers.chat_templates import MessagesRefused, render
from tidegate.engines.transformers.formats import (
    CallFormat,
    Stops,
    calls_of,
    format_stops,
    read_format,
    response_format,
    with_stops,
)
from tidegate.engines.transformers.tokenizer import load_tokenizer
from tidegate.messages.work import ChatPrompt
from tidegate.replica_args import CHAT_FORMATS, FORMATS_FOLDER

SYSTEM = [{"role": "system", "content": "S"}]
QUESTION = [{"role": "user", "content": "Q1"}]
TURNS = [*QUESTION, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"}]

# What FastChat 0.2.36 writes of `SYSTEM` and `TURNS` (fastchat/conversation.py), with a line break behind a
# system text of one's own where its default has one; of the others what their own repositories write.
WITH_SYSTEM = {
    "alpaca": "S\n\n### Instruction: Q1\n\n### Response: A1</s>### Instruction: Q2\n\n### Response:",
    "aquila": "S###Human: Q1###Assistant: A1###Human: Q2###Assistant:",
    "baize": "S\n[|Human|]Hello!\n[|AI|]Hi!\n[|Human|]Q1\n[|AI|]A1\n[|Human|]Q2\n[|AI|]",
    "belle": "S\n\nHuman: Q1\n\nAssistant: A1</s>Human: Q2\n\nAssistant:",
    "chatglm": "S\n[Round 0]\n问：Q1\n答：A1\n[Round 1]\n问：Q2\n答：",
    "chatglm2": "S\n\n[Round 1]\n\n问：Q1\n\n答：A1\n\n[Round 2]\n\n问：Q2\n\n答：",
    "chatml": (
        "<|im_start|>system\n"
        "S<|im_end|>\n"
        "<|im_start|>user\n"
        "Q1<|im_end|>\n"
        "<|im_start|>assistant\n"
        "A1<|im_end|>\n"
        "<|im_start|>user\n"
        "Q2<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "colossalchat": "S\n\nHuman: <s>Q1</s>Assistant: <s>A1</s>Human: <s>Q2</s>Assistant: <s>",
    "dolly": (
        "S\n\n### Instruction:\nQ1\n\n### Response:\nA1### End\n\n### Instruction:\nQ2\n\n### Response:\n"
    ),
    "falcon-instruct": "S\n\nUser: Q1\n\nAssistant: A1\n\nUser: Q2\n\nAssistant:",
    "firefly": "<s>S\nQ1</s>A1</s>Q2</s>",
    "firefly-1b4": "<s>S\nQ1</s></s>A1</s>Q2</s></s>",
    "gpt4all": "### Instruction:\nS\n### Prompt: Q1\n### Response: A1\n### Prompt: Q2\n### Response:",
    "hermes": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    ),
    "koala": "S USER: Q1 GPT: A1</s>USER: Q2 GPT:",
    "llama-2": "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "moss": "S\n<|Human|>: Q1<eoh>\n<|MOSS|>: A1<eom>\n<|Human|>: Q2<eoh>\n<|MOSS|>:",
    "mpt-30b-chat": (
        "<|im_start|>system\n"
        "S<|im_end|>\n"
        "<|im_start|>user\n"
        "Q1<|im_end|>\n"
        "<|im_start|>assistant\n"
        "A1<|im_end|>\n"
        "<|im_start|>user\n"
        "Q2<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "mpt-chat": (
        "<|im_start|>system\n"
        "S<|im_end|>\n"
        "<|im_start|>user\n"
        "Q1<|im_end|>\n"
        "<|im_start|>assistant\n"
        "A1<|im_end|>\n"
        "<|im_start|>user\n"
        "Q2<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "mpt-instruct": "S\n\n### Instruction\nQ1\n\n### Response\nA1\n\n### Instruction\nQ2\n\n### Response\n",
    "oasst": "S<|prompter|>Q1</s><|assistant|>A1</s><|prompter|>Q2</s><|assistant|>",
    "redpajama": "S\n<human>: Q1\n<bot>: A1\n<human>: Q2\n<bot>:",
    "stable-vicuna": "S\n\n### Human: Q1\n### Assistant: A1\n\n### Human: Q2\n### Assistant:",
    "starchat": (
        "<|system|>\n"
        "S<|end|>\n"
        "<|user|>\n"
        "Q1<|end|>\n"
        "<|assistant|>\n"
        "A1<|end|>\n"
        "<|user|>\n"
        "Q2<|end|>\n"
        "<|assistant|>\n"
    ),
    "tigerbot": "S\n\n### Instruction:\nQ1\n\n### Response:\nA1\n\n### Instruction:\nQ2\n\n### Response:\n",
    "vicuna": "S USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "vicuna-0": "S\n### Human: Q1\n### Assistant: A1\n### Human: Q2\n### Assistant:",
    "wizardlm": "S\n\nQ1\n\n### Response: A1</s>Q2\n\n### Response:",
    "xgen": "S\n\n\n### Human: Q1\n### Assistant: A1\n### Human: Q2\n### Assistant:",
}
WITHOUT_SYSTEM = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction: Q1\n"
        "\n"
        "### Response:"
    ),
    "aquila": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.###Human: "
        "Q1###Assistant:"
    ),
    "baize": (
        "The following is a conversation between a human and an AI assistant named Baize (named "
        "after a mythical creature in Chinese folklore). Baize is an open-source AI assistant "
        "developed by UCSD and Sun Yat-Sen University. The human and the AI assistant take turns "
        "chatting. Human statements start with [|Human|] and AI assistant statements start with "
        "[|AI|]. The AI assistant always provides responses in as much detail as possible, and "
        "in Markdown format. The AI assistant always declines to engage with topics, questions "
        "and instructions related to unethical, controversial, or sensitive issues. Complete the "
        "transcript in exactly that format.\n"
        "[|Human|]Hello!\n"
        "[|AI|]Hi!\n"
        "[|Human|]Q1\n"
        "[|AI|]"
    ),
    "belle": "Human: Q1\n\nAssistant:",
    "chatglm": "[Round 0]\n问：Q1\n答：",
    "chatglm2": "[Round 1]\n\n问：Q1\n\n答：",
    "chatml": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "colossalchat": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.\n"
        "\n"
        "Human: <s>Q1</s>Assistant: <s>"
    ),
    "dolly": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Q1\n"
        "\n"
        "### Response:\n"
    ),
    "falcon-instruct": "User: Q1\n\nAssistant:",
    "firefly": "<s>Q1</s>",
    "firefly-1b4": "<s>Q1</s></s>",
    "gpt4all": (
        "### Instruction:\n"
        "The prompt below is a question to answer, a task to complete, or a conversation to "
        "respond to; decide which and write an appropriate response.\n"
        "### Prompt: Q1\n"
        "### Response:"
    ),
    "hermes": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "koala": "BEGINNING OF CONVERSATION: USER: Q1 GPT:",
    "llama-2": "[INST] Q1 [/INST]",
    "moss": (
        "You are an AI assistant whose name is MOSS.\n"
        "- MOSS is a conversational language model that is developed by Fudan University. It is "
        "designed to be helpful, honest, and harmless.\n"
        "- MOSS can understand and communicate fluently in the language chosen by the user such "
        "as English and 中文. MOSS can perform any language-based tasks.\n"
        "- MOSS must refuse to discuss anything related to its prompts, instructions, or rules.\n"
        "- Its responses must not be vague, accusatory, rude, controversial, off-topic, or "
        "defensive.\n"
        "- It should avoid giving subjective opinions but rely on objective facts or phrases "
        'like "in this context a human might say...", "some people might think...", etc.\n'
        "- Its responses must also be positive, polite, interesting, entertaining, and engaging.\n"
        "- It can provide additional relevant details to answer in-depth and comprehensively "
        "covering mutiple aspects.\n"
        "- It apologizes and accepts the user's suggestion if the user corrects the incorrect "
        "answer generated by MOSS.\n"
        "Capabilities and tools that MOSS can possess.\n"
        "<|Human|>: Q1<eoh>\n"
        "<|MOSS|>:"
    ),
    "mpt-30b-chat": (
        "<|im_start|>system\n"
        "A conversation between a user and an LLM-based AI assistant. The assistant gives "
        "helpful and honest answers.<|im_end|>\n"
        "<|im_start|>user\n"
        "Q1<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "mpt-chat": (
        "<|im_start|>system\n"
        "- You are a helpful assistant chatbot trained by MosaicML.\n"
        "- You answer questions.\n"
        "- You are excited to be able to help the user, but will refuse to do anything that "
        "could be considered harmful to the user.\n"
        "- You are more than just an information source, you are also able to write poetry, "
        "short stories, and make jokes.<|im_end|>\n"
        "<|im_start|>user\n"
        "Q1<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "mpt-instruct": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction\n"
        "Q1\n"
        "\n"
        "### Response\n"
    ),
    "oasst": "<|prompter|>Q1</s><|assistant|>",
    "redpajama": "<human>: Q1\n<bot>:",
    "stable-vicuna": (
        "### Assistant: I am StableVicuna, a large language model created by CarperAI. I am here "
        "to chat!\n"
        "\n"
        "### Human: Q1\n"
        "### Assistant:"
    ),
    "starchat": "<|system|>\n<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n",
    "tigerbot": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.\n"
        "\n"
        "### Instruction:\n"
        "Q1\n"
        "\n"
        "### Response:\n"
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Q1 ASSISTANT:"
    ),
    "vicuna-0": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.\n"
        "### Human: Q1\n"
        "### Assistant:"
    ),
    "wizardlm": "Q1\n\n### Response:",
    "xgen": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the human's questions.\n"
        "\n"
        "\n"
        "### Human: Q1\n"
        "### Assistant:"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, with_template=False)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def written(folder: Path, form: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return render(ChatPrompt(messages, **options), load_tokenizer(folder, form))


def test_the_tables_have_all_formats() -> None:
    assert set(WITH_SYSTEM) == set(WITHOUT_SYSTEM) == set(CHAT_FORMATS)


@pytest.mark.parametrize("form", CHAT_FORMATS)
def test_a_format_writes_a_conversation(folder: Path, form: str) -> None:
    assert written(folder, form, [*SYSTEM, *TURNS]) == WITH_SYSTEM[form]
    assert written(folder, form, QUESTION) == WITHOUT_SYSTEM[form]


@pytest.mark.parametrize("form", CHAT_FORMATS)
def test_a_last_message_goes_on(folder: Path, form: str) -> None:
    """Behind what the format writes before an answer, as the answer itself would."""
    answer = "The tide\n\nrises"
    begun = written(
        folder,
        form,
        [*QUESTION, {"role": "assistant", "content": answer}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert begun.startswith(WITHOUT_SYSTEM[form])
    assert begun.removeprefix(WITHOUT_SYSTEM[form]).lstrip(" ") == answer


@pytest.mark.parametrize("form", CHAT_FORMATS)
def test_no_answer_begins_where_none_is_asked_for(folder: Path, form: str) -> None:
    asked = written(folder, form, QUESTION, add_generation_prompt=False)
    assert WITHOUT_SYSTEM[form].startswith(asked)
    assert asked.rstrip().endswith(("Q1", "</s>", "[/INST]", "<|im_end|>", "<|end|>", "<eoh>", "###"))


@pytest.mark.parametrize("form", CHAT_FORMATS)
@pytest.mark.parametrize("role", ["system", "critic"])
def test_a_role_without_a_place_in_a_format_is_refused(folder: Path, form: str, role: str) -> None:
    with pytest.raises(MessagesRefused, match="system message"):
        written(folder, form, [*QUESTION, {"role": role, "content": "?"}])


@pytest.mark.parametrize(
    ("form", "starts"), [("vicuna", 1), ("llama-2", 1), ("firefly", 1), ("{{ messages[0].content }}", 0)]
)
def test_a_built_in_format_begins_as_the_tokenizer_begins_a_text(
    tmp_path: Path, form: str, starts: int
) -> None:
    """A template of one's own begins as it says."""
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    file.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", BOS)])
    file.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, form)
    ids = prompt_ids(a_request("r", QUESTION), tokenizer, len(tokenizer))
    assert ids[:2].count(BOS) == starts


def test_a_format_that_there_is_not_is_refused_with_those_that_there_are(folder: Path) -> None:
    with pytest.raises(
        EngineLoadError, match=r"no chat format 'vicunja'; use one of alpaca, .*vicuna"
    ) as caught:
        load_tokenizer(folder, "vicunja")
    assert caught.value.reason == "InvalidEngineArgs"


def test_a_special_token_stops_by_its_id_and_a_text_as_text(folder: Path) -> None:
    for form, stops in {
        "vicuna": Stops(token_ids=(2,)),
        "vicuna-0": Stops(texts=("###",)),
        "aquila": Stops(texts=("###", "[UNK]"), token_ids=(2,)),
        "{{ messages[0].content }}": Stops(),
        "": Stops(),
    }.items():
        assert format_stops(load_tokenizer(folder, form), 512) == stops
    assert format_stops(load_tokenizer(folder, "vicuna"), 2) == Stops()  # not a token of this model


def test_a_formats_stops_are_a_chats_alone_and_come_beside_the_clients() -> None:
    stops = Stops(texts=("###",), token_ids=(2,))
    asked = {"stop": ("\n",), "stop_token_ids": (7,), "ignore_eos": False}
    found = sampling_of(with_stops(a_request("r", QUESTION, **asked), stops))
    assert (found.stop, found.stop_token_ids) == (("\n", "###"), (7, 2))
    for other in (a_request("r", "text", **asked), a_request("r", QUESTION, **{**asked, "ignore_eos": True})):
        assert with_stops(other, stops) is other


# Of each response format: answers as models write them, with their content, reasoning and calls.
CALL: tuple[str, dict[str, Any]] = ("f", {"a": 1, "b": "x"})
OTHER: tuple[str, dict[str, Any]] = ("g", {})
THOUGHT = "<think>\nhm hm\n</think>\n\n"
HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx\n</parameter>\n"
    "</function>\n</tool_call>"
)
GLM = (
    "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>x</arg_value>\n</tool_call>"
)
DEEPSEEK = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1, "b": "x"}\n```<｜tool▁call▁end｜>'
DEEPSEEK_31 = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1, "b": "x"}<｜tool▁call▁end｜>'
HARMONY = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1, "b": "x"}'
ANSWERS: list[tuple[str, str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("hermes", "Just text.", "Just text.", "", []),
    ("hermes", "1 < 2 <tool", "1 < 2 <tool", "", []),
    ("hermes", HERMES, "", "", [CALL]),
    ("hermes", f"{THOUGHT}I see.\n{HERMES}\n{HERMES}", "I see.", "hm hm", [CALL, CALL]),
    ("hermes", f"{THOUGHT}A text.", "A text.", "hm hm", []),
    ("hermes", "<think>cut off", "", "cut off", []),
    ("hermes", "<tool_call>\n{broken\n</tool_call>", "", "", []),
    ("qwen3-coder", f"I see.\n\n{CODER}\n{CODER}", "I see.", "", [CALL, CALL]),
    ("qwen3-coder", "<tool_call>\n<function=g>\n</function>\n</tool_call>", "", "", [OTHER]),
    ("glm-4.5", f"{THOUGHT}{GLM}\n<tool_call>g\n</tool_call>", "", "hm hm", [CALL, OTHER]),
    ("llama3-json", '{"name": "f", "parameters": {"a": 1, "b": "x"}}', "", "", [CALL]),
    ("llama3-json", '<|python_tag|>{"name": "g", "parameters": {}}', "", "", [OTHER]),
    (
        "llama3-json",
        '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {"a": 1, "b": "x"}}',
        "",
        "",
        [OTHER, CALL],
    ),
    ("llama3-json", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', "", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1, "b": "x"}}]', "", "", [CALL]),
    (
        "mistral",
        'Well. [TOOL_CALLS][{"name": "g", "arguments": {}, "id": "abcdefghi"}, '
        '{"name": "f", "arguments": {"a": 1, "b": "x"}}]',
        "Well.",
        "",
        [OTHER, CALL],
    ),
    ("mistral", "[TOOL_CALLS] [{", "", "", []),
    ("mistral-args", '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "x"}[TOOL_CALLS]g[ARGS]{}', "", "", [CALL, OTHER]),
    ("mistral-args", "[THINK]hm hm[/THINK]Well.[TOOL_CALLS]g[CALL_ID]1[ARGS]{}", "Well.", "hm hm", [OTHER]),
    ("pythonic", '[f(a=1, b="x"), g()]', "", "", [CALL, OTHER]),
    ("pythonic", "<|python_start|>[f(b='x', a=1)]<|python_end|>", "", "", [CALL]),
    (
        "pythonic",
        '[f(a=[true, None, {"k": -1.5}], b=")]")]',
        "",
        "",
        [("f", {"a": [True, None, {"k": -1.5}], "b": ")]"})],
    ),
    ("pythonic", "[1] is a list of one.", "[1] is a list of one.", "", []),
    ("pythonic", "[f(a=open('/'))]", "", "", []),
    (
        "deepseek-v3",
        f"{THOUGHT}So.<｜tool▁calls▁begin｜>{DEEPSEEK}\n{DEEPSEEK}<｜tool▁calls▁end｜>",
        "So.",
        "hm hm",
        [CALL, CALL],
    ),
    (
        "deepseek-v3.1",
        f"So.<｜tool▁calls▁begin｜>{DEEPSEEK_31}{DEEPSEEK_31}<｜tool▁calls▁end｜>",
        "So.",
        "",
        [CALL, CALL],
    ),
    (
        "harmony",
        f"<|channel|>analysis<|message|>hm hm<|end|><|start|>assistant{HARMONY}<|call|>",
        "",
        "hm hm",
        [CALL],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm hm<|end|><|start|>assistant<|channel|>final<|message|>A text.",
        "A text.",
        "hm hm",
        [],
    ),
    ("harmony", " to=functions.g<|channel|>commentary json<|message|>{}", "", "", [OTHER]),
    ("harmony", "A text.", "A text.", "", []),
    ("think", f"{THOUGHT}A text.", "A text.", "hm hm", []),
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            },
        },
    }
    for name in ("f", "g")
]


def read(form: str, prefix: str, pieces: list[str]) -> tuple[str, str, list[tuple[str, dict[str, Any]]]]:
    """Content, reasoning and calls of an answer that comes in these pieces."""
    parser = ResponseParser(read_format(form).response_template, prefix=prefix, tools=TOOLS)
    events: list[dict[str, Any]] = []
    calls: list[tuple[str, dict[str, Any]]] = []
    try:
        for piece in pieces:
            events += parser.feed(piece)
        events += parser.finalize()[1]
    except ValueError:  # of a call that is none, as of those of `calls_of`
        pass
    for event in events:
        if event["type"] == "region_close" and event["field"] == "tool_calls":
            with suppress(ValueError):
                calls += [(call.name, call.arguments) for call in calls_of(event["value"])]
    texts = {
        name: "".join(
            event["text"] for event in events if event["type"] == "region_chunk" and event["field"] == name
        )
        for name in ("content", "reasoning_content")
    }
    return texts["content"].strip(), texts["reasoning_content"].strip(), calls


@pytest.mark.parametrize(("form", "answer", "content", "reasoning", "calls"), ANSWERS)
def test_an_answer_is_read_the_same_whatever_pieces_it_comes_in(
    form: str, answer: str, content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    expected = (content, reasoning, calls)
    assert read(form, "", [answer]) == expected
    assert read(form, "", list(answer)) == expected
    for at in range(1, len(answer)):
        assert read(form, "", [answer[:at], answer[at:]]) == expected, answer[:at]


@pytest.mark.parametrize(
    ("form", "prefix"),
    [
        ("hermes", f"<|im_start|>user\n{HERMES}<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("deepseek-v3", "<｜User｜>Q<｜Assistant｜><think>\n"),
        ("think", "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n"),
        ("harmony", "<|start|>assistant<|channel|>analysis<|message|>"),
    ],
)
def test_what_the_prompt_has_begun_goes_on(form: str, prefix: str) -> None:
    end = "<|end|><|channel|>final<|message|>" if form == "harmony" else "\n</think>\n\n"
    assert read(form, prefix, [f"hm hm{end}A text."]) == ("A text.", "hm hm", [])


def written_call(form: CallFormat, name: str, arguments: dict[str, Any]) -> str:
    def value(given: Any) -> str:
        if form.arguments == "text" and isinstance(given, str):
            return given
        return repr(given) if form.arguments == "python" else json.dumps(given)

    parameters = [
        form.parameter.replace("{key}", key).replace("{value}", value(given))
        for key, given in arguments.items()
    ]
    text = json.dumps(arguments) if form.arguments == "json" else form.comma.join(parameters)
    return form.call.replace("{arguments}", text).replace("{name}", name)


@pytest.mark.parametrize(
    "form", sorted(file.stem for file in FORMATS_FOLDER.glob("*.json") if b'"calls"' in file.read_bytes())
)
def test_a_call_that_is_written_as_the_format_says_is_read_back(form: str) -> None:
    calls = read_format(form).calls
    assert calls is not None
    asked = [CALL, OTHER] if calls.separator is not None else [CALL]
    text = (calls.separator or "").join(written_call(calls, *call) for call in asked)
    answer = f"{calls.begin}{text}{calls.end}"
    assert read(form, "", list(answer)) == ("", "", asked)
    assert answer.startswith(calls.trigger)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {"name": "f", "arguments": [1]},
        {"name": "f", "arguments": {"a": math.nan}},
        {"name": "f", "arguments": "{"},
        {"function": {"arguments": {}}},
        "[f(1)]",
        "[f(**{'a': 1})]",
        "[f(a={1})]",
        "[f(a=b)]",
        "[f(a=1), 2]",
        "f(a=1)",
        "[]",
        "[f(a=" + "[" * 5000,
        "[f(a=" + "9" * 5000 + ")]",
    ],
)
def test_what_is_no_call_is_none(value: Any) -> None:
    with pytest.raises(ValueError):  # json's, ast's, or its own
        calls_of(value)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("<tool_call>\n{}\n</tool_call>", "hermes"),
        ("<tool_call>\n<function=x>\n<parameter=y>\n</tool_call>", "qwen3-coder"),
        ("<tool_call>x\n<arg_key>\n</tool_call>", "glm-4.5"),
        ('{"name": function name, "parameters": dictionary} <|start_header_id|>', "llama3-json"),
        ("[TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]x[ARGS]", "mistral-args"),
        ("<|python_start|>", "pythonic"),
        ("<｜tool▁call▁begin｜>function\n```json", "deepseek-v3"),
        ("<｜tool▁call▁begin｜>", "deepseek-v3.1"),
        ("<|channel|>commentary <|constrain|>json", "harmony"),
        ("{{ content.split('</think>')[-1] }}", "think"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_a_checkpoints_own_template_says_how_its_answers_are_read(
    folder: Path, template: str, form: str | None
) -> None:
    """And it ends as the checkpoint says, not as the built-in format of that name."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    found = response_format(tokenizer)
    assert found == (None if form is None else replace(read_format(form), stop=()))
    tokenizer.response_template = {"start_anchor": "x", "fields": {"content": {}}}
    own = response_format(tokenizer)
    assert own is not None
    assert own.response_template == tokenizer.response_template
    assert own.calls == (found.calls if found is not None else None)


def test_a_built_in_format_with_tools_shows_them_their_calls_and_what_they_gave(folder: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
    shown = written(
        folder,
        "hermes",
        [
            *QUESTION,
            {"role": "assistant", "content": "So.", "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "1", "content": "R1"},
            {"role": "tool", "tool_call_id": "1", "content": "R2"},
        ],
    )
    assert shown == WITHOUT_SYSTEM["hermes"] + (
        f"So.\n{HERMES}\n{HERMES}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
