"""Small JSON files of a model folder, which somebody else may have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepladder.errors import InputError, ModelError

MAX_BYTES = 20_000_000
CODE_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it is missing, too large or no JSON object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(path, f"is larger than {MAX_BYTES:,} bytes; give an undamaged folder")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}); give a complete folder") from None
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"is not JSON ({error}); give an undamaged folder") from None
    if not isinstance(content, dict):
        raise InputError(path, "is not a JSON object; give an undamaged folder")
    return content


def refuse_code(folder: Path, runner: str) -> None:
    """Refuse a folder that brings code, for a program that would run it (CVE-2025-66448 in vLLM; ms-swift always).

    Raises:
        ModelError: it does.
    """
    for path in (folder / name for name in CODE_FILES):
        if path.exists() and "auto_map" in read_json(path):
            raise ModelError(f"{path}: the model brings its own code (auto_map), which {runner} may run; use another")
