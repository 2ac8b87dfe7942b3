"""What ``attnplan verify`` does with ``--backends``, ``--catalogue`` and ``--merge``: cross-validation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import click

from attnplan.cli_common import _echo_json, _progress
from attnplan.errors import SpecError
from attnplan.spec import AttentionSpec


@attrs.frozen
class CrossValidation:
    """What was asked for on the command line."""

    backends: str | None
    catalogue: bool
    merge: tuple[str, ...]
    size: str | None
    output: str | None
    as_json: bool

    def wanted(self, file: str | None, flags: Mapping[str, Any], pinned: bool) -> bool:
        """Return whether cross-validation is asked for.

        Raises
        ------
        SpecError
            If options contradict one another.
        """
        many = self.catalogue or bool(self.merge)
        given = [name for name, value in flags.items() if value is not None and (name != "dtype" or self.merge)]
        _need(
            many or (self.size is None and self.output is None), "--size and --output belong to --catalogue or --merge"
        )
        _need(not many or not (file or given), f"a catalogue brings its specs; leave out {file or ', '.join(given)}")
        _need(
            not (self.merge and (self.catalogue or self.backends or self.size)),
            "--merge runs nothing; leave out --catalogue, --backends and --size",
        )
        folder = Path(self.output or ".").parent
        _need(folder.is_dir(), f"cannot write {self.output!r}: there is no folder {str(folder)!r}")
        wanted = many or self.backends is not None
        _need(
            not (wanted and pinned),
            "--backend, --strategy and --max-memory pin one plan; cross-validation runs all: use --backends",
        )
        return wanted

    def run(self, spec: Callable[[], AttentionSpec], dtype: str | None, **options: Any) -> None:
        """Cross-validate, print what was found, and raise if something is wrong or nothing ran."""
        from attnplan.testing import Report, catalogue, cross_validate, cross_validate_catalogue, merge

        options["backends"] = self.backends or "all"
        if self.merge:
            self._show(merge([Report.read(run) for run in self.merge]))
        elif self.catalogue:
            with _progress(len(catalogue()), "cross-validating") as advance:
                report = cross_validate_catalogue(**options, size=self.size, dtype=dtype, advance=advance)
            self._show(report)
        else:
            asked = spec()
            with _progress(None, "cross-validating"):
                matrix = cross_validate(asked, **options)
            self._show(matrix)

    def _show(self, found: Any) -> None:
        if self.output is not None:
            found.write(self.output)
        if self.as_json:
            _echo_json(found.to_dict())
        else:
            click.echo(found.text(color=sys.stdout.isatty()), nl=False)
        found.check()


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)
