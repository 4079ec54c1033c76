"""variants: new questions about the training problems, written by models, with answers proved by other models or by a
program."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from stepladder import records
from stepladder.answering.client import Billing, ModelClient, identity
from stepladder.ask.request import Request, Response
from stepladder.config import VARIANTS, Config, Variants, settings
from stepladder.context import Context
from stepladder.documents import VariantSummary
from stepladder.mcq.prompts import Solved, ask_messages, variant_messages
from stepladder.mcq.reviews import Review, read_variant_reviews, variant_decisions
from stepladder.mcq.shuffle import orders, rng
from stepladder.mcq.similar import nearest
from stepladder.mcq.variant import Draft, Unfit, facts, is_repeated, only_asks, read, variant_id
from stepladder.mcq.verify import judge
from stepladder.nodes.chosen import workers_of
from stepladder.records import CHARGES, Charge, Question, Sample
from stepladder.shards.each import Pool
from stepladder.shards.proofs import PROVED, Program
from stepladder.workspace import Artifact, digest, write_atomic

UNPROVED, JUDGED = "unproved.jsonl", "judged.jsonl"
"""The questions that nothing has proved and nobody has decided about, and what writer and judges wrote about them: for
people to judge."""
PIECE_PROGRAMS = 100
"""That one process tries."""

Proof = Literal["agreed", "program", "reviewed"]
"""``reviewed``: a person kept it."""


class Written(NamedTuple):
    """A draft, its writer, and the key of the request that it answers."""

    draft: Draft
    writer: str
    key: str


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    models = sorted({*_table(config).models, *judges(config)})
    inputs = {name: context.digest_of(name) for name in ("questions", "samples")} | context.prompts_of(models)
    inputs |= {f"model {name}": identity(config, name) for name in models}
    if config.questions.reviewed is not None and (decided := variant_decisions(config.questions.reviewed)):
        inputs["reviewed"] = digest(decided)
    chosen_settings = {"variants": settings(_table(config)), "seed": config.seed}
    return Artifact(context.input("variants"), chosen_settings, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    questions = records.read(context.input("questions") / f"{context.taught[-1]}.jsonl", Question)
    chains = records.read(context.input("samples") / "accepted.jsonl", Sample)
    problems: dict[str, list[Question]] = {}
    for question in questions:
        problems.setdefault(question.problem_id, []).append(question)
    refused: list[dict[str, object]] = []
    charges: dict[str, int] = {}
    drafts = write(context, problems, chains, refused, charges)
    proofs, judged = prove(context, drafts, problems, charges)
    reviews = _reviews(context.config, drafts)
    proofs |= {name: "reviewed" for name, review in reviews.items() if review.action == "keep"}
    dropped = {name for name, review in reviews.items() if review.action != "keep"}
    accepted, unproved = list[Written](), list[Written]()
    for written in drafts:
        name = written.draft.question.id
        if name in dropped:
            refused.append(_row(name, written.writer, "refused by a reviewer", written.draft))
        elif name in proofs:
            accepted.append(written)
        else:
            refused.append(_row(name, written.writer, "not proved", written.draft))
            unproved.append(written)
    accepted.sort(key=lambda written: written.draft.question.id)
    refused.sort(key=lambda row: str(row["id"]))
    write_atomic(folder / "questions.jsonl", records.lines(written.draft.question for written in accepted))
    write_atomic(folder / "accepted.jsonl", records.lines(map(_sample, accepted)))
    write_atomic(folder / "rejected.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in refused))
    open_ids = {written.draft.question.id for written in unproved}
    write_atomic(folder / UNPROVED, records.lines(written.draft.question for written in unproved))
    shown = [*map(_sample, unproved), *(sample for sample in judged if sample.question_id in open_ids)]
    write_atomic(folder / JUDGED, records.lines(shown))
    charged = (Charge(key=key, micro_dollars=amount) for key, amount in sorted(charges.items()) if amount)
    write_atomic(folder / CHARGES, records.lines(charged))
    VariantSummary(
        problems=len(problems),
        written=len(accepted) + len(refused),
        accepted=dict(sorted(Counter(proofs[written.draft.question.id] for written in accepted).items())),
        refused=dict(Counter(str(row["reason"]) for row in refused).most_common()),
        writers=dict(sorted(Counter(written.writer for written in accepted).items())),
    ).write(folder)
    context.progress.say(f"{len(accepted):,} new questions proved, {len(refused):,} refused")


def judges(config: Config) -> tuple[str, ...]:
    """The models that answer the new questions."""
    return _table(config).judges or tuple(config.models)


def write(
    context: Context,
    problems: Mapping[str, Sequence[Question]],
    chains: Sequence[Sample],
    refused: list[dict[str, object]],
    charges: dict[str, int],
) -> list[Written]:
    """Let the writers write; returns the drafts that can be asked, appends the others to ``refused``, and adds to
    ``charges`` what each answer cost, in micro-dollars by request key."""
    config, table = context.config, _table(context.config)
    examples = _examples(problems, chains, table.examples, config.seed)
    drafts: list[Written] = []
    existing = {problem: list(questions) for problem, questions in problems.items()}
    for writer in table.models:
        client, folder = ModelClient(context, writer, _billing(table)), config.prompts_for(writer)
        requests = {
            (problem, index): Request(
                model=client.identity,
                messages=variant_messages(questions, solved, _program(questions), folder),
                max_tokens=table.max_tokens,
                **table.of_answer(index),
            )
            for (problem, questions), solved in zip(problems.items(), examples, strict=True)
            for index in range(table.per_problem)
        }
        answers = _ask(client, [*requests.values()], f"{writer} writes", charges)
        for (problem, index), request in requests.items():
            name, answer = variant_id(problem, writer, index), answers[request.key]
            try:
                if not answer.finished:
                    raise Unfit("cut off")
                draft = read(answer.text, problems[problem][0], name)
                if is_repeated(draft.question, existing[problem]):
                    raise Unfit("repeats a question")
            except Unfit as reason:
                refused.append(_row(name, writer, str(reason)) | {"text": answer.text})
                continue
            source = f"variant/{writer}"
            draft = draft._replace(question=draft.question.model_copy(update={"source": source}))
            existing[problem].append(draft.question)
            drafts.append(Written(draft, writer, request.key))
    return drafts


def prove(
    context: Context,
    drafts: Sequence[Written],
    problems: Mapping[str, Sequence[Question]],
    charges: dict[str, int],
) -> tuple[dict[str, Proof], list[Sample]]:
    """The proof of each draft that has one, by question id, and what the judges answered; adds to ``charges`` as
    :func:`write` does.

    Judges give the writer's answer under shuffled options without having seen it. ``agree`` of them prove it; one is
    enough beside a program that proves it on the problem's own facts, but a program alone is not, since its rules are
    the writer's. Several names of one model count once.
    """
    config, table = context.config, _table(context.config)
    programs = _proved_by_program(context, drafts, problems)
    identities = {written.writer: identity(config, written.writer) for written in drafts}
    agreed: dict[str, set[str]] = {}
    judged: list[Sample] = []
    for name in judges(config):
        client = ModelClient(context, name, _billing(table))
        asked = []
        for written in drafts:
            question = written.draft.question
            if identities[written.writer] != client.identity:
                (order,) = orders(1, len(question.options), config.seed, question.id, name)
                messages = ask_messages(question, order, config.prompts_for(name))
                request = Request(model=client.identity, messages=messages, max_tokens=table.max_tokens)
                asked.append((question, order, request))
        answers = _ask(client, [request for _, _, request in asked], f"{name} judges", charges)
        for question, order, request in asked:
            answer = answers[request.key]
            judgement = judge(question, order, answer.text, finished=answer.finished)
            judged.append(
                Sample(
                    question_id=question.id,
                    rung=VARIANTS,
                    model=name,
                    sample_index=0,
                    permutation=order,
                    key=request.key,
                    text=answer.text,
                    answer=judgement.answer,
                    verdict=judgement.verdict,
                )
            )
            if answer.finished and judgement.verdict == "accepted":
                agreed.setdefault(question.id, set()).add(client.identity)
    proofs: dict[str, Proof] = {name: "agreed" for name, voices in agreed.items() if len(voices) >= table.agree}
    return proofs | {name: "program" for name in agreed if name in programs}, judged


def _reviews(config: Config, drafts: Sequence[Written]) -> dict[str, Review]:
    """What people decided about the drafts, by question id."""
    reviewed = config.questions.reviewed
    if reviewed is None:
        return {}
    return read_variant_reviews(reviewed, {written.draft.question.id: written.draft.question for written in drafts})


def _ask(client: ModelClient, requests: Sequence[Request], label: str, charges: dict[str, int]) -> dict[str, Response]:
    with client:
        answers = client.ask(requests, label)
    charges |= {key: answer.micro_dollars for key, answer in answers.items()}
    return answers


def _proved_by_program(
    context: Context, drafts: Sequence[Written], problems: Mapping[str, Sequence[Question]]
) -> set[str]:
    """Ids of the questions whose answer follows from the problem's program and the writer's rules."""
    programs = []
    for draft, writer, _ in drafts:
        question, base = draft.question, _program(problems[draft.question.problem_id])
        if base is not None and only_asks(base, draft.rules, len(question.options)):
            programs.append(Program(question.id, writer, base, draft.rules, len(question.options), question.answer))
    if not programs:
        return set()
    scratch = artifact(context, None).scratch()
    pool = Pool(workers_of(context.config.cluster), scratch, context.progress.update)
    orders = [
        {"programs": programs[start : start + PIECE_PROGRAMS]} for start in range(0, len(programs), PIECE_PROGRAMS)
    ]
    results = pool.each("proofs", "proofs", orders)
    return {name for result in results for name in json.loads((result / PROVED).read_text(encoding="utf-8"))}


def _program(questions: Sequence[Question]) -> str | None:
    """The problem's facts as a program, without what single questions add, such as "suppose that"; None where its
    questions carry no program or do not agree on the facts."""
    programs = {facts(question.program) for question in questions if question.program}
    return programs.pop() or None if len(programs) == 1 else None


def _examples(
    problems: Mapping[str, Sequence[Question]], chains: Sequence[Sample], count: int, seed: int
) -> list[list[Solved]]:
    """For every problem, ``count`` solved questions about the most similar other problems."""
    questions = {question.id: question for group in problems.values() for question in group}
    solved: dict[str, Solved] = {}
    for sample in chains:
        question = questions[sample.question_id]
        solved.setdefault(question.problem_id, Solved(question, sample.permutation, sample.text))
    pool = [*solved]
    texts = [group[0].problem for group in problems.values()]
    neighbours = nearest(texts, [problems[name][0].problem for name in pool], count + 1, rng("examples", seed))
    return [
        [solved[pool[index]] for index in indices if pool[index] != problem][:count]
        for problem, indices in zip(problems, neighbours, strict=True)
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


def _billing(table: Variants) -> Billing:
    return Billing(VARIANTS, table.dollars)


def _table(config: Config) -> Variants:
    if config.variants is None:
        raise LookupError("the stage has no parts without the table [variants]")
    return config.variants
