"""What the engine is measured against: the same requests through the same SDK, in one asyncio.gather, nothing kept."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

import openai


async def main(url: str, count: int) -> None:
    http = openai.DefaultAioHttpClient()
    client = openai.AsyncOpenAI(base_url=url, api_key="test-key", max_retries=0, http_client=http)
    room = asyncio.Semaphore(256)

    async def one(number: int) -> str | None:
        async with room:
            answer = await client.chat.completions.create(
                model="test-model",
                messages=[{"role": "user", "content": f"question {number}"}],
                max_tokens=64,
                temperature=0.0,
            )
            return answer.choices[0].message.content

    begun, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(one(number) for number in range(count)))
    figures = {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "answered": len(answers),
    }
    print(json.dumps(figures))
    await client.close()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
