"""variants: new questions about the training problems, written by models, whose answers others must prove."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from stepladder import records
from stepladder.answering.client import Billing, ModelClient, identity
from stepladder.ask.request import Request
from stepladder.closedworld.prove import Unproved, prove_untrusted
from stepladder.config import VARIANTS, Config, Variants, settings
from stepladder.context import Context
from stepladder.documents import VariantSummary
from stepladder.mcq.prompts import Solved, ask_messages, variant_messages
from stepladder.mcq.shuffle import orders, rng
from stepladder.mcq.similar import nearest
from stepladder.mcq.variant import Draft, Unfit, complete, facts, is_repeated, only_asks, read
from stepladder.mcq.verify import judge
from stepladder.records import LETTERS, Question, Sample
from stepladder.workspace import Artifact, write_atomic

SECONDS, MEBIBYTES = 10, 512
"""What the solver may use for one program that a model wrote."""

Proof = Literal["agreed", "program"]


class Written(NamedTuple):
    """A draft and who wrote it."""

    draft: Draft
    writer: str
    key: str


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    inputs = {name: context.digest_of(name) for name in ("questions", "samples")} | context.prompts_digest()
    inputs |= {f"model {name}": identity(config, name) for name in sorted({*_wanted(config).models, *judges(config)})}
    chosen = {"variants": settings(_wanted(config)), "seed": config.seed}
    return Artifact(context.workspace.path("variants"), chosen, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    questions = records.read(context.input("questions") / "train.jsonl", Question)
    chains = records.read(context.input("samples") / "accepted.jsonl", Sample)
    problems: dict[str, list[Question]] = {}
    for question in questions:
        problems.setdefault(question.problem_id, []).append(question)
    refused: list[dict[str, object]] = []
    drafts = write(context, problems, chains, refused)
    proofs = prove(context, drafts, problems)
    accepted = [written for written in drafts if written.draft.question.id in proofs]
    for written in drafts:
        if written.draft.question.id not in proofs:
            refused.append(_row(written.draft.question.id, written.writer, "not proved", written.draft))
    accepted.sort(key=lambda written: written.draft.question.id)
    refused.sort(key=lambda row: str(row["id"]))
    write_atomic(folder / "questions.jsonl", records.lines(written.draft.question for written in accepted))
    write_atomic(folder / "accepted.jsonl", records.lines(map(_sample, accepted)))
    write_atomic(folder / "rejected.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in refused))
    VariantSummary(
        problems=len(problems),
        written=len(drafts) + sum(row["reason"] != "not proved" for row in refused),
        accepted=dict(sorted(Counter(proofs.values()).items())),
        refused=dict(Counter(str(row["reason"]) for row in refused).most_common()),
        writers=dict(sorted(Counter(written.writer for written in accepted).items())),
    ).write(folder)
    context.progress.say(f"{len(accepted):,} new questions proved, {len(refused):,} refused")


def judges(config: Config) -> tuple[str, ...]:
    """Who answers the new questions."""
    return _wanted(config).judges or tuple(config.models)


def write(
    context: Context,
    problems: Mapping[str, Sequence[Question]],
    chains: Sequence[Sample],
    refused: list[dict[str, object]],
) -> list[Written]:
    """What the writers wrote that can be asked; the rest goes to ``refused`` with the reason."""
    config, wanted = context.config, _wanted(context.config)
    prompts = {
        problem: variant_messages(questions, examples, _program(questions), config.prompts)
        for (problem, questions), examples in zip(
            problems.items(), _examples(problems, chains, wanted.examples, config.seed), strict=True
        )
    }
    drafts: list[Written] = []
    known = {problem: list(questions) for problem, questions in problems.items()}
    for writer in wanted.models:
        client = ModelClient(context, writer, _account(wanted))
        requests = {
            (problem, index): Request(
                model=client.identity,
                messages=messages,
                temperature=wanted.temperature,
                sample_index=index,
                max_tokens=wanted.max_tokens,
            )
            for problem, messages in prompts.items()
            for index in range(wanted.per_problem)
        }
        with client:
            answers = client.ask(list(requests.values()), f"{writer} writes")
        for (problem, index), request in requests.items():
            name, answer = f"{problem}~{writer}-{index}", answers[request.key]
            try:
                if not answer.finished:
                    raise Unfit("cut off")
                draft = read(answer.text, problems[problem][0], name)
                if is_repeated(draft.question, known[problem]):
                    raise Unfit("repeats a question")
            except Unfit as reason:
                refused.append(_row(name, writer, str(reason)) | {"text": answer.text})
                continue
            source = f"variant/{writer}"
            draft = draft._replace(question=draft.question.model_copy(update={"source": source}))
            known[problem].append(draft.question)
            drafts.append(Written(draft, writer, request.key))
    return drafts


def prove(context: Context, drafts: Sequence[Written], problems: Mapping[str, Sequence[Question]]) -> dict[str, Proof]:
    """Which drafts are proved, and how: by a program on the problem's own facts, or by enough judges who name the
    writer's answer under shuffled options without having seen it. Two names of one model are one."""
    config, wanted = context.config, _wanted(context.config)
    proofs: dict[str, Proof] = {}
    for written in drafts:
        question, base = written.draft.question, _program(problems[written.draft.question.problem_id])
        if base is not None and written.draft.rules and _follows(base, written.draft):
            proofs[question.id] = "program"
    who = {written.writer: identity(config, written.writer) for written in drafts}
    agreed: dict[str, set[str]] = {}
    for name in judges(config):
        client = ModelClient(context, name, _account(wanted))
        judged = []
        for written in drafts:
            question = written.draft.question
            if who[written.writer] != client.identity and question.id not in proofs:
                (order,) = orders(1, len(question.options), config.seed, question.id, name)
                messages = ask_messages(question, order, config.prompts)
                request = Request(model=client.identity, messages=messages, max_tokens=wanted.max_tokens)
                judged.append((question, order, request))
        with client:
            answers = client.ask([request for _, _, request in judged], f"{name} judges")
        for question, order, request in judged:
            answer = answers[request.key]
            verdict = judge(question, order, answer.text, finished=answer.finished).verdict
            if answer.finished and verdict == "accepted":
                agreed.setdefault(question.id, set()).add(client.identity)
    return proofs | {name: "agreed" for name, judges in agreed.items() if len(judges) >= wanted.agree}


def _follows(base: str, draft: Draft) -> bool:
    if not only_asks(base, draft.rules, len(draft.question.options)):
        return False
    try:
        option = prove_untrusted(complete(base, draft.rules), SECONDS, MEBIBYTES)
    except Unproved:
        return False
    return LETTERS[option : option + 1] == draft.question.answer


def _program(questions: Sequence[Question]) -> str | None:
    """The problem itself as a program, where its questions carry one and agree on it: what one of them adds, such as
    "suppose that", is not the problem's."""
    found = {facts(question.program) for question in questions if question.program}
    return found.pop() or None if len(found) == 1 else None


def _examples(
    problems: Mapping[str, Sequence[Question]], chains: Sequence[Sample], count: int, seed: int
) -> list[list[Solved]]:
    """For every problem, solved questions about the problems most like it."""
    questions = {question.id: question for group in problems.values() for question in group}
    solved: dict[str, Solved] = {}
    for sample in chains:
        question = questions[sample.question_id]
        solved.setdefault(question.problem_id, Solved(question, sample.permutation, sample.text))
    pool = [*solved]
    texts = [group[0].problem for group in problems.values()]
    found = nearest(texts, [problems[name][0].problem for name in pool], count + 1, rng("examples", seed))
    return [
        [solved[pool[place]] for place in places if pool[place] != problem][:count]
        for problem, places in zip(problems, found, strict=True)
    ]


def _sample(written: Written) -> Sample:
    question = written.draft.question
    return Sample(
        question_id=question.id,
        rung=VARIANTS,
        model=written.writer,
        sample_index=0,
        permutation=tuple(range(len(question.options))),
        key=written.key,
        text=written.draft.chain,
        answer=question.answer,
        verdict="accepted",
    )


def _row(name: str, writer: str, reason: str, draft: Draft | None = None) -> dict[str, object]:
    row: dict[str, object] = {"id": name, "writer": writer, "reason": reason}
    return row if draft is None else row | {"question": draft.question.model_dump(mode="json"), "chain": draft.chain}


def _account(wanted: Variants) -> Billing:
    return Billing(VARIANTS, wanted.dollars)


def _wanted(config: Config) -> Variants:
    if config.variants is None:
        raise LookupError("without the table [variants] the stage has no parts")
    return config.variants
