"""Files and folders of resources: each refusal says where, what and how to mend it."""

from __future__ import annotations

import os
import socket
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.control import resource_files
from tidegate.control.resource_files import (
    MAX_FILE_BYTES,
    combine,
    load_resources,
    parse_resource,
    read_file,
    read_files,
)
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


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in pairwise("abcdefghijkl")
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("since: 2024-02-30", "spec.since: '2024-02-30': no such field"),
        ("since: !!timestamp 2024-02-30", "does not fit its tag"),
        ("since: " + "9" * 5000, "a number of 5000 characters"),
        ("since: 0x" + "f" * 100_000, "a number of 100002 characters"),
        ("since: " + "1:" * 400 + "0.5", "a number of"),
        ("since: !!int x", "does not fit its tag"),
        ("since: !!float ''", "does not fit its tag"),
        ("since: !!int ''", "does not fit its tag"),
        ("since: !!bool maybe", "does not fit its tag"),
        ("since: !!binary é", "not valid YAML"),
        ("since: !!python/object/apply:os.getpid []", "not valid YAML"),
        ("since: &s [*s]", "holds itself"),
        ("since: *nowhere", "not valid YAML"),
        ("? [a]\n  : b", "not valid YAML"),
        ("pool: a\n  pool: b", "'pool' is given twice"),
        ("since: " + "{a: " * 60, "nested more than 50 deep"),
        ("1: x", "spec.1: 1: its name must be text"),
        ('"\\e[2J": x', "spec.\\x1b[2J: 'x': no such field"),
        ("source: {uri: ~nobody-has-this-name/x}\n  precision: 1", "spec.precision: 1: use 'auto'"),
        ('source: {uri: "a\\0b"}', "spec.source.uri"),
        ("scaling: {minReplicas: .inf}", "spec.scaling.minReplicas: inf"),
        ("? " + "k" * 100_000 + "\n  : x", "no such field"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_one_bad_value_is_refused_by_name_and_no_neighbour_with_it(
    tmp_path: Path, line: str, said: str
) -> None:
    write(tmp_path / "good.yaml", good("good"))
    write(tmp_path / "bad.yaml", good("bad") + f"  {line}\n")
    files = read_files([tmp_path])
    text = "; ".join(str(problem) for file in files for problem in file.problems)
    assert said in text
    assert "bad.yaml" in text
    assert text.isprintable()
    assert len(text) < 4000
    assert [model.name for model in combine(files)[0].models] == ["good"]


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGE_BOMB,
        "[x," * 20_000,
        "---\n" * 200_000,
        "[" + "a," * 200_000 + "]",
        "%TAG !a! b\n" * 50_000,
    ],
    ids=["aliases", "merges", "deep", "documents", "long", "directives"],
)
def test_what_unfolds_beyond_the_bounds_is_refused_before_it_unfolds(tmp_path: Path, text: str) -> None:
    file = read_file(write(tmp_path / "m.yaml", text))
    assert [(problem.field, problem.value) for problem in file.problems] == [
        (str(tmp_path / "m.yaml"), "not valid YAML")
    ]


def test_aliases_and_merges_within_the_bounds_stand_for_what_they_name(tmp_path: Path) -> None:
    text = good("m") + "  queue: &q {maxRequests: 5}\n---\n" + good("n").replace("spec:", "spec: &s")
    text += "  queue: {<<: {maxRequests: 5, maxBytes: 2048}, maxRequests: 6}\n"
    models = load_resources(write(tmp_path / "m.yaml", text)).models
    assert [(model.spec.queue.max_requests) for model in models] == [5, 6]
    assert models[1].spec.queue.max_bytes == 2048


def test_many_mistakes_are_counted_and_not_all_written_out(tmp_path: Path) -> None:
    fields = "".join(f"  field{number}: 1\n" for number in range(5000))
    problems = read_file(write(tmp_path / "m.yaml", good("m") + fields)).problems
    assert len(problems) == 21
    assert problems[-1].value == "4980 more mistakes"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1", "Model metadata.name: 1: write text: put the value in quotes"),
        ("yes", "Model metadata.name: True: write text: put the value in quotes"),
        ("[a]", "Model metadata.name: ['a']: write text"),
        ("A_b", "Model A_b metadata.name: 'A_b': use lower-case letters, digits and '-'"),
        ('"a\\e[31m"', "Model a\\x1b[31m metadata.name: 'a\\x1b[31m': use lower-case"),
        ("x" * 5000, "Model " + "x" * 63 + "…"),
    ],
    ids=lambda value: value[:12],
)
def test_a_wrong_name_is_shown_with_what_to_write(tmp_path: Path, name: str, said: str) -> None:
    text = refusal(write(tmp_path / "m.yaml", GOOD.format(name=name)))
    assert said in text
    assert len(text) < 1000


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "null.yaml").symlink_to("/dev/zero")
    (tmp_path / "circle.yaml").symlink_to(tmp_path / "circle.yaml")
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "gone")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    (tmp_path / os.fsdecode(b"name-\xff.yaml")).write_text(good("hidden"))
    write(tmp_path / "good.yaml", good("good"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.yaml"))
        files = read_files([tmp_path])
    assert [file.path.name for file in files if not file.problems] == ["good.yaml"]
    said = {Path(problem.field).name: str(problem) for file in files for problem in file.problems}
    assert "not a regular file" in said["pipe.yaml"]
    assert "not a regular file" in said["folder.yaml"]
    assert "not a regular file" in said["zero"]
    assert "not a regular file" in said["s.yaml"]
    assert "symbolic links" in said["circle.yaml"]
    assert "no such file" in said["gone"]
    assert "byte 3 is not UTF-8" in said["latin.yaml"]
    assert f"more than {MAX_FILE_BYTES} bytes" in said["huge.yaml"]
    assert "rename it" in said["name-\\udcff.yaml"]


def test_a_folder_with_too_many_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_files, "MAX_FILES", 2)
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.yaml", good(name))
    assert "3 files: keep at most 2 in one folder" in refusal(tmp_path)


@given(st.binary(max_size=200) | st.text(st.sampled_from("&*![]{}:,-?%|>'\"\n a1.~<"), max_size=60))
def test_any_content_is_resources_or_problems(content: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.yaml")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        file = read_file(path)
        assert not (file.problems and file.models)
        assert str(file.problems).isprintable()
