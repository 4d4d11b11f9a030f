"""Streams of a real QEMU: read, taken apart, put together again, loaded."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillframe.errors import DataError
from stillframe.vmstate import writer
from stillframe.vmstate.devices import (
    DeviceSection,
    choose_state,
)
