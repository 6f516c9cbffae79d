"""The gateway speaks these dialects, one module an endpoint. A new endpoint is a module and a line here."""

from tidegate.gateway.dialects.anthropic import ANTHROPIC, CountTokens, Messages
from tidegate.gateway.dialects.base import Dialect
from tidegate.gateway.dialects.chat import Chat
from tidegate.gateway.dialects.completions import Completions
from tidegate.gateway.dialects.tokenize import DetokenizeDialect, TokenizeDialect
from tidegate.gateway.dialects.wire import OPENAI, Wire

DIALECTS: tuple[Dialect, ...] = (
    Chat(),
    Completions(),
    TokenizeDialect(),
    DetokenizeDialect(),
    Messages(),
    CountTokens(),
)
# Of the paths that begin so, whatever comes of them.
_WIRES = (("/v1/messages", ANTHROPIC),)


def wire_of(path: str) -> Wire:
    """The protocol that a path belongs to."""
    return next((wire for begin, wire in _WIRES if path.startswith(begin)), OPENAI)
