"""The gateway speaks these dialects, one module an endpoint. A new endpoint is a module and a line here."""

from tidegate.gateway.dialects.anthropic import ANTHROPIC, CountTokens, Messages
from tidegate.gateway.dialects.base import Dialect
from tidegate.gateway.dialects.chat import Chat
from tidegate.gateway.dialects.completions import Completions
from tidegate.gateway.dialects.embeddings import EMBEDDINGS
from tidegate.gateway.dialects.judging import JUDGING
from tidegate.gateway.dialects.ollama import OLLAMA, OllamaChat, OllamaGenerate
from tidegate.gateway.dialects.ollama_embed import OLLAMA_EMBED
from tidegate.gateway.dialects.responses import Responses
from tidegate.gateway.dialects.tgi import TGI, GenerateEither, GenerateStream, GenerateText
from tidegate.gateway.dialects.tokenize import DetokenizeDialect, TokenizeDialect
from tidegate.gateway.dialects.wire import OPENAI, Wire

DIALECTS: tuple[Dialect, ...] = (
    Chat(),
    Completions(),
    EMBEDDINGS,
    *JUDGING,
    Responses(),
    TokenizeDialect(),
    DetokenizeDialect(),
    Messages(),
    CountTokens(),
    GenerateText(),
    GenerateStream(),
    GenerateEither(),
    OllamaChat(),
    OllamaGenerate(),
    OLLAMA_EMBED,
)
# Of the paths that begin so, whatever comes of them.
_WIRES = (("/v1/messages", ANTHROPIC), ("/generate", TGI), ("/info", TGI), ("/api/", OLLAMA))


def wire_of(path: str) -> Wire:
    """The protocol that a path belongs to."""
    return next((wire for begin, wire in _WIRES if path.startswith(begin)), OPENAI)
