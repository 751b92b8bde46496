"""`python -m eval serve --runs URI`: watch runs, evaluate each new checkpoint once, show everything in a browser."""

import socket
from dataclasses import dataclass
from typing import Annotated

from eval.judging.prompts import read_lines
from eval.run import RunOptions, check_metrics, settle
from eval.service.access import choose_access
from eval.service.app import build_app
from eval.service.index import Index
from eval.service.watcher import Watcher
from eval.service.worker import EvaluationSettings
from infra.cli import FLAT
from infra.errors import UserError
from infra.log import get_logger

log = get_logger("service")


@dataclass(frozen=True)
class ServeOptions:
    """Watch runs, evaluate each new checkpoint once, and show losses, scores, samples and scaling laws as web pages."""

    evaluation: Annotated[RunOptions, FLAT]
    port: int = 8080
    """0 takes a free one"""
    host: str = "127.0.0.1"
    """another address than loopback needs --token-file"""
    token_file: str | None = None
    """file with the token that readers must give"""
    evaluate: bool = True
    """--no-evaluate only shows what is in the store"""
    retry: bool = False
    """try failed checkpoints once more"""
    every: float = 10.0
    """seconds between two looks at the store"""
    gallery: str | None = None
    """file with prompts (one per line) to draw from every checkpoint; the world has its own"""


def serve(options: ServeOptions) -> None:
    """Runs until it is interrupted."""
    access = choose_access(options.host, options.token_file)
    index, watcher = prepare(options)
    listening = _listen(options.host, options.port)
    address = _format_address(listening)
    watcher.start()
    print(f"beeline eval service on {address}" + (" (with ?token=TOKEN)" if access.token else ""), flush=True)
    try:
        import uvicorn

        config = uvicorn.Config(
            build_app(index, watcher, access), log_level="warning", access_log=False, timeout_graceful_shutdown=3
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        watcher.stop()


def prepare(options: ServeOptions) -> tuple[Index, Watcher]:
    """Everything but the web; refuses settings with which no checkpoint could be evaluated."""
    wanted = options.evaluation
    if options.evaluate and wanted.metrics:  # without any, only the gallery is drawn
        check_metrics(wanted.metrics)
    if wanted.checkpoints not in ("all", "last"):
        raise UserError(f"--checkpoints {wanted.checkpoints!r}: a service evaluates all, or the last of each run")
    if not 0 <= options.port < 65536:
        raise UserError(f"--port {options.port}: expected 0 to 65535")
    if not options.every > 0:
        raise UserError(f"--every {options.every:g}: expected seconds, more than 0")
    wanted.check()
    gallery = tuple(read_lines(options.gallery)) if options.gallery else ()
    index = Index(wanted.runs)
    if not options.evaluate:
        return index, Watcher(index, None, every=options.every)
    from eval.judging.judges import build_judges

    build_judges(wanted.judges, wanted.official)
    wanted = settle(wanted)
    return index, Watcher(index, EvaluationSettings(wanted, gallery), every=options.every, retry=options.retry)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)  # whoever reads our address may connect at once, and waits until the server answers
        return found
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host} port {port} ({reason}): choose another --port") from error


def _format_address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
