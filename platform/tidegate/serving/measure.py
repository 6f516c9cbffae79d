"""What an attempt at a request was like, and the outcomes that its end counts as (`messages.outcomes`)."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.errors import PROMPT_REFUSALS
from tidegate.messages.outcomes import bucket_of
from tidegate.messages.work import Finish, Segment


class Measure:
    """Takes each output of one attempt. `created` is the request's, `log` what earlier attempts emitted; all
    times are unix seconds."""

    __slots__ = (
        "_created",
        "_first",
        "_first_tokens",
        "_has_text",
        "_is_continued",
        "_is_whole",
        "_last",
        "_tokens",
    )

    def __init__(self, created: float, log: Sequence[Segment]) -> None:
        self._created = created
        self._is_continued = bool(log)
        self._has_text = False
        self._is_whole = False  # it generates nothing
        self._tokens = 0
        for segment in log:
            self._has_text = self._has_text or bool(segment.output.any_text)
            self._tokens += len(segment.output.token_ids)
        self._first = self._last = 0.0
        self._first_tokens = 0

    def add(self, tokens: int, text: str, now: float, *, is_whole: bool = False) -> None:
        self._tokens += tokens
        self._is_whole = is_whole
        if text:
            self._has_text = True
        if not self._first:
            self._first, self._first_tokens = now, self._tokens
        self._last = now

    def ends(self, finish: Finish) -> str:
        """The outcomes that such an end counts as, with spaces between them; empty: it counts nowhere."""
        if finish.reason == "error":
            if finish.code in PROMPT_REFUSALS:
                return ""
            words = ["error"]
        elif finish.reason == "stop":
            words = ["ok"]
            if self._is_whole:
                pass
            elif not self._has_text:
                words.append("empty")
            elif self._tokens <= 1:
                words.append("instant")
        elif finish.reason == "length":
            words = ["ok", "length"]
        else:
            return ""
        if self._first and not self._is_continued:
            words.append(f"t{bucket_of(self._first - self._created)}")
        if (later := self._tokens - self._first_tokens) and self._first:
            words.append(f"i{bucket_of((self._last - self._first) / later)}")
        return " ".join(words)
