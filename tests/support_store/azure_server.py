"""Azure's blob storage on loopback: Azurite from the npm registry, a process of its own.

Too heavy for every run (180 MiB of packages), so only the soak tests use it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hmac
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.support_store.s3_server import only_these

_ACCOUNT = "devstoreaccount1"
# The account that every Azurite has; its documentation prints this key.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_CONTAINER, _VERSION = "stillframe-tests", "2021-08-06"


class AzureServer:
    """A server that runs; ``url`` is a fresh prefix each time."""

    def __init__(self, directory: Path) -> None:
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--silent", "azurite@3"],
            cwd=directory,
            check=True,
            timeout=600,
        )
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.process = subprocess.Popen(
            [str(directory / "node_modules/.bin/azurite-blob"), "--silent", "--skipApiVersionCheck",
             "--blobPort", self.endpoint.rpartition(":")[2], "--location", str(directory / "data")],
        )  # fmt: skip
        deadline_s = time.monotonic() + 120
        while True:
            try:
                self._make_container()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    self.stop()
                    raise
                time.sleep(0.1)

    def _make_container(self) -> None:
        """Source: "Create Container" and "Authorize with Shared Key" of Azure's REST reference."""
        now = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        signed = [
            "PUT", *[""] * 11, f"x-ms-date:{now}", f"x-ms-version:{_VERSION}",
            f"/{_ACCOUNT}/{_ACCOUNT}/{_CONTAINER}", "restype:container",
        ]  # fmt: skip
        digest = hmac.digest(base64.b64decode(_KEY), "\n".join(signed).encode(), "sha256")
        signature = base64.b64encode(digest).decode()
        request = urllib.request.Request(
            f"{self.endpoint}/{_ACCOUNT}/{_CONTAINER}?restype=container",
            method="PUT",
            headers={
                "x-ms-date": now,
                "x-ms-version": _VERSION,
                "Authorization": f"SharedKey {_ACCOUNT}:{signature}",
            },
        )
        urllib.request.urlopen(request, timeout=30).close()

    @property
    def url(self) -> str:
        """A prefix that nobody uses."""
        return f"az://{_CONTAINER}/{uuid.uuid4().hex}"

    @property
    def environment(self) -> dict[str, str]:
        """What the programs that use it need."""
        return {
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": self.endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
        }

    def stop(self) -> None:
        """As ``kill -9`` does."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def azure_server(directory: Path) -> Iterator[AzureServer]:
    """A server and, in this process's environment, what its clients need."""
    server = AzureServer(directory)
    try:
        with only_these("AZURE_", server.environment):
            yield server
    finally:
        server.stop()
