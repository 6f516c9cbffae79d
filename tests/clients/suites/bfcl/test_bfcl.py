"""`bfcl generate` and `bfcl evaluate` on a few rows of its data: each answer decodes to calls of functions
that were offered, or to none. How many are right is the model's matter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from bfcl_eval._llm_response_generation import build_handler
from bfcl_eval._llm_response_generation import main as generate
from bfcl_eval.constants.enums import ReturnFormat
from bfcl_eval.constants.eval_config import RESULT_PATH, SCORE_PATH, TEST_IDS_TO_GENERATE_PATH
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
from bfcl_eval.eval_checker.eval_runner import main as evaluate
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler
from bfcl_eval.model_handler.api_inference.openai_response import OpenAIResponsesHandler
from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler
from bfcl_eval.utils import is_function_calling_format_output, load_dataset_entry

MODEL = os.environ["CLIENTS_MODEL"]
CONTEXT = json.loads((Path(os.environ["CLIENTS_SOURCE"]) / "config.json").read_text())[
    "max_position_embeddings"
]
CATEGORIES = ["simple_python", "multiple", "parallel", "irrelevance"]
ROWS = 6  # of each category; the shortest, as the demo model's context is small
HANDLERS = {
    "chat": OpenAICompletionsHandler,
    "responses": OpenAIResponsesHandler,
    "completions": QwenFCHandler,
}
OFFERED = {
    row["id"]: {function["name"] for function in row["function"]}
    for category in CATEGORIES
    for row in sorted(load_dataset_entry(category), key=lambda row: len(json.dumps(row)))[:ROWS]
}


@pytest.fixture(autouse=True, scope="module")
def key() -> Any:
    """Its own question whether a server is there sends no key, and it asks until that is answered."""
    patch = pytest.MonkeyPatch()
    headers = {"Authorization": f"Bearer {os.environ['CLIENTS_KEY']}"}
    patch.setattr(requests, "get", lambda url: requests.request("GET", url, headers=headers))
    yield
    patch.undo()


@pytest.fixture(scope="module", params=HANDLERS)
def name(request: pytest.FixtureRequest, key: None) -> str:
    """A model of BFCL's by that handler, with the answers to the rows written as `bfcl generate` does."""
    name = f"{MODEL}-{request.param}"
    about = {"display_name": name, "url": "", "org": "", "license": ""}
    # None of these take a "." in a function's name.
    MODEL_CONFIG_MAPPING[name] = ModelConfig(
        model_name=MODEL, model_handler=HANDLERS[request.param], underscore_to_dot=True, **about
    )
    chosen = {category: [row for row in OFFERED if row.startswith(f"{category}_")] for category in CATEGORIES}
    TEST_IDS_TO_GENERATE_PATH.write_text(json.dumps(chosen), encoding="utf-8")
    options = {"temperature": 0.001, "include_input_log": False, "exclude_state_log": False, "num_threads": 4}
    server = {"num_gpus": 1, "gpu_memory_utilization": 0.9, "backend": "vllm", "skip_server_setup": True}
    lora = {"local_model_path": None, "lora_modules": None, "enable_lora": False, "max_lora_rank": None}
    which = {"model": [name], "test_category": CATEGORIES, "run_ids": True, "result_dir": None}
    generate(SimpleNamespace(**which, **options, **server, **lora, allow_overwrite=True))
    return name


def read(name: str) -> list[dict[str, Any]]:
    files = sorted((RESULT_PATH / name).rglob("*_result.json"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_answers(name: str) -> None:
    answers = read(name)
    assert {answer["id"] for answer in answers} == set(OFFERED)
    handler = build_handler(name, 0.001)
    called = 0
    for answer in answers:
        print(answer)
        assert "traceback" not in answer
        assert answer["input_token_count"] > 0
        assert answer["output_token_count"] > 0
        # Without a call these handlers give the text itself; what fills the context is cut off in the middle.
        is_text = isinstance(answer["result"], str) and "<tool_call>" not in answer["result"]
        if is_text or answer["input_token_count"] + answer["output_token_count"] == CONTEXT:
            continue
        calls = handler.decode_ast(answer["result"], ReturnFormat.PYTHON, False)
        assert is_function_calling_format_output(calls)
        # A completion's request holds a text and no tools: what it names is the model's matter.
        if not isinstance(handler, QwenFCHandler):
            names = {name for call in calls for name in call}
            assert names <= {name.replace(".", "_") for name in OFFERED[answer["id"]]}
        called += len(calls)
    assert called > 0


def test_evaluate(name: str) -> None:
    evaluate([name], CATEGORIES, None, None, partial_eval=True)

    for category in CATEGORIES:
        (file,) = (SCORE_PATH / name).rglob(f"*_{category}_score.json")
        score, *wrong = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        print(score, wrong)
        assert score["total_count"] == ROWS
        assert 0 <= score["correct_count"] <= ROWS
