"""Refuse URLs that carry credentials.

URLs are in logs, events, recipes, checkpoints and process lists, and credentials must not be. They
come from the environment (AWS_..., GOOGLE_..., ...), from files of the client libraries or from the
machine itself. The errors here do not repeat what they refuse.
"""

from __future__ import annotations

import re

from svfap_dist.errors import ConfigError

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(\S*)", re.IGNORECASE)
_SECRET_PARAMETER = re.compile(
    r"[?&]([^=&]*(signature|credential|token|secret|password)|sig|(aws)?accesskeyid)=",
    re.IGNORECASE,
)
_DO = (
    "leave them out of the URL: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the "
    "store's client reads, in the environment, which no log or file of a run shows"
)


def refuse_credentials(text: str, where: str) -> None:
    """Raise if a URL in a text has a user's name and password, or a signature.

    Args:
        text: A URL, or a text that may contain some.
        where: Its place, for the error.

    Raises:
        ConfigError: It has; the error shows the URL's scheme only.
    """
    for url in _URL.finditer(text):
        if _has_credentials(url[1].lower(), url[2]):
            raise ConfigError("URL contains credentials", where, f"{url[1]}://***", _DO)


def _has_credentials(scheme: str, rest: str) -> bool:
    authority = rest.partition("/")[0]
    user, at, _ = authority.rpartition("@")
    if at and (":" in user or scheme in ("s3", "http", "https")):
        return True
    # A secret may have a slash itself.
    name, colon, after = authority.partition(":")
    if colon and "@" in rest and not after.isdigit() and name != "arn" and not at:
        return True
    # To S3 a question mark is part of a key.
    return scheme != "s3" and _SECRET_PARAMETER.search(rest) is not None
