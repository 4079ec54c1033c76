"""What a run's TOML file may hold: one frozen tree of tables. Unknown keys are errors.

The docstring under a field is its documentation (docs/reference/configuration.md is made of them). The module is long
because it holds all tables, most of them fields without code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from stepladder.config.addresses import address_problem
from stepladder.records import Language

BASE = "base"
"""Name of the untuned student among the predictions; no member may have it."""
VARIANTS = "variants"
"""The account of ``[variants]`` in the ledger, beside those of the rungs."""


def _folder_name(value: str) -> str:
    if not value or not all(c.isalnum() or c in "-_." for c in value) or value.startswith("."):
        raise ValueError("must be letters, digits, '-', '_' or '.', since it names a folder")
    return value


FolderName = Annotated[str, AfterValidator(_folder_name)]


def _data_file(value: str) -> str:
    if re.fullmatch(r"(\w[\w .()+-]*/)*\w[\w .()+-]*\.(jsonl?|parquet)", value) is None:
        raise ValueError("must be the path of a *.jsonl, *.json or *.parquet in the dataset, without wildcards")
    return value


DataFile = Annotated[str, AfterValidator(_data_file)]


def _base_url(value: str) -> str:
    if (problem := address_problem(value)) is not None:
        raise ValueError(problem)
    return value


BaseUrl = Annotated[str, AfterValidator(_base_url)]
RESERVED_BODY_KEYS = frozenset({
    "model", "messages", "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "stream", "n",
    "best_of", "logprobs", "top_logprobs", "add_generation_prompt", "continue_final_message", "tools", "functions",
    "service_tier", "web_search_options",
})  # fmt: skip
"""Keys that ``extra_body`` may not hold."""
Dtype = Literal["auto", "float32", "bfloat16"]
"""A number format to compute in; ``auto``: bfloat16 where the hardware multiplies it, float32 elsewhere."""


class Table(BaseModel):
    """A TOML table: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _is_unset(value: object) -> bool:
    return value is None


def _is_off(value: object) -> bool:
    return not value


class Sampling(Table):
    """How an answer is sampled: keys that ``[[rung]]``, ``[variants]`` and ``[predict]`` share. Those that are not set
    are in no fingerprint."""

    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1, exclude_if=_is_unset)
    """Nucleus sampling: a token is drawn from the likeliest ones that together have this probability."""
    top_k: int | None = Field(default=None, ge=1, exclude_if=_is_unset)
    """A token is drawn from so many of the likeliest ones. Weights here and servers of your own (vLLM) take it,
    OpenAI's API does not, so it is refused for models with a price."""
    seed: int | None = Field(default=None, ge=0, exclude_if=_is_unset)
    """Seed that is sent with each request, plus the index of the answer; providers promise no more than to try. Weights
    in this process are seeded by the request itself, of which this is then a part."""

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> Self:
        drawn = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) is not None]
        if drawn and self.temperature == 0:
            raise ValueError(f"{drawn[0]} needs temperature above 0, since 0 is greedy and draws nothing")
        return self

    def of_answer(self, index: int) -> dict[str, Any]:
        """The fields of a request (ask/request.py) for a model's answer with this index to a question."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": None if self.seed is None else self.seed + index,
            "sample_index": index,
        }


class Questions(Table):
    """``[questions]``: the labelled data."""

    train: str = Field(min_length=1)
    """Labelled problems, JSONL (docs/guide/questions.md shows a line): a path, relative to the TOML file, a pattern of
    several files (``part-*.jsonl``), or the address of one or several in an object store (``s3://bucket/part-*``);
    compressed ones end in ``.gz`` or ``.zst``."""
    test: str | None = Field(default=None, min_length=1)
    """Problems of the final measurement, in the same ways; labels optional."""
    validation: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training problems (never of sub-questions) held out for every choice that is made."""
    reviewed: Path | None = None
    """Labels somebody has looked at, JSONL of ``{"id", "action": "keep" | "relabel" | "drop", "answer"}``: confirmed,
    given another letter, or left out of training and validation. Relative to the TOML file."""


class Price(Table):
    """``price``: dollars per million tokens, as providers list them, which is micro-dollars per token."""

    input: Decimal = Field(ge=0)
    """Of the prompt."""
    output: Decimal = Field(ge=0)
    """Of the answer, reasoning included."""
    batch: Decimal = Field(default=Decimal("0.5"), ge=0, le=1)
    """What the provider's batch API costs, as a share of the above."""

    def in_batch(self) -> Price:
        """The price of requests in a batch."""
        return Price(input=self.input * self.batch, output=self.output * self.batch)

    def of(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Cost in micro-dollars, rounded up."""
        return math.ceil(self.input * prompt_tokens + self.output * completion_tokens)


class Model(Table):
    """``[models.<name>]``: a model that can be asked."""

    engine: Literal["local", "vllm", "openai"] = "local"
    """How it is asked: ``local`` is a transformers model in this process, ``vllm`` servers that are started for it
    (``[serve]``), ``openai`` any server that speaks the OpenAI protocol (a provider, or a vLLM of your own)."""
    path: str | None = None
    """``local`` and ``vllm``: a folder with weights, an id on a hub (see ``[train] base``), or ``bundled`` (the
    default) for the SmolLM2-135M-Instruct that comes with Stepladder. ``openai``: the folder or id of the weights your
    own servers serve, so that answers are identified by the weights instead of the address."""
    base_url: tuple[BaseUrl, ...] = ()
    """``openai``: the address up to and including ``/v1``, or a list of servers of the same model, among which requests
    are balanced."""
    base_url_file: Path | None = None
    """``openai``: instead of ``base_url``, a text file with one address a line, which is read again while a run lasts:
    servers may come and go. Relative to the TOML file."""
    model: str | None = None
    """``openai``: the model's name at the server; by default the table's name."""
    api_key_env: str | None = None
    """``openai``: the environment variable that holds the API key."""
    price: Price | None = None
    """``openai``: no request is sent without one; a server of your own has ``{ input = 0, output = 0 }``."""
    concurrency: int = Field(default=256, ge=1)
    """``openai``: most requests in flight at one server; the actual number adapts to what the server can take."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """``openai``: the account's limit at each server."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """``openai``: the account's limit at each server."""
    batch_queue_tokens: int | None = Field(default=None, ge=1)
    """``openai``: the account's limit on prompt tokens that wait in the provider's batch queue at once, for rungs with
    ``batch = true``; what is over it is sent as batches end. By default learned from the provider's refusal."""
    timeout: float = Field(default=600, gt=0)
    """``openai``: seconds for one attempt."""
    cap_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """``openai``: the server's name for the cap on the answer; some reasoning models need the longer one."""
    prompts: Path | None = None
    """A folder with templates for this model alone, instead of the run's ``prompts``. Relative to the TOML file."""
    extra_body: dict[str, Any] = {}
    """``openai``: further keys of every request's JSON body, such as ``{ reasoning_effort = "none" }`` or
    ``{ thinking = { type = "disabled" } }``. They are a part of the model's identity: other keys, other answers."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keys_fit_engine(self) -> Self:
        keys = self.model_fields_set - {"engine", "path", "prompts"}
        if self.engine != "openai" and keys:
            raise ValueError(f"{sorted(keys)[0]!r} is for engine = 'openai'")
        if self.engine == "openai" and bool(self.base_url) == bool(self.base_url_file):
            raise ValueError("engine = 'openai' needs either base_url or base_url_file")
        if reserved := sorted(RESERVED_BODY_KEYS & self.extra_body.keys()):
            raise ValueError(
                f"extra_body may not hold {reserved[0]!r}: other keys of this file set it, or it changes what a "
                "request costs; leave it out"
            )
        if self.engine == "openai" and self.price is None:
            raise ValueError(
                "engine = 'openai' needs a price, such as { input = 0.15, output = 0.60 } dollars per million tokens; "
                "without one no budget can be kept"
            )
        return self

    def served_as(self, name: str) -> str:
        """The server's name for the model that the configuration calls ``name``."""
        return self.model or name

    @property
    def is_own(self) -> bool:
        """Whether its servers are self-hosted, which price 0 says. Such servers must show which weights they serve."""
        return self.price is not None and self.price.input == self.price.output == 0


class Limits(Table):
    """``[limits]``: what the run may use."""

    dollars: float | None = Field(default=None, ge=0)
    """Hard cap on what the run may spend, all restarts together; reserved before a request is sent."""


KEYS_WITHOUT_MODELS = frozenset({"name", "kind", "chains", "accept", "clean", "trust_majority", "keep", "also_solved"})
"""Keys that a rung with chains may have."""


class Rung(Sampling):
    """``[[rung]]``: one step of the cascade, asked only the questions that are still unsolved."""

    name: FolderName
    kind: Literal["ask", "worked", "chains"] = "ask"
    """``ask`` asks models; ``worked`` offers the worked solution that came with the question, and ``chains`` the chains
    of a file, both free."""
    chains: Path | None = Field(default=None, exclude=True)
    """A file of chains that you have already, JSONL of ``{"id", "chain"}``: the id of a question, and a text that ends
    in an answer line with the letter in the options' own order; ``"model"`` may name who wrote it. They are judged like
    every other answer. It makes the rung one of kind ``chains``. Relative to the TOML file."""
    models: tuple[str, ...] = ()
    """Names under ``[models]``."""
    orders: int = Field(default=1, ge=1, le=24)
    """Number of shuffled orders of the options in which each model is asked a question."""
    shuffle: bool = True
    """``false`` shows the options in their own order, for answers that were recorded in it."""
    samples: int = Field(default=1, ge=1, le=100)
    """Number of answers of each model to a question, if more than ``orders``; they take the orders in turn."""
    accept: Literal["all", "majority"] = "all"
    """When a model has solved a question: ``all`` of its answers are right, or the ``majority`` of them, counted in the
    original order of the options, is right; then only the chains that agree with the majority are kept."""
    samples_after_miss: bool = Field(default=False, exclude_if=_is_off)
    """With ``accept = "majority"``: only the first answer is requested at first, and the others where it is wrong; then
    all of them vote."""
    also_solved: bool = Field(default=False, exclude_if=_is_off)
    """Whether it is also asked the questions that rungs before it have solved. So a member with this rung as its
    teacher learns from it about all questions, not only those that were left for it."""
    clean: bool = Field(default=False, exclude_if=_is_off)
    """Whether a right answer solves a question only where its chain has no flaw that bars it from training
    (``mcq/cleaning.py``: it begins within a sentence, answers before it reasons, judges itself, ...). Else the question
    goes up, for a chain that a member with ``clean = true`` does learn."""
    trust_majority: bool = False
    """With ``accept = "majority"``: the majority counts as right even where it contradicts the label."""
    keep: int | None = Field(default=None, ge=1)
    """Most accepted chains of a question that this rung keeps, the most different ones; by default all."""
    max_tokens: int = Field(default=512, ge=1)
    """Cap on the answer's length, tokens."""
    dollars: float | None = Field(default=None, ge=0)
    """Hard cap on what this rung may spend, within the run's."""
    batch: bool = False
    """Whether its models are asked through their provider's batch API: at half the price, answered within 24 hours."""

    @model_validator(mode="before")
    @classmethod
    def _chains_say_the_kind(cls, values: Any) -> Any:
        return {"kind": "chains", **values} if isinstance(values, dict) and "chains" in values else values

    @model_validator(mode="after")
    def _models_fit_kind(self) -> Self:
        if (self.kind == "ask") != bool(self.models):
            raise ValueError("a rung of kind 'ask' needs models, one of another kind takes none")
        if (self.kind == "chains") != (self.chains is not None):
            raise ValueError("a rung of kind 'chains' needs the key chains, a file; one of another kind takes none")
        if self.kind == "chains" and (asking := sorted(self.model_fields_set - KEYS_WITHOUT_MODELS)):
            raise ValueError(f"a rung with chains asks no model, so {asking[0]} does nothing; leave it out")
        if self.samples > self.orders and self.temperature == 0:
            raise ValueError(
                f"samples = {self.samples} with orders = {self.orders} and temperature = 0 would ask the same again; "
                "set temperature, 0.7 for example, or as many orders"
            )
        if self.orders > 1 and not self.shuffle:
            raise ValueError(f"orders = {self.orders} needs shuffle = true")
        if self.samples_after_miss and (self.accept != "majority" or self.answers == 1):
            raise ValueError('samples_after_miss needs accept = "majority" and samples above 1')
        if self.trust_majority and self.accept != "majority":
            raise ValueError('trust_majority needs accept = "majority"')
        return self

    @property
    def answers(self) -> int:
        """Answers of each model to a question."""
        return max(self.orders, self.samples)


class Variants(Sampling):
    """``[variants]``: new questions about the training problems, written by models and proved by others; without this
    table there are none. A member with ``variants = true`` learns from them."""

    models: tuple[str, ...] = Field(min_length=1)
    """The writers: names under ``[models]``."""
    judges: tuple[str, ...] = ()
    """The models that answer the new questions, with shuffled options and without seeing the writer's answer: names
    under ``[models]``; by default all. No model judges its own questions."""
    agree: int = Field(default=2, ge=1)
    """Number of judges that must give the writer's answer. Where the problem carries a closed-world program, a program
    that proves the answer is enough."""
    per_problem: int = Field(default=1, ge=1)
    """New questions each writer is asked for about a problem."""
    examples: int = Field(default=2, ge=0)
    """Solved questions about similar problems that the writer is shown."""
    temperature: float = Field(default=0.7, ge=0)
    """Sampling temperature of the writers; judges are greedy."""
    max_tokens: int = Field(default=1024, ge=1)
    """Cap on the length of a writer's or a judge's answer, tokens."""
    dollars: float | None = Field(default=None, ge=0)
    """Hard cap on what writers and judges may spend, within the run's."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.per_problem > 1 and self.temperature == 0:
            raise ValueError("per_problem above 1 needs temperature above 0, or the same question comes again")
        for names in (self.models, self.judges):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"model {name!r} is named twice; name it once")
        return self


class Swift(Table):
    """``[train.swift]``: settings for ``backend = "swift"``."""

    environment: Path = Path(".venv-swift")
    """The environment that ms-swift is installed in, by ``make swift``; relative to where the command is run."""
    model_type: str | None = None
    """ms-swift's name for the base's architecture; by default read from the weights. The bundled base is ``llama``."""
    template: str | None = None
    """ms-swift's name for the chat template; by default read from the weights. The bundled base has ``chatml``."""


class Train(Table):
    """``[train]``: LoRA fine-tuning, shared by all members."""

    backend: Literal["trl", "swift"] = "trl"
    """What trains: TRL and PEFT in this process, or ms-swift, which the winning entry used, in its own environment."""
    swift: Swift = Swift()

    base: str = "bundled"
    """The student: a folder with weights, ``bundled``, or an id: ``OWNER/NAME`` on the Hugging Face hub,
    ``modelscope:OWNER/NAME`` on ModelScope (``pip install modelscope``), either with an optional ``@REVISION``. It is
    downloaded once (never with ``HF_HUB_OFFLINE=1``) and then found in the hub's cache. A pinned revision (the 40
    digits of a commit) makes the run reproducible; without one it is the revision in the cache, or else the current
    ``main`` (ModelScope: ``master``). A folder of the same name takes precedence."""
    dtype: Dtype = "auto"
    """Number format of the base while its adapter is trained, and of the merged weights while they are quantised;
    ``auto``: bfloat16 where the hardware multiplies it, float32 elsewhere (docs/determinism.md). The adapter and the
    optimiser's state are float32 in any case."""
    lora_rank: int = Field(default=256, ge=1)
    """Rank r of the LoRA update."""
    lora_alpha: int = Field(default=512, ge=1)
    """LoRA scaling: the update is multiplied by alpha / rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the adapter's inputs; the winning entry used ms-swift's 0.05."""
    epochs: float = Field(default=3, gt=0)
    """Passes over the member's examples."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate (AdamW, linear warm-up)."""
    weight_decay: float = Field(default=0.0, ge=0, exclude_if=_is_off)
    """AdamW's weight decay; the winning entry used ms-swift's 0.1."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's decay rate for squared gradients; the winning entry used ms-swift's 0.95."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after its warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps spent warming up."""
    clip: float = Field(default=1.0, gt=0)
    """Gradient clipping: largest norm of the gradient."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences per forward pass: conversations, or with ``packing`` packs of those that share their beginning."""
    packing: bool = True
    """Whether examples that share their beginning, such as the questions about one problem, are packed into one
    sequence that holds it once: a third fewer tokens. They are then in the same step; where a step has few sequences,
    the same number of examples of different problems teaches more (docs/experiments.md). ms-swift never packs."""
    gradient_accumulation: int = Field(default=8, ge=1)
    """Forward passes per optimiser step, which so holds ``batch_size`` times as many sequences: conversations with
    ``packing = false``, which a recipe that counts conversations needs."""
    gradient_checkpointing: bool | None = None
    """Whether activations are recomputed in the backward pass instead of kept; by default on a card, where memory is
    the limit, and not on a CPU."""
    max_length: int = Field(default=2048, ge=16)
    """Longest sequence, tokens, for packing too; a longer example is left out and counted in the data card, never
    cut."""
    devices: int = Field(default=1, ge=1)
    """Cards (or, without one, CPU processes) that train together. ``gradient_accumulation`` is divided among them, so a
    step has the same sequences whatever their number."""
    sharding: Literal["none", "fsdp", "zero3"] = "none"
    """What is split over the devices: nothing but the data (DDP), or also weights and optimiser state, by PyTorch's
    FSDP2 or DeepSpeed's ZeRO-3 (``pip install deepspeed``), for a base that one card cannot hold."""
    qlora: bool = False
    """Whether the base is held in 4 bits (NF4, double quantisation) while its adapter is trained, for small cards
    (``stepladder[extras]``). The adapter is merged into the unquantised base all the same."""
    save_steps: int = Field(default=50, ge=1)
    """Optimiser steps between two checkpoints, from which a killed training continues."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What ``patience`` measures after each epoch: the loss on right chains of validation questions, or (on one device)
    the accuracy on validation questions, which takes longer. Right chains are the questions' worked solutions; for
    questions without one ``patience`` also asks the ladder, whose chains for them train no member."""
    patience: int | None = Field(default=None, ge=1)
    """Number of epochs without improvement after which training stops; then the best epoch's adapter is kept. By
    default all epochs are trained and the last is kept."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's curves, one folder a member (``stepladder[extras]``)."""

    @model_validator(mode="after")
    def _devices_share(self) -> Self:
        if self.gradient_accumulation % self.devices:
            raise ValueError(
                f"gradient_accumulation = {self.gradient_accumulation} cannot be divided among devices = "
                f"{self.devices}; make it a multiple"
            )
        if self.sharding != "none" and self.devices == 1:
            raise ValueError(f"sharding = {self.sharding!r} needs devices above 1")
        if self.metric == "accuracy" and self.devices > 1:
            raise ValueError("metric = 'accuracy' needs devices = 1; use 'loss'")
        if self.qlora and self.sharding != "none":
            raise ValueError("qlora and sharding exclude each other; leave one of them out")
        return self

    @model_validator(mode="after")
    def _swift_can(self) -> Self:
        is_set = {
            "metric": self.metric == "accuracy",
            "packing": self.packing and "packing" in self.model_fields_set,
            "patience": self.patience is not None,
            "tensorboard": self.tensorboard is not None,
        }
        refused = [key for key, asked in is_set.items() if asked]
        if self.backend == "swift" and refused:
            raise ValueError(f"{refused[0]} is for backend = 'trl', and ms-swift does not do it; leave it out")
        return self

    @property
    def asks_validation(self) -> bool:
        """Whether training needs right chains of validation questions, for which the ladder is then asked."""
        return self.patience is not None and self.metric == "loss"


class Member(Table):
    """``[[member]]``: one student of the ensemble; members differ in their data mix or seed."""

    name: FolderName
    path: str | None = Field(default=None, exclude=True)
    """A finished model or adapter of your own, which is not trained but merged, quantised, measured and joined like the
    others: a model folder or an id (see ``[train] base``), or a folder with a PEFT adapter (plain LoRA) of ``[train]
    base``. The keys below then choose the chains that it is calibrated on."""
    teachers: tuple[str, ...] = ()
    """Rungs or models whose accepted chains it learns from; empty means all."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training problems it sees, drawn with its seed."""
    learns: Literal["chains", "letters"] = Field(default="chains", exclude_if=lambda value: value == "chains")
    """What it learns of an accepted chain: the whole of it, or only to name the letter at once. A member that learns
    letters says what reasoning gains, and is the better one where a student is too small to reason
    (docs/guide/training.md)."""
    chains: int | None = Field(default=None, ge=1)
    """Most chains of one question it learns from; by default all."""
    choose: Literal["different", "shortest", "likely", "fitting"] = Field(
        default="different", exclude_if=lambda value: value == "different"
    )
    """Which ``chains`` of a question those are: the most different ones; the shortest, which a small student follows to
    the end; the likeliest under the base (mean log-likelihood of their tokens); or those of the lowest rank-surprisal
    ratio, which say something new in words that the base might have used (docs/guide/training.md). The last two compute
    every chain of a question that has more than ``chains`` with the base, once, a layer at a time."""
    max_chain: int | None = Field(default=None, ge=16, exclude_if=_is_off)
    """Tokens of the longest chain it learns from, its answer line included: a small student loses itself in long ones.
    Longer ones are left out and counted in the data card; by default only ``[train] max_length`` bounds a
    conversation."""
    orders: int = Field(default=1, ge=1, le=24, exclude_if=lambda value: value == 1)
    """Number of orders of the options in which it learns each chain; letters that the chain names move along, and a
    chain whose letters are ambiguous stays in its own order."""
    variants: bool = False
    """Whether it also learns from the new questions of ``[variants]``."""
    control: str | None = None
    """With ``variants``: the member that is the same without them. This member joins the ensemble only if it is at
    least as accurate on validation."""
    clean: bool = True
    """Whether debris of prompts and chat formats is removed from chains (``Assistant:``, ``<reflection>`` blocks,
    tags), and a chain left out that begins within a sentence, answers before it reasons, names two letters, judges its
    own reasoning, repeats itself or has none."""
    balance: bool = False
    """Whether the options of examples are reordered so that every letter is right equally often; letters that a chain
    names move along, as with ``orders``."""
    seed: int = 0
    """Seed of data order, option order and LoRA initialisation."""

    @model_validator(mode="after")
    def _finished_ones_learn_nothing(self) -> Self:
        trained = [key for key in ("variants", "control", "balance") if getattr(self, key)]
        if self.orders > 1:
            trained.append("orders")
        if self.path is not None and trained:
            raise ValueError(f"a member with path is finished and learns nothing, so leave {trained[0]} out")
        return self

    @model_validator(mode="after")
    def _letters_are_no_chains(self) -> Self:
        of_chains = self.model_fields_set & {"chains", "choose", "max_chain", "clean"}
        if self.learns == "letters" and of_chains:
            raise ValueError(f"a member that learns letters learns no chain, so leave {min(of_chains)} out")
        return self


class General(Table):
    """``[[quantise.general]]``: general text to calibrate on beside the student's own chains."""

    source: str
    """A file, or a dataset of a hub: ``OWNER/NAME`` or ``modelscope:OWNER/NAME``, either with an optional
    ``@REVISION``. Rows are conversations (fields ``messages``, ``conversations``, ``instruction`` and ``output``, or
    ``prompt`` and ``completion``), which are rendered in the chat template, or plain ``text``."""
    file: DataFile | None = None
    """The dataset's data file: JSONL, a JSON array or Parquet, of 2 GiB at most. It is downloaded once, when it is
    first needed, and then found in the hub's cache, as ``[train] base``; its first 20,000 rows are read."""
    samples: int = Field(ge=1)
    """Rows drawn from it, with the run's seed."""
    max_length: int = Field(default=512, ge=16)
    """Tokens after which a row is cut."""


Repair = Literal["calibration", "groups", "mixed", "recovery", "8bit"]
"""More calibration (four times the samples); groups half as large; 8 bits for the tenth of the weights whose layers
suffered most; norms tuned for one pass over the calibration chains; 8 bits for all."""


class Quantise(Table):
    """``[quantise]``: GPTQ, weights in 4 or 8 bits, activations in 16 (W4A16), and the gate on what it may cost."""

    backend: Literal["llmcompressor", "gptqmodel"] = "llmcompressor"
    """What quantises: llm-compressor in this process (compressed-tensors format), or gptqmodel in ms-swift's
    environment (``[train.swift] environment``; classic ``gptq`` format, symmetric only)."""
    method: Literal["gptq", "rtn"] = "gptq"
    """GPTQ, or rounding to nearest (``rtn``), which needs no calibration and loses more."""
    bits: Literal[4, 8] = 4
    """Bits per weight."""
    group_size: int | None = Field(default=None, ge=1)
    """Weights per scale; must divide every linear layer's input width. By default the largest of 128, 64, 32 and 16
    that does."""
    symmetric: bool = True
    """Whether the range of a group is centred on zero. ``false`` stores a zero point with each group: a little larger
    and closer to the weights."""
    samples: int = Field(default=128, ge=1)
    """Calibration examples, drawn from the member's own chat-formatted training set, each whole."""
    general: tuple[General, ...] = ()
    """General text to calibrate on as well, one table for each source."""
    max_loss: float = Field(default=0.03, ge=0, le=1)
    """The gate: validation accuracy (share) that quantisation may cost: the margin of a test of non-inferiority on the
    paired answers, at level 0.05 (docs/guide/four-bits.md). An export passes where a loss of it is excluded, and is
    refused where not and it lost more than chance explains."""
    max_orders: int = Field(default=8, ge=1, le=24)
    """Most orders of the options in which a validation question is asked while the answers are too few to tell whether
    ``max_loss`` is kept; 1 asks no more than the first."""
    undecided: Literal["pass", "fail"] = "pass"
    """What happens where they still are: the export passes, and the run says so, or it fails the gate."""
    max_unparsed: float = Field(default=0.05, ge=0, le=1)
    """The gate: by how much the share of answers without a readable letter may grow."""
    max_kl: float = Field(default=0.1, gt=0)
    """The gate: mean Kullback-Leibler divergence of next-token distributions from the merged weights', nats a token, on
    the merged weights' own answers to validation questions. Nor may it be larger than with rounding to nearest."""
    repairs: tuple[Repair, ...] = ("calibration", "groups", "mixed", "recovery", "8bit")
    """Repairs to try while the gate is not passed, in this order and each on top of those before. gptqmodel skips
    ``mixed``."""

    @model_validator(mode="after")
    def _gptqmodel_can(self) -> Self:
        supported = self.symmetric and self.method == "gptq" and self.group_size in (None, 32, 64, 128)
        if self.backend == "gptqmodel" and not supported:
            raise ValueError(
                "backend = 'gptqmodel' needs symmetric = true, method = 'gptq' and groups of 32, 64 or 128"
            )
        return self


class Serve(Table):
    """``[serve]``: the vLLM servers that ``engine = "vllm"`` starts: one for each card, or one on the CPU."""

    environment: Path = Path(".venv-serve")
    """The environment that vLLM is installed in, by ``make serve-env``; relative to where the command is run."""
    max_length: int = Field(default=4096, ge=64)
    """Longest prompt and answer together, tokens."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for the KV cache, GiB for each card; by default what ``utilisation`` leaves (on a CPU 2)."""
    utilisation: float = Field(default=0.92, gt=0, le=1)
    """Share of a card's memory that its server may use."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Number of cards that one model is split over, where one card is too small for it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format to compute in; ``auto``: that which the weights are stored in."""
    prefix_caching: bool = True
    """Whether the common beginning of prompts, such as a problem's text, is computed only once."""
    startup: float = Field(default=900, gt=0)
    """Seconds within which a server must be healthy."""
    base_url: tuple[BaseUrl, ...] = ()
    """Address, up to and including ``/v1``, of a server that already serves the model, or a list of them; then none is
    started. A server that serves other weights is refused. Its key, if it wants one, is taken from VLLM_API_KEY. A
    server that is no vLLM (it has no ``/tokenize``) is sent chat requests instead of token ids, which takes longer."""
    model: str = "student"
    """The name of the model at those servers."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class Cluster(Table):
    """``[cluster]``: other machines, on whose cards (or, where none has a card, on whose cores) servers are started
    instead of on this one. Weights and ``[serve] environment`` have the same paths on all of them."""

    scheduler: Literal["ray", "slurm"]
    """``ray``: the nodes of a Ray cluster, on one of which this command runs; ``slurm``: those of the Slurm job that it
    runs in."""
    address: str = "auto"
    """Of the Ray cluster's head, as ``ray start`` says it; ``auto``: of the cluster that this machine is a node of."""
    train_nodes: int = Field(default=1, ge=1)
    """Number of nodes that a training is spread over, each with its share of ``[train] devices``; with 1 it runs where
    the command does. The run's folder is then on storage that all nodes share."""
    ledger: Path | None = None
    """The ledger's file, on a disk of the machine that the command runs on: the runs' folder, where it is otherwise,
    may be on storage that nodes share, and SQLite does not work over a network."""

    @model_validator(mode="after")
    def _slurm_needs_no_address(self) -> Self:
        if self.scheduler == "slurm" and "address" in self.model_fields_set:
            raise ValueError("with scheduler = 'slurm' the job's own nodes are used, so leave address out")
        return self


class Predict(Sampling):
    """``[predict]``: how base, merged and quantised models answer validation and test."""

    engine: Literal["local", "vllm"] = "local"
    """What computes: transformers in this process, or vLLM servers that are started (``[serve]``). Where it is left out
    it is ``vllm`` on a machine with an NVIDIA card whose ``[serve] environment`` holds vLLM."""
    dtype: Dtype = "auto"
    """With ``local``: number format to compute in, also of ``[models]`` with ``engine = "local"``; ``auto`` as in
    ``[train]``. For vLLM it is ``[serve] dtype``."""
    max_tokens: int = Field(default=512, ge=1)
    """Cap on the answer's length, tokens."""
    votes: int = Field(default=1, ge=1)
    """Answers per question; the most frequent letter is chosen."""
    adaptive: bool = False
    """Whether ``votes`` is only the maximum: two answers at first, then one more at a time while no letter leads by two
    and another could still win."""
    prompts: Path | None = Field(default=None, exclude=True)
    """A folder with templates for the student, which is trained and asked with them, instead of the run's ``prompts``:
    so it may be asked otherwise than those who write its chains. Relative to the TOML file."""
    probabilities: bool = False
    """Whether each answer is followed by a request for one token, which gives the probability of every letter in the
    place of its letter. ``[ensemble] rule = "average"`` and ``"selector"`` then use these probabilities."""
    merged_test: Literal["all", "leader"] = "all"
    """Which members' merged (not yet quantised) weights answer the test too: all, or to save time only the ``leader``,
    the best member on validation. Merged weights are measured, not shipped."""


class Ensemble(Table):
    """``[ensemble]``: how the members' answers become one."""

    rule: Literal["auto", "single", "vote", "weighted", "leader", "average", "selector"] = "auto"
    """``single``: the best member; ``vote``: the most frequent letter; ``weighted``: votes weighted by the members'
    log-odds on validation; ``leader``: when the other members agree, follow them, otherwise the best member (the
    winning entry's); ``average``: the letter with the highest mean probability over members (``[predict]
    probabilities``) or, without probabilities, the highest mean share of their votes; ``selector``: a logistic model of
    which members agree, and with what probability. ``auto``: the best of them in cross-validation, if it beats
    ``single`` there by more than a standard error, else ``single``."""


class Track(Table):
    """``[track]``: a tracker that ``stepladder run`` passes a finished run on to: the members' curves, the figures and
    the page. Its own client library does it, and its environment variables say where the tracker is and with which key.
    A tracker that cannot be reached is no error; the next run tries again."""

    to: Literal["trackio", "wandb", "mlflow"]
    """Whose library is used; it is installed beside Stepladder."""
    project: str = Field(default="stepladder", min_length=1)
    """The project (with mlflow: the experiment) that the run is shown in."""


class Config(Table):
    """A run."""

    name: FolderName
    """Names the run folder."""
    language: Language
    """Language of prompts and chains."""
    seed: int = 2024
    """Seed from which all random choices of the run are derived."""
    final: Literal["none", "all"] = Field(default="none", exclude_if=lambda value: value == "none")
    """``all``: once every choice is made on validation, the members that answer are trained once more by the same
    recipe, from the training and the validation labels together (docs/guide/final.md). These final weights are packed;
    they have no accuracy but what is measured on the test."""
    prompts: Path | None = None
    """A folder with templates of your own (``system.j2``, ``question.j2``, ``variant.j2``), which take precedence over
    the packaged ones in ``mcq/prompts``; for one model ``[models.NAME] prompts``, for the student ``[predict] prompts``
    may name another. Relative to the TOML file."""
    questions: Questions
    limits: Limits = Limits()
    models: dict[str, Model] = {}
    rung: tuple[Rung, ...] = Field(min_length=1)
    variants: Variants | None = None
    train: Train = Train()
    member: tuple[Member, ...] = Field(min_length=1)
    quantise: Quantise = Quantise()
    serve: Serve = Serve()
    cluster: Cluster | None = None
    predict: Predict = Predict()
    ensemble: Ensemble = Ensemble()
    track: Track | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for kind, names in (("rung", [r.name for r in self.rung]), ("member", [m.name for m in self.member])):
            duplicates = {name for name in names if names.count(name) > 1}
            if duplicates:
                raise ValueError(f"{kind} name {sorted(duplicates)[0]!r} is used twice; give each {kind} its own name")
        if self.rung[0].also_solved:
            raise ValueError(f"rung {self.rung[0].name!r} has also_solved, but no rung before it solves anything")
        for rung in self.rung:
            if rung.name == VARIANTS and self.variants is not None:
                raise ValueError(f"a rung cannot be called {VARIANTS!r} beside [variants]; that is the table's account")
            for model in rung.models:
                if model not in self.models:
                    choices = ", ".join(self.models) or "none"
                    raise ValueError(
                        f"rung {rung.name!r} names unknown model {model!r}; known under [models]: {choices}"
                    )
                if rung.batch and len(self.models[model].base_url) != 1:
                    raise ValueError(
                        f"rung {rung.name!r} has batch = true, which needs models with engine = 'openai' and one "
                        f"base_url; model {model!r} is not one"
                    )
                if rung.top_k is not None:
                    self._check_top_k(f"rung {rung.name!r}", model)
        for model in () if self.variants is None else (*self.variants.models, *self.variants.judges):
            if model not in self.models:
                choices = ", ".join(self.models) or "none"
                raise ValueError(f"[variants] names unknown model {model!r}; known under [models]: {choices}")
        for writer in () if self.variants is None or self.variants.top_k is None else self.variants.models:
            self._check_top_k("[variants]", writer)
        if self.variants is not None:
            judges = self.variants.judges or tuple(self.models)
            for writer in self.variants.models:
                if len(set(judges) - {writer}) < self.variants.agree:
                    raise ValueError(
                        f"[variants] has agree = {self.variants.agree}, but only {len(set(judges) - {writer})} judges "
                        f"beside the writer {writer!r}; lower agree or name more models"
                    )
        finished = [member.name for member in self.member if member.path is not None]
        if self.final == "all" and finished:
            raise ValueError(
                f"final = 'all' trains the members once more, and member {finished[0]!r} has path, so it is finished "
                "already; leave the one or the other out"
            )
        teachers = {r.name for r in self.rung} | set(self.models)
        for member in self.member:
            if member.name == BASE:
                raise ValueError(f"a member cannot be called {BASE!r}; that is the untuned student's name")
            if member.variants and self.variants is None:
                raise ValueError(f"member {member.name!r} has variants = true, but there is no table [variants]")
            controls = [other.name for other in self.member if not other.variants and other.path is None]
            if member.control is not None and (not member.variants or member.control not in controls):
                raise ValueError(
                    f"member {member.name!r} has control = {member.control!r}, which must name a member that is "
                    "trained without variants, and itself needs variants = true"
                )
            for teacher in member.teachers:
                if teacher not in teachers:
                    choices = ", ".join(sorted(teachers))
                    raise ValueError(f"member {member.name!r} names unknown teacher {teacher!r}; known: {choices}")
        return self

    @model_validator(mode="after")
    def _nodes_share_devices(self) -> Self:
        nodes = 1 if self.cluster is None else self.cluster.train_nodes
        if self.train.devices % nodes:
            raise ValueError(
                f"[train] devices = {self.train.devices} cannot be divided among [cluster] train_nodes = {nodes}; make "
                "it a multiple"
            )
        return self

    def prompts_for(self, model: str) -> Path | None:
        """The folder of templates that a model under ``[models]`` is asked with; None for the packaged ones."""
        return self.models[model].prompts or self.prompts

    @property
    def student_prompts(self) -> Path | None:
        """The folder of templates that the student is trained and asked with; None for the packaged ones."""
        return self.predict.prompts or self.prompts

    def _check_top_k(self, table: str, model: str) -> None:
        if self.models[model].engine == "openai" and not self.models[model].is_own:
            raise ValueError(
                f"{table} has top_k, which OpenAI's API does not take, and model {model!r} has a price; leave it out, "
                f"or if its server takes it, write extra_body = {{ top_k = ... }} in [models.{model}]"
            )


def settings(table: Table, without: Collection[str] = ()) -> dict[str, Any]:
    """A table as plain JSON values, for fingerprints; ``without`` names keys to leave out. ``dtype = "auto"`` is left
    out too, and the engine that ``[predict]`` does not name is the usual one: what they mean depends on the machine,
    and a run that moves to another one stays up to date."""
    values = table.model_dump(mode="json", exclude=set(without))
    if isinstance(table, Predict) and "engine" not in table.model_fields_set:
        values["engine"] = Predict.model_fields["engine"].default
    if values.get("dtype") == "auto":
        del values["dtype"]
    return values
