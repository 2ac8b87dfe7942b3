"""Backends: torch-free declarations of what can run where, each with an emitter beside it."""

from attnplan.backends.base import Backend, Program, Schedule
from attnplan.backends.registry import Registry, registry

__all__ = ["Backend", "Program", "Registry", "Schedule", "registry"]
