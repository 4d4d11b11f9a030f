"""An object store that starts at once: moto's S3 server, an emulator in Python."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

from tests.support_store.s3_server import BUCKET, S3Server, serving


class ObjectServer(S3Server):
    """Keeps all in memory, and checks no signature."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop()
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        self.port = self._listening()
        request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=60).close()

    def _listening(self, within_s: float = 60.0) -> int:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.process.poll() is None:
            self._log.seek(0)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", self._log.read()):
                return int(found[1])
            time.sleep(0.05)
        self.stop()
        raise RuntimeError("the object store did not start")

    def stop(self) -> None:
        super().stop()
        self._log.close()


def object_server() -> contextlib.AbstractContextManager[S3Server]:
    """A server and, in this process's environment, what its clients need."""
    return serving(ObjectServer)
