"""Which engine answers where the configuration names none."""

from __future__ import annotations

import os

from stepladder.config.schema import Predict, Serve


def with_engine(predict: Predict, serve: Serve) -> Predict:
    """``[predict]`` with the engine that it names, else with vLLM where this machine has a card and the environment of
    ``[serve]`` holds vLLM: a server fills a card's memory with keys and values by itself and answers far faster. The
    engine stays unset, so that the run stays up to date on a machine of the other kind (``config.settings``). (Not run
    on a card.)
    """
    if "engine" in predict.model_fields_set or not (serve.environment / "bin" / "vllm").exists() or not has_card():
        return predict
    on_card = predict.model_copy(update={"engine": "vllm"})
    on_card.model_fields_set.discard("engine")
    return on_card


def has_card() -> bool:
    """Whether there is an NVIDIA card that this process may use, by CUDA_VISIBLE_DEVICES if it is set and else by the
    driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return any(card.strip() not in {"", "-1"} for card in visible.split(","))
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return False
    return count > 0
