"""`mlc_llm serve`: prepare a model and answer OpenAI's requests for it until a signal.

Knows the options and the order of the steps. What is missing (download, conversion, compilation)
is made by `prepare`; everything that can be refused is refused before that.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlc_llm.cli.open_model import (
    DEMO_NAME,
    ModelArgument,
    ModelLibOption,
    OptOption,
    SourceQuantizationOption,
    ThreadsOption,
    optimization_level,
    require_library,
    use_threads,
)
from mlc_llm.cli.options import (
    DeviceOption,
    LoraAdapterOption,
    parse_overrides,
    require_text,
)
from mlc_llm.cli.serve_models import Choice, open_models
from mlc_llm.cli.terminal import say
from mlc_llm.engine.config import SERVE_OVERRIDES, EngineConfig, apply_overrides
from mlc_llm.errors import EngineStopped, ModelNotFound, OptionError

if TYPE_CHECKING:
    from mlc_llm.serve.options import AppOptions

_KEY_VARIABLE = "MLC_LLM_API_KEY"


def serve(
    model: ModelArgument = None,
    device: DeviceOption = "auto",
    model_lib: ModelLibOption = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="local (a few users), interactive (one) or server (all that memory bears).",
        ),
    ] = "local",
    quantization: SourceQuantizationOption = None,
    lora_adapter: LoraAdapterOption = None,
    opt: OptOption = None,
    threads: ThreadsOption = None,
    model_id: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the model in requests; MODEL if left out."),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 0.0.0.0 for all networks.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", help="Port to listen on; 0 takes any free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help=f"Key that requests must bring, /health excepted; or set {_KEY_VARIABLE}.",
        ),
    ] = None,
    overrides: Annotated[
        str,
        typer.Option(
            metavar="K=V;K=V",
            help=f"Change limits of the engine: {', '.join(SERVE_OVERRIDES)}.",
            show_default=False,
        ),
    ] = "",
    prefix_cache_mode: Annotated[
        str, typer.Option(metavar="MODE", help="radix keeps earlier prompts; or disable.")
    ] = "radix",
    prefill_mode: Annotated[
        str,
        typer.Option(
            metavar="MODE", help="hybrid mixes prompts with generation in one step; or chunked."
        ),
    ] = "hybrid",
    tool_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes calls of tools, as docs/tools.md names it; auto looks at "
            "its chat template.",
        ),
    ] = "auto",
    reasoning_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How it marks its thoughts: auto, none, think, mistral, cohere."
        ),
    ] = "auto",
    max_queued_requests: Annotated[
        int, typer.Option(metavar="N", help="Requests that may wait; more are refused (429).")
    ] = 512,
    request_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Longest a request may take; 0 for no limit.")
    ] = 3600.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Longest wait for running requests after a signal to stop."
        ),
    ] = 30.0,
    allow_origins: Annotated[
        str,
        typer.Option(
            metavar="JSON", help="Web pages that may ask (CORS), as a JSON list; none if left out."
        ),
    ] = "[]",
    allow_methods: Annotated[
        str, typer.Option(metavar="JSON", help="Methods they may use.")
    ] = '["*"]',
    allow_headers: Annotated[
        str, typer.Option(metavar="JSON", help="Headers they may send.")
    ] = '["*"]',
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials", help="Let them send cookies and passwords.")
    ] = False,
    allow_hosts: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Names in the Host header that are answered, beside this machine's own; any if "
            "left out, except on a loopback address.",
        ),
    ] = None,
    model_task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="chat; rerank: /v1/rerank is answered too, by asking MODEL as Qwen3-Reranker is "
            "asked; auto: as the model's files say.",
        ),
    ] = "auto",
    embedding_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Model that answers /v1/embeddings; MODEL itself may be one."
        ),
    ] = None,
    embedding_model_lib: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its library, made by `compile`.")
    ] = None,
    additional_models: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Draft models; not supported yet, so refused."),
    ] = None,
    speculative_mode: Annotated[
        str, typer.Option(metavar="MODE", help="disable; speculation is not supported yet.")
    ] = "disable",
    enable_debug: Annotated[
        bool,
        typer.Option(
            "--enable-debug", help="Add the routes /debug/*; take debug_config in requests."
        ),
    ] = False,
    enable_tracing: Annotated[
        bool, typer.Option("--enable-tracing", help="Not supported yet, so refused.")
    ] = False,
) -> None:
    """Serve a model to OpenAI clients, and a chat page to browsers.

    SIGTERM or Ctrl-C lets running requests finish; a second one stops at once.
    """
    if enable_tracing:
        raise OptionError("--enable-tracing is not supported in this release; leave it out")
    values = parse_overrides(overrides, SERVE_OVERRIDES)
    level = optimization_level(opt, values.pop("opt", None), model_lib)
    config = EngineConfig(
        mode=mode,  # type: ignore[arg-type]  # checked there
        prefix_cache_mode=prefix_cache_mode,
        prefill_mode=prefill_mode,
        speculative_mode=speculative_mode,
        additional_models=list(additional_models or []),
        max_queued_requests=max_queued_requests,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        model_task=model_task,
        request_timeout_s=_seconds("--request-timeout", request_timeout) or None,
    )
    config = apply_overrides(config, values)
    _seconds("--drain-timeout", drain_timeout)
    if embedding_model_lib is not None and embedding_model is None:
        raise OptionError("--embedding-model-lib needs --embedding-model; name the model too")
    name = DEMO_NAME if model is None else model
    if model_id is not None:
        name = require_text("--model-id", model_id)
    options = _read_options(
        host,
        os.environ.get(_KEY_VARIABLE) or None if api_key is None else api_key,
        allow_origins=allow_origins,
        allow_methods=allow_methods,
        allow_headers=allow_headers,
        allow_credentials=allow_credentials,
        allow_hosts=allow_hosts,
        enable_debug=enable_debug,
    )
    _check_early(device, level)
    require_library(model_lib)
    if embedding_model_lib is not None and not embedding_model_lib.exists():
        raise ModelNotFound(
            f"--embedding-model-lib {embedding_model_lib} does not exist; "
            "make it with mlc_llm compile"
        )
    use_threads(threads)
    chosen = Choice(
        model, model_lib, embedding_model, embedding_model_lib, quantization, lora_adapter, level
    )
    _serve(chosen, device, config, name, options, host, port, drain_timeout)


def _seconds(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise OptionError(f"{name} is {value}; it must be a number of seconds, 0 or more")
    return value


def _read_options(
    host: str,
    api_key: str | None,
    *,
    allow_origins: str,
    allow_methods: str,
    allow_headers: str,
    allow_credentials: bool,
    allow_hosts: str | None,
    enable_debug: bool,
) -> AppOptions:
    from mlc_llm.serve.options import LOOPBACK_HOSTS, AppOptions, parse_list

    hosts: tuple[str, ...] | None = None
    if allow_hosts is not None or _is_loopback(host):
        given = [] if allow_hosts is None else parse_list("--allow-hosts", allow_hosts)
        hosts = (*LOOPBACK_HOSTS, host, *given)
    if api_key is None and not _is_loopback(host):
        say(f"warning: whoever reaches {host} may use this server; --api-key asks for a key")
    return AppOptions(
        api_key=api_key,
        allow_origins=tuple(parse_list("--allow-origins", allow_origins)),
        allow_methods=tuple(parse_list("--allow-methods", allow_methods)),
        allow_headers=tuple(parse_list("--allow-headers", allow_headers)),
        allow_credentials=allow_credentials,
        allow_hosts=hosts,
        enable_debug=enable_debug,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_early(device: str, opt: str) -> None:
    """Raise for values that would be refused only after a download or a conversion."""
    from mlc_llm.compiler.target import describe_any_target
    from mlc_llm.device import parse_device

    parse_device(device)
    describe_any_target(device, opt)


def _serve(
    chosen: Choice,
    device: str,
    config: EngineConfig,
    name: str,
    options: AppOptions,
    host: str,
    port: int,
    drain_timeout_s: float,
) -> None:
    from mlc_llm.engine.worker import EngineWorker
    from mlc_llm.serve.app import create_app
    from mlc_llm.serve.catalog import ServedModels
    from mlc_llm.serve.gate import Traffic
    from mlc_llm.serve.heap import return_freed_memory
    from mlc_llm.serve.model import ServedModel
    from mlc_llm.serve.server import bind, serve, url_of

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return_freed_memory()
    sockets = bind(host, port)
    with ExitStack() as cleanup:
        for bound in sockets:
            cleanup.callback(bound.close)
        opened, embedding, running = open_models(chosen, device, config, name, cleanup)
        workers, served = [], None
        if opened is not None:
            if config.verbose:
                say(str(opened.plan))
            worker = EngineWorker(
                opened.engine,
                max_queued_requests=config.max_queued_requests,
                request_timeout_s=config.request_timeout_s,
            )
            workers, served = [worker], ServedModel.of(name, opened, worker)
        traffic = Traffic()
        app = create_app(ServedModels(served, embedding), options, traffic)

        def announce() -> None:
            url = url_of(host, sockets)
            running.listen(url)
            print(f"Listening on {url}", flush=True)
            if opened is not None and opened.engine.grammars is not None:
                opened.engine.grammars.start()

        has_drained = serve(
            app,
            workers,
            traffic,
            sockets,
            drain_timeout_s=drain_timeout_s,
            announce=announce,
        )
    if not has_drained:
        raise EngineStopped("the server stopped before all its requests were finished")
