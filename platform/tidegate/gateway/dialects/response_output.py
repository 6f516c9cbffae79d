"""An answer as the items of a response, whole and as events.

Both go through `Drafts`, which sees the segments in their order: what the model thought, what it said and
whom it called are items of their own, a new one wherever that changes. So they are a function of the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from tidegate.gateway.dialects.base import AnswerHead, Usage
from tidegate.gateway.dialects.chat import chat_logprobs
from tidegate.gateway.dialects.openai import encode
from tidegate.gateway.dialects.response_objects import (
    FunctionCallItem,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    Status,
)
from tidegate.gateway.sse import text_json
from tidegate.messages.work import Finish, Segment, TokenLogprob

ID_PREFIX = "resp_"
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "function_call_output": "fco"}


def item_id(call_id: str, kind: str, place: int | str) -> str:
    return f"{_PREFIXES[kind]}_{call_id.removeprefix(ID_PREFIX)}_{place}"


@dataclass(slots=True)
class Draft:
    """One item on its way."""

    kind: Literal["reasoning", "message", "function_call"]
    id: str
    place: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    is_closed: bool = False  # another one came after it

    def item(self, status: ItemStatus) -> OutputItem:
        text = "".join(self.pieces)
        if self.kind == "message":
            content = OutputText(text, logprobs=chat_logprobs(self.logprobs))
            return MessageItem(self.id, "assistant", status, [content])
        if self.kind == "reasoning":
            return ReasoningItem(self.id, status, [ReasoningText(text)])
        return FunctionCallItem(self.id, status, self.call_id, self.name, text)


class Piece(NamedTuple):
    """What a segment adds to an item. Of a new one `closed` is the one before it."""

    draft: Draft
    text: str
    logprobs: Sequence[TokenLogprob] = ()
    is_new: bool = False
    closed: Draft | None = None


class Drafts:
    def __init__(self, call_id: str) -> None:
        self._call_id = call_id
        self.drafts: list[Draft] = []
        self.finish: Finish | None = None
        self.reasoning_tokens = 0

    def take(self, segment: Segment) -> Iterator[Piece]:
        output, finish = segment.output, segment.finish
        if output.reasoning:
            self.reasoning_tokens += len(output.token_ids)
            yield self._piece("reasoning", output.reasoning)
        # Tokens without text, as parts of a character are, belong to the text around them.
        is_silent = not (
            output.reasoning or output.calls or (self.drafts and self.drafts[-1].kind != "message")
        )
        if output.text or (output.logprobs and is_silent):
            yield self._piece("message", output.text, output.logprobs)
        for call in output.calls:
            yield self._piece("function_call", call.arguments, call_id=call.id, name=call.name)
        if finish is not None:
            self.finish = finish
            if not self.drafts:  # the model said nothing
                yield self._piece("message", "")

    def items(self, *, has_ended: bool) -> list[OutputItem]:
        return [draft.item(self._status(draft, has_ended=has_ended)) for draft in self.drafts]

    def last_item(self) -> OutputItem:
        return self.drafts[-1].item(self._status(self.drafts[-1], has_ended=True))

    def _status(self, draft: Draft, *, has_ended: bool) -> ItemStatus:
        if draft.is_closed or (self.finish is not None and self.finish.reason == "stop"):
            return "completed"
        return "incomplete" if has_ended else "in_progress"

    def _piece(
        self,
        kind: Literal["reasoning", "message", "function_call"],
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        *,
        call_id: str = "",
        name: str = "",
    ) -> Piece:
        last = self.drafts[-1] if self.drafts else None
        is_new = last is None or last.kind != kind or bool(name)
        if is_new:
            place = len(self.drafts)
            draft = Draft(kind, item_id(self._call_id, kind, place), place, call_id, name)
            self.drafts.append(draft)
            if last is not None:
                last.is_closed = True
        else:
            assert last is not None
            draft, last = last, None
        draft.pieces.append(text)
        draft.logprobs += logprobs
        return Piece(draft, text, logprobs, is_new, last)


def drafts_of(call_id: str, segments: Iterable[Segment]) -> Drafts:
    drafts = Drafts(call_id)
    for segment in segments:
        for _ in drafts.take(segment):
            pass
    return drafts


class Responding(Protocol):
    def __call__(
        self, drafts: Drafts, status: Status | None = None, error: ResponseError | None = None
    ) -> Response: ...


class ResponseEvents:
    """OpenAI's events. `sequence_number` counts them from 0. `respond` makes the response of its items."""

    __slots__ = ("_drafts", "_has_begun", "_is_background", "_respond", "_sent")

    def __init__(self, head: AnswerHead, respond: Responding, *, is_background: bool) -> None:
        self._drafts = Drafts(head.call_id)
        self._respond = respond
        self._is_background = is_background
        self._has_begun = False
        self._sent = 0

    def begin(self) -> bytes:
        """Before anything is known of the answer; the first render does it where nobody did."""
        if self._has_begun:
            return b""
        self._has_begun = True
        statuses: list[tuple[bytes, Status]] = [(b"created", "in_progress"), (b"in_progress", "in_progress")]
        if self._is_background:
            statuses = [(b"created", "queued"), (b"queued", "queued"), (b"in_progress", "in_progress")]
        nothing = Drafts("")
        return b"".join(
            [self._of_response(name, self._respond(nothing, status)) for name, status in statuses]
        )

    def render(self, index: int, segment: Segment) -> bytes:  # noqa: ARG002 - there is one
        out = [self.begin()]
        for piece in self._drafts.take(segment):
            if piece.closed is not None:
                out.append(self._done(piece.closed, piece.closed.item("completed")))
            if piece.is_new:
                out.append(self._added(piece.draft))
            if piece.text or piece.logprobs:
                out.append(self._delta(piece))
        if segment.finish is not None:
            out.append(self._done(self._drafts.drafts[-1], self._drafts.last_item()))
        return b"".join(out)

    def end(self, usage: Usage) -> bytes:  # noqa: ARG002 - the response has its own
        response = self._respond(self._drafts)
        return self._of_response(response.status.encode(), response)

    def failed(self, status: Literal["failed", "cancelled"], error: ResponseError) -> bytes:
        """End a stream whose answer failed."""
        return self.begin() + self._of_response(b"failed", self._respond(self._drafts, status, error))

    def broke(self, error: ResponseError) -> bytes:
        """End a stream for what is not the answer's fault: it may go on elsewhere. As no event of the answer
        it has the number of the last one, and whoever goes on after that misses none."""
        self._sent -= 1
        made = b'"code":%b,"message":%b,"param":null' % (text_json(error.code), text_json(error.message))
        return self._event(b"error", made)

    def _added(self, draft: Draft) -> bytes:
        item = Draft(draft.kind, draft.id, draft.place, draft.call_id, draft.name).item("in_progress")
        if isinstance(item, FunctionCallItem):
            return self._item_event(b"added", draft, item)
        part = item.content.pop()
        return self._item_event(b"added", draft, item) + self._event(
            b"response.content_part.added", b'%b,"part":%b' % (_place(draft), encode(part))
        )

    def _delta(self, piece: Piece) -> bytes:
        text = text_json(piece.text)
        if piece.draft.kind == "function_call":
            return self._event(
                b"response.function_call_arguments.delta", b'%b,"delta":%b' % (_item(piece.draft), text)
            )
        if piece.draft.kind == "reasoning":
            return self._event(
                b"response.reasoning_text.delta", b'%b,"delta":%b' % (_place(piece.draft), text)
            )
        logprobs = encode(chat_logprobs(piece.logprobs)) if piece.logprobs else b"[]"
        return self._event(
            b"response.output_text.delta",
            b'%b,"delta":%b,"logprobs":%b' % (_place(piece.draft), text, logprobs),
        )

    def _done(self, draft: Draft, item: OutputItem) -> bytes:
        if isinstance(item, FunctionCallItem):
            whole = b'%b,"name":%b,"arguments":%b' % (
                _item(draft),
                text_json(item.name),
                text_json(item.arguments),
            )
            out = self._event(b"response.function_call_arguments.done", whole)
        else:
            part = item.content[0]
            whole = b'%b,"text":%b' % (_place(draft), text_json(part.text))
            if isinstance(part, OutputText):
                whole += b',"logprobs":%b' % encode(part.logprobs)
            of = b"output_text" if isinstance(part, OutputText) else b"reasoning_text"
            out = self._event(b"response.%b.done" % of, whole)
            out += self._event(b"response.content_part.done", b'%b,"part":%b' % (_place(draft), encode(part)))
        return out + self._item_event(b"done", draft, item)

    def _item_event(self, name: bytes, draft: Draft, item: OutputItem) -> bytes:
        whole = b'"output_index":%d,"item":%b' % (draft.place, encode(item))
        return self._event(b"response.output_item." + name, whole)

    def _of_response(self, name: bytes, response: Response) -> bytes:
        return self._event(b"response." + name, b'"response":%b' % encode(response))

    def _event(self, kind: bytes, fields: bytes) -> bytes:
        number, self._sent = self._sent, self._sent + 1
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, number, fields)


def _item(draft: Draft) -> bytes:
    return b'"item_id":"%b","output_index":%d' % (draft.id.encode(), draft.place)


def _place(draft: Draft) -> bytes:
    return b'%b,"content_index":0' % _item(draft)
