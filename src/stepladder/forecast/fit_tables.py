"""Whether the members fit the card and the hours, and what making one takes, as tables for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from stepladder import models
from stepladder.ask.local import BATCH_SIZE
from stepladder.config import Config
from stepladder.errors import MissingExtra
from stepladder.forecast import capacity, memory
from stepladder.forecast.capacity import Card, Workload
from stepladder.forecast.memory import GIB
from stepladder.forecast.model_shape import Shape
from stepladder.progress import duration
from stepladder.terminal import table

CARDS = (1, 2, 4, 8)
BITS = (4, 8, 16)


def show(
    config: Config, shape: Shape | None, work: Workload, on: Card, hours: float, rate: float | None, console: Console
) -> None:
    """Show what the run's members take on a card, and a plain yes or no.

    Args:
        config: of the run.
        shape: of the student's base; None where it is not known.
        work: what is to be answered.
        on: the card that answers.
        hours: that it has for the test (the validation questions where there is none).
        rate: tokens a second that one member was measured to write on it.
        console: where it is shown.
    """
    if shape is None:
        console.print(
            f"\n{config.train.base} is not on this machine yet, so what it takes is not known; "
            "a folder, a downloaded model or one of the Qwen2.5 family is planned for",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip
        return
    title = f"\n{config.train.base}, {shape.parameters / 1e9:.2f} B parameters, on {on.name}"
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(
        f"{work.questions:,} questions, {work.votes} answer{'s' if work.votes > 1 else ''} each, "
        f"{work.prompt:,.0f} tokens in and {work.answer:,.0f} out, at most {work.length:,}\n"
        f"{memory.kv_per_token(shape) / 1024:,.0f} KiB of keys and values a token\n",
        highlight=False,
    )
    console.print(_serving(shape, work, on, hours, rate))
    _verdict(shape, work, on, hours, rate, console)
    console.print(_making(config, shape, work))


def _serving(shape: Shape, work: Workload, on: Card, hours: float, rate: float | None) -> Table:
    names = ("weights", "KV cache", "at once", "longest", "tokens/s", "a member", f"in {hours:g} h")
    shown = table(["bits"], names)
    for bits in BITS if on.bytes_each is None else (work.bits,):  # which are unpacked there, however many
        row = capacity.serving(shape, work._replace(bits=bits, members=1), on, rate)
        style = "bold" if bits == work.bits else ""
        start = (str(bits), _gib(row.weights))
        if not row.fits:
            shown.add_row(*start, _gib(row.cache), "does not fit", "", "", "", "", style=style)
            continue
        count = capacity.members_in(shape, work._replace(bits=bits), on, hours, rate)
        alone = f"{capacity.longest(shape, work._replace(bits=bits), on):,}"
        figures = (str(row.at_once), alone, f"{row.rate:,.0f}", duration(row.seconds), str(count))
        shown.add_row(*start, _gib(row.cache), *figures, style=style)
    return shown


def _verdict(shape: Shape, work: Workload, on: Card, hours: float, rate: float | None, console: Console) -> None:
    done = capacity.serving(shape, work, on, rate)
    who = f"{work.members} member{'s' if work.members > 1 else ''} in {work.bits} bits"
    fits = done.fits and done.seconds <= hours * 3600
    if fits:
        said = f"Yes: {who} answer everything in {duration(done.seconds)} of {hours:g} h."
    elif done.fits:
        said = f"No: {who} need {duration(done.seconds)}, and there are {hours:g} h."
    else:
        said = f"No: {who} do not fit {on.name}."
    console.print(f"\n{said}", style="green" if fits else "red", highlight=False)
    if work.members > 1 and (cache := capacity.side_by_side(shape, work, on)) is not None:
        console.print(f"They fit side by side, with {cache / GIB:,.1f} GiB of KV cache each.", highlight=False)
    levers = [lever for lever in capacity.levers(shape, work, on, rate) if lever.done.fits]
    best = next((lever for lever in levers if not done.fits or lever.done.seconds < 0.98 * done.seconds), None)
    if best is None and not done.fits:
        console.print("No single change makes it fit: take a smaller base, or several cards (tensor parallel).")
    if best is not None:
        enough = "" if fits or best.done.seconds <= hours * 3600 else ", still too long"
        console.print(
            f"The largest lever: {best.change}, {duration(best.done.seconds)}{enough}.", highlight=False, soft_wrap=True
        )
    known = "its data sheet" if on.bytes_each is None else "what a moment's measuring finds"
    source = "as you measured it" if rate is not None else f"{capacity.REACHED:.0%} of {known} (assumed)"
    console.print(
        f"At once: sequences of full length. Longest: tokens, alone. Speed: {source}.", style="dim", highlight=False
    )


def _making(config: Config, shape: Shape, work: Workload) -> Table:
    """What training and quantising take."""
    train = config.train
    shown = table(["GiB of memory"], ["1 card", *(f"each of {count}" for count in CARDS[1:])])
    tokens_at_once = train.batch_size * train.max_length
    again = train.gradient_checkpointing is not False
    half = tokens_at_once // 2

    def lora(cards: int = 1, *, qlora: bool = False) -> str:
        rank = train.lora_rank
        parts = memory.training(shape, rank, tokens_at_once, half, checkpointing=again, qlora=qlora, cards=cards)
        return f"{parts.total / GIB:,.1f}"

    shown.title, shown.title_justify = "\nTo make a member", "left"
    name = f"LoRA rank {train.lora_rank}, {tokens_at_once:,} tokens at once"
    shown.add_row(name, *(lora(count) for count in CARDS))
    shown.add_row("the same with qlora", lora(qlora=True))
    texts = config.quantise.samples + sum(general.samples for general in config.quantise.general)
    length = round(work.prompt + work.answer)
    host = memory.quantising(shape, texts, length)._replace(work=0)  # that is on the card
    shown.add_row(f"GPTQ, {texts} texts: host memory", f"{host.total / GIB:,.1f}")
    here_in = _on_this_machine(config)
    if here_in is not None:
        each = {task: 4 if name == "float32" else 2 for task, name in here_in.items()}
        here = memory.training(
            shape, train.lora_rank, tokens_at_once, half, bytes_each=each["train"],
            checkpointing=train.gradient_checkpointing is True, cards=0,
        )  # fmt: skip
        shown.add_row(f"here, without a card, in {here_in['train']}: LoRA", f"{here.total / GIB:,.1f}")
        rows = min(BATCH_SIZE, work.questions * work.votes)
        answers = memory.answering(shape, rows, length, bytes_each=each["predict"])
        shown.add_row(f"here, in {here_in['predict']}: answering", f"{answers.total / GIB:,.1f}")
        packed = memory.quantising(shape, texts, length, bytes_each=each["train"])
        shown.add_row(f"here, in {here_in['train']}: GPTQ", f"{packed.total / GIB:,.1f}")
    return shown


def _on_this_machine(config: Config) -> dict[str, str] | None:
    """The number formats this machine's CPU computes ``[train]`` and ``[predict]`` in; None if it has a card, or
    nothing to compute with."""
    try:
        if models.has_cuda():
            return None
        return {task: models.dtype_name(getattr(config, task).dtype) for task in ("train", "predict")}
    except MissingExtra:
        return None


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f} GiB"
