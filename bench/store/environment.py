"""Where numbers were made: what may explain a difference between two machines."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING

from bench.store.records import Environment, Outcome

if TYPE_CHECKING:
    import torch

NAMED = re.compile(r"^(Name|Version): (.+?)\s*$", re.M)


def environment(device: torch.device, threads: int) -> Environment:
    """The machine and the versions that what is computed on a device, with so many CPU threads, runs on."""
    import torch  # start-up
    import transformers  # start-up

    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        platform=platform.platform(),
        cpu=_cpu_name(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=threads,
        git=git_revision(),
    )


def environments(records: Iterable[Outcome]) -> list[Environment]:
    """The different environments that cells ran in, in their order."""
    found: list[Environment] = []
    for record in records:
        if record.environment not in found:
            found.append(record.environment)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@lru_cache(maxsize=1)
def git_revision() -> str | None:
    """The commit the engine runs from, with ``-dirty`` if it was changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def lock() -> list[str]:
    """Every installed distribution as ``name==version``: what would have to be installed to run this again."""
    return sorted({f"{name.lower().replace('_', '-')}=={version}" for name, version in map(_named, distributions())})


def _named(found: Distribution) -> tuple[str, str]:
    """Name and version, by two lines of its file: to read all of hundreds of them as mail takes half a second."""
    text = found.read_text("METADATA") or ""
    told = dict(NAMED.findall(text.partition("\n\n")[0]))
    return told.get("Name") or found.name, told.get("Version") or found.version
