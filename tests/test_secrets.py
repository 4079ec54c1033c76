"""Keys, passwords and the ledger itself: who gets to see them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from asker import request

from stepladder.ask.ledger import Ledger
from stepladder.ask.remote.servers import read_addresses
from stepladder.ask.request import Response
from stepladder.config import Config, load
from stepladder.config.addresses import address_problem
from stepladder.errors import AskError, ConfigError

TABLE = """
name = "r"
language = "en"
questions = {{ train = "t" }}
member = [{{ name = "a" }}]
rung = [{{ name = "w", kind = "ask", models = ["t"] }}]
[models.t]
engine = "openai"
base_url = {url}
api_key_env = "MY_TEACHER"
price = {{ input = 1, output = 2 }}
"""


def modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir() if path.is_file()}


def use(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.begin_session()
        ledger.store("run", [(request("x"), Response(text="A", max_tokens=9, prompt_tokens=1, completion_tokens=1))])
        assert len(modes(path.parent)) == 4  # the ledger, its log, its shared memory, the session
        assert set(modes(path.parent).values()) == {"0o600"}


def test_a_ledger_is_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        use(tmp_path / "ledger.sqlite")
    finally:
        os.umask(old)


def test_one_of_the_version_before_becomes_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path):
        for file in tmp_path.iterdir():
            file.chmod(0o644)
        use(path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://api.example.com/v1", None),
        ("http://[::1]:8000/v1", None),
        ("http://127.0.0.1:8000/v1", None),
        ("https://me:hunter2@api.example.com/v1", "user name or password"),
        ("https://hunter2@api.example.com/v1", "user name or password"),
        ("https://api.example.com/v1?key=hunter2", "goes on after the path"),
        ("https://api.example.com/v1#hunter2", "goes on after the path"),
        ("ftp://api.example.com/v1", "no base URL"),
        ("api.example.com", "no base URL"),
        ("http://", "names no server"),
        ("http://[::1/v1", "no base URL"),
        ("http://h:99999999/v1", "no base URL"),
        ("http://h/v1\x1b]52;", "no base URL"),
        ("http://h /v1", "no base URL"),
    ],
)
def test_an_address_is_an_address(tmp_path: Path, url: str, said: str | None) -> None:
    file = tmp_path / "run.toml"
    written = '"' + url.replace("\x1b", "\\u001b") + '"'
    for value in (written, f"[{written}]"):
        file.write_text(TABLE.format(url=value))
        if said is None:
            assert isinstance(load(file), Config)
        else:
            with pytest.raises(ConfigError, match=rf"base_url.*{said}") as refused:
                load(file)
            assert "hunter2@" not in str(refused.value)
            assert ":hunter2" not in str(refused.value)
    problem = address_problem(url)
    assert (problem is None) == (said is None)
    if problem is not None:
        assert "hunter2" not in problem
        addresses = tmp_path / "servers.txt"
        addresses.write_text(f"{url}\n")
        with pytest.raises(AskError, match=r"servers.txt:1: ") as unread:
            read_addresses(addresses)
        assert "hunter2@" not in str(unread.value)
