"""Names how a prompt begins, so that requests that begin alike are known without a tokenizer.

A *chain* is some hashes of 8 bytes, one behind the other: of the prompt's first bytes up to growing lengths.
Two prompts of one salt that begin alike have the hashes up to there in common. A chain is a hint alone: it
says where to look for a prefix, and nothing is answered from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from tidegate.messages.work import ChatPrompt, Generate, TextPrompt, Work

HASH_BYTES = 8
# 1, 1.5, 2, 3, 4, 6, ... 192 KiB: at least two thirds of what two prompts have in common are found.
LENGTHS_BYTES = [unit << step for step in range(9, 17) for unit in (2, 3)]
MOST_BYTES = LENGTHS_BYTES[-1]
# The longest ones: what is less than three eighths of a prompt is not looked for.
MOST_HASHES = 4


def prefix_salt(tenant: str, adapter: str = "") -> bytes:
    """Return what two requests have in common that may share a prefix. Nobody sees what another tenant's
    prompts begin with, and what an adapter computes of a prompt is not what its model or another one does."""
    return "\0".join((tenant, adapter) if adapter else (tenant,)).encode(errors="surrogatepass")


def prefix_chain(salt: bytes, work: Work) -> bytes:
    """Return the chain of what is to be generated from, the shortest length first; empty where it is short,
    and for all other work. Chains of different salts have nothing in common, as engines share no prefix
    between them."""
    if not isinstance(work, Generate):
        return b""
    hasher = hashlib.blake2b(hashlib.blake2b(salt).digest(), digest_size=HASH_BYTES)
    chain, done = b"", 0
    lengths = iter(LENGTHS_BYTES)
    length = next(lengths)
    for piece in _pieces(work):
        at = 0
        while done + len(piece) - at >= length:
            end = at + length - done
            hasher.update(memoryview(piece)[at:end])
            chain += hasher.digest()
            at, done = end, length
            if (length := next(lengths, 0)) == 0:
                return chain[-MOST_HASHES * HASH_BYTES :]
        hasher.update(memoryview(piece)[at:])
        done += len(piece) - at
    return chain[-MOST_HASHES * HASH_BYTES :]


def _pieces(work: Generate) -> Iterator[bytes]:
    """The prompt in the order in which a template writes it. JSON: a longer value begins as a shorter one."""
    prompt = work.prompt
    if isinstance(prompt, ChatPrompt):
        for part in (prompt.tools, prompt.template_args, *prompt.messages):
            try:
                yield msgspec.json.encode(part)
            except (OverflowError, UnicodeEncodeError, RecursionError):
                return  # numbers beyond 64 bits, half a surrogate pair: what came before has to do
    elif isinstance(prompt, TextPrompt):
        yield prompt.text[:MOST_BYTES].encode(errors="surrogatepass")
    else:
        yield msgspec.json.encode(prompt.token_ids[:MOST_BYTES])
