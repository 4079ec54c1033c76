"""The pages: for each address a function that finds what is shown, and the template that shows it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, get_args
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from stepladder.context import Context
from stepladder.documents import SampleSummary
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.reviews import Action, Decision, Standing, evidence_of, last_of
from stepladder.progress import duration
from stepladder.records import LETTERS, Question, Sample
from stepladder.reporting import figures
from stepladder.reporting.content import Report
from stepladder.stages.report import HTML
from stepladder.stats import gain_interval, mcnemar
from stepladder.viewing import live, marks, words
from stepladder.viewing.decided import Decisions
from stepladder.viewing.index import FILTERS, PAGE_SIZE, Current, Index, Whole, systems
from stepladder.viewing.items import Item, as_in_file, is_out_of_date, item_of

STATIC = Path(__file__).parent / "static"
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
"""Of report.html, which has its style inside."""
MAX_NOTE = 5000
LAST = "last"
"""The action that takes back what the reviewer decided last, whatever it was about."""
KINDS = {
    (True, False): "broken", (False, True): "fixed", (False, False): "both wrong", (True, True): "both right",
}  # fmt: skip
"""What became of a question, by whether it was right before and is right after."""
COOKIES = {"reviewer": 60, "language": 2, "blind": 1, "keys": 3}
"""What a browser remembers, and how long it may be."""


class PageAddress(Protocol):
    """Makes the address of a page."""

    def __call__(self, path: str, /, **query: object) -> str: ...


def served_at(path: str, /, **query: object) -> str:
    """Where a page is served."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


class Pages:
    """The pages of a run.

    Args:
        context: the run.
        link: the address of a page, from its path and its query; by default where it is served. With another one the
            pages are files, which can be read and not used.
    """

    def __init__(self, context: Context, link: PageAddress | None = None) -> None:
        self._context = context
        self._link, self._is_static = link or served_at, link is not None
        self._runs: dict[str, Current] = {}
        reviewed = context.config.questions.reviewed
        self._decisions = None if reviewed is None else Decisions(reviewed)
        self._environment = Environment(
            loader=PackageLoader("stepladder.viewing"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._environment.filters |= {"visible": marks.visible}
        self._environment.globals |= {"LETTERS": LETTERS, "duration": duration}

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/", self.run),
                Route("/live", self.live),
                Route("/questions", self.questions),
                Route("/question", self.question),
                Route("/audit", self.audit),
                Route("/decide", self.decide, methods=["POST"]),
                Route("/remember", self.remember, methods=["POST"]),
                Route("/decisions", self.decisions),
                Route("/compare", self.compare),
                Route("/report", self.report),
                Route("/static/{name}", self.static),
            ]
        )

    # The run

    def run(self, request: Request) -> Response:
        return self._page(request, "run", **self._live())

    def live(self, request: Request) -> Response:
        """What of the run's page changes."""
        return self._page(request, "live", **self._live())

    def _live(self) -> dict[str, Any]:
        folder, config = self._context.workspace.folder, self._context.config
        samples = folder / "samples"
        return {
            "live": live.look(self._context),
            "losses": figures.loss_curves(trained) if (trained := live.losses(self._context)) else None,
            "rungs": SampleSummary.read(samples).rungs if (samples / SampleSummary.FILE).exists() else (),
            "report": Report.read(folder / "report") if (folder / "report" / Report.FILE).exists() else None,
            "caps": {rung.name: rung.dollars for rung in config.rung},
            "cap": config.limits.dollars,
        }

    def report(self, request: Request) -> Response:
        path = self._context.workspace.folder / "report" / HTML
        if not path.is_file():
            raise HTTPException(404, "There is no report yet.")
        return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})

    # Questions

    def questions(self, request: Request) -> Response:
        index = self._index()
        filters = {name: request.query_params.get(name, "") for name in FILTERS}
        sort = request.query_params.get("sort", "doubt")
        page = max(1, _number(request.query_params.get("page"), 1))
        standing = self._standing()
        bound = dict(filters)
        if filters["decided"]:
            bound["decided"] = json.dumps([name for name, found in standing.items() if found.is_decided])
        total, rows = index.find(bound, sort, (page - 1) * PAGE_SIZE, PAGE_SIZE)
        return self._page(
            request, "questions", rows=rows, total=total, page=page, pages=math.ceil(total / PAGE_SIZE), sort=sort,
            filters=filters, choices=index.choices, standing=standing,
        )  # fmt: skip

    def question(self, request: Request) -> Response:
        item = self._item(request.query_params.get("id", ""))
        compared = None
        left, right = (_number(request.query_params.get(side), -1) for side in ("left", "right"))
        chains = [chain for side in item.sides.values() for chain in side]
        if 0 <= left < len(chains) and 0 <= right < len(chains):
            texts = (chains[left].sample.text, chains[right].sample.text)
            compared = (chains[left], chains[right], marks.aligned(*texts))
        return self._page(
            request, "question", item=item, compared=compared, back=_local(request.query_params.get("back", ""))
        )

    # Decisions

    def audit(self, request: Request) -> Response:
        """The next item of the queue, or the one that is asked for."""
        index, reviewer = self._index(), _cookie(request, "reviewer")
        doubtful = index.doubtful
        waiting = self._queue(doubtful, reviewer)
        name = request.query_params.get("id")
        if name is None:
            name = next((name for name in waiting if self._is_free(name, reviewer)), None)
        item = None if name is None else self._item(name)
        # Fetched ahead, while those before it may not be decided about yet.
        begin = waiting.index(name) + 1 if name in waiting else 0
        others = (other for other in (*waiting[begin:], *waiting[:begin]) if item is not None and other != name)
        after = next((other for other in others if self._is_free(other, reviewer)), None)
        common = {"total": len(doubtful), "left": len(waiting), "after": after, "pace": self._pace(reviewer)}
        first = request.query_params.get("first", "")
        blind = bool(_cookie(request, "blind")) and not first
        template = "item" if request.query_params.get("part") else "audit"
        return self._page(request, template, item=item, blind=blind, first=first, **common)

    def _queue(self, doubtful: Sequence[str], reviewer: str) -> list[str]:
        """Doubtful labels that nobody has decided about, those that this reviewer skipped last."""
        standing = self._standing()
        skipped = dict.fromkeys(
            decision.id
            for decision in (self._decisions.all() if self._decisions else ())
            if decision.action == "skip" and decision.reviewer == reviewer
        )
        waiting = [name for name in doubtful if name not in standing or not standing[name].is_decided]
        left = {*waiting}
        return [name for name in waiting if name not in skipped] + [name for name in skipped if name in left]

    def _is_free(self, name: str, reviewer: str) -> bool:
        return self._decisions is None or self._decisions.lease(name, reviewer)

    def _pace(self, reviewer: str) -> float | None:
        """Seconds that a decision takes this reviewer, by the last ones; None if there are too few."""
        times = [
            d.time for d in (self._decisions.all() if self._decisions else ()) if d.reviewer == reviewer and d.time
        ]
        gaps = sorted(after - before for before, after in zip(times[-21:], times[-20:], strict=False))
        return gaps[len(gaps) // 2] if len(gaps) > 2 else None

    async def decide(self, request: Request) -> Response:
        """Keep a decision, and go on to where the form says."""
        form = await _form(request)
        if self._decisions is None:
            raise HTTPException(409, "Name a file in [questions] reviewed, such as reviewed.jsonl.")
        reviewer, shown_next = _cookie(request, "reviewer"), None
        if form.get("action") == LAST:
            last = last_of(self._decisions.all(), reviewer)
            if last is None:
                raise HTTPException(409, "You have decided nothing that could be taken back.")
            form, shown_next = {"id": last.id, "action": "undo"}, last.id
        _, question, _ = self._question(form.get("id", ""))
        decision = _decided(form, question, reviewer)
        try:
            self._decisions.append(decision)
        except OSError as error:
            raise HTTPException(507, f"{self._decisions.file}: cannot be written ({error.strerror})") from None
        if request.headers.get("accept") == "application/json":
            left = len(self._queue(self._index().doubtful, reviewer))
            return JSONResponse({"id": decision.id, "action": decision.action, "left": left, "show": shown_next})
        back = f"/audit?{urlencode({'id': shown_next})}" if shown_next else _local(form.get("back", ""))
        return RedirectResponse(back or "/audit", 303)

    def decisions(self, request: Request) -> Response:
        standing = self._standing()
        index = self._index()
        items = [(name, found, self._is_stale(index, name, found)) for name, found in standing.items()]
        everybody = [found for _, found, _ in items if len(found.by_reviewer) > 1]
        agreed = sum(len({d.review for d in found.by_reviewer.values()}) == 1 for found in everybody)
        return self._page(
            request, "decisions", items=items, several=len(everybody), agreed=agreed, command=self._context.run_command
        )

    def _is_stale(self, index: Index, name: str, found: Standing) -> bool:
        whole = index.whole(name)
        return whole is not None and is_out_of_date(as_in_file(whole.question, found), found)

    # Two systems

    def compare(self, request: Request) -> Response:
        """Two systems, of this run or of another one beside it."""
        runs, own = self._context.workspace.runs, self._context.workspace.name
        found = {run: [*systems(runs / run)] for run in self._run_names()}
        known = [f"{run}: {system}" for run in found for system in dict.fromkeys(name for name, _, _ in found[run])]
        ours = [name for name in known if name.startswith(f"{own}: ")]
        before, after = (
            chosen if (chosen := request.query_params.get(side)) in known else next(iter(default), "")
            for side, default in (("before", ours), ("after", ours[::-1]))
        )
        splits = sorted({split for run in found.values() for _, split, _ in run})
        split = request.query_params.get("split") or next(iter(splits), "")
        was, now = (self._right(name, split) for name in (before, after))
        both = sorted(was.keys() & now.keys())
        groups: dict[str, list[str]] = {kind: [] for kind in KINDS.values()}
        for name in both:
            groups[KINDS[was[name], now[name]]].append(name)
        figures = None
        if both:
            old, new = ([answers[name] for name in both] for answers in (was, now))
            problems = [name.rpartition("#")[0] for name in both]
            figures = (mcnemar(old, new), gain_interval(old, new, problems, seed=self._context.config.seed))
        return self._page(
            request, "compare", names=known, splits=splits, before=before, after=after, split=split, groups=groups,
            figures=figures, n=len(both),
        )  # fmt: skip

    def _run_names(self) -> list[str]:
        """This run, and those beside it that have answers."""
        runs, own = self._context.workspace.runs, self._context.workspace.name
        return [own, *sorted(path.parent.name for path in runs.glob("*/predictions") if path.parent.name != own)]

    def _right(self, name: str, split: str) -> dict[str, bool]:
        """Whether a system, named with its run, has each question right."""
        run, _, system = name.partition(": ")
        return self._index(run).right(system, split) if run in self._run_names() else {}

    def _index(self, run: str | None = None) -> Index:
        """What is in a run's folder now, by default in this run's."""
        name = run or self._context.workspace.name
        return self._runs.setdefault(name, Current(self._context.workspace.runs / name))()

    # All pages

    async def remember(self, request: Request) -> Response:
        """Keep a setting in the browser."""
        form = await _form(request)
        response = RedirectResponse(_local(form.get("back", "")) or "/", 303)
        for name, longest in COOKIES.items():
            if name in form:
                value = urlencode({"": form[name].strip()[:longest]})[1:]
                response.set_cookie(name, value, max_age=365 * 24 * 3600, httponly=True, samesite="strict")
        return response

    def static(self, request: Request) -> Response:
        path = STATIC / request.path_params["name"]
        if path.name not in ("view.css", "view.js") or not path.is_file():
            raise HTTPException(404, "There is no such file.")
        return FileResponse(path)

    def _page(self, request: Request, template: str, **values: Any) -> Response:
        language = _language(request)

        def t(text: str) -> str:
            return words.translate(language, text)

        text = self._environment.get_template(f"{template}.html.j2").render(
            t=t, language=language, languages=words.LANGUAGES, path=request.url.path, here=_here(request),
            link=self._link, is_static=self._is_static,
            reviewer=_cookie(request, "reviewer"), is_blind=bool(_cookie(request, "blind")), prompt=self.prompt,
            keys=_cookie(request, "keys") != "off", run=self._context.config.name,
            can_decide=self._decisions is not None, fault=None if self._decisions is None else self._decisions.error,
            **values,
        )  # fmt: skip
        return HTMLResponse(text)

    def _standing(self) -> Mapping[str, Standing]:
        return {} if self._decisions is None else self._decisions.standing()

    def _item(self, name: str) -> Item:
        whole, question, standing = self._question(name)
        return item_of(whole, question, standing, None if self._decisions is None else self._decisions.holder(name))

    def _question(self, name: str) -> tuple[Whole, Question, Standing | None]:
        """Everything about a question, the question with the label of the question file, and what reviewers think."""
        whole = self._index().whole(name)
        if whole is None:
            raise HTTPException(404, "There is no such question in this run.")
        standing = self._standing().get(name)
        return whole, whole.question if standing is None else as_in_file(whole.question, standing), standing

    def prompt(self, question: Question, sample: Sample) -> str:
        """What a model was asked, as it was sent."""
        folder = self._context.config.prompts_for(sample.model) if sample.model in self._context.config.models else None
        return "\n\n".join(message.content for message in ask_messages(question, sample.permutation, folder))


def _decided(form: Mapping[str, str], question: Question, reviewer: str) -> Decision:
    """The decision that a form holds. An option's letter keeps the label, if it is that one, or else replaces it."""
    action, answer = form.get("action", ""), form.get("answer")
    letters = tuple(LETTERS[: len(question.options)])
    if action in letters:
        action, answer = ("keep", None) if action == question.answer else ("relabel", action)
    if action not in get_args(Action):
        raise HTTPException(400, f"{action!r} is not something that can be decided.")
    if action == "relabel" and answer not in letters:
        raise HTTPException(400, "A new label is one of the question's letters.")
    return Decision(
        id=question.id, action=cast("Action", action), answer=answer if action == "relabel" else None,
        reviewer=reviewer, note=form.get("note", "")[:MAX_NOTE], label=question.answer,
        evidence=evidence_of(question), time=round(time.time(), 3), settles=bool(form.get("settles")),
    )  # fmt: skip


async def _form(request: Request) -> dict[str, str]:
    body = await request.body()
    return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=50))


def _cookie(request: Request, name: str) -> str:
    pairs = parse_qsl(f"v={request.cookies.get(name, '')}")
    return pairs[0][1][: COOKIES[name]] if pairs else ""


def _language(request: Request) -> str:
    chosen = _cookie(request, "language")
    if chosen in words.LANGUAGES:
        return chosen
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


def _here(request: Request) -> str:
    return f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path


def _local(address: str) -> str | None:
    """An address of ours, or None."""
    is_ours = address.startswith("/") and not address.startswith(("//", "/\\")) and address.isprintable()
    return address if is_ours else None


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else default
