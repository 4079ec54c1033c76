"""What ``stepladder predict`` is measured against: vLLM's own ``LLM.chat`` on the same conversations.

Run by benchmarks/serving.py with the environment that vLLM is installed in.
"""

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams

    told = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: SIM115, PTH123
    model = LLM(told["model"], dtype=told["dtype"], max_model_len=told["max_length"], enforce_eager=True)
    settings = SamplingParams(temperature=0.0, max_tokens=told["max_tokens"])
    begun = time.perf_counter()
    answers = model.chat(told["conversations"], settings, use_tqdm=False)
    seconds = time.perf_counter() - begun
    texts = [answer.outputs[0].text for answer in answers]
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "texts": texts}))


if __name__ == "__main__":
    main()
