"""Import the libraries that models need: only when needed, offline, and without their output on the terminal."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import warnings

from stepladder.errors import MissingExtra

OPTIONAL_LIBRARIES = {"bitsandbytes", "deepspeed", "tensorboard"}
"""Libraries that only one setting needs and that are not part of the training extra."""


def require(*libraries: str) -> None:
    """Make sure that torch, transformers and ``libraries`` are installed; the caller imports them right after.

    Raises:
        MissingExtra: one is not installed; the message says how to install it.
    """
    need("torch", "transformers", *libraries)


def need(*libraries: str) -> None:
    """As :func:`require`, but only ``libraries``, one of which must be transformers. PyTorch is not needed where a
    server computes."""
    go_offline()
    for library in libraries:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            name = error.name or library
            raise MissingExtra(name, *([name] if name in OPTIONAL_LIBRARIES else [])) from None
    silence()


def go_offline() -> None:
    """Set the variables that libraries read at import: no hub, no progress bars, no parallel tokenizers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # PEFT imports it if it is installed; on CPUs with AVX512-BF16 it logs that a kernel from a hub is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def release_cards() -> None:
    """Give the memory of cards back that PyTorch keeps for tensors that are gone: other processes, such as servers or a
    training on several cards, need it. Does nothing where this process has used no card. (Not run on a card.)"""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def silence() -> None:
    """Turn off the libraries' warnings and progress bars; errors are still raised."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", module=r"(transformers|compressed_tensors|llmcompressor|torch|peft|trl)\b")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def quiet() -> contextlib.AbstractContextManager[object]:
    """Discard standard error, for libraries that draw progress bars whatever is set; errors are still raised."""
    return contextlib.redirect_stderr(io.StringIO())
