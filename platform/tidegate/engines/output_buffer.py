"""Holds back what of an answer may not be seen yet: text, and log probabilities with it.

An entry of the log probabilities goes out with the text of its token, and with the end of the answer where
a stop string swallows that text: every token that counts has its entry. Pushing the same pieces again
rebuilds the same state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tidegate.engines.stop_buffer import StopBuffer
from tidegate.messages.work import TokenLogprob


class OutputBuffer:
    __slots__ = ("_entries", "_released", "_seen", "_stop", "stopped", "stopped_by")

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        self._stop = StopBuffer(stops, keeps_stop=keeps_stop) if stops else None
        self._entries: deque[tuple[int, TokenLogprob]] = deque()  # (characters before the token, entry)
        self._seen = 0  # characters pushed
        self._released = 0  # characters given out
        self.stopped = False
        self.stopped_by = ""  # the stop string

    def push(
        self, piece: str, entry: TokenLogprob | None = None, *, may_stop: bool = True
    ) -> tuple[str, list[TokenLogprob]]:
        """Add one token's text and entry; return what may go out now."""
        if entry is not None:
            self._entries.append((self._seen, entry))
        self._seen += len(piece)
        text = piece
        if self._stop is not None:
            text = self._stop.push(piece, may_stop=may_stop)
            self.stopped, self.stopped_by = self._stop.stopped, self._stop.stopped_by
        self._released += len(text)
        return text, self._due() if self._entries else []

    def flush(self) -> tuple[str, list[TokenLogprob]]:
        """End the answer without a stop string: return what was held."""
        text = self._stop.flush() if self._stop is not None else ""
        self._released += len(text)
        return text, self._due() if self._entries else []

    def _due(self) -> list[TokenLogprob]:
        """Take the entries whose token has begun to show, or of which nothing is still to come."""
        due = []
        is_all_out = self.stopped or self._released == self._seen
        while self._entries and (is_all_out or self._entries[0][0] < self._released):
            due.append(self._entries.popleft()[1])
        return due
