"""Builds llama.cpp's converter, quantiser and server for this machine: ``make llama``.

The sources are those inside llama-cpp-python's source distribution on PyPI, pinned by its hash in llama.txt. They are
built with CMake and a C++ compiler, without the web page and without a connection to anywhere: CPUs only, unless
CMAKE_ARGS says otherwise (``CMAKE_ARGS=-DGGML_CUDA=ON make llama``; not run on a card).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parent
PROGRAMS = ("llama-server", "llama-quantize")
SCRIPTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
"""What the converter is made of."""
SOURCES = "vendor/llama.cpp/"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="an environment with pip, which gets the programs beside")
    folder: Path = parser.parse_args().folder.absolute()
    if not (shutil.which("c++") or shutil.which("g++") or os.environ.get("CXX")):
        sys.exit("llama.cpp is built from source, and there is no C++ compiler; install one (Debian: g++)")
    python, cmake = folder / "bin" / "python", folder / "bin" / "cmake"
    pip = [str(python), "-m", "pip"]
    run(*pip, "install", "--quiet", "cmake==4.4.5", "ninja==1.13.2", "scikit-build-core[pyproject]==1.1.2")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run(
            *pip, "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
            "--require-hashes", "-r", str(CONSTRAINTS / "llama.txt"), "-d", str(work),
        )  # fmt: skip
        (archive,) = work.glob("*.tar.gz")
        unpack(archive, work / "llama.cpp")
        build = work / "build"
        options = [f"-D{key}={value}" for key, value in OPTIONS.items()] + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run(str(cmake), "-S", str(work / "llama.cpp"), "-B", str(build), "-G", "Ninja", *options)
        run(str(cmake), "--build", str(build), "--target", *PROGRAMS)
        shutil.rmtree(folder / "llama.cpp", ignore_errors=True)
        (folder / "llama.cpp").mkdir()
        for part in SCRIPTS:
            source = work / "llama.cpp" / part
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, folder / "llama.cpp" / part)
        for program in PROGRAMS:
            shutil.copy2(build / "bin" / program, folder / "bin" / program)


def run(*words: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(words[0]).parent}{os.pathsep}{os.environ['PATH']}"}
    if code := subprocess.run(words, env=environment, check=False).returncode:  # noqa: S603
        sys.exit(f"{shlex.join(words[:4])} ... ended with code {code}; llama.cpp was not installed")


def unpack(archive: Path, out: Path) -> None:
    """Unpack llama.cpp's sources alone."""
    with tarfile.open(archive) as opened:
        for member in opened:
            _, _, name = member.name.partition("/")
            if name.startswith(SOURCES):
                member.name = name.removeprefix(SOURCES)
                opened.extract(member, out, filter="data")


if __name__ == "__main__":
    main()
