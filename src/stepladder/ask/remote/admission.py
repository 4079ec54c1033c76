"""Whether a server of one's own serves what the run thinks it does.

Weights carry no name over HTTP, so a server is known by what it does: it lists the model, it renders a fixed
conversation into the same tokens as the run's tokenizer, and it answers that conversation as the first server did
whose answer is on record. The last is a probe, an ordinary request in the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from decimal import Decimal

from stepladder.ask.ledger.commit import Committer
from stepladder.ask.outcome import Unreachable, judge
from stepladder.ask.remote.openai_http import Http
from stepladder.ask.request import Request, Response, TokenLogprob
from stepladder.config import Price
from stepladder.records import Message

PROBE = (
    Message(role="system", content="Closed world: what does not follow is false."),
    Message(
        role="user",
        content="Ann sits left of Bob. Bob sits left of Cleo.\nWho sits last? 谁坐在最后？\nA. Ann\nB. Bob\nC. Cleo\n"
        "Think step by step. The last line is 'Answer: ' and the letter.",
    ),
)
PROBE_TOKENS, PROBE_TOP = 16, 5
FREE = Price(input=Decimal(0), output=Decimal(0))
LIKELY = -3.0
"""Log-probability below which a token's own is mostly noise."""
SAME = 0.15
"""Mean difference of log-probabilities, nats, up to which two servers have the same weights."""


class WrongServer(Exception):
    """It serves something else; the message says what, without naming the server."""


class Admission:
    """What a server of one's own must pass before it is sent requests.

    Args:
        identity: the run's name for the weights, under which their answers are kept.
        served: the name the server must list.
        tokens: token ids of :data:`PROBE` as the run's own tokenizer renders it, where the weights are at hand.
        run: the run that a probe belongs to.
    """

    def __init__(self, identity: str, served: str, tokens: Sequence[int] | None, run: str) -> None:
        self._served, self._tokens, self._run = served, tokens, run
        self._probe = Request(model=identity, messages=PROBE, top_logprobs=PROBE_TOP, max_tokens=PROBE_TOKENS)
        self._one_at_a_time = asyncio.Lock()

    async def check(self, transport: Http, committer: Committer) -> None:
        """Raises WrongServer, or Unreachable when there is no telling yet."""
        names = await transport.models()
        if names is not None and self._served not in names:
            raise WrongServer(f"it serves {', '.join(names) or 'nothing'} and not {self._served}")
        await self._check_template(transport)
        async with self._one_at_a_time:  # the first answer is what the others are held against
            await self._check_weights(transport, committer)

    async def _check_template(self, transport: Http) -> None:
        if self._tokens is None or (theirs := await transport.tokens(PROBE)) is None:
            return
        ours = list(self._tokens)
        if theirs != ours:
            shared = min(len(ours), len(theirs))
            place = next((i for i in range(shared) if ours[i] != theirs[i]), shared)
            raise WrongServer(
                f"its chat template or tokenizer differs: prompt token {place} is {theirs[place : place + 1]} there "
                f"and {ours[place : place + 1]} here ({len(theirs)} and {len(ours)} tokens in all)"
            )

    async def _check_weights(self, transport: Http, committer: Committer) -> None:
        probe = self._probe
        delivery = await transport.send(probe, probe.key)
        outcome = judge(probe, delivery, FREE)
        if outcome.kind in ("fatal", "rejected", "refused"):
            raise WrongServer(outcome.message)
        if (answer := outcome.response) is None:
            raise Unreachable(outcome.message)
        if self._tokens is not None and answer.prompt_tokens not in (0, len(self._tokens)):
            raise WrongServer(
                f"its chat template is another one: a prompt of {len(self._tokens)} tokens has {answer.prompt_tokens}"
            )
        known = await committer.read(lambda ledger: ledger.find(probe))
        if known is None:
            await committer.write(lambda ledger: ledger.keep(self._run, probe, answer))
        elif (apart := difference(known, answer)) > SAME:
            raise WrongServer(
                f"it has other weights than those whose answers are on record: it answers the probe {apart:.2f} nats "
                f"apart (at most {SAME} between servers of the same weights)"
            )


def difference(first: Response, second: Response) -> float:
    """How far two greedy answers to the same prompt are apart: the mean difference of log-probabilities, in nats, over
    the likely tokens of each place up to the first where they go different ways; infinite where one has none."""
    apart: list[float] = []
    for mine, theirs in zip(first.logprobs, second.logprobs, strict=False):
        apart += _place(mine, theirs)
        if mine.token != theirs.token:
            break
    if not first.logprobs or not second.logprobs:  # a server that tells no log-probabilities is known by its words
        return 0.0 if first.text == second.text else float("inf")
    return sum(apart) / len(apart)


def _place(mine: TokenLogprob, theirs: TokenLogprob) -> list[float]:
    """Differences at one place; a token that only one side lists is at most as likely as the other's last."""
    ours = {mine.token: mine.logprob, **mine.top}
    others = {theirs.token: theirs.logprob, **theirs.top}
    least, least_other = min(ours.values()), min(others.values())
    likely = {token for side in (ours, others) for token, logprob in side.items() if logprob > LIKELY}
    return [abs(ours.get(token, least) - others.get(token, least_other)) for token in likely]
