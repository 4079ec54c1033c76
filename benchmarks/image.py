"""The steps of a package's Dockerfile, one by one, where there is no Docker: as root on Linux, without a network.

    python benchmarks/image.py PACKAGE OUT [--questions FILE] [--target full|slim|none] [--python /usr/bin/python3]

This machine's file system, under an overlay that is thrown away, stands for the base image; everything a Dockerfile of
``stepladder pack`` may say is carried out on it in a namespace of its own, and anything else is an error. Then the
entry point answers the questions (by default the package's self-test) as the image's user, everything read-only but
``/output``, which is OUT. With ``--target none`` the package is used without Docker: copied into another folder, set up
by its ``install.sh``, and asked in the same way.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

TEMPORARY = "/tmp"  # noqa: S108


WITHOUT_DOCKER = (
    "WORKDIR /elsewhere", "COPY {} ./", "RUN ./install.sh && mkdir -p /data /output", "USER 10001:0",
    'ENTRYPOINT ["./run.sh"]',
)  # fmt: skip


class Image(NamedTuple):
    """What the steps have come to."""

    root: Path
    package: Path
    environment: dict[str, str]
    settings: dict[str, str]


def stages(text: str) -> dict[str, list[str]]:
    """The instructions of each stage, those of the stage it starts from first."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            lines = found[name] = [*found.get(parent, [])]
        elif name:
            lines.append(line)
    return found


def instructions(package: Path, target: str) -> list[str]:
    """What makes a target."""
    if target == "none":
        return [line.format(" ".join(sorted(path.name for path in package.iterdir()))) for line in WITHOUT_DOCKER]
    return stages((package / "Dockerfile").read_text())[target]


def inside(image: Image, command: str, user: str, *binds: str, read_only: bool = False) -> None:
    """Run a command in the image, in a mount and a network namespace of its own."""
    root = shlex.quote(str(image.root))
    steps = [f"mount --bind {root} {root}"]
    if read_only:
        steps += [f"mount -o remount,bind,ro {root}", f"mount -t tmpfs tmpfs {root}{TEMPORARY}"]
    steps += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"mount --rbind /sys {root}/sys"]
    steps += [f"mount --bind {source} {root}{target}" for source, target in (bind.split(":") for bind in binds)]
    told = " ".join(shlex.quote(f"{name}={value}") for name, value in image.environment.items())
    who = f"setpriv --reuid={user.partition(':')[0]} --regid=0 --clear-groups" if user != "root" else ""
    work = image.settings.get("WORKDIR", "/")
    inner = f"chroot {root} {who} env -i {told} sh -c {shlex.quote(f'cd {work} && {command}')}"
    whole = " && ".join(["mount --make-rprivate /", "ip link set lo up || true", *steps, inner])
    subprocess.run(["unshare", "--mount", "--net", "sh", "-c", whole], check=True)  # noqa: S607


def carry_out(image: Image, line: str) -> None:
    """One instruction."""
    word, _, rest = line.partition(" ")
    work = image.root / image.settings.get("WORKDIR", "/").lstrip("/")
    if word == "ENV":
        image.environment.update(part.split("=", 1) for part in shlex.split(rest))
    elif word == "WORKDIR":
        image.settings[word] = rest
        (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "COPY":
        *sources, target = rest.split()
        for source in sources:
            place = work / target / (Path(source).name if not source.endswith("/") else "")
            place.parent.mkdir(parents=True, exist_ok=True)
            if (image.package / source).is_dir():
                shutil.copytree(image.package / source, place, dirs_exist_ok=True)
            else:
                shutil.copy2(image.package / source, place)
    elif word == "RUN":
        binds = []
        while rest.startswith("--mount="):
            mount, _, rest = rest.partition(" ")
            keys = dict(part.split("=") for part in mount.removeprefix("--mount=").split(","))
            if keys["type"] != "bind":
                raise SystemExit(f"cannot carry out: {line}")
            (image.root / keys["target"].lstrip("/")).mkdir(parents=True, exist_ok=True)
            binds.append(f"{image.package / keys['source']}:{keys['target']}")
        inside(image, rest, image.settings.get("USER", "root"), *binds)
    elif word in ("USER", "ENTRYPOINT", "CMD", "HEALTHCHECK"):
        image.settings[word] = rest
    else:
        raise SystemExit(f"cannot carry out: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--target", default="full", choices=("full", "slim", "none"))
    parser.add_argument("--python", default="/usr/bin/python3", help="which the base image has")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.out.chmod(0o777)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for part in ("upper", "work", "root"):
            (scratch / part).mkdir()
        scratch.chmod(0o755)
        layers = f"lowerdir=/,upperdir={scratch / 'upper'},workdir={scratch / 'work'}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(scratch / "root")]
        subprocess.run(mount, check=True)
        try:
            known = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHON": asked.python}
            image = Image(scratch / "root", asked.package.resolve(), known, {})
            for number, line in enumerate(instructions(asked.package, asked.target), 1):
                print(f"{number:3}  {line[:110]}", flush=True)
                carry_out(image, line)
            if asked.target == "slim":
                binds = [f"{image.package / 'model'}:{image.settings['WORKDIR']}/model"]
                (image.root / image.settings["WORKDIR"].lstrip("/") / "model").mkdir()
            else:
                binds = []
            user, entry = image.settings["USER"], image.settings["ENTRYPOINT"].strip('[]"')
            source = "selftest.jsonl"
            if asked.questions is not None:
                binds.append(f"{asked.questions.resolve().parent}:/data")
                source = f"/data/{asked.questions.name}"
            command = f"{entry} {source} /output/answers.jsonl"
            print(f"     as {user}, read-only: {command}", flush=True)
            inside(image, command, user, *binds, f"{asked.out.resolve()}:/output", read_only=True)
        finally:
            subprocess.run(["umount", str(scratch / "root")], check=True)  # noqa: S607
    print(f"every step was carried out; answers are in {asked.out / 'answers.jsonl'}")


if __name__ == "__main__":
    main()
