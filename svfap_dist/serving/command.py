"""Serve a network until Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_sharding.faces import detect
from svfap_dist.progress import waiting
from svfap_dist.serving import web
from svfap_dist.serving.analyze import Analyzer
from svfap_dist.serving.prepare import NO_DETECTOR
from svfap_dist.video.probe import Limits

MEMORY_BYTES = 4 << 30  # address space of the process that decodes
log = logging.getLogger(__name__)


class Address(NamedTuple):
    """Where to listen. token_file: path of a file with the token; empty: the environment's."""

    host: str
    port: int
    token_file: str = ""


def serve(
    url: str,
    address: Address,
    limits: Limits,
    *,
    queue: int,
    detector: str,
    device: str,
    overrides: Mapping[str, Any],
    on_start: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a network until Ctrl-C.

    Args:
        url: As `inference.load.load`.
        address: Where to listen.
        limits: What a video may cost.
        queue: Videos that may wait while one is computed.
        detector: As `prepare.Preparer`.
        device: As `inference.load.move`.
        overrides: As `inference.load.load`.
        on_start: Called with the URL of the page once it can be used.

    Raises:
        CheckpointError: There is no network.
        ConfigError: An option does not fit, or the address cannot be used.
        StorageError: The store fails.
    """
    token = web.read_token(address.token_file)
    if detector != NO_DETECTOR:
        detect.load_detector(detector)  # a wrong name fails here, once
    with web.listen(address.host, address.port, has_token=bool(token)) as listener:
        with waiting(f"Loading {url}"):
            analyzer = Analyzer(url, overrides, device, detector, limits)
        name = "/".join(url.rstrip("/").split("/")[-2:])  # the rest may be private
        service = web.Service(analyzer, analyzer.info, name, limits, queue, token)
        host, port = listener.getsockname()[:2]
        page = f"http://{_netloc(host, port)}"
        log.info("Serving %s at %s (Ctrl-C stops it)", url, page)
        on_start(page)
        with contextlib.closing(analyzer), contextlib.suppress(KeyboardInterrupt):
            web.build_server(web.build_app(service)).run(sockets=[listener])


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
