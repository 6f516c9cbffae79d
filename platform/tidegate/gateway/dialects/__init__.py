"""The gateway speaks these dialects, one module an endpoint. A new endpoint is a module and a line here."""

from tidegate.gateway.dialects.base import Dialect
from tidegate.gateway.dialects.chat import Chat
from tidegate.gateway.dialects.completions import Completions
from tidegate.gateway.dialects.embeddings import Embeddings
from tidegate.gateway.dialects.judging import JUDGING
from tidegate.gateway.dialects.tokenize import DetokenizeDialect, TokenizeDialect

DIALECTS: tuple[Dialect, ...] = (
    Chat(),
    Completions(),
    Embeddings(),
    *JUDGING,
    TokenizeDialect(),
    DetokenizeDialect(),
)
