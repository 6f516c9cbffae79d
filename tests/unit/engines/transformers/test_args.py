from __future__ import annotations

from pathlib import Path

from msgspec.structs import fields

from tidegate.replica_args import TransformersArgs

GUIDE = Path(__file__).parents[4] / "platform/docs/guides/serve-your-own-model.md"


def test_the_guide_names_every_argument() -> None:
    table = GUIDE.read_text(encoding="utf-8").split("## Arguments of the engine")[1]
    named = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert named == {field.name for field in fields(TransformersArgs)}
