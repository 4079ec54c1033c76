"""``stepladder export``: a GGUF file, its Modelfile, and what is said where it cannot be made."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import stepladder
from transformers import PreTrainedTokenizerBase

from stepladder import models
from stepladder.config import Predict
from stepladder.documents import GgufVerdict
from stepladder.errors import UserError
from stepladder.exporting import llama_cpp, modelfile
from stepladder.models import template
from stepladder.records import Message

LLAMA = Path(__file__).parent.parent / ".venv-llama"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(models.locate(models.BUNDLED))


def test_a_modelfile_frames_a_prompt_as_the_template_of_the_weights_does(tokenizer: PreTrainedTokenizerBase) -> None:
    text = modelfile.text("m.gguf", tokenizer, Predict(max_tokens=77), 2048, "apache-2.0")
    head, body = text.split('TEMPLATE """')
    framed, tail = body.split('"""')
    question = "Which letter?"
    expected = template.prompt_text(tokenizer, [Message(role="user", content=question)])
    assert framed.replace("{{ .Prompt }}", question) == expected
    assert head == "FROM ./m.gguf\n"
    assert tail.splitlines()[1:] == [
        "PARAMETER temperature 0", "PARAMETER num_ctx 2048", "PARAMETER num_predict 77", "LICENSE apache-2.0"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("<{{u>", 'TEMPLATE """<{{ "{{" }}u>{{ .Prompt }}:"""\n'),
        ('"""\nADAPTER /etc/passwd\n', None),
    ],
)
def test_a_hostile_template_adds_no_instruction(
    monkeypatch: pytest.MonkeyPatch, written: str, expected: str | None
) -> None:
    monkeypatch.setattr(template, "prompt_text", lambda _, messages: f"{written}{messages[0].content}:")
    text = modelfile.text("m.gguf", SimpleNamespace(bos_token_id=None), Predict(), 512, None)  # type: ignore[arg-type]
    assert "ADAPTER" not in text
    assert (expected in text) if expected else ("TEMPLATE" not in text)


def test_llama_cpp_is_found_where_make_puts_it_and_in_a_checkout(tmp_path: Path) -> None:
    for folder, script, programs in (("made", "llama.cpp", "bin"), ("checkout", ".", "build/bin")):
        for path in (Path(script, "convert_hf_to_gguf.py"), Path(programs, "llama-quantize")):
            place = tmp_path / folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        with pytest.raises(UserError, match="has no llama-server; 'make llama' builds"):
            llama_cpp.find(tmp_path / folder)
        (tmp_path / folder / programs / "llama-server").touch()
        assert llama_cpp.find(tmp_path / folder).server == tmp_path / folder / programs / "llama-server"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", "out", "--llama-cpp", "nowhere"), "nowhere: has no convert_hf_to_gguf.py"),
        (("al", "out"), "there is no member 'al'; the members are all, half"),
        (("all", "out", "--gguf", "q3"), "--gguf 'q3': is none of q4_0,"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(project: Path, arguments: tuple[str, ...], message: str) -> None:
    done = stepladder(project, "export", "tiny.toml", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (project / "out").exists()


@pytest.mark.llama
def test_a_member_answers_through_llama_cpp_as_its_weights_do(project: Path) -> None:
    out = project / "gguf"
    done = stepladder(project, "export", "tiny.toml", "all", str(out), "--gguf", "q8_0", "--llama-cpp", str(LLAMA))
    assert done.returncode == 0, done.stderr
    measured = GgufVerdict.read(out)
    assert {path.name for path in out.iterdir()} == {measured.file, "Modelfile", "gguf.json"}
    assert (out / measured.file).read_bytes()[:4] == b"GGUF"
    assert measured.gguf.bytes < measured.merged.bytes
    assert measured.n > 0
    assert (
        abs(measured.gguf.accuracy - measured.merged.accuracy)
        <= (measured.flips.right_to_wrong + measured.flips.wrong_to_right) / measured.n
    )
    assert measured.tokens_per_second
    assert f"Wrote {out}" in done.stdout.replace("\n", "")
    again = stepladder(project, "export", "tiny.toml", "all", str(out), "--llama-cpp", str(LLAMA))
    assert (again.returncode, again.stderr) == (
        2,
        f"error: {out}: is there already; name another folder, or move it away\n",
    )
    shutil.rmtree(out)


@pytest.mark.llama
def test_weights_that_do_not_load_end_in_a_line_and_leave_nothing(project: Path, tmp_path: Path) -> None:
    file, log = tmp_path / "m.gguf", tmp_path / "log"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="ended with code"), llama_cpp.served(llama_cpp.find(LLAMA), file, 512, log):
        pass
