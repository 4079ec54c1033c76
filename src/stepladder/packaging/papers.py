"""What a package is made of: a CycloneDX bill of materials, and the licences of its wheels."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
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

LICENCE_FILE = re.compile(r"(?i)(licen[cs]e|copying|notice|authors)")
"""In the names of files with a licence."""


class PackedModel(NamedTuple):
    """A member's weights, for the bill of materials."""

    name: str
    digest: str
    base: str
    licence: str | None


def bill(wheels: Path, models: list[PackedModel], name: str, version: str) -> str:
    """The CycloneDX 1.6 bill of materials, JSON, of a package's wheels and models. It holds no timestamp: the same
    package has the same bill."""
    licences = LicenseFactory()
    parts = []
    for wheel in sorted(wheels.glob("*.whl")):
        metadata = _metadata(wheel)
        library, library_version = str(metadata["Name"]), str(metadata["Version"])
        text = metadata["License-Expression"] or _licence_classifier(metadata) or metadata["License"]
        parts.append(
            Component(
                type=ComponentType.LIBRARY,
                name=library,
                version=library_version,
                purl=PackageURL("pypi", None, library.lower(), library_version, {"file_name": wheel.name}),
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
    bom = Bom(components=parts, serial_number=serial)
    bom.metadata.component = root
    bom.register_dependency(root, parts)
    content: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del content["metadata"]["timestamp"]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def licences(wheels: Path) -> Iterator[tuple[str, bytes]]:
    """The licence files inside wheels: path below ``licenses/``, content."""
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(wheel.name)
        contents: dict[str, bytes] = {}
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                path = PurePosixPath(entry)
                inner = path.parts[1:]
                if not entry.endswith("/") and path.parts[0].endswith(".dist-info") and LICENCE_FILE.search(path.name):
                    contents["/".join(inner[1:] if inner[0] == "licenses" else inner)] = archive.read(entry)
        for file, content in contents.items():
            yield f"{name}-{version}/{file}", content


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def _licence_classifier(metadata: Message) -> str | None:
    """The licence that a trove classifier names."""
    lines = [line for line in metadata.get_all("Classifier", []) if line.startswith("License :: OSI Approved :: ")]
    return str(lines[0]).rpartition(" :: ")[2] if lines else None
