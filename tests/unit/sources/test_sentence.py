"""What sentence-transformers' files may say, and what of it is refused by the file's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.encoders import with_modules
from tests.unit.sources.builders import write
from tidegate.errors import SourceError
from tidegate.sources.checkpoint import read_checkpoint
from tidegate.sources.sentence import CONFIG, Sentence, read_sentence

LENGTH, POOLING, DENSE = "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json"
BERT = {"architectures": ["BertModel"], "model_type": "bert"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_modules(write(tmp_path / "bert", BERT), {"pooling_mode": "mean"}, dense={})


def read(folder: Path, name: str, content: Any) -> Sentence:
    (folder / name).write_text(json.dumps(content))
    return read_sentence(read_checkpoint(folder), "cls")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (CONFIG, {"prompts": ["a"]}, "got `array` - at `$.prompts`"),
        (CONFIG, {"prompts": {"q": None}}, "got `null` - at `$.prompts[...]`"),
        (CONFIG, {"default_prompt_name": "q"}, "lacks its default prompt 'q'"),
        (CONFIG, [], "got `array`"),
        (LENGTH, {"max_seq_length": "long"}, "at `$.max_seq_length`"),
        (LENGTH, {"max_seq_length": -1}, "at `$.max_seq_length`"),
        (POOLING, {"pooling_mode": 7}, "at `$.pooling_mode`"),
        (POOLING, {"pooling_mode": [7]}, "at `$.pooling_mode[0]`"),
        (DENSE, {"module_input_name": [1]}, "at `$.module_input_name`"),
        (DENSE, {"activation_function": 1}, "at `$.activation_function`"),
        ("modules.json", {}, "got `object`"),
        ("modules.json", [{"type": 1}], "at `$[0].type`"),
    ],
)
def test_a_file_that_is_malformed_is_named_with_the_place(
    folder: Path, name: str, content: Any, said: str
) -> None:
    with pytest.raises(SourceError) as error:
        read(folder, name, content)
    assert error.value.source_reason == "SourceFormat"
    assert str(folder / name) in error.value.message
    assert said in error.value.message


def test_what_says_nothing_says_the_usual(folder: Path) -> None:
    nothing = {"max_seq_length": None, "do_lower_case": None}
    assert (found := read(folder, LENGTH, nothing)).max_tokens == 0
    assert (found.modes, found.lowers, found.dense[0].activation) == (("mean",), False, "Tanh")
    assert read(folder, LENGTH, {"max_seq_length": 10**30}).max_tokens == 10**30  # a tokenizer's "any"
    assert read(folder, CONFIG, {"prompts": None, "default_prompt_name": None}).prompts == {}
