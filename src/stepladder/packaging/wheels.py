"""The wheels that a package is installed from, in the versions installed here, and the lock file with their hashes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

from packaging.markers import default_environment
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from stepladder.errors import MissingExtra, UserError
from stepladder.workspace import file_digest

STEPLADDER = "stepladder"
PIP = "pip"
"""Included and run from its wheel, since a base image may lack it."""
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""Version of the Python that packs."""
GLIBC_MINORS = range(39, 4, -1)
"""Versions 2.x of the GNU C library whose wheels are accepted, the newest first."""


def collect(folder: Path, extra: str, pythons: Sequence[str]) -> None:
    """Put the wheels of Stepladder, of all it needs with an extra, and of pip into a folder, for each of the Pythons
    (``"3.12"``).

    Raises:
        MissingExtra: a library that is needed is not installed here, so its version is not known.
        UserError: pip cannot download or build a wheel.
    """
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), _source())
    (own,) = folder.glob(f"{STEPLADDER}-*.whl")
    requirements_of_own = requirements_of(own)
    download = ("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
    for python in pythons:
        versions = needed(requirements_of_own, extra, python)
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as requirements:
            requirements.writelines(f"{name}=={version}\n" for name, version in sorted(versions.items()))
            requirements.flush()
            _pip(*download, "-r", requirements.name, *_target_options(python))
    _pip(*download, f"{PIP}=={importlib.metadata.version(PIP)}")


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel says it needs."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        metadata = Metadata.from_email(archive.read(name), validate=False)
    return [str(requirement) for requirement in metadata.requires_dist or ()]


def needed(requirements_of_own: Sequence[str], extra: str, python: str) -> dict[str, str]:
    """Installed versions, by name, of all libraries that Stepladder with an extra needs under a Python.

    Args:
        requirements_of_own: what Stepladder's wheel needs. The metadata of an installation from a folder are as old as
            that installation, whatever the folder holds now.
        extra: of Stepladder.
        python: its version, ``"3.12"``.

    Raises:
        MissingExtra: one of them is not installed here.
    """
    environment = {key: str(value) for key, value in default_environment().items()}
    environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(STEPLADDER, frozenset({extra}))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            requirements = requirements_of_own if name == STEPLADDER else importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise MissingExtra(name, f"'{STEPLADDER}[{extra}]'") from None
        if name != STEPLADDER:
            versions[name] = importlib.metadata.version(name)
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or any(
                requirement.marker.evaluate({**environment, "extra": e}) for e in {"", *extras}
            ):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return versions


def lock(folder: Path) -> str:
    """A requirements file with the hash of every wheel of a folder but pip's, for ``pip install --require-hashes``."""
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


def _target_options(python: str) -> Iterator[str]:
    """Options for pip to download for another Python than the one it runs in."""
    if python == THIS_PYTHON:
        return
    yield from ("--python-version", python, "--implementation", "cp")
    for minor in GLIBC_MINORS:
        yield from ("--platform", f"manylinux_2_{minor}_{platform.machine()}")
    yield from ("--platform", f"manylinux2014_{platform.machine()}")


def _source() -> str:
    """The source of Stepladder's own wheel, for pip: the folder it was installed from, else its version."""
    origin = importlib.metadata.distribution(STEPLADDER).read_text("direct_url.json")
    url = urlparse(json.loads(origin)["url"]) if origin else None
    if url is not None and url.scheme == "file":
        return unquote(url.path)
    return f"{STEPLADDER}=={importlib.metadata.version(STEPLADDER)}"


def _pip(*arguments: str) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR") or "No module named" in line]
        reason = (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: ")
        raise UserError(f"pip {arguments[0]}: {reason[:300]}; packing needs the network, so that installing does not")
