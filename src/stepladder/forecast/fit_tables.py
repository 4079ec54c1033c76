"""Tables: whether the members fit the card and the hours, and the memory of training and quantising one."""

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
from stepladder.terminal import print_table, table

CARD_COUNTS = (1, 2, 4, 8)
"""For which the memory of training is shown."""
BITS = (4, 8, 16)
"""For which serving is shown."""


def show(
    config: Config,
    shape: Shape | None,
    workload: Workload,
    card: Card,
    hours: float,
    rate: float | None,
    console: Console,
) -> None:
    """Show what the run's members need on a card, and whether they fit.

    Args:
        config: of the run.
        shape: of the student's base; None if it is not known.
        workload: the questions to answer.
        card: the card that answers them.
        hours: available for the test, or without one for the validation questions.
        rate: tokens a second that one member was measured to write on the card.
        console: where it is printed.
    """
    if shape is None:
        console.print(
            f"\n{config.train.base} is not on this machine yet, so its memory cannot be planned; "
            "download it, or plan for a model of the Qwen2.5 family",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip
        return
    title = f"\n{config.train.base}, {shape.parameters / 1e9:.2f} B parameters, on {card.name}"
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(
        f"{workload.questions:,} questions, {workload.votes} answer{'s' if workload.votes > 1 else ''} each, "
        f"{workload.prompt:,.0f} tokens in and {workload.answer:,.0f} out, at most {workload.length:,}\n"
        f"{memory.kv_per_token(shape) / 1024:,.0f} KiB of keys and values a token\n",
        highlight=False,
    )
    print_table(console, _serving_table(shape, workload, card, hours, rate))
    _print_verdict(shape, workload, card, hours, rate, console)
    print_table(console, _making_table(config, shape, workload))


def _serving_table(shape: Shape, workload: Workload, card: Card, hours: float, rate: float | None) -> Table:
    columns = ("weights", "KV cache", "at once", "longest", "tokens/s", "a member", f"in {hours:g} h")
    result = table(["bits"], columns)
    for bits in BITS if card.bytes_each is None else (workload.bits,):  # the embedded engine unpacks them, however many
        in_bits = workload._replace(bits=bits, members=1)
        row = capacity.serving(shape, in_bits, card, rate)
        style = "bold" if bits == workload.bits else ""
        sizes = (str(bits), _gib(row.weights), _gib(row.cache))
        if not row.fits:
            result.add_row(*sizes, "does not fit", "", "", "", "", style=style)
            continue
        count = capacity.members_in(shape, in_bits, card, hours, rate)
        longest = f"{capacity.longest_sequence(shape, in_bits, card):,}"
        figures = (str(row.at_once), longest, f"{row.rate:,.0f}", duration(row.seconds), str(count))
        result.add_row(*sizes, *figures, style=style)
    return result


def _print_verdict(
    shape: Shape, workload: Workload, card: Card, hours: float, rate: float | None, console: Console
) -> None:
    result = capacity.serving(shape, workload, card, rate)
    members = f"{workload.members} member{'s' if workload.members > 1 else ''} in {workload.bits} bits"
    fits = result.fits and result.seconds <= hours * 3600
    if fits:
        verdict = f"Yes: {members} answer everything in {duration(result.seconds)} of {hours:g} h."
    elif result.fits:
        verdict = f"No: {members} need {duration(result.seconds)}, and there are {hours:g} h."
    else:
        verdict = f"No: {members} do not fit {card.name}."
    console.print(f"\n{verdict}", style="green" if fits else "red", highlight=False)
    if workload.members > 1 and (cache := capacity.side_by_side_cache(shape, workload, card)) is not None:
        console.print(f"They fit side by side, with {cache / GIB:,.1f} GiB of KV cache each.", highlight=False)
    levers = [lever for lever in capacity.levers(shape, workload, card, rate) if lever.result.fits]
    best = next((lever for lever in levers if not result.fits or lever.result.seconds < 0.98 * result.seconds), None)
    if best is None and not result.fits:
        console.print("No single change makes it fit: use a smaller base, or several cards (tensor parallel).")
    if best is not None:
        suffix = "" if fits or best.result.seconds <= hours * 3600 else ", still too long"
        console.print(
            f"The largest lever: {best.change}, {duration(best.result.seconds)}{suffix}.",
            highlight=False,
            soft_wrap=True,
        )
    limit = "its data sheet" if card.bytes_each is None else "a short measurement"
    source = "as you measured it" if rate is not None else f"{capacity.EFFICIENCY:.0%} of {limit} (assumed)"
    console.print(
        f"At once: sequences of maximum length. Longest: tokens of a single sequence. Speed: {source}.",
        style="dim",
        highlight=False,
    )


def _making_table(config: Config, shape: Shape, workload: Workload) -> Table:
    """The memory of training and quantising."""
    train = config.train
    result = table(["GiB of memory"], ["1 card", *(f"each of {count}" for count in CARD_COUNTS[1:])])
    tokens = train.batch_size * train.max_length
    scored = tokens // 2
    checkpointing = train.gradient_checkpointing is not False

    def lora(cards: int = 1, *, qlora: bool = False) -> str:
        rank = train.lora_rank
        parts = memory.training(shape, rank, tokens, scored, checkpointing=checkpointing, qlora=qlora, cards=cards)
        return f"{parts.total / GIB:,.1f}"

    result.title, result.title_justify = "\nTo make a member", "left"
    result.add_row(f"LoRA rank {train.lora_rank}, {tokens:,} tokens at once", *(lora(count) for count in CARD_COUNTS))
    result.add_row("the same with qlora", lora(qlora=True))
    texts = config.quantise.samples + sum(general.samples for general in config.quantise.general)
    length = round(workload.prompt + workload.answer)
    host = memory.quantising(shape, texts, length)._replace(layer=0)  # these buffers are on the card
    result.add_row(f"GPTQ, {texts} texts: host memory", f"{host.total / GIB:,.1f}")
    dtypes = _cpu_dtypes(config)
    if dtypes is not None:
        bytes_each = {task: 4 if dtype == "float32" else 2 for task, dtype in dtypes.items()}
        training = memory.training(
            shape, train.lora_rank, tokens, scored, bytes_each=bytes_each["train"],
            checkpointing=train.gradient_checkpointing is True, cards=0,
        )  # fmt: skip
        result.add_row(f"here, without a card, in {dtypes['train']}: LoRA", f"{training.total / GIB:,.1f}")
        rows = min(BATCH_SIZE, workload.questions * workload.votes)
        answering = memory.answering(shape, rows, length, bytes_each=bytes_each["predict"])
        result.add_row(f"here, in {dtypes['predict']}: answering", f"{answering.total / GIB:,.1f}")
        quantising = memory.quantising(shape, texts, length, bytes_each=bytes_each["train"])
        result.add_row(f"here, in {dtypes['train']}: GPTQ", f"{quantising.total / GIB:,.1f}")
    return result


def _cpu_dtypes(config: Config) -> dict[str, str] | None:
    """The number formats in which this machine's CPU computes ``[train]`` and ``[predict]``; None if the machine has a
    card, or torch is not installed."""
    try:
        if models.has_cuda():
            return None
        return {task: models.dtype_name(getattr(config, task).dtype) for task in ("train", "predict")}
    except MissingExtra:
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
