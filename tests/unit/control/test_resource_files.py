"""Files and folders of resources: each refusal says where, what and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.control.resource_files import load_resources, parse_resource, read_file
from tidegate.errors import ConfigError

GOOD = """\
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata: {{name: {name}}}
spec:
  engine: {{name: simulated}}
"""


def good(name: str) -> str:
    return GOOD.format(name=name)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        load_resources(path)
    assert refused.value.problems
    return str(refused.value)


def test_folders_files_and_documents_in_reading_order(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", good("third"))
    write(tmp_path / "a.yml", good("first") + "---\n" + good("second"))
    write(tmp_path / "notes.txt", "no YAML: at all: [")
    write(tmp_path / ".hidden.yaml", "broken: [")
    resources = load_resources(tmp_path)
    assert [model.name for model in resources.models] == ["first", "second", "third"]
    assert resources.origins["second"].name == "a.yml"


def test_a_relative_source_is_meant_from_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "m.yaml", good("m").replace("{name: simulated}", "{}") + "  source: {uri: ./w}\n")
    source = load_resources(file).models[0].spec.source
    assert source is not None
    assert source.uri == str(tmp_path.resolve() / "w")


def test_an_unknown_field_is_named_with_the_known_ones_and_a_guess(tmp_path: Path) -> None:
    text = refusal(write(tmp_path / "m.yaml", good("m") + "  scaling: {minReplica: 3}\n"))
    assert "m.yaml: Model m spec.scaling.minReplica: 3: no such field" in text
    assert "did you mean minReplicas?" in text


def test_an_unknown_field_inside_a_list_is_named_too(tmp_path: Path) -> None:
    text = "apiVersion: tidegate.dev/v1alpha1\nkind: Pool\nmetadata: {name: p}\n"
    text += "spec: {groups: [{name: a, gpu: 1}]}\n"
    said = refusal(write(tmp_path / "p.yaml", text))
    assert "Pool p spec.groups.0.gpu: 1: no such field" in said
    assert "did you mean gpus?" in said


def test_each_document_is_counted(tmp_path: Path) -> None:
    text = refusal(write(tmp_path / "m.yaml", good("m") + "---\n" + good("n") + "  precision: fp16\n"))
    assert "m.yaml document 2: Model n spec.precision: 'fp16': use 'auto', 'float32'" in text


def test_a_wrong_engine_argument_is_one_problem(tmp_path: Path) -> None:
    file = write(tmp_path / "m.yaml", good("m").replace("simulated}", "simulated, args: {a: [1]}}"))
    assert [problem.field for problem in read_file(file).problems] == ["m.yaml: Model m spec.engine.args.a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "write a mapping"),
        ("kind: Deployment", "use Model or Pool"),
        ("kind: Model\napiVersion: v1", "use tidegate.dev/v1alpha1"),
        ("kind: Model\napiVersion: tidegate.dev/v1alpha1", "metadata: missing: add it"),
        ("x: \x00", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_resource_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(write(tmp_path / "m.yaml", text))


def test_a_name_is_given_once(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", good("m"))
    write(tmp_path / "b.yaml", good("m"))
    assert "b.yaml: Model m metadata.name: 'm': already defined in a.yaml" in refusal(tmp_path)


def test_an_unknown_pool_is_refused(tmp_path: Path) -> None:
    assert "no such Pool; known: default" in refusal(write(tmp_path / "m.yaml", good("m") + "  pool: gold\n"))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "gone.yaml")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["kind", "apiVersion", "metadata", "spec", "name"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_document_is_a_resource_or_a_list_of_problems(document: object) -> None:
    parsed = parse_resource(document, "f")
    assert not isinstance(parsed, list) or all(problem.remedy for problem in parsed)
