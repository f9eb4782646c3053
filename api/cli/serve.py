"""`halyard serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import argparse
from pathlib import Path

from halyard.api.cli import options

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="embedded", help="folder or Hugging Face id (default: embedded)"
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    group.add_argument("--served-model-name", nargs="+", default=(), metavar="NAME",
                       help="what clients call the model; more names are aliases")  # fmt: skip
    group.add_argument("--grace-seconds", type=float, default=5.0, metavar="S",
                       help="running requests get that long at Ctrl-C (%(default)s)")  # fmt: skip
    group.add_argument("--access-log", action="store_true", help="log one line a request")
    group.add_argument("--log-format", choices=("text", "json"), default="text",
                       help="of log lines on standard error (%(default)s)")  # fmt: skip
    group.add_argument(
        "--metrics-compat",
        choices=("vllm",),
        help="vLLM's metric names beside Halyard's at /metrics",
    )
    group.add_argument("--otlp-endpoint", metavar="URL",
                       help="send traces there (OTLP over HTTP), e.g. http://collector:4318")  # fmt: skip
    group.add_argument("--allow-origin", nargs="+", default=(), metavar="ORIGIN",
                       help="web sites whose scripts may call the API")  # fmt: skip
    group.add_argument("--data-dir", type=Path, metavar="DIR",
                       help="keeps files and batches (default: only while it runs)")  # fmt: skip
    group.add_argument("--in-process", action="store_true",
                       help="run the engine's steps in a thread of the server")  # fmt: skip
    group.add_argument("--hang-seconds", type=float, default=120.0, metavar="S",
                       help="a step that takes longer has hung; 0: never (%(default)s)")  # fmt: skip
    group.add_argument("--load-seconds", type=float, default=1800.0, metavar="S",
                       help="a phase of loading that takes longer has hung; 0: never (%(default)s)")  # fmt: skip
    safety = parser.add_argument_group("tenants and limits")
    safety.add_argument("--api-keys", type=Path, metavar="FILE",
                        help="who may call, made by `halyard keys` (default: everybody)")  # fmt: skip
    safety.add_argument("--request-timeout", type=float, metavar="S",
                        help="answers end as they are after that many seconds")  # fmt: skip
    safety.add_argument("--max-body-mib", type=float, default=32, metavar="N",
                        help="larger request bodies are refused (%(default)s)")  # fmt: skip
    safety.add_argument("--max-connections", type=int, default=4096, metavar="N",
                        help="open at once; more are refused (%(default)s)")  # fmt: skip
    safety.add_argument("--prompt-log", type=Path, metavar="DIR",
                        help="log prompts and answers there, a file a tenant (default: nowhere)")  # fmt: skip

    group.add_argument("--max-restarts", type=int, default=5, metavar="N",
                       help="engines that die soon, in a row, before it stays down (%(default)s)")  # fmt: skip
    group.add_argument("--enable-admin", action="store_true",
                       help="answer POST /admin/reload, /admin/sleep and /admin/wake")  # fmt: skip

    options.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # Imported here: a wrong command line should not wait for the web framework.
    from halyard.api.logs import configure
    from halyard.api.restarts import RestartConfig
    from halyard.api.server import ServerConfig, serve

    configure(args.log_format, access_log=args.access_log)
    server = ServerConfig(
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name),
        grace_seconds=args.grace_seconds,
        access_log=args.access_log,
        log_format=args.log_format,
        otlp_endpoint=args.otlp_endpoint,
        metrics_compat=args.metrics_compat,
        allowed_origins=tuple(args.allow_origin),
        data_dir=args.data_dir,
        in_process=args.in_process,
        hang_seconds=args.hang_seconds or None,
        load_seconds=args.load_seconds or None,
        api_keys=args.api_keys,
        request_timeout=args.request_timeout,
        prompt_log=args.prompt_log,
        max_connections=args.max_connections,
        max_body_bytes=int(args.max_body_mib * (1 << 20)),
        restarts=RestartConfig(max_in_a_row=0 if args.in_process else args.max_restarts),
        enable_admin=args.enable_admin,
    )
    return serve(options.engine_config(args), server, lambda line: print(line, flush=True))
