"""Commands that measure: ``calibrate`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from attnplan.cli_common import _JSON, _SPEC_OPTIONS, _echo, _echo_json, _options, _progress, _spec, main
from attnplan.errors import NoBackendError, SpecError


@main.command("calibrate")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda: a device that is here.")
@click.option("--budget", type=click.FloatRange(min=1), metavar="SECONDS", help="Default: 90 on a GPU, 240 on a CPU.")
@click.option("--dry-run", is_flag=True, help="Measure and fit, and write nothing.")
@_JSON
def calibrate_device(device: str, budget: float | None, dry_run: bool, as_json: bool) -> None:
    """Measure this machine, so that plans are priced with what it reaches and not with data sheets."""
    from attnplan.cost import resolve

    target = resolve(device)
    if target.torch_device is None:
        raise NoBackendError(f"{target.device.title} is not here to be measured; calibrate where it is")
    from attnplan.calibrate import calibrate, grid

    try:
        with _progress(len(grid(target.device.kind)), "calibrating") as advance:
            found = calibrate(target, budget, lambda name: advance(), keep=not dry_run)
    except KeyboardInterrupt:
        click.echo("interrupted: nothing was written, plans are priced as before", err=True)
        raise click.exceptions.Exit(130) from None
    facts = {
        "device": found.device.name,
        "measurements": found.measurements,
        "error": found.error,
        "error_before": found.error_before,
        "spread": found.spread,
        "seconds": found.seconds,
        "path": None if found.path is None else str(found.path),
        "numbers": found.numbers,
    }
    if as_json:
        _echo_json(facts)
        return
    where = "written nowhere" if found.path is None else f"written to {found.path}"
    _echo(
        f"{found.device.title}: {found.measurements} measurements in {found.seconds:.0f} s, {where}\n"
        f"predictions are off by {100 * found.error:.0f} % on average, {100 * found.error_before:.0f} % before; "
        f"rounds differ by {100 * found.spread:.0f} %\n"
    )


@main.command("bench")
@click.argument("files", nargs=-1)
@_options(_SPEC_OPTIONS)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda: a device that is here.")
@click.option("--backends", metavar="NAMES", default="", help="Backends that take part, by commas; default: all.")
@click.option("--peers", metavar="NAMES", default="sdpa,cudnn,flex,fa4", show_default=True,
              help="Calls outside attnplan that take part where they can say the pattern.")  # fmt: skip
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(2), help="Timed rounds, all taking turns.")
@click.option("--output", metavar="FILE", help="Write the rows as JSON.")
@_JSON
def bench_specs(files: tuple[str, ...], device: str, backends: str, peers: str, rounds: int, output: str | None,
                as_json: bool, **flags: Any) -> None:  # fmt: skip
    """Run every candidate of each spec beside kernels called by hand: times, memory and errors, in one process."""
    from attnplan.cost import resolve
    from attnplan.harness.names import check_names

    specs = {file: _spec(file, flags) for file in files} or {"spec": _spec(None, flags)}
    if len(specs) < len(files):
        raise SpecError("a spec file is named twice")
    chosen = check_names(backends, peers)
    target = resolve(device)
    if target.torch_device is None:
        raise NoBackendError(f"{target.device.title} is not here to run on")
    from attnplan.harness import environment, table, write_rows
    from attnplan.harness.run import run_specs

    with _progress(len(specs), "measuring") as advance:
        rows = run_specs(specs, target, *chosen, rounds, lambda name: advance())
    head = {"environment": environment()}
    if output is not None:
        try:
            write_rows(Path(output), head, rows)
        except OSError as error:
            raise SpecError(f"cannot write {output!r}: {error.strerror}") from None
    if as_json:
        _echo_json({**head, "rows": rows})
    else:
        _echo(table(rows))
    if not any("seconds" in row for row in rows):
        raise NoBackendError("nothing ran")
