"""Whether a self-hosted server serves the model that the run takes it to serve.

HTTP does not say which weights a server has, so the server is checked by its behaviour: it lists the model; it renders
a fixed conversation into the same tokens as the run's tokenizer; and it answers that conversation as the first admitted
server did, whose answer is in the ledger. That last check is a probe, an ordinary request.
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
PROBE_TOKENS, PROBE_TOP_LOGPROBS = 16, 5
FREE = Price(input=Decimal(0), output=Decimal(0))
MIN_LOGPROB = -3.0
"""Tokens are compared where at least one server gives them this log-probability; below it, differences are mostly
noise."""
MAX_DIFFERENCE_NATS = 0.15
"""Mean difference of log-probabilities up to which two servers have the same weights."""


class WrongServer(Exception):
    """The server serves something else; the message says what, without naming the server."""


class Admission:
    """The checks that a self-hosted server must pass before it is sent requests.

    Args:
        identity: identifies the weights; their answers are stored under it.
        served: the model name that the server must list.
        tokens: token ids of :data:`PROBE` by the run's own tokenizer; None where it does not have the weights.
        run: the run whose account the probe is stored under.
    """

    def __init__(self, identity: str, served: str, tokens: Sequence[int] | None, run: str) -> None:
        self._served, self._tokens, self._run = served, tokens, run
        self._probe = Request(model=identity, messages=PROBE, top_logprobs=PROBE_TOP_LOGPROBS, max_tokens=PROBE_TOKENS)
        self._probe_lock = asyncio.Lock()

    async def check(self, transport: Http, committer: Committer) -> None:
        """Check a server.

        Raises:
            WrongServer: it serves something else.
            Unreachable: it did not answer; it may be checked again.
        """
        names = await transport.models()
        if names is not None and self._served not in names:
            raise WrongServer(f"it serves {', '.join(names[:5]) or 'nothing'} and not {self._served}")
        await self._check_template(transport)
        async with self._probe_lock:  # the others are compared with the first answer
            await self._check_weights(transport, committer)

    async def _check_template(self, transport: Http) -> None:
        if self._tokens is None or (server_tokens := await transport.tokens(PROBE)) is None:
            return
        tokens = list(self._tokens)
        if server_tokens != tokens:
            shorter = min(len(tokens), len(server_tokens))
            position = next((i for i in range(shorter) if tokens[i] != server_tokens[i]), shorter)
            raise WrongServer(
                f"its chat template or tokenizer differs: prompt token {position} is "
                f"{server_tokens[position : position + 1]} at the server and {tokens[position : position + 1]} by the "
                f"run's tokenizer ({len(server_tokens)} and {len(tokens)} tokens in all)"
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
                f"its chat template or tokenizer differs: the probe has {answer.prompt_tokens} prompt tokens at the "
                f"server and {len(self._tokens)} by the run's tokenizer"
            )
        stored = await committer.read(lambda ledger: ledger.find(probe))
        if stored is None:
            await committer.write(lambda ledger: ledger.keep(self._run, probe, answer))
        elif not (nats := difference(stored, answer)) <= MAX_DIFFERENCE_NATS:  # also if it is no number
            raise WrongServer(
                f"it has other weights than the server whose answers are in the ledger: log-probabilities of the probe "
                f"differ by {nats:.2f} nats (at most {MAX_DIFFERENCE_NATS} between servers of the same weights)"
            )


def difference(first: Response, second: Response) -> float:
    """Mean absolute difference of log-probabilities, in nats, between two greedy answers to the same prompt.

    Compared are the likely tokens at each position, up to the first position where the answers differ. If either answer
    has no log-probabilities, or no likely token: 0 if the texts are equal, else infinite.
    """
    differences: list[float] = []
    for first_token, second_token in zip(first.logprobs, second.logprobs, strict=False):
        differences += _position_differences(first_token, second_token)
        if first_token.token != second_token.token:
            break
    if not differences:
        return 0.0 if first.text == second.text else float("inf")
    return sum(differences) / len(differences)


def _position_differences(first: TokenLogprob, second: TokenLogprob) -> list[float]:
    """Absolute differences of log-probabilities at one position, by token. A token that only one answer lists is given
    the lowest log-probability that the other lists."""
    left = {first.token: first.logprob, **first.top}
    right = {second.token: second.logprob, **second.top}
    left_min, right_min = min(left.values()), min(right.values())
    likely = {token for side in (left, right) for token, logprob in side.items() if logprob > MIN_LOGPROB}
    return [abs(left.get(token, left_min) - right.get(token, right_min)) for token in likely]
