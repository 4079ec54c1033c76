"""What ``stepladder predict`` is measured against: vLLM's own ``LLM.chat`` on the same conversations.

Run by benchmarks/serving.py with the environment that vLLM is installed in.
"""

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    told = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: SIM115, PTH123
    model = LLM(
        told["model"], dtype=told["dtype"], max_model_len=told["max_length"], enforce_eager=True,
        kv_cache_memory_bytes=told["kv_cache_bytes"],
    )  # fmt: skip
    settings = SamplingParams(temperature=0.0, max_tokens=told["max_tokens"])
    begun = time.perf_counter()
    answers = model.chat(told["conversations"], settings, use_tqdm=False)
    seconds = time.perf_counter() - begun
    texts = [answer.outputs[0].text for answer in answers]
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    # Into a file: vLLM writes its log to the standard output.
    with open(sys.argv[2], "w", encoding="utf-8") as out:  # noqa: PTH123
        json.dump({"seconds": seconds, "tokens": tokens, "texts": texts}, out)


if __name__ == "__main__":
    main()
