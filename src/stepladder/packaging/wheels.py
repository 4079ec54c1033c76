"""The wheels that a package is installed from, exactly what is installed here, and the lock that names their hashes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from stepladder.errors import MissingExtra, UserError
from stepladder.workspace import file_digest

OWN = "stepladder"
PIP = "pip"
"""It installs the others from its own wheel, since many a base image has none."""
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The Python that packs."""
GLIBC = range(39, 4, -1)
"""Minor versions of the GNU C library 2 that wheels are built for; a base image has one of the newer ones."""


def collect(folder: Path, extra: str, pythons: Sequence[str]) -> None:
    """Download Stepladder's wheel, and those of all it needs with an extra, for each of the Pythons (``"3.12"``).

    Raises:
        MissingExtra: something that is needed is not installed here, so nothing says in which version.
        UserError: pip cannot download or build a wheel.
    """
    into = ("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
    for python in pythons:
        pinned = needed(extra, python)
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listed:
            listed.writelines(f"{name}=={version}\n" for name, version in sorted(pinned.items()))
            listed.flush()
            _pip(*into, "-r", listed.name, *_for(python))
    _pip(*into, f"{PIP}=={importlib.metadata.version(PIP)}")
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), _source())


def needed(extra: str, python: str) -> dict[str, str]:
    """Versions by name of all that Stepladder with an extra needs under a Python, as they are installed here.

    Raises:
        MissingExtra: one of them is not installed.
    """
    place = {key: str(value) for key, value in default_environment().items()}
    place |= {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(OWN, frozenset({extra}))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise MissingExtra(name, f"'{OWN}[{extra}]'") from None
        if name != OWN:
            found[name] = importlib.metadata.version(name)
        for requirement in map(Requirement, wanted):
            if requirement.marker is None or any(
                requirement.marker.evaluate({**place, "extra": e}) for e in {"", *extras}
            ):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def lock(folder: Path) -> str:
    """A requirements file with every wheel of a folder but pip's, by hash, for ``pip install --require-hashes``."""
    hashes: dict[str, list[str]] = defaultdict(list)
    for wheel in sorted(folder.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(wheel.name)
        if name == PIP:
            continue
        hashes[f"{name}=={version}"].append(file_digest(wheel))
    lines = (
        " \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in digests)])
        for pin, digests in sorted(hashes.items())
    )
    return "".join(f"{line}\n" for line in lines)


def _for(python: str) -> Iterator[str]:
    """What tells pip to download for another Python than its own."""
    if python == HERE:
        return
    yield from ("--python-version", python, "--implementation", "cp")
    for minor in GLIBC:
        yield from ("--platform", f"manylinux_2_{minor}_{platform.machine()}")
    yield from ("--platform", f"manylinux2014_{platform.machine()}")


def _source() -> str:
    """What pip builds Stepladder's own wheel from: the folder it was installed from, or its version."""
    origin = importlib.metadata.distribution(OWN).read_text("direct_url.json")
    url = urlparse(json.loads(origin)["url"]) if origin else None
    if url is not None and url.scheme == "file":
        return unquote(url.path)
    return f"{OWN}=={importlib.metadata.version(OWN)}"


def _pip(*words: str) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        reason = (said or done.stderr.splitlines() or ["it says no reason"])[-1].removeprefix("ERROR: ")
        raise UserError(f"pip {words[0]}: {reason[:300]}; wheels are fetched when packing, so that nothing is later")
