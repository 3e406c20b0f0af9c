"""What machine this is, in words, for results."""

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Processor and number of cores."""
    return f"{_processor()}, {os.cpu_count()} cores"


def memory_gb() -> float:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
