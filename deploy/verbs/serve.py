"""`edgereg serve`: a bundle behind HTTP."""

import argparse
import json
import signal
import sys
import threading

from deploy.terminal import printable
from deploy.verbs.arguments import (
    add_bundle_arguments,
    natural,
    open_runner_of,
    positive_float,
    positive_int,
)

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of `edgereg serve`."""
    serve = subparsers.add_parser(
        "serve",
        help="answer over HTTP: the Open Inference Protocol v2, and metrics",
        description="Serve a bundle by the Open Inference Protocol v2 (REST), with Prometheus "
        "metrics at /metrics. There is no encryption and nobody is asked who they are: it listens "
        "on this machine only, unless told otherwise. SIGTERM stops it when all that was taken is "
        "answered.",
    )
    add_bundle_arguments(serve, json_help="print one JSON line when it is ready")
    serve.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)"
    )
    serve.add_argument(
        "--port", type=natural, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    serve.add_argument(
        "--queue",
        type=positive_int,
        default=64,
        metavar="N",
        help="requests that may wait; one more is refused with 503 (default: %(default)s)",
    )
    serve.add_argument(
        "--max-wait-ms",
        type=positive_float,
        default=2.0,
        metavar="MS",
        help="how long the first image of a batch waits for others (default: %(default)g)",
    )
    serve.add_argument(
        "--max-body-mib",
        type=positive_float,
        metavar="MIB",
        help="the largest request (default: what a full batch takes as JSON)",
    )
    serve.add_argument(
        "--drain-s",
        type=positive_float,
        default=20.0,
        metavar="S",
        help="after SIGTERM, how long what was taken may need (default: %(default)g)",
    )
    serve.set_defaults(handler=_serve)


def _serve(args: argparse.Namespace) -> int:
    from deploy.bundle.read import open_bundle
    from deploy.errors import BadInputError
    from deploy.service.serve import Limits, Service, body_limit

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    limit = body_limit(open_bundle(args.bundle))
    if args.max_body_mib is not None:
        limit = int(args.max_body_mib * 2**20)
    limits = Limits(args.queue, args.max_wait_ms / 1e3, drain_s=args.drain_s)
    try:
        service = Service((args.host, args.port), limits=limits, max_body_bytes=limit)
    except (OSError, OverflowError) as error:
        raise BadInputError(
            "the address to listen on must be free, and this machine's",
            found=f"{args.host}:{args.port}: {error}",
            remedy="choose another --host or --port",
        ) from error
    try:
        service.load(lambda: open_runner_of(args))
        _say(args, service.url)
        service.wait(stop)
    finally:
        drained = service.stop()
    if not drained:
        print(f"edgereg: not all was answered within {args.drain_s:g} s", file=sys.stderr)
    return 0 if drained else 1


def _say(args: argparse.Namespace, url: str) -> None:
    document = json.dumps({"url": url, "bundle": str(args.bundle)})
    text = f"serving {printable(str(args.bundle))} on {url}"
    print(document if args.json else text, flush=True)
