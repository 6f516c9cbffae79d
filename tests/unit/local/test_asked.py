"""What was asked of the laptop's host beside its files, and when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.control.builders import model
from tidegate.control.resource_files import ResourceSet
from tidegate.control.resources import Model, PoolSpec
from tidegate.local.asked import Asked
from tidegate.messages.rollouts import Action


class Files:
    """Resource files that the test writes."""

    pool = PoolSpec()

    def __init__(self, *models: Model) -> None:
        self.resources = ResourceSet(models)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "asked.json"


def lengths(asked: Asked) -> dict[str, int]:
    return {each.name: each.spec.context_length for each in asked.resources.models}


def test_a_spec_that_was_set_stands_also_after_a_restart(path: Path) -> None:
    files = Files(model("one"), model("two"))
    Asked(files, path).set_spec(model("one", contextLength=64), "anna")
    again = Asked(files, path)
    assert lengths(again) == {"one": 64, "two": 0}
    assert again.is_overlaid("one")
    assert not again.is_overlaid("two")
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_ends_when_the_file_says_something_else_and_does_not_come_back(path: Path) -> None:
    files = Files(model("one"), model("two"))
    asked = Asked(files, path)
    asked.set_spec(model("one", contextLength=64), "anna")
    asked.set_spec(model("two", contextLength=64), "anna")
    files.resources = ResourceSet((model("one", contextLength=32), model("two")))
    assert lengths(asked) == {"one": 32, "two": 64}
    files.resources = ResourceSet((model("one"), model("two")))
    assert lengths(asked) == {"one": 0, "two": 64}
    assert lengths(Asked(files, path)) == {"one": 0, "two": 64}


def test_the_files_own_spec_ends_it(path: Path) -> None:
    asked = Asked(Files(model("one")), path)
    asked.set_spec(model("one", contextLength=64), "anna")
    asked.set_spec(model("one"), "anna")
    assert not asked.is_overlaid("one")


def test_all_of_it_goes_with_the_model(path: Path) -> None:
    files = Files(model("one"))
    asked = Asked(files, path)
    asked.set_spec(model("one", contextLength=64), "anna")
    asked.act("one", Action("pause", "", "anna", 1.0))
    asked.drain("one", True, "anna")
    files.resources = ResourceSet()
    assert lengths(asked) == {}
    files.resources = ResourceSet((model("one"),))
    assert (lengths(asked), asked.actions, asked.drains) == ({"one": 0}, {}, frozenset())


def test_an_action_that_came_meanwhile_is_not_taken_for_the_one_acted_on(path: Path) -> None:
    asked = Asked(Files(model("one")), path)
    first, second = Action("pause", "", "anna", 1.0), Action("pause", "", "anna", 2.0)
    asked.act("one", first)
    taken = asked.actions
    asked.act("one", second)
    asked.acted(taken)
    assert asked.actions == {"one": second}
    asked.acted(asked.actions)
    assert Asked(Files(model("one")), path).actions == {}


def test_an_overlay_that_this_versions_schema_refuses_ends(path: Path) -> None:
    asked = Asked(Files(model("one")), path)
    asked.set_spec(model("one", contextLength=64), "anna")
    path.write_bytes(path.read_bytes().replace(b'"contextLength":64', b'"contextLength":-1'))
    assert lengths(Asked(Files(model("one")), path)) == {"one": 0}


@pytest.mark.parametrize("text", [b"", b"[]", b'{"actions":{"one":{"verb":"dance"}}}'])
def test_a_file_that_cannot_be_read_is_nothing_asked(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    asked = Asked(Files(model("one")), path)
    assert (lengths(asked), asked.actions) == ({"one": 0}, {})
