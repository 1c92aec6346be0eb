"""What a number was measured on: one line for the record beside it."""

import os
import platform
from pathlib import Path


def hardware() -> str:
    """Processor, cores, system and Python."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores, {platform.system()}, Python {platform.python_version()}"
