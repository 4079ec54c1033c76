"""The libraries that models need: imported when first needed, offline, and without their own output on the terminal."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings

from stepladder.errors import MissingExtra

SELDOM = {"bitsandbytes", "deepspeed", "tensorboard"}
"""Libraries that only a setting needs, and that the training extra leaves out."""


def require(*libraries: str) -> None:
    """Make sure that torch, transformers and ``libraries`` are installed; the caller imports them right after.

    Raises:
        MissingExtra: one line on how to get what is not there.
    """
    need("torch", "transformers", *libraries)


def need(*libraries: str) -> None:
    """The same for ``libraries`` alone, which include transformers: where a server computes, PyTorch is not needed."""
    go_offline()
    for library in libraries:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            name = error.name or library
            raise MissingExtra(name, *([name] if name in SELDOM else [])) from None
    silence()


def go_offline() -> None:
    """Set the environment that the libraries read when they are imported: no hub, no progress bars, no forks."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # PEFT imports it wherever it is installed, and on CPUs with AVX512-BF16 it misses a kernel of a hub's.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def silence() -> None:
    """Keep the warnings and progress bars of the libraries out of the terminal; errors are raised as ever."""
    from transformers.utils import logging as theirs

    warnings.filterwarnings("ignore", module=r"(transformers|compressed_tensors|llmcompressor|torch|peft|trl)\b")
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]


def quiet() -> contextlib.AbstractContextManager[object]:
    """No progress bars of libraries that draw theirs whatever is set; errors are raised as ever."""
    return contextlib.redirect_stderr(io.StringIO())
