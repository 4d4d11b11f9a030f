"""An S3 server on loopback, a process of its own: what who uses it needs to know."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pytest

BUCKET = "stillframe-tests"


class S3Server:
    """A server that runs; ``url`` is a fresh prefix each time. Subclasses start it."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """A prefix that nobody uses."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    @property
    def environment(self) -> dict[str, str]:
        """What the programs that use it need."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """Amazon's own client, for what a store never asks for."""
        import boto3  # of moto's extra; half a second
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 1}, read_timeout=60),
        )

    def stop(self) -> None:
        """As ``kill -9`` does."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def only_these(prefix: str, values: Mapping[str, str]) -> Iterator[None]:
    """In this process's environment, of all variables that begin so."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(prefix)]:
            patch.delenv(name)
        for name, value in values.items():
            patch.setenv(name, value)
        yield


Started = TypeVar("Started", bound=S3Server)


@contextlib.contextmanager
def serving(start: Callable[[], Started]) -> Iterator[Started]:
    """A server and, in this process's environment, what its clients need."""
    server = start()
    try:
        with only_these("AWS_", server.environment):
            yield server
    finally:
        server.stop()
