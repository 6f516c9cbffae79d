"""Profiles of each Python process of the platform while a load runs, made by py-spy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from loadtests.context import Context
from loadtests.machine import command_line
from loadtests.measure import Load, Target, run_load


def profile_during(context: Context, target: Target, load: Load) -> list[Path]:
    """Run `load` once more with py-spy recording; writes `profile-<role>.raw` and prints the leaders."""
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None:
        print("py-spy is not installed: no profile.")
        return []
    runner = threading.Thread(target=run_load, args=(target, load))
    runner.start()
    recorders = []
    for role, pid in target.process_ids.items():
        if not any(Path(word).name.startswith("python") for word in command_line(pid)[:1]):
            continue
        path = context.folder / f"profile-{role}.raw"
        command = [spy, "record", "-p", str(pid), "-d", str(round(context.profile_seconds)), "-r", "250"]
        command += ["-f", "raw", "-o", str(path), "-t"]
        recorders.append((role, path, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
    for role, path, recorder in recorders:
        recorder.wait(context.profile_seconds + 30)
        if not path.exists():
            print(f"py-spy left no profile of {role}.")
            continue
        print(f"\nprofile of {role} ({path}):")
        for share, line in leaders(path.read_text(), 25):
            print(f"  {share:6.1%}  {line}")
    runner.join()
    return [path for _, path, _ in recorders]


def leaders(raw: str, most: int) -> list[tuple[float, str]]:
    """The frames with the largest own share of the samples in py-spy's raw format, largest first."""
    own: Counter[str] = Counter()
    total = 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack or not count.isdigit():
            continue
        total += int(count)
        own[stack.rpartition(";")[2]] += int(count)
    return [(count / total, frame) for frame, count in own.most_common(most)] if total else []
