"""The CRDs: they follow from the classes, keep Kubernetes' rules for schemas, and take what the classes take.

What only an API server can say, that it accepts them and what its CEL refuses, is in tests/cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from msgspec.structs import fields
from pydantic import ValidationError

from tests.cluster.bad_resources import BAD_RESOURCES, Bad
from tests.unit.control import stored_before
from tidegate.control.desired import Look, ModelRecord, Pin, RevisionRecord
from tidegate.control.evidence import Thresholds
from tidegate.control.packing import Placement
from tidegate.control.resources import Model, Pool
from tidegate.control.rollout_state import RolloutState
from tidegate.messages.registry import RevisionReport
from tidegate.messages.rollouts import Action, GateView, RolloutView, StepView
from tidegate.replica_args import Probe
from tidegate.sources.facts import DecoderShape, StoredWeights
from tidegate_operator import crd
from tidegate_operator.status_patch import record_of, record_on_wire, rollout_on_wire

SAMPLES = Path(__file__).parents[3] / "helm" / "samples"
DEFINITIONS = crd.definitions()
KINDS: dict[str, type[Model] | type[Pool]] = {"Model": Model, "Pool": Pool}
Node = tuple[str, dict[str, Any]]


def schema_of(kind: str) -> dict[str, Any]:
    definition = DEFINITIONS[f"{kind.lower()}s"]
    found: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def nodes(schema: dict[str, Any], path: str) -> Iterator[Node]:
    """Every value's schema by its path."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if part in schema:
            yield from nodes(schema[part], f"{path}[]")


NODES = [node for kind in KINDS for node in nodes(schema_of(kind), kind)]
FIELDS = [node for node in NODES if not re.fullmatch(r"\w+(\.metadata.*)?", node[0])]
INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]


def paths(wrong: Iterator[str]) -> list[str]:
    return sorted(wrong)


class TestCommittedFiles:
    def test_are_what_the_classes_say(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert crd.main(["--check"]) == 0, capsys.readouterr().err

    def test_drift_is_found_and_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert crd.main(["--check", "--folder", str(tmp_path)]) == 1
        assert crd.main(["--write", "--folder", str(tmp_path)]) == 0
        assert crd.main(["--check", "--folder", str(tmp_path)]) == 0
        with (tmp_path / "pools.yaml").open("a") as file:
            file.write("# changed\n")
        capsys.readouterr()
        assert crd.main(["--check", "--folder", str(tmp_path)]) == 1
        assert "pools.yaml" in capsys.readouterr().err

    def test_are_read_back_as_they_were_meant(self) -> None:
        """Helm inserts them as text; no anchor, no number that YAML reads differently."""
        for name, text in crd.files().items():
            assert yaml.safe_load(text) == DEFINITIONS[name.removesuffix(".yaml")]
            assert text.count("\nmetadata:\n") == 1  # where the chart puts its annotations


class TestStructuralSchema:
    """https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/"""

    def test_every_value_has_a_type(self) -> None:
        open_ended = {"x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"}
        assert paths(path for path, node in NODES if "type" not in node and not open_ended & set(node)) == []

    def test_nothing_is_there_that_kubernetes_forbids(self) -> None:
        forbidden = {
            "$ref",
            "$defs",
            "title",
            "const",
            "oneOf",
            "allOf",
            "not",
            "patternProperties",
            "nullable",
        }
        assert paths(path for path, node in NODES if forbidden & set(node)) == []
        assert (
            paths(path for path, node in NODES if {"properties", "additionalProperties"} <= set(node)) == []
        )
        assert paths(path for path, node in NODES if isinstance(node.get("additionalProperties"), bool)) == []
        assert paths(path for path, node in NODES if node.get("anyOf", INT_OR_STRING) != INT_OR_STRING) == []
        assert (
            paths(path for path, node in NODES if ("anyOf" in node) != ("x-kubernetes-int-or-string" in node))
            == []
        )

    def test_of_metadata_only_the_name_is_bounded(self) -> None:
        for kind in KINDS:
            metadata = schema_of(kind)["properties"]["metadata"]
            assert set(metadata) == {"type", "properties"}
            assert set(metadata["properties"]) == {"name"}
            assert "description" not in metadata["properties"]["name"]

    def test_every_field_is_described(self) -> None:
        named = [(path, node) for path, node in FIELDS if not path.endswith("[]")]
        assert len(named) > 100
        assert paths(path for path, node in named if not node.get("description")) == []

    def test_every_string_list_and_map_is_bounded(self) -> None:
        assert (
            paths(
                path
                for path, node in FIELDS
                if (node.get("type") == "string" or "anyOf" in node) and not {"maxLength", "enum"} & set(node)
            )
            == []
        )
        assert paths(p for p, node in FIELDS if node.get("type") == "array" and "maxItems" not in node) == []
        free = [p for p, node in FIELDS if "additionalProperties" in node and "maxProperties" not in node]
        assert free == []

    def test_every_number_of_a_spec_is_bounded(self) -> None:
        numbers = [(p, n) for p, n in FIELDS if n.get("type") in ("integer", "number") and ".spec." in p]
        assert paths(p for p, node in numbers if not {"minimum", "maximum"} <= set(node)) == []

    def test_items_of_keyed_lists_have_their_keys(self) -> None:
        keyed = [(path, node) for path, node in NODES if "x-kubernetes-list-map-keys" in node]
        assert {path for path, _ in keyed} >= {"Pool.spec.groups", "Model.status.conditions"}
        for path, node in keyed:
            assert node["x-kubernetes-list-type"] == "map"
            assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"]), path

    def test_defaults_fit_their_schema(self) -> None:
        """And are whole: the API server runs a parent's rules on its default as it stands."""
        for path, node in NODES:
            if "default" in node:
                jsonschema.validate(node["default"], node)
                rules = " ".join(rule["rule"] for rule in node.get("x-kubernetes-validations", ()))
                if isinstance(node["default"], dict):
                    needed = set(re.findall(r"self\.(\w+)", rules)) - set(
                        re.findall(r"has\(self\.(\w+)", rules)
                    )
                    assert needed <= set(node["default"]), path

    def test_a_keyword_that_is_not_known_stops_the_generation(self) -> None:
        with pytest.raises(ValueError, match="no structural form of oneOf"):
            crd.structural({"oneOf": [{"type": "string"}]})


class TestRules:
    RULES = tuple(
        (path, node, rule) for path, node in NODES for rule in node.get("x-kubernetes-validations", ())
    )

    def test_each_has_a_message_of_one_line(self) -> None:
        assert len(self.RULES) > 15
        assert [rule for _, _, rule in self.RULES if not rule["message"] or "\n" in rule["message"]] == []

    def test_each_speaks_of_fields_that_exist(self) -> None:
        for path, node, rule in self.RULES:
            for chain in re.findall(r"self((?:\.\w+)+)(?!\()\b(?!\()", rule["rule"]):
                place = node
                for name in chain.strip(".").split("."):
                    if "properties" not in place:  # a function of a plain value or a list
                        break
                    assert name in place["properties"], (path, rule["rule"])
                    place = place["properties"][name]
            if "fieldPath" in rule:
                assert rule["fieldPath"].removeprefix(".") in node["properties"], path

    def test_only_the_pool_of_a_model_cannot_change(self) -> None:
        assert [path for path, _, rule in self.RULES if "oldSelf" in rule["rule"]] == ["Model.spec.pool"]

    def test_no_pattern_ends_the_text_that_it_stands_in(self) -> None:
        assert [rule["rule"] for _, _, rule in self.RULES if rule["rule"].count("'") % 2] == []
        assert [rule["rule"] for _, _, rule in self.RULES if "\\" in rule["rule"]] == []


class TestWhatKubectlShows:
    def test_columns_lead_to_fields(self) -> None:
        for kind in KINDS:
            version = DEFINITIONS[f"{kind.lower()}s"]["spec"]["versions"][0]
            known = {path.removeprefix(kind) for path, _ in nodes(schema_of(kind), kind)}
            known.add(".metadata.creationTimestamp")
            for column in version["additionalPrinterColumns"]:
                path = re.sub(r"\[\?\(@\.type==\"\w+\"\)\]", "[]", column["jsonPath"])
                assert path in known, column

    def test_a_model_can_be_scaled(self) -> None:
        scale = DEFINITIONS["models"]["spec"]["versions"][0]["subresources"]["scale"]
        known = {path for path, _ in nodes(schema_of("Model"), "")}
        assert set(scale.values()) <= known


def sample_documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.name}:{document['kind']}/{document['metadata']['name']}")
        for path in sorted(SAMPLES.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if document["kind"] in KINDS
    ]


class TestSamples:
    def test_there_is_one_of_each_sort(self) -> None:
        assert {path.stem for path in SAMPLES.glob("*.yaml")} == {
            "cpu-demo",
            "one-gpu",
            "shared-gpus",
            "scale-from-zero",
            "two-pools",
        }

    @pytest.mark.parametrize("document", sample_documents())
    def test_fit_the_classes_and_the_schema(self, document: dict[str, Any]) -> None:
        kind = document["kind"]
        resource = KINDS[kind].model_validate(document)
        jsonschema.validate(document, schema_of(kind))
        # Written out with every default, as an API server stores it, it fits again and means the same.
        whole = json.loads(resource.model_dump_json(by_alias=True, exclude_none=True))
        jsonschema.validate(whole, schema_of(kind))
        assert KINDS[kind].model_validate(whole) == resource

    def test_models_name_pools_and_groups_that_are_beside_them(self) -> None:
        for path in SAMPLES.glob("*.yaml"):
            documents = [
                document for document in yaml.safe_load_all(path.read_text()) if document["kind"] in KINDS
            ]
            pools = [Pool.model_validate(document) for document in documents if document["kind"] == "Pool"]
            groups = {(pool.name, group.name) for pool in pools for group in pool.spec.groups}
            for document in documents:
                if document["kind"] == "Model":
                    spec = Model.model_validate(document).spec
                    wanted = spec.resources.accelerator
                    assert spec.pool in {pool.name for pool in pools}
                    assert not wanted or (spec.pool, wanted) in groups


def refused_path(error: jsonschema.ValidationError) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    if error.validator == "required":
        path += "." + error.message.split("'")[1]  # 'name' is a required property
    return path.strip(".")


class TestBadResources:
    def test_there_are_enough(self) -> None:
        assert len(BAD_RESOURCES) >= 40
        assert len({(bad.document["kind"], bad.name) for bad in BAD_RESOURCES}) == len(BAD_RESOURCES)

    @pytest.mark.parametrize(
        "bad",
        [bad for bad in BAD_RESOURCES if bad.is_local],
        ids=lambda bad: f"{bad.document['kind']}: {bad.name}",
    )
    def test_the_classes_refuse_them(self, bad: Bad) -> None:
        with pytest.raises(ValidationError) as refused:
            KINDS[bad.document["kind"]].model_validate(bad.document)
        # pydantic names the field by its place, a rule over several fields in its sentence.
        (error, *_) = refused.value.errors(include_url=False)
        place = ".".join(str(part) for part in error["loc"])
        wanted = re.sub(r"\[(\d+)\]", r".\1", bad.says)
        leaf = wanted.rpartition(".")[2]
        if bad.by == "keys":
            leaf = wanted.split(".")[1].removesuffix("s")
        assert place.startswith(wanted) or leaf in error["msg"], error

    @pytest.mark.parametrize(
        "bad",
        [bad for bad in BAD_RESOURCES if bad.by == "schema"],
        ids=lambda bad: f"{bad.document['kind']}: {bad.name}",
    )
    def test_the_schema_refuses_them(self, bad: Bad) -> None:
        errors = list(
            jsonschema.Draft202012Validator(schema_of(bad.document["kind"])).iter_errors(bad.document)
        )
        assert any(refused_path(error).startswith(bad.says) for error in errors), errors

    @pytest.mark.parametrize(
        "bad",
        [bad for bad in BAD_RESOURCES if bad.by != "schema"],
        ids=lambda bad: f"{bad.document['kind']}: {bad.name}",
    )
    def test_the_others_are_wrong_in_nothing_else(self, bad: Bad) -> None:
        """The API server runs no rule on a resource that its schema refuses."""
        jsonschema.validate(bad.document, schema_of(bad.document["kind"]))

    def test_what_is_changed_stood_before(self) -> None:
        for bad in BAD_RESOURCES:
            if bad.before is not None:
                KINDS[bad.before["kind"]].model_validate(bad.before)


def test_the_status_mirrors_what_is_remembered_of_a_revision() -> None:
    item = schema_of("Model")["properties"]["status"]["properties"]["revisions"]["items"]
    assert len(item["properties"]) == len(fields(RevisionRecord))
    assert set(item["properties"]["proof"]["properties"]) >= {"proved", "kvBytesPerToken", "loadSeconds"}
    assert item["properties"]["spec"]["x-kubernetes-preserve-unknown-fields"] is True


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` as a refusal of what Kubernetes would drop without a word."""
    inner = {name: closed(value) for name, value in schema.get("properties", {}).items()}
    made = {**schema, **({"properties": inner} if inner else {})}
    if "items" in made:
        made["items"] = closed(made["items"])
    is_open = "additionalProperties" in made or "x-kubernetes-preserve-unknown-fields" in made
    return made if is_open or made.get("type") != "object" else {**made, "additionalProperties": False}


def test_nothing_of_what_the_operator_remembers_is_dropped() -> None:
    record = RevisionRecord(
        revision="0123456789",
        spec={"engine": {"name": "simulated"}},
        checkpoint="/weights",
        weights_bytes=1,
        quantization="gptq",
        precision="float16",
        proof=RevisionReport(
            "m", "0123456789", 1.5, True, "Reason", "why", ["note"], 1.0, 1, 1, 1, 1, "float16", "cpu", 1.0
        ),
        attempt_at=1.0,
        failures=1,
        retry_at=2.0,
        reason="Reason",
        message="why",
        retired_at=3.0,
        shape=DecoderShape(1, 2, 3, 4, 5, 6),
        stored_weights=StoredWeights(1, 2),
        placement=Placement("l4", 0.5, 1, 2),
        waits_since=4.0,
        spec_hash="abcdef0123",
        commit="c",
        digest="d",
        created=5.0,
        cause="precision: auto → float16",
        author="someone",
        number=6,
        restarted=7.0,
        probes=[Probe("Say a", [{"role": "user", "content": "x"}], "a", "b", 4)],
        task="embed",
    )
    look, pin = Look("h", 6.0, record, "a", 7.0, "Reason", "why"), Pin("r", "h", "s")
    gate = GateView("errors", "fails", "why", 1.0, 2.0, 3, 4, 5, 6)
    rollout = RolloutState(
        id="1",
        target="0123456789",
        stable="old",
        strategy="Canary",
        phase="Aborted",
        started=1.0,
        steps=[StepView(15, 1.0, True)],
        step=0,
        step_since=2.0,
        ended=3.0,
        weight=15,
        ready_for=50,
        size=2,
        is_paused=True,
        released=0,
        skipped=0,
        is_refused=True,
        looked_at=1.0,
        looked_ended=1,
        thresholds=Thresholds((1, 2, 3, 4), (5, 6, 7, 8), 2.0),
        leaving=["old"],
        reason="Reason",
        message="why",
        note="no",
        author="ada",
        gates=[gate],
        clean_requests=7,
        needed_requests=59,
    )
    action = Action("undo", "old", "ada", 1.0)
    known = ModelRecord("m", 1, {"0123456789": 100}, {record.revision: record}, look, pin, rollout, action)
    status = record_on_wire(known)
    assert record_of("m", status) == known
    assert len(status["rolloutState"]) == len(fields(RolloutState))
    view = RolloutView(
        *("m", "1", "Canary", "Aborted", "old", "new", 15, 0, [StepView(15, 1.0, True)], "Reason", "why"),
        *([gate], 1, 2, 3.0, 4.0, 5.0, 6.0, 7, {"old": "1/1"}, "Refused"),
    )
    status |= rollout_on_wire(view)
    assert len(status["rollout"]) == len(fields(RolloutView))
    assert len(status["look"]) + len(status["pinned"]) == len(fields(Look)) + len(fields(Pin))
    written = status["revisions"][0]
    assert len(written) == len(fields(RevisionRecord))
    assert len(written["proof"]) == len(fields(RevisionReport))
    assert written["storedWeights"] == {"floatValues": 1, "fixedBytes": 2}
    jsonschema.validate(status, closed(schema_of("Model")["properties"]["status"]))
    with pytest.raises(jsonschema.ValidationError, match="unknownField"):
        jsonschema.validate({"unknownField": 1}, closed(schema_of("Model")["properties"]["status"]))


@pytest.mark.parametrize("name", stored_before.statuses())
def test_nothing_of_what_the_version_before_stored_is_dropped(name: str) -> None:
    """The API server drops what the schema does not name, also when it reads a stored object."""
    status = stored_before.statuses()[name]
    jsonschema.validate(status, closed(schema_of("Model")["properties"]["status"]))
