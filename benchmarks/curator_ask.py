"""The same requests through bespokelabs-curator 0.1.31, to run in an environment of its own that has it installed."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time

url, count = sys.argv[1], int(sys.argv[2])
os.environ |= {"OPENAI_API_KEY": "test-key", "TELEMETRY_ENABLED": "0", "CURATOR_DISABLE_CACHE": "1"}

import tiktoken  # noqa: E402


class Words:
    """Counts words where tiktoken would download its vocabulary first: no network here, and less work for curator."""

    def encode(self, text: str, **_: object) -> list[str]:
        return text.split()


tiktoken.get_encoding = tiktoken.encoding_for_model = lambda name: Words()

from bespokelabs import curator  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    os.environ["CURATOR_CACHE_DIR"] = folder
    model = curator.LLM(
        model_name="gpt-4o-mini",
        backend="openai",
        generation_params={"max_tokens": 64, "temperature": 0.0},
        backend_params={
            "base_url": url,
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 1_000_000_000,
            "max_concurrent_requests": 256,
            "in_mtok_cost": 1,
            "out_mtok_cost": 2,
        },
    )
    begun, cpu = time.perf_counter(), time.process_time()
    answers = model([f"question {number}" for number in range(count)])
    figures = {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "answered": len(getattr(answers, "dataset", answers)),
    }
print(json.dumps(figures))
