"""The endpoints of models that judge: rerank and score (query and document), classify and moderations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from tidegate.gateway.bodies import Rule, documented, not_honoured, reference, refusal, says
from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.inputs import (
    MOST_INPUTS,
    TEXT_FORMS,
    InputBody,
    InputCall,
    InputDialect,
    InputField,
    InputUsage,
    Item,
    Text,
    input_list,
    input_usage,
    results,
)
from tidegate.gateway.dialects.openai import Flag, encode
from tidegate.messages.work import PairPrompt, Score, Segment

THRESHOLD = 0.5  # of a moderation's category
# Labels of moderation models that say that nothing is wrong, without case, blanks, - and _.
HARMLESS = frozenset(
    ["ok", "safe", "neutral", "normal", "none", "clean", "benign", "sfw", "nottoxic", "nontoxic", "nothate"]
)
_CUTS_NOTHING = "a document that is too long is refused; see truncate_prompt_tokens"
_TEXT_ONLY = "documents are texts; leave it out"


class DocumentText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: Text


_DOCUMENT = {"anyOf": [{"type": "string", "minLength": 1}, reference("DocumentText")]}


class RerankBody(InputBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/rerank`: Cohere's, Jina's and vLLM's."""

    query: Annotated[Text, says("a text that is not empty")]
    documents: Annotated[
        Annotated[list[Text | DocumentText], Meta(min_length=1, max_length=MOST_INPUTS)],
        documented(
            f'1 to {MOST_INPUTS} texts that are not empty, or objects {{"text": ...}}',
            {"type": "array", "minItems": 1, "maxItems": MOST_INPUTS, "items": _DOCUMENT},
        ),
    ]
    top_n: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 31)] | None,
        says("how many of the most relevant documents come back; 0 or left out: all"),
    ] = None
    return_documents: Annotated[bool | None, says("true or false; left out: true")] = None
    max_tokens_per_doc: Annotated[Any, not_honoured(_CUTS_NOTHING)] = None
    max_chunks_per_doc: Annotated[Any, not_honoured(_CUTS_NOTHING)] = None
    rank_fields: Annotated[Any, not_honoured(_TEXT_ONLY)] = None


class RankedDocument(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct):
    """`index` is the document's place in the call."""

    index: int
    relevance_score: float
    document: RankedDocument | msgspec.UnsetType = msgspec.UNSET


class Ranking(msgspec.Struct):
    id: str
    model: str
    usage: InputUsage
    results: list[Ranked]


class RerankCall(InputCall):
    prompt_field = "documents"

    def __init__(self, body: RerankBody) -> None:
        texts = [item if isinstance(item, str) else item.text for item in body.documents]
        pairs = [PairPrompt(body.query, text) for text in texts]
        super().__init__(body.model, body.user, pairs, partial(Score, truncate=body.truncate_prompt_tokens))
        self._texts = texts if body.return_documents is not False else None
        self._top = body.top_n or len(texts)

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        scores = [row[0] for row in score_rows(choices)]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._top]
        ranked = [
            Ranked(index, scores[index])
            if self._texts is None
            else Ranked(index, scores[index], RankedDocument(self._texts[index]))
            for index in best
        ]
        return encode(Ranking(head.call_id, head.model, input_usage(usage), ranked))


Texts = Annotated[
    Text | Annotated[list[Text], Meta(min_length=1, max_length=MOST_INPUTS)] | None,
    documented(
        f"a text, or 1 to {MOST_INPUTS} of them; none of them empty",
        {"anyOf": [{"type": "null"}, *TEXT_FORMS]},
    ),
]
# That lists of more than one are as long as each other, a schema cannot say.
_ONE = {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 1}]}
_SIDES = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))


def _sides(body: ScoreBody) -> tuple[list[str], list[str]]:
    """The texts of both sides, paired: the first's one text goes with each of the second's."""
    named = [pair for pair in _SIDES if any(getattr(body, name) is not None for name in pair)]
    if len(named) != 1 or None in (getattr(body, name) for name in named[0]):
        names = ", or ".join(" and ".join(pair) for pair in _SIDES)
        raise refusal("text_1", "given in part" if named else "missing", f"send {names}")
    first, second = (
        [found] if isinstance(found, str) else found for found in (getattr(body, name) for name in named[0])
    )
    if len(first) == 1:
        return first * len(second), second
    if len(first) != len(second):
        raise refusal(
            named[0][1], f"{len(second)} texts", f"send as many as {named[0][0]} has, which are {len(first)}"
        )
    return first, second


def _check_sides(body: ScoreBody) -> None:
    _sides(body)


class ScoreBody(InputBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/score`, vLLM's: one text with each of others, or as many on both sides."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        *InputBody.RULES,
        Rule(
            _check_sides,
            {
                "oneOf": [
                    {
                        "required": list(pair),
                        "properties": {
                            pair[0]: _ONE,
                            pair[1]: {"not": {"type": "null"}},
                            **{
                                other: {"type": "null"}
                                for others in _SIDES
                                for other in others
                                if other not in pair
                            },
                        },
                    }
                    for pair in _SIDES
                ]
            },
        ),
    )

    text_1: Texts = None
    text_2: Texts = None
    queries: Texts = None
    documents: Texts = None
    data_1: Texts = None
    data_2: Texts = None


class TextScore(msgspec.Struct):
    index: int
    object: Literal["score"]
    score: float


class ScoreList(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextScore]
    usage: InputUsage


class ScoreCall(InputCall):
    prompt_field = "text_1"

    def __init__(self, body: ScoreBody) -> None:
        pairs = [PairPrompt(*pair) for pair in zip(*_sides(body), strict=True)]
        super().__init__(body.model, body.user, pairs, partial(Score, truncate=body.truncate_prompt_tokens))

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        data = [TextScore(index, "score", row[0]) for index, row in enumerate(score_rows(choices))]
        return encode(ScoreList(head.call_id, "list", head.created, head.model, data, input_usage(usage)))


class ClassifyBody(InputBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/classify`, vLLM's."""

    input: InputField
    add_special_tokens: Flag = None


class TextClass(msgspec.Struct):
    """`label` is the likeliest; `probs` are in the order of the model's labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassList(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[TextClass]
    usage: InputUsage


class ClassifyCall(InputCall):
    def __init__(self, body: ClassifyBody) -> None:
        items = input_list(body.input, add_special_tokens=body.add_special_tokens is not False)
        super().__init__(body.model, body.user, items, partial(Score, truncate=body.truncate_prompt_tokens))

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:
        labels = results(choices)[0].labels
        data = [
            TextClass(index, labels[row.index(max(row))], row, len(row))
            for index, row in enumerate(score_rows(choices))
        ]
        return encode(ClassList(head.call_id, "list", head.created, head.model, data, input_usage(usage)))


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Other types than text are refused."""

    type: Annotated[Literal["text"], says("text, the only type that is read")]
    text: Text


_PART = {"anyOf": [{"type": "string", "minLength": 1}, reference("TextPart")]}


class ModerationBody(InputBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/moderations`."""

    input: Annotated[
        Text | Annotated[list[Text | TextPart], Meta(min_length=1, max_length=MOST_INPUTS)],
        documented(
            f'a text, or 1 to {MOST_INPUTS} texts or parts {{"type": "text", "text": ...}}; none empty',
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "maxItems": MOST_INPUTS, "items": _PART},
                ]
            },
        ),
    ]
    threshold: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        says(f"the share from which on a category holds; left out: {THRESHOLD}"),
    ] = None


class Moderation(msgspec.Struct):
    """`flagged`: a category holds that is not one of harmless texts."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]


class ModerationList(msgspec.Struct):
    id: str
    model: str
    results: list[Moderation]


class ModerationCall(InputCall):
    def __init__(self, body: ModerationBody) -> None:
        given = [body.input] if isinstance(body.input, str) else body.input
        texts: list[str | int | list[int]] = [item if isinstance(item, str) else item.text for item in given]
        items: list[Item] = list(input_list(texts))
        super().__init__(body.model, body.user, items, partial(Score, truncate=body.truncate_prompt_tokens))
        self._threshold = THRESHOLD if body.threshold is None else body.threshold

    def answer(self, head: AnswerHead, choices: Sequence[Sequence[Segment]], usage: Usage) -> bytes:  # noqa: ARG002
        labels = results(choices)[0].labels
        found = [self._moderation(dict(zip(labels, row, strict=True))) for row in score_rows(choices)]
        return encode(ModerationList(head.call_id, head.model, found))

    def _moderation(self, scores: dict[str, float]) -> Moderation:
        holds = {label: score >= self._threshold for label, score in scores.items()}
        return Moderation(any(holds[label] and not is_harmless(label) for label in holds), holds, scores)


def is_harmless(label: str) -> bool:
    return "".join(character for character in label.lower() if character.isalnum()) in HARMLESS


def score_rows(choices: Sequence[Sequence[Segment]]) -> list[list[float]]:
    return [row for result in results(choices) for row in result.rows]


_RERANK = (
    "score",
    "rerank-",
    "Order documents by their relevance to a query",
    RerankBody,
    Ranking,
    "The documents, the most relevant first",
    RerankCall,
)
_SCORE = (
    "score",
    "score-",
    "Score pairs of texts",
    ScoreBody,
    ScoreList,
    "A score for each pair, in their order",
    ScoreCall,
)
_CLASSIFY = (
    "classify",
    "classify-",
    "Classify texts",
    ClassifyBody,
    ClassList,
    "The labels' shares for each text, in their order",
    ClassifyCall,
)
_MODERATION = (
    "classify",
    "modr-",
    "Say which categories of a classifier hold for texts",
    ModerationBody,
    ModerationList,
    "The categories of each text, in their order",
    ModerationCall,
)
JUDGING = (
    InputDialect("/v1/rerank", "rerank", *_RERANK),
    InputDialect("/rerank", "rerank_unversioned", *_RERANK),
    InputDialect("/v2/rerank", "rerank_v2", *_RERANK),
    InputDialect("/v1/score", "score", *_SCORE),
    InputDialect("/score", "score_unversioned", *_SCORE),
    InputDialect("/v1/classify", "classify", *_CLASSIFY),
    InputDialect("/classify", "classify_unversioned", *_CLASSIFY),
    InputDialect("/v1/moderations", "create_moderation", *_MODERATION),
)
