"""The documentation is true: generated pages are current, links lead somewhere, and the README's commands
work in their order on a platform of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.integration.cli.command import tidegate
from tests.processes import runs
from tidegate.control.reasons import Reason
from tidegate.local.ray_cluster import free_port

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "platform" / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("loadtests/*.md")])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generate: ModuleType) -> None:
    stale = [
        name
        for name, text in generate.pages().items()
        if (generate.REFERENCE / name).read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_troubleshooting_names_every_reason() -> None:
    guide = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("engines", "serving")
        for path in (ROOT / "platform" / "tidegate" / folder).rglob("*.py")
    )
    raised = set(re.findall(r'(?:EngineLoadError|Crash)\(\s*"([A-Za-z]+)"', code))
    assert raised
    assert sorted(reason for reason in raised | {*Reason} if f"`{reason}`" not in guide) == []


def test_every_setting_and_metric_is_documented() -> None:
    from tidegate import telemetry
    from tidegate.settings import Settings, variables

    settings = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    metrics = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    names = [
        value
        for value in vars(telemetry).values()
        if isinstance(value, str) and re.fullmatch(r"(tidegate|gen_ai)_[a-z_]+", value)
    ]
    assert names
    assert [name for name in variables(Settings) if f"TIDEGATE_{name.upper()}`" not in settings] == []
    assert [name for name in names if f"`{name}" not in metrics] == []


def test_every_field_of_the_api_is_documented() -> None:
    from tidegate.gateway.dialects import DIALECTS

    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    fields = {field for dialect in DIALECTS for field in dialect.body.__struct_fields__}
    assert fields
    assert sorted(field for field in fields if f"`{field}" not in page) == []


def blocks(language: str) -> list[str]:
    """The README's code blocks from `make up` on, before `make down`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Ten minutes to a working call") : text.index("**Stop.**")]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A platform with the demo, as `make up` starts it, but with a home and a port of its own."""
    home, port = tmp_path_factory.mktemp("readme"), free_port()
    own = {"TIDEGATE_HOME": str(home), "TIDEGATE_PORT": str(port)}
    started = tidegate("up", environment=own, timeout=280)
    assert started.returncode == 0, started.stderr
    (call,) = re.findall(r"^curl .*", started.stdout, re.DOTALL | re.MULTILINE)
    yield own | {"TEST_CALL": call.strip()}
    stopped = tidegate("clean", "--yes", environment=own)
    assert stopped.returncode == 0, stopped.stderr


def shell(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run what the README says in bash, at this platform's address and with this environment's programs."""
    here = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TIDEGATE_HOME": environment["TIDEGATE_HOME"],
        "TIDEGATE_PORT": environment["TIDEGATE_PORT"],
    }
    local = script.replace("127.0.0.1:8000", f"127.0.0.1:{environment['TIDEGATE_PORT']}")
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", local],
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.serial
@pytest.mark.timeout(600)
class TestReadme:
    """In the README's order; the platform is started once."""

    def test_the_printed_call_streams_an_answer(self, environment: dict[str, str]) -> None:
        answered = shell(environment["TEST_CALL"], environment)
        assert answered.returncode == 0
        assert answered.stdout.rstrip().endswith("data: [DONE]")
        assert '"content":"' in answered.stdout

    def test_the_commands_work(self, environment: dict[str, str]) -> None:
        commands = [block for block in blocks("bash") if "make up" not in block]
        assert len(commands) == 6
        script = "".join(commands).replace("source .venv/bin/activate\n", "")
        (program,) = blocks("python")
        ran = shell(f"{script}\npython - <<'END'\n{program}END\n", environment)
        assert ran.returncode == 0, ran.stderr
        for name in ("minilm", "tide-demo", "tide-demo-gptq", "tide-demo-zero"):
            assert name in ran.stdout
        assert '"embedding":[' in ran.stdout
        assert ran.stderr.count("TTFT") == 4
        assert "Traceback" not in ran.stderr

    @pytest.mark.parametrize("guide", ["agents", "retrieval"])
    def test_the_guides_programs_say_what_the_guides_show(
        self, environment: dict[str, str], guide: str
    ) -> None:
        page = (DOCS / "guides" / f"{guide}.md").read_text(encoding="utf-8")
        (program,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
        (export,) = re.findall(r"^    (export .*\n)", page, re.MULTILINE)
        shown = page.split("```\n> ")[1].split("```")[0]
        ran = shell(f"{export}python - <<'END'\n{program}END\n", environment)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == f"> {shown}"

    def test_nothing_is_left_after_down(self, environment: dict[str, str]) -> None:
        running = tidegate("status", "-o", "json", environment=_own(environment))
        pids = [int(pid) for pid in re.findall(r'"pid": (\d+)', running.stdout)]
        assert pids
        stopped = tidegate("down", environment=_own(environment))
        assert stopped.returncode == 0
        assert [pid for pid in pids if runs(pid)] == []
        assert tidegate("status", environment=_own(environment)).returncode == 1


def _own(environment: dict[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in ("TIDEGATE_HOME", "TIDEGATE_PORT")}
