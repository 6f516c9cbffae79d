"""The page is made of what the document says, and escapes it."""

from __future__ import annotations

from tidegate.gateway.docs import render

DOCUMENT = {
    "info": {"title": "T<1>", "version": "1", "description": "d & e"},
    "paths": {
        "/open": {
            "get": {
                "summary": "Open <b>",
                "responses": {
                    "200": {
                        "description": "ok",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}},
                    }
                },
            }
        },
        "/closed": {"post": {"summary": "s", "security": [{"bearer": []}], "responses": {}}},
    },
    "components": {
        "schemas": {
            "Thing": {"required": ["a"], "properties": {"a": {"type": "string", "description": "x<y"}}}
        }
    },
}


def test_the_page_shows_operations_and_objects() -> None:
    page = render(DOCUMENT, "http://localhost:1").decode()
    assert "T&lt;1&gt;" in page and "d &amp; e" in page
    assert "Open &lt;b&gt;" in page and "x&lt;y" in page
    assert '<a href="#Thing">Thing</a>' in page and '<details id="Thing">' in page
    assert page.count("needs a key") == 1
    assert "curl http://localhost:1/v1/chat/completions" in page
