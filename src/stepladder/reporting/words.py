"""Numbers of the report as words and sentences, for page and terminal."""

from __future__ import annotations

from stepladder.progress import duration
from stepladder.reporting.content import Comparison, Report, Result, SystemName

SIGNIFICANT = 0.05
"""A difference whose Holm-adjusted p-value is below this is called real."""


def percent(share: float, digits: int = 0) -> str:
    """A share as per cent, with a no-break space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def interval(low: float, high: float, digits: int = 0) -> str:
    """The limits of an interval of shares as per cent: ``20.9 to 27.4 %``."""
    return f"{100 * low:.{digits}f} to {percent(high, digits)}"


def step(system: str, bits: int) -> str:
    """A system as the reader knows it: ``base``, ``tuned``, ``4-bit``, ``ensemble``."""
    return {"merged": "tuned", "quantised": f"{bits}-bit"}.get(system, system)


def weights_and_step(row: SystemName, bits: int) -> str:
    """A system as the reader knows it, and whether its weights are final: ``4-bit``, ``final 4-bit``."""
    return ("final " if row.weights == "final" else "") + step(row.system, bits)


def name(row: SystemName, bits: int) -> str:
    """A system and its member: ``base``, ``tuned m1``, ``4-bit m1``, ``ensemble``, ``final 4-bit m1``."""
    return " ".join(filter(None, (weights_and_step(row, bits), row.member)))


def staircase(report: Report) -> list[Result]:
    """The results from base to final answer, on the split of the headline: base, the best member tuned and quantised,
    and the ensemble unless it is that member alone; then the last two with final weights, where they were measured."""
    run = report.run
    rows = [row for row in report.results if row.split == run.split]
    steps = [row for row in rows if row.member in (None, run.best_member)]
    return [row for row in steps if row.system != "ensemble" or not alone(report)]


def headline(report: Report) -> str:
    """``base 31 % → tuned 84 % → 4-bit 83 %``."""
    bits = report.run.bits
    return " → ".join(f"{weights_and_step(row, bits)} {percent(row.accuracy)}" for row in staircase(report))


def measured_on(report: Report) -> str:
    """What the headline was measured on, and the accuracy without reading."""
    run = report.run
    row = staircase(report)[0]
    what = "held-out test questions" if run.split == "test" else "held-out validation questions"
    commonest = f", the commonest letter {percent(report.commonest[run.split])}" if report.commonest else ""
    return f"on {row.n} {what}; guessing would get {percent(report.chance[run.split])}{commonest}"


def alone(report: Report) -> bool:
    """Whether the ensemble is a single member."""
    return report.ensemble.alone


def is_real(comparison: Comparison) -> bool:
    return comparison.p_holm < SIGNIFICANT


def p_value(p: float) -> str:
    """A p-value; small ones with three significant digits, so that one just below the limit is not rounded to it."""
    return "p\u00a0<\u00a00.0001" if p < 0.0001 else f"p\u00a0=\u00a0{p:.{3 if p < 0.1 else 2}g}"


def verdict(comparison: Comparison) -> str:
    """Whether the difference of a comparison is real."""
    lost, won = comparison.b, comparison.c
    if lost == won == 0:
        return "the same questions right"
    if not is_real(comparison):
        return "within noise"
    return "a real gain" if won > lost else "a real loss"


def movement(comparison: Comparison) -> str:
    """How many questions became right, and how many wrong."""
    return f"{comparison.c} newly right, {comparison.b} newly wrong"


def ensemble(report: Report) -> str:
    """The ensemble's rule in a sentence or two, and its difference from the best single model."""
    choice, run = report.ensemble, report.run
    if len(run.members) == 1:
        return f"There is one member, {run.best_member}, so its answers are the final answers."
    source = "set in the configuration" if choice.asked == choice.rule else "chosen by cross-validation"
    voters = len(choice.members)
    description = {
        "single": f"the answers of the best member, {choice.leader}, alone",
        "vote": f"the most frequent letter of {voters} members",
        "weighted": f"a vote of {voters} members, weighted by how often each was right on validation",
        "leader": f"{choice.leader}, unless all other members agree on another letter",
        "average": f"the letter that {voters} members find likeliest on average",
        "selector": f"the letter that a logistic model of the agreement among {voters} members finds likeliest",
    }[choice.rule]
    sentence = f"The final answer is {description} (rule “{choice.rule}”, {source})."
    if excluded := [name for name in run.members if name not in choice.members]:
        pronoun = "it has" if len(excluded) == 1 else "they have"
        sentence += f" The variants did not help {', '.join(excluded)} on validation, so {pronoun} no vote."
    if alone(report):
        return sentence
    last = next(row for row in report.comparisons if row.after.system == "ensemble")
    change = f"{movement(last)}; {verdict(last)} ({p_value(last.p_holm)})"
    return f"{sentence} Against the best single model on {last.n} {last.split} questions: {change}."


def final(report: Report) -> str:
    """Which figures belong to the final weights, in a few sentences; empty where there are none."""
    if not report.final:
        return ""
    members = ", ".join(row.member for row in report.final)
    text = (
        f"The final weights ({members}) were trained once more by the chosen recipe, from the labels of training and "
        "validation together, and are what is packed. Every figure on validation belongs to the chosen weights, which "
        "never learned from those labels, and so does every figure that is not called final. "
    )
    last = next((row for row in report.comparisons if row.after.weights == "final"), None)
    if last is None:
        return text + "Without a labelled test the final weights have no accuracy of their own."
    change = f"{movement(last)}; {verdict(last)} ({p_value(last.p_holm)})"
    return text + f"Of the final weights there is the accuracy on the test: {change}, against the chosen weights."


def diversity(report: Report) -> str:
    """The upper limit of any rule, and the correlation of the members' errors."""
    validation = report.ensemble.validation
    if validation is None:
        return ""
    share = percent(validation.oracle, 1)
    text = f"At least one member is right on {share} of the validation questions: the most that any rule could reach."
    pairs = [
        f"{first} and {second} {value:.2f}" for first, second, value in validation.correlation if value is not None
    ]
    if pairs:
        text += f" Correlation of the members' errors (1: they err on the same questions): {', '.join(pairs)}."
    return text


def cascade(report: Report) -> str:
    """The results of the cascade in one line."""
    counts = report.cascade
    rungs = ", ".join(f"{rung.name} solved {rung.solved} of {rung.asked}" for rung in counts.rungs)
    dollars = sum(rung.dollars for rung in counts.rungs)
    return f"{counts.questions} training questions: {rungs}; {counts.unsolved} unsolved; {money(dollars)} spent"


def money(dollars: float) -> str:
    return f"${dollars:,.2f}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, worth in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= worth:
            return f"{count / worth:.{1 if count < 100 * worth else 0}f}\u00a0{unit}"
    return f"{count}\u00a0bytes"


def number_format(report: Report) -> str:
    """The number formats that the best member was trained and answered in; empty where they are not recorded."""
    dtypes = report.run.dtype
    verbs = {"adapter": "trained", "predictions": "answered"}
    formats = [f"{verb} in {dtypes[stage]}" for stage, verb in verbs.items() if dtypes[stage]]
    return " and ".join(formats).capitalize() + "." if formats else ""


def cost(report: Report) -> str:
    """Time and money of the run in a sentence."""
    seconds = sum(row.seconds for row in report.stages)
    dollars = sum(row.dollars for row in report.stages)
    paid = f"{money(dollars)} for teachers" if dollars else "nothing, since every model was local"
    return f"The stages took {duration(seconds)} and cost {paid}."
