"""The endpoints of tasks that generate nothing share this: inputs, the requests that carry them, usage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NoReturn

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import BodyReader, RequestBody, Rule, documented, not_honoured, refusal, says
from tidegate.gateway.dialects.base import AnswerHead, Ask, Call, Free, Usage
from tidegate.gateway.dialects.openai import MAX_TOKEN_ID, MAX_TOKENS, Advisory, VocabularyId
from tidegate.gateway.dialects.wire import OPENAI, Wire
from tidegate.messages.work import Embed, Inputs, PairPrompt, Score, Segment, TextPrompt, TokenPrompt

MOST_INPUTS = 2048  # OpenAI's
MOST_DIMENSIONS = 1 << 16
INPUTS_A_REQUEST = 8  # enough that a request costs little beside them, few enough that replicas share a call
_CHARACTERS_PER_TOKEN = 4
INPUT = "a text, a list of texts, a list of token ids, or a list of lists of token ids; none of them empty"
_TEXT = {"type": "string", "minLength": 1}
_TOKEN_IDS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
}
TEXT_FORMS: list[dict[str, Any]] = [
    _TEXT,
    {"type": "array", "minItems": 1, "maxItems": MOST_INPUTS, "items": _TEXT},
]
TOKEN_FORMS: list[dict[str, Any]] = [
    _TOKEN_IDS,
    {"type": "array", "minItems": 1, "maxItems": MOST_INPUTS, "items": _TOKEN_IDS},
]
TRUNCATE = "how many of an input's first tokens are kept, 1 or more; -1: as many as the model takes"
Text = Annotated[str, Meta(min_length=1)]
InputField = Annotated[
    Text | Annotated[list[str | VocabularyId | list[VocabularyId]], Meta(min_length=1)],
    documented(INPUT, {"anyOf": [*TEXT_FORMS, *TOKEN_FORMS]}),
]

Dimensions = Annotated[
    Annotated[int, Meta(ge=1, le=MOST_DIMENSIONS)] | None,
    says("how many of a vector's first numbers are kept and normalised again; at most what it has"),
]


def _check_truncation(body: Any) -> None:
    if body.truncate_prompt_tokens == 0:
        raise refusal("truncate_prompt_tokens", 0, f"send {TRUNCATE}")


class InputBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """All of these endpoints share these fields."""

    RULES: ClassVar[tuple[Rule, ...]] = (Rule(_check_truncation, {}),)

    model: Annotated[
        str, Meta(min_length=1, max_length=256, description="the name of a model that GET /v1/models lists")
    ]
    user: Annotated[
        Annotated[str, Meta(max_length=1024)] | None,
        says(
            "a text of at most 1024 characters: while a model changes, one user's calls stay on one revision"
        ),
    ] = None
    # The fields below are vLLM's.
    truncate_prompt_tokens: Annotated[
        Annotated[int, Meta(ge=-1, le=MAX_TOKENS)] | None,
        documented(
            TRUNCATE,
            {
                "anyOf": [
                    {"enum": [-1, None]},
                    {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS},
                ]
            },
        ),
    ] = None
    priority: Annotated[Any, not_honoured("calls wait in the order they come; use 0 or leave it out", 0)] = (
        None
    )
    request_id: Advisory = None


Item = TextPrompt | TokenPrompt | PairPrompt


class InputCall(Free):
    """A call of one work over inputs, `INPUTS_A_REQUEST` of them a request. `work` makes that of some."""

    n = 1
    is_streamed = False
    prompt_field = "input"

    def __init__(
        self, model: str, user: str | None, items: Sequence[Item], work: Callable[[Inputs], Embed | Score]
    ) -> None:
        self.model = model
        self.user = user or ""
        self._items = items
        self._work = work

    def asks(self, random_seed: int) -> list[Ask]:  # noqa: ARG002 - nothing is drawn
        # The inputs may be large, and the call lives as long as its answer.
        items, self._items = self._items, ()
        return [
            Ask(self._work(Inputs(list(part), first)), cost=sum(map(estimated_tokens, part)))
            for first in range(0, len(items), INPUTS_A_REQUEST)
            for part in [items[first : first + INPUTS_A_REQUEST]]
        ]

    def events(self, head: AnswerHead) -> NoReturn:
        raise AssertionError(f"{head.call_id} is not streamed")


@dataclass
class InputDialect:
    """An endpoint of such a task; `call` makes a call of a `body`."""

    path: str
    operation_id: str
    task: str
    id_prefix: str
    summary: str
    body: type[RequestBody]
    answer: Any
    answer_description: str
    call: Callable[[Any], Call]
    wire: Wire = OPENAI
    may_stream: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._reader = BodyReader(self.body)

    def read(self, raw: bytes) -> Call:
        return self.call(self._reader.read(raw))


class InputUsage(msgspec.Struct):
    """Token counts, the model's own. Nothing is generated."""

    prompt_tokens: int
    total_tokens: int


def input_usage(usage: Usage) -> InputUsage:
    return InputUsage(usage.prompt_tokens, usage.total_tokens)


def estimated_tokens(item: Item) -> int:
    if isinstance(item, TokenPrompt):
        return len(item.token_ids)
    characters = len(item.text) + (len(item.pair) if isinstance(item, PairPrompt) else 0)
    return characters // _CHARACTERS_PER_TOKEN + 1


def input_list(found: str | list[Any], *, add_special_tokens: bool = True) -> list[TextPrompt | TokenPrompt]:
    """The inputs of a body: all texts, or all lists of token ids. Raises `InvalidRequest`."""
    if isinstance(found, str):
        return [TextPrompt(found, add_special_tokens)]
    kinds = {type(item) for item in found}
    if kinds == {int}:
        return [TokenPrompt(found)]
    if len(found) > MOST_INPUTS:
        raise refusal("input", f"{len(found)} inputs", f"send at most {MOST_INPUTS} in one call")
    if kinds not in ({str}, {list}):
        raise refusal("input", found, f"it mixes kinds; send {INPUT}")
    if (place := next((place for place, item in enumerate(found) if not item), None)) is not None:
        raise refusal(f"input[{place}]", found[place], "an input needs at least one character or token")
    if kinds == {str}:
        return [TextPrompt(text, add_special_tokens) for text in found]
    return [TokenPrompt(token_ids) for token_ids in found]


def results(choices: Sequence[Sequence[Segment]]) -> list[Any]:
    """The one result of each request, in their order."""
    return [segment.result for segments in choices for segment in segments if segment.result is not None]
