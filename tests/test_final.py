"""``final = "all"``: the chosen recipe once more, on all labels, after every choice; and which figures are whose."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from stepladder import cli, models
from stepladder.closedworld.generate import generate, to_line
from stepladder.config import Quantise, load
from stepladder.context import FINAL_STAGES, Context
from stepladder.documents import FinalVerdict, TrainsetCard, Verdict
from stepladder.errors import ConfigError
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.packaging import build, wheels
from stepladder.packaging.build import PackageManifest
from stepladder.records import Example, Message, Prediction, Question, read
from stepladder.reporting.content import Report
from stepladder.stages import flow
from stepladder.stages.quantised import chosen_form
from stepladder.training.sequences import tokenise
from stepladder.workspace import read_manifest

pytestmark = pytest.mark.dtype
torch = pytest.importorskip("torch")

MEMBERS = ("first", "second")
TOML = """
name = "run"
language = "en"

[questions]
train = "train.jsonl"
test = "test.jsonl"
validation = 0.4

[[rung]]
name = "worked"
kind = "worked"

[train]
base = "base"
lora_rank = 4
lora_alpha = 8
epochs = 3
patience = 1
learning_rate = 1e-3
warmup = 0.0
gradient_accumulation = 2

[[member]]
name = "first"

[[member]]
name = "second"
seed = 1

[quantise]
method = "rtn"
group_size = 32
max_loss = 1.0
max_unparsed = 1.0
max_kl = 100.0

[predict]
max_tokens = 8

[ensemble]
rule = "vote"
"""


class FinalRun(NamedTuple):
    """A finished run that got ``final = "all"`` afterwards, and went on."""

    folder: Path
    before: dict[str, str]
    """The manifest of each artifact before that, by its folder."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    @property
    def context(self) -> Context:
        return Context.open(self.folder / "run.toml", self.folder / "runs")

    def questions(self, split: str) -> dict[str, Question]:
        return {question.id: question for question in read(self.run / "questions" / f"{split}.jsonl", Question)}

    def learned(self, weights: str, member: str) -> list[Example]:
        return read(self.run / weights / "trainset" / member / "train.jsonl", Example)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stepladder", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def manifests(run: Path) -> dict[str, str]:
    return {str(path.parent.relative_to(run)): path.read_text() for path in sorted(run.rglob("manifest.json"))}


def set_final(toml: Path) -> None:
    toml.write_text(toml.read_text().replace('language = "en"', 'language = "en"\nfinal = "all"', 1))


def teach_to_answer(base: Path, out: Path, problems: Path) -> None:
    """Save a copy of a tiny random model that answers ``Answer: A`` to every question, so that its answers can be
    read."""
    model, tokenizer = models.load(base, "float32"), models.load_tokenizer(base)
    asked = [question for problem in read_problems(problems, "en", labelled=True) for question in problem.questions]
    answer = Message(role="assistant", content="Answer: A")
    examples = [
        Example(messages=(*ask_messages(q, tuple(range(len(q.options)))), answer), question_id=q.id, teacher="")
        for q in asked
    ]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for row in 4 * tokenise(tokenizer, examples, 1024):
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[:, : row.prompt_length] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> FinalRun:
    folder = tmp_path_factory.mktemp("final")
    for split, problems in (("train", 6), ("test", 2)):
        lines = [*map(to_line, generate(2024, problems, "en", split))]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    teach_to_answer(base, folder / "base", folder / "train.jsonl")
    (folder / "run.toml").write_text(TOML)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert command(monkeypatch, "run", "run.toml") == 0
        before = manifests(folder / "runs" / "run")
        set_final(folder / "run.toml")
        assert command(monkeypatch, "run", "run.toml") == 0
    return FinalRun(folder, before)


def test_no_choice_is_made_again_and_then_all_is_up_to_date(
    finished: FinalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    after = manifests(finished.run)
    assert {name for name, text in finished.before.items() if after[name] != text} == {"report"}
    assert {name.split("/")[1] for name in after.keys() - finished.before.keys()} == {*FINAL_STAGES} - {"variants"}
    context = Context.open(Path("run.toml"), Path("runs"))
    states = {place.label: state for place, state in flow.states(context)}
    assert states.keys() == after.keys()
    assert {*states.values()} == {"done"}


def test_validation_labels_train_the_final_weights_and_test_labels_nobody(finished: FinalRun) -> None:
    train, validation, test = (finished.questions(split) for split in ("train", "validation", "test"))
    assert all(question.answer is not None for question in test.values()), "there are labels that could leak"
    for member in MEMBERS:
        chosen, final = ({row.question_id for row in finished.learned(weights, member)} for weights in ("", "final"))
        assert chosen == train.keys()
        assert final == train.keys() | validation.keys()
        texts = "".join(message.content for row in finished.learned("final", member) for message in row.messages)
        assert not any(question.problem in texts for question in test.values())
        assert any(question.problem in texts for question in validation.values())
        card = TrainsetCard.read(finished.run / "final" / "trainset" / member)
        assert card.labels == ("train", "validation")


def test_a_training_problem_that_is_in_the_test_trains_no_final_weights_either(
    finished: FinalRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem is one of validation, which nothing compared with the test before."""
    shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    problem = next(iter(finished.questions("validation").values())).problem_id
    lines = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    twin = json.loads(next(line for line in lines if json.loads(line)["id"] == problem)) | {"id": "twin"}
    with Path("test.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(twin) + "\n")
    context = Context.open(Path("run.toml"), Path("runs"))
    flow.run(context, ("questions", "samples"))
    for stage, part in (("samples", None), ("trainset", "first")):
        place = flow.artifact_at(context.final.place(stage, part))
        with place.writing() as folder:
            flow.stage(stage).build(context.final, part, folder)
    card = TrainsetCard.read(context.final.input("trainset", "first"))
    assert [twin.problem for twin in card.twins] == [problem]
    learned = read(context.final.input("trainset", "first") / "train.jsonl", Example)
    assert not any(row.question_id.startswith(f"{problem}#") for row in learned)


def test_the_choices_are_kept(finished: FinalRun) -> None:
    for member in MEMBERS:
        log, final_log = (
            [json.loads(line) for line in (folder / "adapter" / member / "log.jsonl").read_text().splitlines()]
            for folder in (finished.run, finished.run / "final")
        )
        losses = [row["validation_loss"] for row in log if "validation_loss" in row]
        kept = 1 + losses.index(min(losses))
        manifest = read_manifest(finished.run / "final" / "adapter" / member)
        assert manifest["settings"]["last_epoch"] == kept
        assert not any("validation_loss" in row for row in final_log), "there is nothing left to measure on"
        assert final_log[-1]["epoch"] == pytest.approx(kept)
        assert final_log[-1]["step"] > kept * (log[-1]["step"] / log[-1]["epoch"]) - 1, "more data, more steps"
        chosen = Verdict.read(finished.run / "quantised" / member)
        final = FinalVerdict.read(finished.run / "final" / "quantised" / member)
        assert (final.form, final.n) == (chosen.form, chosen.n)
        assert final.chosen_kl == (None if chosen.distance is None else chosen.distance.kl)


def test_no_figure_on_validation_belongs_to_the_final_weights(finished: FinalRun) -> None:
    report = Report.read(finished.run / "report")
    final = {(row.system, row.member, row.split) for row in report.results if row.weights == "final"}
    assert final == {("quantised", "first", "test"), ("quantised", "second", "test"), ("ensemble", None, "test")}
    assert [row.member for row in report.final] == [*MEMBERS]
    assert (report.comparisons[-1].before.weights, report.comparisons[-1].after.weights) == ("chosen", "final")
    page = (finished.run / "report" / "report.html").read_text(encoding="utf-8")
    assert "Every figure on validation belongs to the chosen weights" in page
    assert "final ensemble" in page
    for member in MEMBERS:
        card = (finished.run / "final" / "quantised" / member / "README.md").read_text(encoding="utf-8")
        assert "final weights" in card
        assert "Accuracies on validation belong to the chosen weights" in card
        assert "accuracy" not in json.loads(
            (finished.run / "final" / "quantised" / member / "verdict.json").read_text()
        )


def test_the_package_has_the_final_weights_and_answers_as_they_did(
    finished: FinalRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wheels, which test_pack.py has, are left out."""
    monkeypatch.setattr(wheels, "collect", lambda *_: None)
    monkeypatch.chdir(finished.folder)
    package = build.pack(finished.context, tmp_path / "package", "local", None, ("3.11",))
    manifest = PackageManifest.read(package)
    assert manifest.weights == "final"
    for member in MEMBERS:
        packed = (package / "model" / member / "model.safetensors").read_bytes()
        assert packed == (finished.run / "final" / "quantised" / member / "model.safetensors").read_bytes()
        assert packed != (finished.run / "quantised" / member / "model.safetensors").read_bytes()
        assert manifest.validation[member].quantised == Verdict.read(finished.run / "quantised" / member).quantised
    assert "The figures below belong to those chosen weights" in (package / "README.md").read_text(encoding="utf-8")
    out = tmp_path / "answers.jsonl"
    assert command(monkeypatch, "predict", str(package), "test.jsonl", str(out)) == 0
    letters = [answer["answer"] for line in out.read_text().splitlines() for answer in json.loads(line)["questions"]]
    joined = read(finished.run / "final" / "ensemble" / "test.jsonl", Prediction)
    assert letters == [row.answer for row in joined]


def test_a_form_is_taken_over_with_its_repairs(finished: FinalRun) -> None:
    chosen = Verdict.read(finished.run / "quantised" / "first")
    attempt = chosen.attempts[0]
    repaired = chosen.form.model_copy(update={"group_size": 16, "samples": 8, "layers_in_8_bits": ("a.b",)})
    tried = tuple(attempt.model_copy(update={"repair": name}) for name in (None, "calibration", "mixed", "recovery"))
    form = chosen_form(Quantise(method="rtn"), chosen.model_copy(update={"form": repaired, "attempts": tried}))
    assert (form.settings.method, form.settings.group_size, form.settings.samples) == ("gptq", 16, 8)
    assert form.layers_in_8_bits == ("a.b",)
    assert form.recovery


def test_plan_counts_the_questions_and_the_hours_twice(
    finished: FinalRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.folder)
    assert command(monkeypatch, "plan", "run.toml") == 0
    said = " ".join(capsys.readouterr().out.split())
    validation, train = len(finished.questions("validation")), len(finished.questions("train"))
    assert f"and {validation} validation questions, whose chains the final weights learn from" in said
    assert f"up to 2 members are trained once more, on {1 + validation / train:.2f} times the data" in said
    assert "By what the chosen weights took" in said


def test_it_is_refused_for_a_finished_member(finished: FinalRun, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text((finished.folder / "run.toml").read_text().replace("seed = 1", 'path = "base"'))
    with pytest.raises(ConfigError, match="final = 'all' trains the members once more, and member 'second' has path"):
        load(toml)


def test_without_it_nothing_is_in_a_fingerprint(finished: FinalRun) -> None:
    config = load(finished.folder / "run.toml")
    assert config.model_dump()["final"] == "all"
    assert "final" not in config.model_copy(update={"final": "none"}).model_dump()
