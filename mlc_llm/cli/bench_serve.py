"""`mlc_llm bench serve`: ask a server much, and print, store and draw how fast it answers.

Knows the options; prompts, clients and figures are in `bench/load/`.
"""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlc_llm.cli.bench import check_outputs, parse_sizes, print_table
from mlc_llm.cli.terminal import say
from mlc_llm.errors import OptionError

if TYPE_CHECKING:
    from mlc_llm.bench.load.ask import Endpoint
    from mlc_llm.bench.load.drive import Load
    from mlc_llm.bench.load.measure import Questions
    from mlc_llm.bench.load.results import Result

_PROMPT_LEN = 128
_OUTPUT_LEN = 64
_MAX_TOTAL_LEN = 2048
_REQUESTS_PER_CLIENT = 8
_REQUESTS_OF_A_RATE = 50
_MAX_CLIENTS = 1024
# A server that was never started may have to download, convert and compile its model first.
_START_TIMEOUT_S = 4 * 3600.0


def bench_serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Any OpenAI server, such as http://127.0.0.1:8000; or a model, which is served "
            "by `mlc_llm serve --mode server` meanwhile.",
            show_default=False,
        ),
    ],
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Numbers of clients that ask at once, each waiting for its answer; "
            "1,4,16 if left out.",
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R,R",
            help="Instead: requests a second, at random times (Poisson), whoever is waiting.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Requests of each load; {_REQUESTS_PER_CLIENT} for each client, or "
            f"{_REQUESTS_OF_A_RATE} with --rate, if this and --duration are left out.",
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Send no more after so long, for each load."),
    ] = None,
    prompt_len: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Tokens of made-up prompts ({_PROMPT_LEN} if left out)."),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens of answers; {_OUTPUT_LEN}, or as in the dataset, if left out.",
        ),
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Let made-up lengths differ evenly by up to this share, 0 to 1.",
        ),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Ask the first questions of dialogues in ShareGPT's JSON format."
        ),
    ] = None,
    max_total_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Leave out dialogues of more tokens, question and answer "
            f"({_MAX_TOTAL_LEN} if left out).",
        ),
    ] = None,
    endpoint: Annotated[
        str, typer.Option(metavar="NAME", help="What to ask: chat or completions.")
    ] = "chat",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="ID", help="Model to ask for; the first one if left out."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="MLC_LLM_API_KEY",
            show_envvar=False,
            help="Sent as bearer token; $MLC_LLM_API_KEY if left out.",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for answers of full length, where the server can; or do not.",
        ),
    ] = True,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of all requests.")] = 0.0,
    warmup: Annotated[
        int, typer.Option(metavar="N", help="Requests before each load that do not count.")
    ] = 2,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Give a request up after so long.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(metavar="N", help="For prompts, lengths and times.")] = 0,
    server_args: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="More options for `mlc_llm serve MODEL`, in quotes."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw throughput against time per token as .png; needs `pip install matplotlib`.",
        ),
    ] = None,
) -> None:
    """Measure how fast a server answers many users.

    The time to the first token counts from sending the request; the time of each later token is the
    rest of the answer's time over its tokens. Throughput is all tokens of a load over its time.
    """
    from mlc_llm.artifact import write_atomically
    from mlc_llm.bench.load.http import Server
    from mlc_llm.bench.load.measure import Target, run_measure
    from mlc_llm.bench.load.plot import draw
    from mlc_llm.prepare.cache import storage_errors

    loads = _plan_loads(concurrency, rate, requests, duration, warmup)
    questions = _plan_questions(dataset, prompt_len, output_len, spread, max_total_len, seed)
    chosen = _parse_endpoint(endpoint)
    _require_positive("--timeout", timeout)
    if temperature < 0:
        raise OptionError(f"--temperature is {temperature:g}; it must be at least 0")
    check_outputs(json_path, plot)
    api_key = api_key or None  # an empty variable is none
    with _serving(target, server_args, api_key) as url:
        results = run_measure(
            Target(Server.parse(url, api_key), chosen, model, temperature, ignore_eos, timeout),
            questions,
            loads,
            say,
        )
    _print_tables(f"{target}, {endpoint}", results)
    if json_path is not None:
        report = {
            "target": target,
            "endpoint": endpoint,
            "model": model,
            "questions": _describe(questions, dataset),
            "loads": [result.to_json() for result in results],
        }
        with storage_errors(json_path):
            write_atomically(json_path, json.dumps(report, indent=2) + "\n")
    if plot is not None:
        with storage_errors(plot):
            draw(target, results, plot)


def _plan_loads(
    concurrency: str | None,
    rate: str | None,
    requests: int | None,
    duration: float | None,
    warmup: int,
) -> list[Load]:
    from mlc_llm.bench.load.drive import Bounds, Load

    if concurrency is not None and rate is not None:
        raise OptionError("--concurrency and --rate are two kinds of load; use one")
    if requests is not None and requests < 1:
        raise OptionError(f"--requests is {requests}; it must be at least 1")
    if duration is not None:
        _require_positive("--duration", duration)
    if warmup < 0:
        raise OptionError(f"--warmup is {warmup}; it must be at least 0")
    is_open = requests is None and duration is None
    if rate is not None:
        bounds = Bounds(_REQUESTS_OF_A_RATE if is_open else requests, duration)
        return [Load(None, each, bounds, warmup) for each in _parse_rates(rate)]
    sizes = parse_sizes("--concurrency", concurrency or "1,4,16", 1)
    if max(sizes) > _MAX_CLIENTS:
        raise OptionError(f"--concurrency {max(sizes)} is more than {_MAX_CLIENTS} clients")
    return [
        Load(
            size,
            None,
            Bounds(size * _REQUESTS_PER_CLIENT if is_open else requests, duration),
            warmup,
        )
        for size in sizes
    ]


def _parse_rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--rate {text!r} is not a list of numbers, as in --rate 0.5,2") from None
    for rate in rates:
        _require_positive("--rate", rate)
    return rates


def _plan_questions(
    dataset: Path | None,
    prompt_len: int | None,
    output_len: int | None,
    spread: float | None,
    max_total_len: int | None,
    seed: int,
) -> Questions:
    from mlc_llm.bench.load.measure import Questions
    from mlc_llm.bench.load.prompts import Lengths, read_sharegpt

    lengths = (("--prompt-len", prompt_len), ("--output-len", output_len))
    for name, value in (*lengths, ("--max-total-len", max_total_len)):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise OptionError(f"--seed is {seed}; it must be at least 0")
    if dataset is not None:
        for name, given in (("--prompt-len", prompt_len), ("--spread", spread)):
            if given is not None:
                raise OptionError(f"{name} is for made-up prompts and --dataset has its own")
        return Questions(
            exchanges=read_sharegpt(dataset),
            output_len=output_len,
            max_total_len=max_total_len or _MAX_TOTAL_LEN,
            seed=seed,
        )
    if max_total_len is not None:
        raise OptionError("--max-total-len chooses dialogues; it needs --dataset")
    if spread is not None and not 0 <= spread <= 1:
        raise OptionError(f"--spread is {spread:g}; it must be from 0 to 1")
    made_up = Lengths(prompt_len or _PROMPT_LEN, output_len or _OUTPUT_LEN, spread or 0.0)
    return Questions(lengths=made_up, seed=seed)


def _parse_endpoint(name: str) -> Endpoint:
    if name == "chat":
        return "chat"
    if name == "completions":
        return "completions"
    raise OptionError(f"--endpoint {name!r} is not known; choose chat or completions")


def _require_positive(name: str, value: float) -> None:
    # Infinity and NaN pass as numbers on command lines.
    if not 0 < value < float("inf"):
        raise OptionError(f"{name} is {value:g}; it must be a number above 0")


@contextmanager
def _serving(target: str, server_args: str | None, api_key: str | None) -> Iterator[str]:
    """Give the URL of the target; a model is served until the end of the block."""
    from mlc_llm.serve.popen_server import PopenServer

    if target.startswith(("http://", "https://")):
        if server_args is not None:
            raise OptionError("--server-args are for a model; the server of a URL runs already")
        yield target
        return
    try:
        arguments = shlex.split(server_args or "")
    except ValueError as error:
        raise OptionError(f"--server-args {server_args!r} cannot be split: {error}") from None
    if api_key is not None:
        arguments += ["--api-key", api_key]
    server = PopenServer(
        target,
        mode="server",
        port=_free_port(),
        arguments=arguments,
        start_timeout_s=_START_TIMEOUT_S,
    )
    say(f"starting `mlc_llm serve {target}` ...")
    with server:
        yield server.base_url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _print_tables(title: str, results: Sequence[Result]) -> None:
    from mlc_llm.bench.load.results import LATENCY_HEADER, RATES_HEADER

    print(title)
    print_table(RATES_HEADER, [result.rates_row() for result in results])
    print("milliseconds")
    print_table(LATENCY_HEADER, [row for result in results for row in result.latency_rows()])
    for result in results:
        for note in result.notes:
            print(note)


def _describe(questions: Questions, dataset: Path | None) -> dict[str, Any]:
    lengths = None if questions.lengths is None else vars(questions.lengths)
    return {
        "dataset": None if dataset is None else str(dataset),
        "lengths": lengths,
        "output_len": questions.output_len,
        "seed": questions.seed,
    }
