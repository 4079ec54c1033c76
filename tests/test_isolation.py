"""Templates, folders and processes of strangers: nothing runs but what renders or proves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stepladder.errors import InputError
from stepladder.isolation import templates
from stepladder.isolation.confinement import DENIED
from stepladder.isolation.folders import files_inside
from stepladder.isolation.templates import TemplateFault, Templates


def rendered(text: str, **values: object) -> str:
    return Templates({"x": text}, chat=True).render("x", values)


def test_a_template_renders_what_it_is_given() -> None:
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% generation %}!{% endgeneration %}{% endfor %}"
    assert rendered(text, messages=[{"role": "user", "content": " 你好 "}]) == "<user>你好!"
    assert rendered("{{ {'a': 'é'} | tojson }}{% for i in [1, 2] %}{% break %}{% endfor %}") == '{"a": "é"}'


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'].environ }}",
        "{{ messages.append(1) }}",
        "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{% include '../../../etc/passwd' %}",
    ],
)
def test_no_template_gets_at_python_or_at_files(attack: str) -> None:
    with pytest.raises(TemplateFault):
        print(rendered(attack, messages=[{"role": "user", "content": "x"}]))


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 10**10 }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '{:>1000000000}'.format(3) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x = namespace(t='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
    ],
)
def test_no_template_takes_all_time_or_memory_and_the_next_one_renders(
    bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 2.0)
    with pytest.raises(TemplateFault):
        rendered(bomb)
    assert rendered("{{ 1 + 1 }}") == "2"


def test_a_reply_that_nobody_waits_for_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendered("{{ 0 }}") == "0"

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stepladder.isolation.templates.select.poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered("{{ 1 }}")
    assert rendered("{{ 2 }}") == "2"


def test_the_chat_template_of_the_bundled_model_renders_as_transformers_renders_it() -> None:
    from stepladder import models

    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>1 + 1</b>？\n\n"}]
    for opened in (True, False):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
        values = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": opened}
        source = str(tokenizer.chat_template)
        assert Templates({"x": source}, chat=True).render("x", values | tokenizer.special_tokens_map) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp")
def test_a_confined_process_opens_starts_and_reaches_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    code = f"""
import os, socket, sys
sys.path.insert(0, {str(Path(__file__).parent.parent / "src")!r})
from stepladder.isolation.confinement import confine
assert confine(512, 5)
tries = {{
    "open": lambda: open("/etc/passwd"),
    "write": lambda: open({str(tmp_path / "new")!r}, "w"),
    "socket": lambda: socket.socket(),
    "unlink": lambda: os.unlink({str(tmp_path / "there")!r}),
    "rename": lambda: os.rename({str(tmp_path / "there")!r}, {str(tmp_path / "gone")!r}),
    "fork": os.fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
}}
for name, act in tries.items():
    try:
        act()
        print(name, "was allowed")
    except OSError:
        pass
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    assert (tmp_path / "there").exists()


def test_system_calls_of_both_machines_are_as_many() -> None:
    """What one has under several numbers (open and openat) the other has under one."""
    assert len(DENIED["aarch64"]) < len(DENIED["x86_64"]) < 2 * len(DENIED["aarch64"])


def test_links_that_leave_a_folder_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "credentials"
    secret.write_text("key")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "sub" / "b").symlink_to("../a")
    assert files_inside(folder) == [folder / "a", folder / "sub" / "b"]
    for target, reason in ((secret, "leaves"), (tmp_path / "nowhere", "leads nowhere"), (tmp_path, "leaves")):
        link = folder / "LICENSE"
        link.symlink_to(target)
        with pytest.raises(InputError, match=rf"LICENSE: is a link that {reason}"):
            files_inside(folder)
        link.unlink()


def test_links_into_the_blobs_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert files_inside(snapshot) == [snapshot / "config.json"]
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0f")
    (snapshot / "other").symlink_to("../../refs/main")
    with pytest.raises(InputError, match="leaves"):
        files_inside(snapshot)
