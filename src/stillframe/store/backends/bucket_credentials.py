"""Credentials that obstore does not find itself: the AWS command line's profiles.

obstore reads instance metadata and the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``AZURE_STORAGE_...``, ``GOOGLE_...``).
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import Any, Final

_KEYS: Final = {
    "aws_access_key_id": "aws_access_key_id",
    "aws_secret_access_key": "aws_secret_access_key",
    "aws_session_token": "aws_session_token",
    "region": "aws_region",
    "endpoint_url": "aws_endpoint",
}


def profile(url: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return obstore's ``config`` and ``client_options`` for a store at ``url``.

    The environment wins over a profile. The default region is ``us-east-1``, as in boto for S3.
    Plain HTTP is allowed only for an endpoint given as ``http://``.
    """
    if not url.startswith("s3"):
        return {}, {}
    environment = os.environ
    config: dict[str, str] = {}
    if "AWS_ACCESS_KEY_ID" not in environment:
        config = _from_files(environment.get("AWS_PROFILE", "default"))
    endpoint = (
        environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or config.get("aws_endpoint")
    )
    if endpoint:
        config["aws_endpoint"] = endpoint
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    config["aws_region"] = region or config.get("aws_region", "us-east-1")
    plain = bool(endpoint and endpoint.startswith("http://"))
    return config, {"allow_http": True} if plain else {}


def _from_files(name: str) -> dict[str, str]:
    home = Path.home() / ".aws"
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.environ.get(variable) or home / file)
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
        if parser.has_section(section):
            items = dict(parser.items(section))
            found |= {ours: items[theirs] for theirs, ours in _KEYS.items() if theirs in items}
    return found
