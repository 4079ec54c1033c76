"""Tables: whether the members fit the card and the hours, and the memory of training and quantising one."""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from stepladder import models
from stepladder.ask.local import BATCH_SIZE
from stepladder.config import Config
from stepladder.errors import MissingExtra
from stepladder.forecast import capacity, many_servers, memory, published
from stepladder.forecast.capacity import Serving
from stepladder.forecast.datasheets import Card
from stepladder.forecast.memory import GIB
from stepladder.forecast.model_shape import Shape
from stepladder.forecast.workload import Workload
from stepladder.progress import duration
from stepladder.terminal import print_table, say, table

CARD_COUNTS = (1, 2, 4, 8)
"""For which the memory of training is shown."""
BITS = (4, 8, 16)
"""For which serving is shown."""


class Terms(NamedTuple):
    """Under what the questions are to be answered."""

    card: Card
    hours: float
    """Available for all members, the arrival of their weights included."""
    rate: float | None = None
    """Tokens a second that one member was measured to write on the card."""
    megabits: float = 0
    """Mbit/s at which weights arrive where they compute; 0: they are there."""
    servers: int = 1
    """That answer at once, each on a card."""
    card_price: float | None = None
    """Dollars an hour of such a card."""
    free_bytes: float = math.inf
    """Disk space for the ledger."""


def show(config: Config, shape: Shape | None, workload: Workload, terms: Terms, console: Console) -> None:
    """Show what the run's members need on a card, and whether they fit.

    Args:
        config: of the run.
        shape: of the student's base; None if it is not known.
        workload: the questions to answer.
        terms: the card and the time for it.
        console: where it is printed.
    """
    if shape is None:
        say(
            console,
            f"\n{config.train.base} is not on this machine yet, so its memory cannot be planned; "
            "download it, or plan for a model of the Qwen2.5 family",
        )
        return
    card = terms.card
    title = f"\n{config.train.base}, {shape.parameters / 1e9:.2f} B parameters, on {card.name}"
    console.print(title, style="bold", markup=False, highlight=False)
    if card.taken_for is not None:
        say(console, f"Taken for a {card.taken_for}, the slowest of that size; name yours with --card.")
    console.print(
        f"{workload.questions:,} questions, {workload.votes} answer{'s' if workload.votes > 1 else ''} each, "
        f"{workload.prompt:,.0f} tokens in and {workload.answer:,.0f} out, at most {workload.length:,}\n"
        f"{memory.kv_per_token(shape) / 1024:,.0f} KiB of keys and values a token",
        highlight=False,
    )
    if workload.engine != "vllm":
        say(console, "The embedded engine computes, which unpacks weights ([predict] engine).")
    console.print()
    print_table(console, _serving_table(shape, workload, terms))
    _print_verdict(shape, workload, terms, console)
    if terms.servers > 1 and workload.engine == "vllm":
        _print_throughput(shape, workload, terms, console)
    print_table(console, _making_table(config, shape, workload))
    if terms.megabits:
        size = memory.weights(shape, 16)
        arrival = duration(capacity.arrival_seconds(size, terms.megabits))
        say(console, f"The base, {_gib(size)}, is downloaded in {arrival} at {terms.megabits:g} Mbit/s (--mbit).")


def _serving_table(shape: Shape, workload: Workload, terms: Terms) -> Table:
    columns = ("weights", "KV cache", "at once", "longest", "tokens/s", "a member", f"in {terms.hours:g} h")
    result = table(["bits"], columns)
    for bits in BITS if workload.engine == "vllm" else (workload.bits,):  # the embedded engine unpacks them
        in_bits = workload._replace(bits=bits, members=1)
        row = capacity.serving(shape, in_bits, terms.card, terms.rate)
        style = "bold" if bits == workload.bits else ""
        sizes = (str(bits), _gib(row.weights), _gib(row.cache))
        if not row.fits:
            problem = "does not fit" if row.obstacle is None else "no kernel"
            result.add_row(*sizes, problem, "", "", "", "", style=style)
            continue
        seconds = row.seconds + _arrival(row, 1, terms)
        longest = f"{capacity.longest_sequence(shape, in_bits, terms.card):,}"
        count = int(terms.hours * 3600 / seconds)
        figures = (str(row.at_once), longest, f"{row.rate:,.0f}", duration(seconds), str(count))
        result.add_row(*sizes, *figures, style=style)
    return result


def _arrival(row: Serving, members: int, terms: Terms) -> float:
    """Seconds until the members' weights are there, unpacked."""
    return capacity.arrival_seconds(members * row.weights, terms.megabits)


def _print_verdict(shape: Shape, workload: Workload, terms: Terms, console: Console) -> None:
    card, rate = terms.card, terms.rate
    result = capacity.serving(shape, workload, card, rate)
    arrival = _arrival(result, workload.members, terms)
    seconds, available = result.seconds + arrival, terms.hours * 3600
    slowest = 1 + published.deviations().highest if rate is None and _is_vllm_on_card(workload, card) else 1.0
    members = f"{workload.members} member{'s' if workload.members > 1 else ''} in {workload.bits} bits"
    fits = result.fits and seconds <= available
    if fits:
        verdict = f"Yes: {members} answer everything in {duration(seconds)} of {terms.hours:g} h."
    elif result.fits:
        verdict = f"No: {members} need {duration(seconds)}, and there are {terms.hours:g} h."
    elif result.obstacle is not None:
        verdict = f"No: {result.obstacle}."
    else:
        verdict = f"No: {members} do not fit {card.name}."
    console.print(f"\n{verdict}", style="green" if fits else "red", highlight=False, soft_wrap=True)
    if fits and result.seconds * slowest + arrival > available:
        say(console, f"Not surely: {duration(result.seconds * slowest + arrival)} if it is as slow as the worst below.")
    if result.fits and arrival:
        say(
            console, f"In it {duration(arrival)} until the weights are there: {terms.megabits:g} Mbit/s, and unpacking."
        )
    if workload.members > 1 and (cache := capacity.side_by_side_cache(shape, workload, card)) is not None:
        console.print(f"They fit side by side, with {cache / GIB:,.1f} GiB of KV cache each.", highlight=False)
    _print_lever(shape, workload, terms, result, console)
    say(console, _basis(workload, terms))


def _print_throughput(shape: Shape, workload: Workload, terms: Terms, console: Console) -> None:
    """Print what many servers take together."""
    found = many_servers.throughput(shape, workload, terms.card, terms.servers, terms.rate)
    if found is None:
        return
    dollars = (terms.card_price or 0) * terms.servers * found.seconds / 3600
    cost = "" if terms.card_price is None else f", ${dollars:,.2f}"
    speed = f"{found.rate:,.0f} answers a second, {found.ledger_bytes / GIB:,.1f} GiB of ledger"
    say(console, f"\n{terms.servers} servers with a card each: {duration(found.seconds)}{cost}; {speed}.")
    say(console, f"What limits them: {found.limit(terms.servers, terms.free_bytes)}.")


def _print_lever(shape: Shape, workload: Workload, terms: Terms, result: Serving, console: Console) -> None:
    levers = [lever for lever in capacity.levers(shape, workload, terms.card, terms.rate) if lever.result.fits]
    best = next((lever for lever in levers if not result.fits or lever.result.seconds < 0.98 * result.seconds), None)
    if best is None and not result.fits:
        console.print("No single change makes it fit: use a smaller base, or several cards (tensor parallel).")
    if best is not None:
        is_too_long = best.result.seconds > terms.hours * 3600
        suffix = ", still too long" if is_too_long else ""
        say(console, f"The largest lever: {best.change}, {duration(best.result.seconds)} of answering{suffix}.")


def _basis(workload: Workload, terms: Terms) -> str:
    """What the figures mean, and what the speed is based on."""
    words = "At once: sequences of maximum length. Longest: tokens of a single sequence. Speed: "
    if terms.rate is not None:
        return f"{words}as you measured it."
    shares = (
        f"{capacity.BANDWIDTH_EFFICIENCY:.0%} of the bandwidth and {capacity.COMPUTE_EFFICIENCY:.0%} of the products"
    )
    if not _is_vllm_on_card(workload, terms.card):
        return f"{words}{shares} of {terms.card.source} (assumed)."
    lowest, median, highest = published.deviations()
    return (
        f"{words}{shares} that the card's data sheet promises ({terms.card.source}). Of {len(published.FIGURES)} "
        f"published figures of vLLM such forecasts were {-lowest:.0%} too slow to {highest:.0%} too fast, "
        f"{median:+.0%} in the middle (docs/guide/planning.md)."
    )


def _is_vllm_on_card(workload: Workload, card: Card) -> bool:
    return workload.engine == "vllm" and card.capability is not None


def _making_table(config: Config, shape: Shape, workload: Workload) -> Table:
    """The memory of training and quantising."""
    train = config.train
    result = table(["GiB of memory"], ["1 card", *(f"each of {count}" for count in CARD_COUNTS[1:])])
    tokens = train.batch_size * train.max_length
    scored = tokens // 2
    checkpointing = train.gradient_checkpointing is not False

    def lora(cards: int = 1, *, qlora: bool = False) -> str:
        rank = train.lora_rank
        parts = memory.training(
            shape, rank, tokens, scored, checkpointing=checkpointing, qlora=qlora, cards=cards,
            accumulates=train.gradient_accumulation > cards,
        )  # fmt: skip
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
        read = round(workload.read)
        answering = memory.answering(shape, rows, length, prompt=read, bytes_each=bytes_each["predict"])
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
