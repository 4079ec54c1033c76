"""The command line: a command for each stage, and those for a whole run. Heavy imports happen inside functions.

One long list of declarations: what a command does is in the module of its name in ``commands/``.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import locale
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepladder import files
from stepladder.errors import StepladderError, UserError
from stepladder.terminal import PlainConsole, say
from stepladder.text import printable
from stepladder.workspace import RUNS

if TYPE_CHECKING:
    from stepladder.config import Cluster

app = typer.Typer(
    help="A few hundred labelled questions in, a small model that reasons step by step out, proved with numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's TOML file.", show_default=False)]
Runs = Annotated[Path, typer.Option(help="Folder that holds all runs and their ledger.")]
OnCluster = Annotated[
    str | None, typer.Option(help="ray or slurm: the work, or with predict vLLM servers, on that cluster's nodes.")
]
ENGINES = ("local", "vllm")
SCHEDULERS = ("ray", "slurm")
LANGUAGES = ("zh", "en")
MAX_ERROR_CHARACTERS = 2000
"""Of the line that an error prints; the middle of a longer one is left out."""
DTYPES = ("float32", "bfloat16")

INTERRUPTED = 130
"""Exit code after Ctrl-C, which typer turns into it: 128 and the number of SIGINT."""

STAGES_PANEL = "Stages, in the order of the flow"
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


@app.command()
def run(config: ConfigFile, runs: Runs = RUNS) -> None:
    """Run every stage that is not up to date, then show the result."""
    from stepladder.commands import run as command

    command.run(config, runs)


def _stage_command(name: str) -> Callable[[Path, Path], None]:
    def stage(config: ConfigFile, runs: Runs = RUNS) -> None:
        from stepladder.commands import run as command

        command.run_stage(config, runs, name)

    stage.__doc__ = STAGE_HELP[name]
    return stage


for _name in STAGE_HELP:
    app.command(_name, rich_help_panel=STAGES_PANEL)(_stage_command(_name))


@app.command()
def plan(
    config: ConfigFile,
    runs: Runs = RUNS,
    pilot: Annotated[int, typer.Option(min=0, help="Ask this many questions first, for real; 0 asks none.")] = 0,
    card: Annotated[
        str, typer.Option(help="What will answer: a card's memory in GiB, its name ('RTX 4090'), or cpu.")
    ] = "32",
    hours: Annotated[float, typer.Option(min=0.01, help="Hours that all members may take there.")] = 4.0,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Tokens/s that a member was measured to write there.")
    ] = None,
    mbit: Annotated[float, typer.Option(min=0, help="Mbit/s at which weights arrive there; 0: they are there.")] = 500,
    questions: Annotated[int | None, typer.Option(min=1, help="Questions to answer; by default the run's own.")] = None,
    servers: Annotated[
        int | None, typer.Option(min=1, help="Servers that answer at once, a card each; by default those of [cluster].")
    ] = None,
    card_price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour of a card.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Also do the steps on fake tensors, without weights; takes minutes.")
    ] = False,
) -> None:
    """Forecast what the cascade asks, takes and costs, and whether the members fit a card; after a run, compare."""
    from stepladder.commands import plan as command

    command.plan(
        config, runs, pilot, card, hours, rate, mbit,
        questions=questions, servers=servers, card_price=card_price, rehearse=rehearse,
    )  # fmt: skip


@app.command()
def view(
    config: ConfigFile,
    runs: Runs = RUNS,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; by default a free one.")] = 0,
    export: Annotated[
        Path | None, typer.Option(help="Write the pages as files into this new folder instead, to be sent or kept.")
    ] = None,
) -> None:
    """Look at a run in a browser, while it runs or afterwards, and decide about labels."""
    from stepladder.commands import view as command

    command.view(config, runs, port, export, PlainConsole())


@app.command()
def status(config: ConfigFile, runs: Runs = RUNS) -> None:
    """Show which artifacts are done, stale or missing, and what the run has spent."""
    from stepladder.commands import status as command

    command.status(config, runs)


@app.command()
def ledger(
    config: ConfigFile,
    runs: Runs = RUNS,
    export: Annotated[
        str | None, typer.Option(help="Write every request and raw response, of all runs, as JSONL.")
    ] = None,
    backup: Annotated[
        str | None, typer.Option(help="Write a copy of the ledger, also while it is in use, into a new file.")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Compress what older versions wrote, and give free space back.")
    ] = False,
) -> None:
    """Show what the run's model calls cost, by rung and model, and how they ended."""
    from stepladder.commands import ledger as command

    with _written(export) as exported, _written(backup) as backed_up:
        command.ledger(config, runs, exported, backed_up, compact=compact)


@app.command()
def audit(
    votes: Annotated[
        Path, typer.Option(help='JSONL of {"id", "gold", "votes": {model: [letters]}}.', show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="JSONL to write, the most suspect label first.", show_default=False)],
) -> None:
    """Rank labels by the evidence against them in the answers of several models."""
    from stepladder.commands import audit as command

    command.audit(votes, out, PlainConsole())


@app.command("choose-rule")
def choose_rule(
    votes: Annotated[
        Path, typer.Argument(help='JSONL of {"id", "gold", "votes": {model: [letters]}}.', show_default=False)
    ],
    members: Annotated[
        str, typer.Option(help="Models of the ensemble, separated by commas: A,B,C,D.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="Seed of the folds.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Choose an ensemble rule by cross-validation on recorded votes."""
    from stepladder.commands import choose_rule as command

    command.choose_rule(votes, _names(members), seed, PlainConsole(), as_json=as_json)


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="JSON, JSONL, CSV, Parquet or text; a pattern: several files.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(help="Question file to write, JSONL.", show_default=False)],
    form: Annotated[
        str | None, typer.Option("--format", help="table, mmlu, bbh or logiqa; by default guessed from the file.")
    ] = None,
    question: Annotated[str, typer.Option(help="Field of the question.")] = "question",
    options: Annotated[
        str,
        typer.Option(
            help="Field with the list of options, or the fields of the single options, separated by commas: A,B,C,D."
        ),
    ] = "",
    answer: Annotated[str | None, typer.Option(help="Field of the answer: letter, number or text.")] = None,
    passage: Annotated[str | None, typer.Option(help="Field of the text the question is about.")] = None,
    one_based: Annotated[bool, typer.Option(help="Answers that are numbers count from 1.")] = False,
    cluster: OnCluster = None,
) -> None:
    """Convert questions of another format into a question file; rows that share a passage become one problem."""
    from stepladder.commands import import_ as command
    from stepladder.mcq.formats import Columns, SourceFormat

    nodes = _cluster(cluster)
    columns = Columns(question, _names(options), answer, passage, one_based)
    with _written(out) as written:
        command.import_(source, written, SourceFormat(columns, form), nodes, PlainConsole())


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Folder of a model or a package, or a hub's id.", show_default=False)],
    questions: Annotated[str, typer.Argument(help="Question file, JSONL; labels are optional.", show_default=False)],
    out: Annotated[str, typer.Argument(help="Answer file to write.", show_default=False)],
    engine: Annotated[
        str | None,
        typer.Option(
            help="local (this process) or vllm (servers that are started); by default as the model was validated."
        ),
    ] = None,
    language: Annotated[str | None, typer.Option(help="zh or en; by default as the model was validated.")] = None,
    votes: Annotated[
        int | None, typer.Option(min=1, help="Answers a question; by default as the model was validated.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.001, help="Time limit; a complete answer file is written at the start.")
    ] = None,
    environment: Annotated[
        Path | None, typer.Option(help="With vllm: the environment that it is installed in.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=64, help="With vllm: longest prompt and answer together, tokens.")
    ] = None,
    kv_cache: Annotated[float | None, typer.Option(min=0.01, help="With vllm: GiB for the KV cache.")] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="Address, up to /v1, of a vLLM server that already serves the model; none is started. Its key: "
            "VLLM_API_KEY."
        ),
    ] = None,
    served_as: Annotated[str | None, typer.Option(help="With --url: the server's name for the model.")] = None,
    least: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail below this accuracy on a labelled file.")
    ] = None,
    expect: Annotated[
        Path | None, typer.Option(help="A package's self-test: file with the answers to compare with.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, for weights in this process; by default what is fast here.")
    ] = None,
    cluster: OnCluster = None,
) -> None:
    """Answer questions with a finished model: a letter for each."""
    from stepladder.commands import predict as command

    _check_choice("--engine", engine, ENGINES)
    _check_choice("--language", language, LANGUAGES)
    _check_choice("--dtype", dtype, DTYPES)
    predict_settings = {"engine": "vllm" if url else engine, "votes": votes, "dtype": dtype}
    serve_settings = {
        "environment": environment,
        "max_length": max_length,
        "kv_cache_gib": kv_cache,
        "base_url": url,
        "model": served_as,
    }
    with files.read(questions) as read, _written(out) as written:
        command.predict(
            model,
            read,
            written,
            PlainConsole(),
            language=language,  # type: ignore[arg-type]  # checked above
            predict_settings={key: value for key, value in predict_settings.items() if value is not None},
            serve_settings={key: value for key, value in serve_settings.items() if value is not None},
            minutes=minutes,
            least=least,
            expected=expect,
            cluster=_cluster(cluster),
        )


@app.command()
def pack(
    config: ConfigFile,
    out: Annotated[str, typer.Argument(help="Folder to make.", show_default=False)],
    runs: Runs = RUNS,
    engine: Annotated[
        str | None,
        typer.Option(help="What computes there: local or vllm; by default as the run was validated."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Base of the Docker image, NAME@sha256:...; by default an argument of docker build."),
    ] = None,
    python: Annotated[
        list[str] | None, typer.Option(help="Python version to include wheels for, such as 3.12; may be repeated.")
    ] = None,
) -> None:
    """Make a folder that answers offline, with Docker or without: models, prompts, wheels, scripts, Dockerfile."""
    from stepladder.commands import pack as command

    _check_choice("--engine", engine, ENGINES)
    with _written(out) as written:
        command.pack(config, runs, written, engine, image, python or [])


@app.command()
def export(
    config: ConfigFile,
    member: Annotated[str, typer.Argument(help="Name of a member that is quantised.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    gguf: Annotated[str, typer.Option(help="llama.cpp's quantisation: q4_k_m, q8_0 and others.")] = "q8_0",
    llama_cpp: Annotated[
        Path, typer.Option(help="Where llama.cpp is: what 'make llama' makes, or a checkout that is built.")
    ] = Path(".venv-llama"),
    runs: Runs = RUNS,
) -> None:
    """Write a member as a GGUF file for llama.cpp and Ollama, once it has answered validation as its weights do."""
    from stepladder.commands import export as command

    command.export(config, runs, member, out, gguf, llama_cpp)


@app.command()
def doctor(
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG",
            help="A TOML file: see instead whether its servers list its models and what room its cluster has.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Try instead every path that needs a card, in about half an hour.")
    ] = False,
    out: Annotated[Path, typer.Option(help="With --card: file to write, to be sent back.")] = Path("card.json"),
    on_cpu: Annotated[
        bool, typer.Option("--on-cpu", help="With --card: do the steps on the CPU, to try the smoke run itself.")
    ] = False,
) -> None:
    """Show what is installed and what is missing, and the number format that is fast here."""
    from stepladder.commands import doctor as command

    console = PlainConsole()
    if models is not None:
        is_well = command.check_models(models, console)
    else:
        is_well = command.try_card(out, console, on_cpu=on_cpu) if card or on_cpu else command.doctor(console)
    if not is_well:
        raise typer.Exit(2)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write into; made if it does not exist.")] = Path(),
    language: Annotated[str, typer.Option(help="zh or en.")] = "en",
    teacher: Annotated[
        str | None,
        typer.Option(help="For questions of your own: who writes the chains, openai or self-hosted (servers)."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="With --teacher: the model to train, a folder or a hub's id.")
    ] = None,
) -> None:
    """Write stepladder.toml: an example with generated questions, or with --teacher and --base for your own."""
    from stepladder.commands import init as command

    _check_choice("--language", language, LANGUAGES)
    _check_choice("--teacher", teacher, tuple(command.MODELS))
    command.init(folder, language, teacher, base, PlainConsole())


@app.command()
def worlds(
    out: Annotated[Path, typer.Argument(help="JSONL file to write.", show_default=False)],
    problems: Annotated[int, typer.Option(min=1, help="How many problems.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 2024,
    language: Annotated[str, typer.Option(help="zh or en.")] = "en",
    split: Annotated[str, typer.Option(help="train or test; the two never share a problem.")] = "train",
    family: Annotated[
        list[str] | None,
        typer.Option(help="chaining, ordering, table or arithmetic; may be repeated; by default all of them in turn."),
    ] = None,
) -> None:
    """Generate closed-world problems whose answers are proved, with worked solutions."""
    from stepladder.commands import worlds as command

    command.worlds(out, problems, seed, language, split, family or ())


def _names(text: str) -> tuple[str, ...]:
    """The names in a text, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


@contextlib.contextmanager
def _written(name: str | None) -> Iterator[Any]:
    """A path to write to, whose content goes to the address that the user gave instead of a path (``files.written``);
    None without a name."""
    if name is None:
        yield None
        return
    with files.written(name) as path:
        yield path
    if files.is_address(name):
        say(PlainConsole(), f"Copied {path} to {name}")


def _cluster(scheduler: str | None) -> Cluster | None:
    """The nodes that an option names."""
    from stepladder.config import Cluster

    _check_choice("--cluster", scheduler, SCHEDULERS)
    return None if scheduler is None else Cluster.model_validate({"scheduler": scheduler})


def _check_choice(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"unknown {option} {value!r}; choose {' or '.join(choices)}")


def _use_utf8() -> None:
    """Restart in Python's UTF-8 mode where the locale has another encoding, in which libraries would read their own
    files; output keeps the terminal's encoding."""
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": f"{sys.stdout.encoding}:replace"}
        os.execv(sys.executable, [sys.executable, "-m", "stepladder", *sys.argv[1:]])  # noqa: S606 (this command)


def _one_line(message: str) -> str:
    """A message as one line of bounded length, since it may quote what a stranger wrote."""
    line = printable(" ".join(message.split()))
    half = MAX_ERROR_CHARACTERS // 2
    return line if len(line) <= MAX_ERROR_CHARACTERS else f"{line[:half]} [...] {line[-half:]}"


def main() -> None:
    """Entry point: a user error is one line and its exit code, and so is Ctrl-C; anything else is a bug and keeps its
    traceback."""
    _use_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print "?" for characters that the encoding lacks
            stream.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("interrupted: what is done is kept; the same command goes on from there", file=sys.stderr)
        raise
    except UserError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except StepladderError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
