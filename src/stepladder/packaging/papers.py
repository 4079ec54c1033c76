"""What a package is made of, for whoever must answer for it: a CycloneDX bill of materials, and licences."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.utils import parse_wheel_filename

from stepladder.workspace import file_digest

OWN_TEXT = re.compile(r"(?i)(licen[cs]e|copying|notice|authors)")
"""How files with a licence are called."""


class PackedModel(NamedTuple):
    """A member's weights, for the bill."""

    name: str
    digest: str
    base: str
    licence: str | None


def bill(wheels: Path, models: list[PackedModel], name: str, version: str) -> str:
    """The CycloneDX 1.6 bill of materials, JSON, of a package's wheels and models. It has no clock: the same package
    has the same bill."""
    licences = LicenseFactory()
    parts = []
    for wheel in sorted(wheels.glob("*.whl")):
        metadata = _metadata(wheel)
        called, version_of = str(metadata["Name"]), str(metadata["Version"])
        text = metadata["License-Expression"] or _classified(metadata) or metadata["License"]
        parts.append(
            Component(
                type=ComponentType.LIBRARY,
                name=called,
                version=version_of,
                purl=PackageURL("pypi", None, called.lower(), version_of, {"file_name": wheel.name}),
                bom_ref=wheel.name,
                licenses=[licences.make_from_string(text.splitlines()[0])] if text else [],
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=file_digest(wheel))],
            )
        )
    for model in models:
        parts.append(
            Component(
                type=ComponentType.MACHINE_LEARNING_MODEL,
                name=model.name,
                bom_ref=f"model/{model.name}",
                description=f"fine-tuned from {model.base}",
                licenses=[licences.make_from_string(model.licence)] if model.licence else [],
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=model.digest)],
            )
        )
    serial = uuid5(NAMESPACE_URL, ",".join(str(part.bom_ref.value) for part in parts))
    root = Component(type=ComponentType.APPLICATION, name=name, version=version, bom_ref="package")
    whole = Bom(components=parts, serial_number=serial)
    whole.metadata.component = root
    whole.register_dependency(root, parts)
    written: dict[str, Any] = json.loads(JsonV1Dot6(whole).output_as_string())
    del written["metadata"]["timestamp"]
    return json.dumps(written, indent=1, ensure_ascii=False) + "\n"


def licences(wheels: Path) -> Iterator[tuple[str, bytes]]:
    """The licence files that wheels bring: name under ``licenses/``, content."""
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(wheel.name)
        found: Mapping[str, bytes] = {}
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                path = PurePosixPath(entry)
                inside = [*path.parts[1:]]
                if not entry.endswith("/") and path.parts[0].endswith(".dist-info") and OWN_TEXT.search(path.name):
                    short = "/".join(inside[1:] if inside[0] == "licenses" else inside)
                    found = {**found, short: archive.read(entry)}
        for short, content in found.items():
            yield f"{name}-{version}/{short}", content


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def _classified(metadata: Message) -> str | None:
    """The licence that a trove classifier names."""
    found = [line for line in metadata.get_all("Classifier", []) if line.startswith("License :: OSI Approved :: ")]
    return str(found[0]).rpartition(" :: ")[2] if found else None
