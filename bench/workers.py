"""Starting the processes of a crew. Imports nothing slow: they start before the process that leads them is ready."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

ONE_THREAD = ("TORCHINDUCTOR_COMPILE_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment() -> dict[str, str]:
    """Return the variables of a worker: one thread each, and a cache of flash-attn 4's kernels that all share."""
    folder = Path(tempfile.gettempdir()) / "flash_attention_cute_dsl_cache"
    shared = {
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder),  # its own default asks for the user's name
    }
    return {**shared, **os.environ, **dict.fromkeys(ONE_THREAD, "1")}


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a worker that is spoken to by lines on its standard input and output."""
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), bufsize=1
    )
