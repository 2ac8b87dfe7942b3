"""Tells when a compiler works. Nothing of that needs the device, so others may use it meanwhile.

Compilers start in the midst of a first call: Inductor for FlexAttention, Triton for kernels of attnplan's own, and
flash-attn 4's. In each, the one function through which every compilation goes is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

Away = Callable[[str], AbstractContextManager[None]]
"""Makes the context in which a compiler of that name works."""


_UNKNOWN: set[str] = set()


def watch(away: Away) -> None:
    """Wrap the compilers that were imported and are not wrapped yet.

    Parameters
    ----------
    away
        Called each time that a compiler starts, with its name; compilers may start others.
    """
    for module, (name, holder, method, within) in COMPILERS.items():
        if module not in sys.modules or module in _UNKNOWN:
            continue
        try:
            owner = holder(sys.modules[module])
            original = getattr(owner, method)
        except AttributeError as error:
            print(f"{name} is not watched, it has the device while it compiles: {error}", file=sys.stderr, flush=True)
            _UNKNOWN.add(module)
            continue
        if not hasattr(original, "watched"):
            wrapped = within(original, away, name)
            wrapped.watched = True
            setattr(owner, method, wrapped)


def _call(original: Callable[..., Any], away: Away, name: str) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with away(name):
            return original(*args, **kwargs)

    return call


def _context(original: Callable[..., Any], away: Away, name: str) -> Any:
    @functools.wraps(original)
    @contextlib.contextmanager
    def context(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = {getattr(x, "name", "") for x in (*args, *kwargs.values())}
        compiles = names & {"DYNAMO", "LAZY_BACKWARD"}  # others choose among kernels, or record them
        with away(name) if compiles else contextlib.nullcontext(), original(self, *args, **kwargs):
            yield

    return context


COMPILERS: dict[str, tuple[str, Callable[[Any], Any], str, Callable[[Callable[..., Any], Away, str], Any]]] = {
    "torch._dynamo.callback": ("Inductor", lambda m: m.CompilationCallbackHandler, "install_callbacks", _context),
    "triton.runtime.jit": ("Triton", lambda m: m.JITFunction, "_do_compile", _call),
    "cutlass.cute": ("flash-attn 4's compiler", lambda m: type(m.compile), "__call__", _call),
}
"""By module: the compiler's name, what holds the function that is wrapped, its name, and how it is wrapped."""
