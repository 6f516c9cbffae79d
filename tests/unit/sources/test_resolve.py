"""Sources: from a URI to a folder and its facts, also as the Job asks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.sources.builders import write
from tidegate import demo
from tidegate.control.source_answer import read_answer
from tidegate.errors import SourceError
from tidegate.sources.__main__ import MAX_ANSWER_BYTES, main, short_answer
from tidegate.sources.facts import Resolved
from tidegate.sources.resolve import pull, resolve
from tidegate.sources.schemes import Kept, Storage

WEIGHTS = Path(demo.__file__).parent / "weights"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint")


def refusal(uri: str | Path) -> tuple[str, str]:
    with pytest.raises(SourceError) as refused:
        resolve(str(uri))
    return refused.value.source_reason, refused.value.message


def test_facts_of_a_folder(folder: Path) -> None:
    found = resolve(str(folder))
    assert (found.architecture, found.quantization, found.precision) == (
        "LlamaForCausalLM",
        "none",
        "bfloat16",
    )
    assert found.weights.loaded_bytes(found.precision) == 8 * 2
    assert found.weights_bytes == (folder / "model.safetensors").stat().st_size
    assert resolve(f"file://{folder}").digest == found.digest


def test_nothing_there(tmp_path: Path) -> None:
    reason, message = refusal(tmp_path / "gone")
    assert reason == "SourceNotFound"
    assert "There is no folder at" in message


def test_an_unknown_scheme_is_told_the_known_ones() -> None:
    reason, message = refusal("ftp://host/path")
    assert reason == "SourceNotFound"
    assert "gs://bucket/prefix" in message


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert "give the folder" in refusal(folder / "config.json")[1]


def test_pull_reads_every_file_to_its_end(folder: Path) -> None:
    moved: dict[str, tuple[int, int]] = {}
    found = pull(str(folder), lambda name, done, total: moved.update({name: (done, total)}))
    assert moved == {f"verify {name}": (size, size) for name, size in found.files.items()}


def test_the_demo_checkpoints() -> None:
    assert resolve(str(WEIGHTS / "tide-demo")).quantization == "none"
    assert resolve(str(WEIGHTS / "tide-demo-gptq")).quantization == "gptq"


def test_offline_says_so_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    answer = subprocess.run(
        [sys.executable, "-m", "tidegate.sources", "resolve", "hf://owner/name@main"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    error = json.loads(answer.stdout)["error"]
    assert (answer.returncode, error["reason"]) == (1, "Offline")
    assert "HF_HUB_OFFLINE" in error["message"]


def test_looking_needs_no_model_library() -> None:
    code = (
        "import sys, tidegate.sources.__main__; "
        "print({'torch', 'transformers', 'ray', 'huggingface_hub', 'obstore'} & {*sys.modules})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "set()"


def test_claims_are_folders_that_are_not_left(folder: Path) -> None:
    storage = Storage(claims={"models": folder.parent})
    assert resolve("pvc://models/checkpoint", storage).path == str(folder)
    for uri, words in (
        ("pvc://other/checkpoint", "not mounted here"),
        ("pvc://models/../..", "leads out of the claim"),
        ("pvc://models/none", "holds no folder none"),
    ):
        with pytest.raises(SourceError, match=words) as refused:
            resolve(uri, storage)
        assert refused.value.source_reason == "SourceNotFound"


def test_the_answer_fits_a_termination_message(folder: Path, tmp_path: Path) -> None:
    """As the Job runs it: what the operator reads is a file of at most 4096 bytes."""
    answer = tmp_path / "answer"
    arguments = ["resolve", "pvc://m/checkpoint", "--claim", f"m={folder.parent}", "--answer", str(answer)]
    assert main(arguments) == 0
    found = read_answer(answer.read_text())
    assert found is not None
    assert (found.state, found.checkpoint, found.precision) == ("resolved", str(folder), "bfloat16")
    assert found.weights == resolve(str(folder)).weights
    assert main(["resolve", str(tmp_path / "gone"), "--answer", str(answer)]) == 1
    failed = read_answer(answer.read_text())
    assert failed is not None
    assert (failed.state, failed.reason) == ("failed", "SourceNotFound")


@pytest.mark.parametrize("letter", ["x", "ü", '"', "\U0001f40b"])
def test_a_long_failure_is_cut_to_fit(letter: str) -> None:
    body = short_answer({"error": {"reason": "Offline", "message": letter * 9000}})
    assert 3000 < len(body) <= MAX_ANSWER_BYTES
    found = read_answer(body.decode())
    assert found is not None
    assert found.reason == "Offline"


def kept(found: Resolved, since: float = 0.0) -> Kept:
    return Kept(found.commit, found.digest, since)


def test_a_folder_is_asked_whether_it_still_holds_what_it_held(folder: Path) -> None:
    before = resolve(str(folder))
    written = {path.name: path.stat().st_mtime for path in folder.iterdir()}
    assert resolve(str(folder), kept=kept(before)) == before
    (folder / "generation_config.json").write_text("{}")
    os.utime(folder / "generation_config.json", (0, max(written.values()) + 20))
    with pytest.raises(SourceError) as refused:
        resolve(str(folder), kept=kept(before, max(written.values()) + 10))
    assert refused.value.source_reason == "SourceChanged"
    assert "; written since: generation_config.json. Put" in refused.value.message
    with pytest.raises(SourceError, match=r"was made from\. Put"):
        resolve(str(folder), kept=kept(before, max(written.values()) + 30))


def test_an_earlier_commit_of_the_hub_is_looked_for(tmp_path: Path) -> None:
    """As huggingface_hub lays it out; `main` has gone on."""
    cache = tmp_path / "hub" / "models--owner--name"
    old, new, gone = "a" * 40, "b" * 40, "c" * 40
    for commit in (old, new):
        snapshot = cache / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        write(snapshot)
        (snapshot / "generation_config.json").write_text(json.dumps({"top_k": int(commit, 16) % 7}))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(new)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def look(*arguments: str) -> dict[str, str]:
        answer = subprocess.run(
            [sys.executable, "-m", "tidegate.sources", "resolve", "hf://owner/name", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )
        found: dict[str, str] = json.loads(answer.stdout)
        return found.get("error") or found  # type: ignore[return-value]

    now = look()
    before = look("--commit", old)
    assert "message" not in now, now
    assert (now["commit"], before["commit"]) == (new, old)
    assert now["digest"] != before["digest"]
    assert look("--commit", old, "--digest", before["digest"]) == before
    assert f"hf://owner/name@{gone}" in look("--commit", gone)["message"]
