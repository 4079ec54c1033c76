"""The command line: one short command per stage, and those about a whole run. Heavy imports happen inside."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from stepladder.errors import StepladderError, UserError

if TYPE_CHECKING:
    from stepladder.stages.flow import Context

app = typer.Typer(
    help="A few hundred labelled questions in, a small model that reasons step by step out, proved with numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's TOML file.", show_default=False)]
Runs = Annotated[Path, typer.Option(help="Folder that holds all runs and their ledger.")]
RUNS = Path("runs")

STAGE_HELP = {
    "questions": "Read, check and split the labelled questions.",
    "samples": "Climb the cascade: collect chains that are proved right.",
    "variants": "Let models write new questions, and others prove them.",
    "trainset": "Choose each member's training chains.",
    "adapter": "Fine-tune each member with LoRA.",
    "merged": "Fold the adapters into the base.",
    "quantised": "Quantise with GPTQ and measure what it cost.",
    "predictions": "Answer validation and test with base, merged and quantised models.",
    "ensemble": "Choose how members' answers become one; write the answer file.",
    "report": "Write the report.",
}


def _context(config: Path, runs: Path) -> Context:
    from stepladder.config import load
    from stepladder.progress import Progress
    from stepladder.stages.flow import Context
    from stepladder.workspace import Workspace

    loaded = load(config)
    if runs.exists() and not runs.is_dir():
        raise UserError(f"{runs}: is not a folder; give --runs a folder, which is made if it is not there")
    return Context(loaded, Workspace(runs, loaded.name), Progress(Console()))


@app.command()
def run(config: ConfigFile, runs: Runs = RUNS) -> None:
    """Run every stage that is not up to date, then show the result."""
    import json

    from stepladder.stages import flow
    from stepladder.stages.report import summary

    context = _context(config, runs)
    place = escape(str(context.workspace.folder))
    context.progress.console.print(f"[bold]{context.config.name}[/bold]  [dim]{place}[/dim]")
    with context.workspace.locked():
        flow.run(context)
    report = json.loads((context.input("report") / "report.json").read_text(encoding="utf-8"))
    summary(report, context.progress.console)
    page = context.input("report") / "report.html"
    context.progress.console.print(f"\nReport: {escape(str(page))}", soft_wrap=True)


def _stage_command(name: str) -> Callable[[Path, Path], None]:
    def command(config: ConfigFile, runs: Runs = RUNS) -> None:
        from stepladder.stages import flow

        context = _context(config, runs)
        with context.workspace.locked():
            flow.run(context, (name,))

    command.__doc__ = STAGE_HELP[name]
    return command


STAGES = "Stages, in the order of the flow"
for _name in [*STAGE_HELP][:-2]:
    app.command(_name, rich_help_panel=STAGES)(_stage_command(_name))


@app.command(help=STAGE_HELP["ensemble"], rich_help_panel=STAGES)
def ensemble(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The run's TOML file.")] = None,
    runs: Runs = RUNS,
    votes: Annotated[
        Path | None,
        typer.Option(help='Instead of a run, JSONL of {"id", "gold", "votes": {model: [letters]}}: which rule to use.'),
    ] = None,
    members: Annotated[str, typer.Option(help="With --votes: models in it, with commas: A,B,C,D.")] = "",
    seed: Annotated[int, typer.Option(help="With --votes: of the folds.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="With --votes: print JSON.")] = False,
) -> None:
    if (config is None) == (votes is None):
        raise UserError("give either the run's TOML file, or --votes FILE with --members A,B,C,D")
    if config is not None:
        _stage_command("ensemble")(config, runs)
        return
    from stepladder.pooling import pool, show, told

    assert votes is not None  # noqa: S101 (for mypy: one of the two is given)
    found, questions = pool(votes, [name.strip() for name in members.split(",") if name.strip()], seed)
    if as_json:
        print(told(found, questions))
    else:
        show(found, questions, Console())


app.command("report", rich_help_panel=STAGES)(_stage_command("report"))


@app.command()
def plan(
    config: ConfigFile,
    runs: Runs = RUNS,
    pilot: Annotated[int, typer.Option(min=0, help="Ask so many questions first, for real; 0 asks nothing.")] = 0,
    card: Annotated[str, typer.Option(help="What will answer: a card's GiB, its name ('RTX 4090'), or cpu.")] = "32",
    hours: Annotated[float, typer.Option(min=0.01, help="Hours it has for all members.")] = 4.0,
    rate: Annotated[float | None, typer.Option(min=0.01, help="Tokens/s a member was measured to write there.")] = None,
) -> None:
    """Say what the cascade will ask, take and cost, and whether the members fit a card; after a run, how it went."""
    from stepladder import capacity, fits
    from stepladder.plan import plan as show

    on = capacity.card(card)
    context = _context(config, runs)
    with context.workspace.locked():
        show(context, pilot)
        fits.show(context, on, hours, rate)


@app.command()
def status(config: ConfigFile, runs: Runs = RUNS) -> None:
    """Show which artifacts are done, stale or missing, and what the run has spent."""
    from stepladder.ask.ledger import Ledger
    from stepladder.stages import flow

    context = _context(config, runs)
    marks = {"done": "[green]✓[/green]", "stale": "[yellow]~[/yellow]", "missing": "[dim]·[/dim]"}
    console = context.progress.console
    for label, state in flow.states(context):
        console.print(f"  {marks[state]}  {label:<24} {state}")
    if context.workspace.ledger.exists():
        with Ledger(context.workspace.ledger) as ledger:
            name = context.workspace.name
            console.print(f"\n{ledger.calls(name)} model calls, ${ledger.spent(name) / 1e6:.2f} spent")
            for batch in ledger.waiting(name):
                what = f"batch {batch.remote}: " if batch.remote else "batch: "
                what += f"{batch.requests:,} requests at the provider; the next run collects them"
                console.print(f"  ${batch.reserved / 1e6:.4f}  {escape(what)}", highlight=False)
            for attempt in ledger.unsettled(name):
                fate = "in flight" if attempt.alive else "in flight when its process ended, so charged at the worst"
                console.print(f"  ${attempt.reserved / 1e6:.4f}  {escape(attempt.model)}: {fate}", highlight=False)


@app.command()
def ledger(
    config: ConfigFile,
    runs: Runs = RUNS,
    export: Annotated[
        Path | None, typer.Option(help="Write every request and raw response, of all runs, as JSONL.")
    ] = None,
) -> None:
    """Show what the run's model calls cost, by rung and model, and how they ended."""
    from stepladder.ask.ledger import Ledger
    from stepladder.spending import show
    from stepladder.workspace import write_atomic

    context = _context(config, runs)
    place = context.workspace.ledger
    if not place.exists():
        raise UserError(f"{place}: there is no ledger yet; 'stepladder run {config}' starts one")
    with Ledger(place) as opened:
        show(opened.accounts(context.workspace.name), context.progress.console)
        if export is not None:
            import json

            write_atomic(export, (json.dumps(row, ensure_ascii=False) + "\n" for row in opened.export()))
            context.progress.console.print(f"Wrote {export}", soft_wrap=True, markup=False)


@app.command()
def audit(
    votes: Annotated[
        Path, typer.Option(help='JSONL of {"id", "gold", "votes": {model: [letters]}}.', show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="JSONL to write, the most suspect label first.", show_default=False)],
) -> None:
    """Rank labels by what models that answered independently say against them."""
    from stepladder.labelaudit import audit as rank

    rank(votes, out, Console())


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="JSON, JSONL, CSV, Parquet or text.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Question file to write, JSONL.", show_default=False)],
    form: Annotated[
        str | None, typer.Option("--format", help="table, mmlu, bbh or logiqa; by default told from the file.")
    ] = None,
    question: Annotated[str, typer.Option(help="Field of the question.")] = "question",
    options: Annotated[
        str, typer.Option(help="Field of the list of options, or one field an option, with commas: A,B,C,D.")
    ] = "",
    answer: Annotated[str | None, typer.Option(help="Field of the answer: letter, number or text.")] = None,
    passage: Annotated[str | None, typer.Option(help="Field of the text the question is about.")] = None,
    one_based: Annotated[bool, typer.Option(help="Answers that are numbers count from 1.")] = False,
) -> None:
    """Turn questions of another form into a question file; rows that share a passage become one problem."""
    from stepladder.importing import Columns, convert

    named = tuple(name.strip() for name in options.split(",") if name.strip())
    count = convert(source, out, form, Columns(question, named, answer, passage, one_based))
    Console().print(
        f"Wrote {out}: {count:,} question{'' if count == 1 else 's'}", soft_wrap=True, markup=False, highlight=False
    )


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Folder of a model or a package, or a hub's id.", show_default=False)],
    questions: Annotated[Path, typer.Argument(help="JSONL in the contest's form.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Answer file to write.", show_default=False)],
    engine: Annotated[
        str | None, typer.Option(help="local (this process) or vllm (servers started for it); by default as validated.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="zh or en; by default what the model was validated in.")] = None,
    votes: Annotated[
        int | None, typer.Option(min=1, help="Answers a question; by default as the model was validated.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.001, help="Time limit; a whole answer file is there from the start.")
    ] = None,
    environment: Annotated[Path | None, typer.Option(help="With vllm: where it is installed.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=64, help="With vllm: longest prompt and answer, tokens.")
    ] = None,
    kv_cache: Annotated[float | None, typer.Option(min=0.01, help="With vllm: GiB for keys and values.")] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="A vLLM that serves the model already, instead of starting one; up to /v1.")
    ] = None,
    served_as: Annotated[str | None, typer.Option(help="With --url: its name for the model.")] = None,
    least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail when a smaller share is as a labelled file says.")
    ] = None,
    expect: Annotated[Path | None, typer.Option(help="A package's self-test: what its answers must be.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, computed in this process; by default what is fast here.")
    ] = None,
) -> None:
    """Answer questions with a finished model: a letter for each, in the contest's form."""
    from stepladder.predicting import predict as answer

    if engine not in (None, "local", "vllm"):
        raise UserError(f"--engine {engine!r}: is not there; take local or vllm")
    if language not in (None, "zh", "en"):
        raise UserError(f"--language {language!r}: is not there; take zh or en")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r}: is not there; take float32 or bfloat16")
    asked = {"engine": "vllm" if url else engine, "votes": votes, "dtype": dtype}
    served = {
        "environment": environment,
        "max_length": max_length,
        "kv_cache_gib": kv_cache,
        "base_url": url,
        "model": served_as,
    }
    answer(
        model,
        questions,
        out,
        Console(),
        language=language,  # type: ignore[arg-type]  # mypy does not narrow by "in"
        asked={name: value for name, value in asked.items() if value is not None},
        served={name: value for name, value in served.items() if value is not None},
        minutes=minutes,
        least=least,
        expected=expect,
    )


@app.command()
def pack(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    runs: Runs = RUNS,
    engine: Annotated[
        str | None,
        typer.Option(help="Who computes there: local or vllm; by default as the run was validated."),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Base of the Docker image, NAME@sha256:...; by default who builds it names it.")
    ] = None,
    python: Annotated[
        list[str] | None, typer.Option(help="Python that wheels are brought for, such as 3.12; may be repeated.")
    ] = None,
) -> None:
    """Make a folder that answers offline, with Docker or without: models, prompts, wheels, scripts, Dockerfile."""
    from stepladder.errors import MissingExtra

    if engine not in (None, "local", "vllm"):
        raise UserError(f"--engine {engine!r}: is not there; take local or vllm")
    try:
        from stepladder.packing.build import pack as make
        from stepladder.packing.wheels import HERE
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "'stepladder[pack]'") from None
    context = _context(config, runs)
    with context.workspace.locked(), context.progress.stage("package"):
        make(context, out, engine, image, python or [HERE])  # type: ignore[arg-type]  # mypy does not narrow by "in"
    context.progress.console.print(f"Wrote {out}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def doctor() -> None:
    """Say what is installed, what this machine computes best in, and what is missing."""
    from stepladder.checkup import checkup

    if not checkup(Console()):
        raise typer.Exit(2)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")] = Path(),
    language: Annotated[str, typer.Option(help="zh or en")] = "en",
) -> None:
    """Write a small example: stepladder.toml with training and test questions beside it."""
    from stepladder.starter import write_starter

    toml = write_starter(folder, language)
    Console().print(f"Wrote {toml}. Next: stepladder run {toml}", soft_wrap=True, markup=False)


@app.command()
def worlds(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.", show_default=False)],
    problems: Annotated[int, typer.Option(min=1, help="How many problems.")] = 100,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 2024,
    language: Annotated[str, typer.Option(help="zh or en")] = "en",
    split: Annotated[str, typer.Option(help="train or test; the two never share a problem.")] = "train",
) -> None:
    """Generate closed-world problems whose answers are proved, with worked solutions."""
    from stepladder.closedworld.generate import generate, to_line
    from stepladder.workspace import write_atomic

    if not out.parent.is_dir():  # said now, not after minutes of proving
        raise UserError(f"{out}: there is no folder {out.parent}; make it, or name a file in another one")
    write_atomic(out, "".join(to_line(record) for record in generate(seed, problems, language, split)))


def main() -> None:
    """Entry point: a user error is one line and its exit code; anything else is a bug and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a character shows a question mark in its place
            stream.reconfigure(errors="replace")
    try:
        app()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except StepladderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
