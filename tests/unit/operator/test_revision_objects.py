"""Histories as ControllerRevisions: what is written, and what goes."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from tests.unit.operator.bodies import model_body
from tidegate.control.desired import RevisionRecord
from tidegate.messages.registry import RevisionReport
from tidegate.sources.facts import DecoderShape
from tidegate_operator.cache import Body, Cache
from tidegate_operator.kinds import OURS
from tidegate_operator.objects import ResourceReader
from tidegate_operator.revision_objects import controller_revision, history_writes, read_history

MODEL = model_body()
ONE = RevisionRecord(
    "a",
    {"engine": {"name": "simulated", "maxSlots": 0}},
    number=1,
    digest="d",
    shape=DecoderShape(layers=2),
    proof=RevisionReport("one", "a", 1.0, True, notes=["slow"]),
)
TWO = RevisionRecord("b", {"precision": "float16"}, number=2, cause="precision: auto → float16")


def stored(*history: RevisionRecord, model: Body = MODEL) -> list[Body]:
    """As the API server keeps them, in no order."""
    found = enumerate(controller_revision(model, kept) for kept in reversed(history))
    return [
        {**body, "metadata": {**body["metadata"], "uid": f"uid-{number}", "resourceVersion": "1"}}
        for number, body in found
    ]


def writes(
    model: Body, bodies: list[Body], history: Sequence[RevisionRecord]
) -> tuple[list[Body], list[Body]]:
    written, deleted = history_writes(model, bodies, read_history(bodies), history)
    return list(written), deleted


def test_an_entry_is_the_models_and_comes_back_as_it_was() -> None:
    written = controller_revision(MODEL, ONE)
    assert (written["metadata"]["name"], written["revision"]) == ("one-a", 1)
    (owner,) = written["metadata"]["ownerReferences"]
    assert owner["uid"] == MODEL["metadata"]["uid"]
    assert written["data"]["spec"] == ONE.spec
    key, value = OURS.split("=")
    assert written["metadata"]["labels"][key] == value
    assert read_history(stored(ONE, TWO)) == (ONE, TWO)


def test_only_what_is_new_is_written() -> None:
    assert writes(MODEL, stored(ONE, TWO), (ONE, TWO)) == ([], [])
    assert writes(MODEL, stored(ONE), (ONE, TWO)) == ([controller_revision(MODEL, TWO)], [])


def test_what_is_no_longer_kept_goes() -> None:
    bodies = stored(ONE, TWO)
    assert writes(MODEL, bodies, (TWO,)) == ([], [bodies[1]])


def test_a_proof_is_added_in_place() -> None:
    (body,) = stored(replace(ONE, proof=None))
    written, deleted = writes(MODEL, [body], (ONE,))
    assert (written, deleted) == ([controller_revision(MODEL, ONE)], [])
    assert written[0]["data"] == body["data"], "the API server takes no other data"


def test_other_data_is_made_anew() -> None:
    bodies = stored(replace(ONE, digest=""))
    assert writes(MODEL, bodies, (ONE,)) == ([], bodies)
    assert writes(MODEL, [], (ONE,)) == ([controller_revision(MODEL, ONE)], [])


def test_what_cannot_be_read_goes() -> None:
    (body,) = stored(ONE)
    broken = {**body, "data": {"number": "one"}}
    assert read_history([broken]) == ()
    assert writes(MODEL, [broken], (ONE,)) == ([], [broken])


def test_a_model_is_read_with_its_own_history() -> None:
    """One that was deleted may have had the same name."""
    cache = Cache()
    gone = {**MODEL, "metadata": {**MODEL["metadata"], "uid": "another"}}
    for kind, body in [
        ("Model", MODEL),
        *(("ControllerRevision", each) for each in stored(ONE)),
        *(("ControllerRevision", each) for each in stored(TWO, model=gone)),
    ]:
        cache.put(kind, body)  # type: ignore[arg-type]
    reader = ResourceReader(cache)
    (found,) = reader.models("models", "default")
    assert found.history == (ONE,)
    assert reader.models("models", "default")[0].history is found.history, "it is read once"
