"""`/docs`: one self-contained page rendered from the OpenAPI document, without any outside resource."""

from __future__ import annotations

from html import escape
from typing import Any

import orjson

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b2733;
background:#fff}h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid #d5dde5}
code,pre{font:14px/1.45 ui-monospace,monospace}pre{background:#f2f5f8;padding:.8rem;overflow:auto}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem;
border-bottom:1px solid #e6ebf0}.m{font-weight:700;color:#0b6e4f}summary{cursor:pointer}
@media(prefers-color-scheme:dark){body{background:#12181f;color:#dde5ec}pre{background:#1c252e}
td,th,h2{border-color:#2b3742}.m{color:#5fd3a8}}
"""
_EXAMPLE = """curl {address}/v1/chat/completions \\
  -H 'Authorization: Bearer KEY' -H 'Content-Type: application/json' \\
  -d '{{"model": "MODEL", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'"""


def render(document: dict[str, Any], address: str) -> bytes:
    """The page as UTF-8 HTML."""
    info = document["info"]
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style>",
        f"<h1>{escape(info['title'])} API</h1><p>Version {escape(info['version'])}. ",
        f'{escape(info["description"])} The whole document: <a href="/openapi.json">/openapi.json</a>.</p>',
        f"<pre>{escape(_EXAMPLE.format(address=address))}</pre>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    parts.append("<h2>Objects</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append(_object(name, schema))
    parts.append("</html>")
    return "".join(parts).encode()


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    lock = " <small>(needs a key)</small>" if operation.get("security") else ""
    rows = [f"<h2><span class=m>{escape(method.upper())}</span> <code>{escape(path)}</code>{lock}</h2>"]
    rows.append(f"<p>{escape(operation.get('summary', ''))}</p>")
    if body := operation.get("requestBody"):
        rows.append(f"<p>Body: {_content(body['content'])}</p>")
    rows.append("<table><tr><th>Status<th>Meaning<th>Body")
    for status, response in operation["responses"].items():
        rows.append(
            f"<tr><td>{escape(str(status))}<td>{escape(response.get('description', ''))}"
            f"<td>{_content(response.get('content', {}))}"
        )
    rows.append("</table>")
    return "".join(rows)


def _object(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>']
    if description := schema.get("description"):
        rows.append(f"<p>{escape(description)}</p>")
    rows.append("<table><tr><th>Field<th>Form<th>Meaning")
    for field, form in schema.get("properties", {}).items():
        shape = {key: value for key, value in form.items() if key not in ("description", "default", "title")}
        mark = " (required)" if field in required else ""
        rows.append(
            f"<tr><td><code>{escape(field)}</code>{mark}<td><code>{escape(orjson.dumps(shape).decode())}</code>"
            f"<td>{escape(form.get('description', ''))}"
        )
    rows.append("</table></details>")
    return "".join(rows)


def _content(content: dict[str, Any]) -> str:
    return ", ".join(
        f"<code>{escape(kind)}</code>{_link(entry.get('schema', {}))}" for kind, entry in content.items()
    )


def _link(schema: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    return f' <a href="#{escape(name)}">{escape(name)}</a>' if name else ""
