"""A member as a GGUF file for llama.cpp and Ollama, which is good once it has answered as its weights do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder import models, records
from stepladder.answering.client import ANSWER_TIMEOUT_SECONDS
from stepladder.answering.voting import Poll, correct, predict, vote
from stepladder.ask import Listener, RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import FREE
from stepladder.ask.request import Request, Response
from stepladder.config import Model
from stepladder.context import Context
from stepladder.documents import Flips, GgufSystem, GgufVerdict, Paired, Verdict
from stepladder.errors import GateError, TemplateError
from stepladder.exporting import llama_cpp, modelfile
from stepladder.exporting.llama_cpp import LlamaCpp, Served
from stepladder.forecast.memory import weights_on_disk
from stepladder.mcq.prompts import ask_messages
from stepladder.models import template
from stepladder.quantising.gate import accuracy_exceeded, flipped_answers, limits_exceeded, unreadable
from stepladder.quantising.margin import Outcomes, check_accuracy, sentence
from stepladder.records import Prediction, Question
from stepladder.reporting.data_card import student_name
from stepladder.reporting.model_card import licence_of
from stepladder.stages.quantised import verdict
from stepladder.stages.trainset import member as member_settings
from stepladder.stats import accuracy_interval, mcnemar
from stepladder.workspace import file_digest, new_folder, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROMPTS = 200
"""That are held against their tokens."""
KINDS = ("q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16", "bf16")
"""llama.cpp's quantisations that may be asked for; those with k have blocks of 256 weights."""


class Speed(NamedTuple):
    """What the server wrote for this command."""

    tokens: int
    seconds: float


def export(context: Context, member: str, kind: str, out: Path, programs: LlamaCpp) -> GgufVerdict:
    """Write a folder with a member's GGUF file, an Ollama Modelfile and what was measured (:class:`GgufVerdict`).

    Args:
        context: a run whose member is quantised.
        member: its name.
        kind: of :data:`KINDS`.
        out: the folder to make; it must not be there.
        programs: llama.cpp's.

    Raises:
        UserError: the folder is there, the run is not so far, or one of the programs failed.
        GateError: the file answers worse than ``[quantise] max_loss`` and ``max_unparsed`` allow; no folder is made.
    """
    with new_folder(out) as partial:
        return _fill(context, member, kind, partial, programs)


def _fill(context: Context, member: str, kind: str, folder: Path, programs: LlamaCpp) -> GgufVerdict:
    exported = context.final if context.config.final == "all" else context
    exported.digest_of("merged", member)  # raises where it is not there yet
    in_bits = verdict(context.chosen, member)
    weights, log = exported.input("merged", member), folder / "log"
    file = folder / f"{context.config.name}-{member}-{kind}.gguf"
    context.progress.update("converts", 0, 1)
    whole = folder / "whole.gguf"
    llama_cpp.convert(programs, weights, whole, log)
    context.progress.update("quantises", 0, 1)
    llama_cpp.quantise(programs, whole, file, kind, log)
    whole.unlink()
    serve, tokenizer = context.config.serve, models.load_tokenizer(weights)
    with llama_cpp.served(programs, file, serve.max_length, log) as server:
        differing = _check_tokens(exported, tokenizer, server)
        measured = _measure(exported, in_bits, kind, GgufStudent(exported, member, file, server))
    measured = measured.model_copy(update={"other_tokens": differing, "llama_cpp": llama_cpp.version(programs)})
    log.unlink()
    measured.write(folder)
    base = student_name(context.config, member_settings(context.config, member))
    licence = licence_of(base, models.locate(base))
    text = modelfile.text(file.name, tokenizer, context.config.predict, serve.max_length, licence)
    write_atomic(folder / modelfile.FILE, text)
    return measured


def _check_tokens(context: Context, tokenizer: PreTrainedTokenizerBase, server: Served) -> int:
    """Hold what the file's chat template and tokenizer make of validation prompts against what the student was trained
    on. Returns how many differ: llama.cpp splits some rare texts otherwise, and what that costs is measured.

    Raises:
        TemplateError: most of them differ.
    """
    questions = records.read(context.input("questions") / "validation.jsonl", Question)[:MAX_PROMPTS]
    differing: list[TemplateError] = []
    for question in questions:
        prompt = ask_messages(question, tuple(range(len(question.options))), context.config.student_prompts)
        expected = template.prompt_tokens(tokenizer, prompt)
        actual = server.prompt_tokens(template.as_text(tokenizer, prompt))
        try:
            template.check_same(tokenizer, "prompt", expected, actual, f"the GGUF file, {question.id}")
        except TemplateError as error:
            differing.append(error)
    if len(differing) > len(questions) / 2:
        raise differing[0]
    if differing:
        context.progress.say(f"llama.cpp splits {len(differing):,} of {len(questions):,} prompts into other tokens")
    return len(differing)


def _measure(context: Context, in_bits: Verdict, kind: str, student: GgufStudent) -> GgufVerdict:
    """Hold the file's answers against the merged weights'; ``in_bits`` is the verdict on the quantised ones.

    Raises:
        GateError: they are worse than is allowed.
    """
    settings, seed = context.config.quantise, context.config.seed
    questions = records.read(context.input("questions") / "validation.jsonl", Question)
    problems, n = [question.problem_id for question in questions], len(questions)
    member, file = student.member, student.file
    merged_weights = context.input("merged", member)
    before = predict(context, member, merged_weights, questions, "validation, merged")
    after = student.answers(questions, f"validation, {kind}")
    right, right_after = correct(questions, before), correct(questions, after)

    def ask_more(more: list[Question]) -> Outcomes:
        merged = correct(more, predict(context, member, merged_weights, more, "validation, other orders, merged"))
        of_file = correct(more, student.answers(more, f"validation, other orders, {kind}"))
        return Outcomes(tuple(question.problem_id for question in more), tuple(merged), tuple(of_file))

    outcomes = Outcomes(tuple(problems), tuple(right), tuple(right_after))
    accuracy = check_accuracy(outcomes, questions, settings.max_loss, settings.max_orders, seed, ask_more)
    unparsed = Paired(merged=unreadable(before), quantised=unreadable(after))
    exceeded = limits_exceeded(settings, unparsed, None, None) + accuracy_exceeded(settings, accuracy)
    if exceeded:
        raise GateError(f"{file.name}: {'; '.join(exceeded)}; export another kind")
    if accuracy.decision == "cannot tell":
        context.progress.say(f"{file.name} passes, but: {sentence(accuracy, settings.max_orders)}")
    flips = mcnemar(right, right_after)
    return GgufVerdict(
        member=member,
        kind=kind,
        file=file.name,
        weights="final" if context.is_final else "chosen",
        n=n,
        merged=GgufSystem(
            accuracy=sum(right) / n,
            interval=accuracy_interval(right, problems, seed),
            bytes=weights_on_disk(merged_weights),
        ),
        quantised=GgufSystem(
            accuracy=in_bits.quantised, interval=in_bits.intervals.quantised, bytes=in_bits.bytes.quantised
        ),
        gguf=GgufSystem(
            accuracy=sum(right_after) / n,
            interval=accuracy_interval(right_after, problems, seed),
            bytes=file.stat().st_size,
        ),
        flips=Flips(
            right_to_wrong=flips.lost,
            wrong_to_right=flips.won,
            p=flips.p,
            examples=flipped_answers(questions, before, after),
        ),
        unparsed=unparsed,
        accuracy=accuracy,
        tokens=sum(sum(answer.tokens) for answer in after) / sum(len(answer.tokens) for answer in after),
        tokens_per_second=student.speed.tokens / student.speed.seconds if student.speed.tokens else None,
    )


class GgufStudent:
    """A GGUF file that llama.cpp's server answers with, asked through the ledger like any model."""

    def __init__(self, context: Context, member: str, file: Path, server: Served) -> None:
        self.member, self.file = member, file
        self._context, self._server = context, server
        self._identity = f"llama.cpp {file_digest(file)}"
        self.speed = Speed(0, 0.0)

    def answers(self, questions: list[Question], label: str) -> list[Prediction]:
        """Its answers as the server gives them; where none can be read, no letter is forced."""
        config = self._context.config

        def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
            return self._ask([request for request in requests if not request.top_logprobs], label)

        poll = Poll(questions, self.member, self._identity, config.predict, config.seed, config.student_prompts)
        return vote(poll, ask)

    def _ask(self, requests: list[Request], label: str) -> dict[str, Response]:
        progress, workspace = self._context.progress, self._context.workspace
        model = Model(
            engine="openai",
            base_url=(self._server.url,),
            price=FREE,
            concurrency=llama_cpp.SLOTS,
            timeout=ANSWER_TIMEOUT_SECONDS,
        )
        remote = RemoteModel("gguf", model, dedicated=True, key=self._server.key)

        def report(done: int, _: int) -> None:
            progress.update(label, done, len(requests))

        with Ledger(workspace.ledger) as ledger:
            stored = ledger.find_all(requests).keys()
            begun = time.monotonic()
            responses = ask_remote(
                requests, remote, ledger, Scope(workspace.name, "gguf"), Listener(report, progress.say)
            )
        written = sum(response.completion_tokens for key, response in responses.items() if key not in stored)
        self.speed = Speed(self.speed.tokens + written, self.speed.seconds + time.monotonic() - begun)
        return responses
