"""`tidegate run`: one prompt through the gateway, the answer streamed to stdout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from tidegate.cli.output import CommandFailed, Format, OutputOption, put, put_foreign, say, show_record
from tidegate.cli.target import KeyOption, Target, UrlOption, find_target

CONNECT_SECONDS = 5.0
# Heartbeats of the gateway come every few seconds; silence for so long means that it is gone.
SILENCE_SECONDS = 120.0


@dataclass
class Answer:
    """The result of one streamed call. Times are `time.monotonic()` seconds."""

    asked: float
    first: float = 0.0
    last: float = 0.0
    text: list[str] = field(default_factory=list)
    finish_reason: str = ""
    request_id: str = ""
    usage: dict[str, int] = field(default_factory=dict)

    @property
    def ttft_seconds(self) -> float:
        return self.first - self.asked if self.first else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first over the time they took. 0 where it cannot be told."""
        tokens, seconds = self.usage.get("completion_tokens", 0) - 1, self.last - self.first
        return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


def run(
    model: Annotated[str, typer.Argument(help="A model that `tidegate models` lists.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    system: Annotated[str, typer.Option(help="A system message before the prompt.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed repeats the same answer.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="TTFT and tokens/s on stderr afterwards.")
    ] = False,
    url: UrlOption = "",
    key: KeyOption = "",
    output: OutputOption = Format.table,
) -> None:
    """Ask a model and stream its answer."""
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chosen = {"max_completion_tokens": max_tokens, "temperature": temperature, "seed": seed}
    body |= {name: value for name, value in chosen.items() if value is not None}
    streams = output not in (Format.json, Format.yaml)
    answer = _ask(find_target(url, key), body, streams)
    if streams:
        put("")
    else:
        show_record(_record(model, answer), output, "")
    if verbose:
        say(_figures(answer))


def _ask(target: Target, body: dict[str, Any], streams: bool) -> Answer:
    import httpx

    answer = Answer(asked=time.monotonic())
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    try:
        with (
            httpx.Client(timeout=timeout, trust_env=not target.is_loopback) as client,
            client.stream(
                "POST", target.url + "/v1/chat/completions", json=body, headers=target.headers
            ) as response,
        ):
            answer.request_id = response.headers.get("x-request-id", "")
            if response.status_code != httpx.codes.OK:
                raise _refused(response)
            for event in _events(response.iter_lines()):
                _take(event, answer, streams)
    except httpx.TransportError as error:
        if answer.first:
            raise CommandFailed(f"The stream broke off: {_reason(error)}.") from error
        raise target.unreachable(_reason(error)) from error
    if not answer.finish_reason:
        raise CommandFailed("The stream ended before the answer did.")
    return answer


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each `data:` line up to `[DONE]`; comments (heartbeats, queue places) go to the person."""
    import orjson

    shown = ""
    for line in lines:
        if line.startswith(":"):
            note = line[1:].strip()
            if note and note != shown and not note.startswith("heartbeat"):
                say(note)
                shown = note
        elif line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield orjson.loads(data)


def _take(event: dict[str, Any], answer: Answer, streams: bool) -> None:
    if error := event.get("error"):
        raise CommandFailed(str(error.get("message") or error))
    if usage := event.get("usage"):
        answer.usage = {name: count for name, count in usage.items() if isinstance(count, int)}
    for choice in event.get("choices", ()):
        if text := choice.get("delta", {}).get("content"):
            answer.last = time.monotonic()
            answer.first = answer.first or answer.last
            answer.text.append(text)
            if streams:
                put_foreign(text, end="")
        if reason := choice.get("finish_reason"):
            answer.finish_reason = reason


def _refused(response: Any) -> CommandFailed:
    """OpenAI's error body as a sentence, with when to try again."""
    import orjson

    raw = response.read()
    try:
        message = orjson.loads(raw)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = f"The gateway answered {response.status_code}: {raw[:200].decode(errors='replace')}"
    if after := response.headers.get("retry-after"):
        message = f"{message} Try again in {after} s."
    return CommandFailed(message)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _record(model: str, answer: Answer) -> dict[str, Any]:
    return {
        "model": model,
        "request_id": answer.request_id,
        "text": "".join(answer.text),
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "ttft_seconds": round(answer.ttft_seconds, 4),
        "tokens_per_second": round(answer.tokens_per_second, 1),
    }


def _figures(answer: Answer) -> str:
    tokens = answer.usage.get("completion_tokens", 0)
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    return f"TTFT {answer.ttft_seconds * 1000:.0f} ms, {tokens} tokens{speed}, {answer.finish_reason}"
