"""What the server takes beyond the engine: the same requests to the bare engine and over HTTP, turn by turn.

    python -m benchmarks.server_overhead [--rounds 5] [--json FILE]

The model of `benchmarks.serving`, at 32 slots; it says letters only, so that each token is a text to be sent. 32
requests at once, each of 32 ids and 128 new tokens; over HTTP each has a client of its own of the package `openai`,
which reads a stream. Engine and server are one process on one core, the clients another process on another core, so
that what clients take themselves counts for nothing. A ratio is the median over the rounds of (over HTTP / bare), with
its range; of two rounds the sides come first once each.

wall    seconds from the first request to the last text's end
cpu     seconds in which the process of engine and server was busy
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.compare_torch import cpu_name, spread, use_cores

if TYPE_CHECKING:
    from maxlm.inference.load import LoadedRun

Figures = dict[str, float]

CLIENTS, PROMPT, NEW, NAME = 32, 32, 128, "m"
GO, DONE = "go", "done"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
        asyncio.run(clients(options.clients))
        return
    from maxlm.serving.listening import bind_address

    listener = bind_address("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    command = [sys.executable, "-m", "benchmarks.server_overhead", "--clients", url]
    # Before jax has threads, which do not go well with a fork.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        use_cores(1)
        rounds = measured(listener, asking, options.rounds)
    figures = {name: spread([http[name] / bare[name] for bare, http in rounds]) for name in ("wall", "cpu")}
    for name, values in figures.items():
        print("{:5} over HTTP / bare {:.3f} ({:.3f} to {:.3f})".format(name, *values))
    if options.json:
        facts = {"command": "python -m benchmarks.server_overhead", "machine": cpu_name(), **figures, "rounds": rounds}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def prompts(number: int) -> list[list[int]]:
    """Of one round; no two rounds share any, so that the cache has none of them."""
    rng = np.random.default_rng(number)
    found: list[list[int]] = rng.integers(0, 258, (CLIENTS, PROMPT)).tolist()
    return found


def measured(listener: socket.socket, asking: Any, n_rounds: int) -> list[tuple[Figures, Figures]]:
    """Bare and over HTTP, of each round."""
    from benchmarks.serving import SLOTS, run
    from maxlm.compile_cache import enable_compilation_cache
    from maxlm.config import EngineConfig, WeightFormat
    from maxlm.serving.app import Service
    from maxlm.serving.listening import DrainingServer
    from maxlm.serving.loading import serve_model

    enable_compilation_cache()
    models = serve_model(of_letters(run()), NAME, EngineConfig(slots=SLOTS), WeightFormat.DTYPE)
    loop: Any = models[NAME].loop
    is_up = threading.Event()
    server = DrainingServer(Service(models=models), drain_s=1, ready=is_up.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    is_up.wait()

    def over_http(number: int) -> None:
        print(GO, number, file=asking.stdin, flush=True)
        assert asking.stdout.readline().strip() == DONE

    rounds = []
    for number in range(0, 2 * n_rounds + 2, 2):
        found: dict[str, Figures] = {}
        for side in ("bare", "http") if number % 4 else ("http", "bare"):
            if side == "http":
                found[side] = timed(lambda number=number: over_http(number + 1))
            else:
                loop.pause()
                found[side] = timed(lambda number=number: in_thread(bare, loop.engine, number))
                loop.resume()
        rounds.append((found["bare"], found["http"]))
    asking.stdin.close()
    server.drain()
    thread.join()
    loop.close()
    return rounds[1:]  # the first one warms


def of_letters(run: LoadedRun) -> LoadedRun:
    """The same, in which no other token is as likely."""
    letters = np.isin(np.arange(run.config.model.vocab_size), list(range(97, 123)))[:, None]
    parameters = run.parameters | {"unembed": run.parameters["unembed"] * letters}
    return dataclasses.replace(run, parameters=parameters)


def timed(work: Any) -> Figures:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def in_thread(work: Any, *arguments: Any) -> None:
    """As the server has its engine: the same steps took up to 1.5 times as long in the main thread."""
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()


def bare(engine: Any, number: int) -> None:
    from maxlm.config import SamplingConfig
    from maxlm.inference.request import Request

    for prompt in prompts(number):
        engine.submit(
            Request(prompt=tuple(prompt), max_new_tokens=NEW, sampling=SamplingConfig(temperature=0), ends=())
        )
    while not engine.idle:
        engine.step()


async def clients(url: str) -> None:
    """A round for each line that comes."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def ask(prompt: list[int]) -> int:
            stream = await client.completions.create(
                model=NAME,
                prompt=prompt,
                max_tokens=NEW,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            return sum([len(chunk.choices[0].text) async for chunk in stream])

        for line in sys.stdin:
            found = await asyncio.gather(*map(ask, prompts(int(line.split()[1]))))
            assert found == [NEW] * CLIENTS, found
            print(DONE, flush=True)


if __name__ == "__main__":
    main()
