"""Files that outlive a process: in the user's cache directory, whole or not at all, and never needed.

The directory is ``$ATTNPLAN_CACHE``, or where the system keeps caches. What cannot be read or written is said in words,
and planning goes on without it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from attnplan.errors import SpecError

MAX_BYTES = 4 * 2**20


def cache_dir() -> Path:
    """Return the directory of files that outlive a process; it need not exist.

    Examples
    --------
    >>> import os
    >>> before = os.environ.get("ATTNPLAN_CACHE")
    >>> os.environ["ATTNPLAN_CACHE"] = "/somewhere"
    >>> cache_dir().as_posix()
    '/somewhere'
    >>> _ = os.environ.pop("ATTNPLAN_CACHE") if before is None else os.environ.update(ATTNPLAN_CACHE=before)
    """
    given = os.environ.get("ATTNPLAN_CACHE")
    if given:
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "attnplan"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "attnplan" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnplan"


@attrs.frozen
class Kept:
    """What a file held."""

    data: dict[str, Any] | None = None
    """None if there is no such file, or it cannot be used."""
    note: str = ""
    """Why it cannot be used; empty where nothing is wrong."""
    stamp: int = 0
    """When it was written, in nanoseconds; 0 if there is none."""


def stamp(name: str) -> int:
    """Return when a file of the cache was written, in nanoseconds, 0 if there is none."""
    try:
        return (cache_dir() / name).stat().st_mtime_ns
    except OSError:
        return 0


def read(name: str, schema: int) -> Kept:
    """Return a file of the cache. One that is damaged is moved aside, one of another user's is not read."""
    path = cache_dir() / name
    try:
        status = path.stat()
    except OSError:
        return Kept()
    if _is_foreign(status.st_uid):
        return Kept(None, f"{path} belongs to another user and is not used")
    try:
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise ValueError("it holds no schema")
    except OSError as error:
        return Kept(None, f"cannot read {path}: {error.strerror}")
    except ValueError as error:  # not UTF-8, not JSON, cut off
        return Kept(None, f"{path} is damaged ({str(error).splitlines()[0]}) and {set_aside(path)}")
    if data["schema"] != schema:
        return Kept(None, f"{path} has schema {data['schema']}, this version reads {schema}: measure again")
    return Kept(data, "", status.st_mtime_ns)


def set_aside(path: Path) -> str:
    """Move a damaged file out of the way, and return what was done in words."""
    target = path.with_name(path.name + ".damaged")
    try:
        path.replace(target)
    except OSError as error:
        return f"could not be moved aside ({error.strerror}); it is not used"
    return f"was moved to {target.name}"


def write(name: str, schema: int, data: dict[str, Any]) -> Path:
    """Write a file of the cache, all of it or nothing, and return where it is.

    Raises
    ------
    SpecError
        If the directory cannot be written to, is full, or belongs to another user.
    """
    directory = cache_dir()
    advice = "set ATTNPLAN_CACHE to a directory of your own"
    path = directory / name
    draft = directory / f".{name}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if _is_foreign(directory.stat().st_uid):
            raise SpecError(f"the cache directory {directory} belongs to another user; {advice}")
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"schema": schema, **data}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror}; {advice}") from None
    finally:
        with suppress(OSError):  # the directory is not there, or not ours
            draft.unlink(missing_ok=True)
    return path


def _is_foreign(owner: int) -> bool:
    """Return whether a file of this owner is another user's; what the administrator put there is trusted."""
    return hasattr(os, "getuid") and owner not in (os.getuid(), 0)
