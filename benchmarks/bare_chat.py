"""What ``stepladder predict`` is measured against: vLLM's own ``LLM.chat`` on the same conversations.

Run by benchmarks/serving.py with the environment that vLLM is installed in.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = LLM(
        told["model"], dtype=told["dtype"], max_model_len=told["max_length"], enforce_eager=True,
        kv_cache_memory_bytes=told["kv_cache_bytes"], max_num_seqs=told["sequences"], block_size=told["block"],
        max_num_batched_tokens=told["batch"],
    )  # fmt: skip
    settings = SamplingParams(temperature=0.0, max_tokens=told["max_tokens"])
    begun = time.perf_counter()
    answers = model.chat(told["conversations"], settings, use_tqdm=False)
    seconds = time.perf_counter() - begun
    texts = [answer.outputs[0].text for answer in answers]
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    # Into a file: vLLM writes its log to the standard output.
    said = json.dumps({"seconds": seconds, "tokens": tokens, "texts": texts})
    Path(sys.argv[2]).write_text(said, encoding="utf-8")


if __name__ == "__main__":
    main()
