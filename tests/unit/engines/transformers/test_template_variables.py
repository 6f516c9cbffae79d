"""No variable that a client may set is taken by the calls on the way to the template."""

from __future__ import annotations

import inspect

from transformers import PreTrainedTokenizerBase

from tidegate.engines.transformers import chat_templates
from tidegate.gateway.dialects.chat import NOT_VARIABLES


def test_the_gateway_keeps_the_names_that_rendering_takes_for_itself() -> None:
    taken = {
        name
        for call in (PreTrainedTokenizerBase.apply_chat_template, chat_templates.write)
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert taken <= NOT_VARIABLES
