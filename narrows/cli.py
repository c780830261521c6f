"""The command line; its `--json` is the contract for scripts."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narrows import __version__
from narrows.core.errors import NarrowsError

if TYPE_CHECKING:
    from rich.console import Console

    from narrows.core.case import Case
    from narrows.door import Progress

# Waiting threads must sleep: spinning costs a hundredfold on shared cores. Before torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INCONCLUSIVE = 3
"""Exit code where nothing is wrong but no verdict can be given."""


class Shell(click.Group):
    """Turns what a user can cause into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; 2 for bad input, 130 when interrupted."""
        try:
            return super().invoke(ctx)
        except NarrowsError as error:
            click.echo(f"narrows: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("narrows: stopped; nothing was half-written", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the work, not of the alphabet."""
        return list(self.commands)


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="narrows")
def main() -> None:
    """Finds what limits a learning system, and relieves it.

    \b
    narrows bound llama-3-70b --machine h100-sxm --set tp=8     the narrowest point
    narrows find  llama-3-8b  --machine a100-80 --prompt 16384  what would widen it
    narrows relieve                                             the whole job, here, proven
    """


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--json`; the command gets `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(command)


def asks_case(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds MODEL and the options that describe a case; the command gets `make_case`."""

    @click.argument("model", default="reference")
    @click.option("--machine", default="here", help="Catalogue name, TOML file, or here.")
    @click.option("--prompt", default=4096, show_default=True, help="Tokens of a prompt.")
    @click.option("--generate", default=128, show_default=True, help="Tokens generated.")
    @click.option("--batch", default=1, show_default=True, help="Requests at a time.")
    @click.option("--dtype", default=None, help="Number format of weights and cache.")
    @click.option("--train", is_flag=True, help="A training step instead of a request.")
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                  help="tp=8, kv_dtype=fp8, fusion=eager ...")  # fmt: skip
    @functools.wraps(command)
    def wrapped(
        model: str, machine: str, prompt: int, generate: int, batch: int, dtype: str | None,
        train: bool, settings: tuple[str, ...], **rest: Any,
    ) -> Any:  # fmt: skip
        from narrows.door import case

        def make_case(progress: Progress | None = None) -> Case:
            return case(
                model, machine, prompt=prompt, generate=generate, batch=batch, dtype=dtype,
                train=train, settings=pairs(settings), progress=progress,
            )  # fmt: skip

        return command(make_case=make_case, **rest)

    return wrapped


def pairs(given: tuple[str, ...]) -> dict[str, str]:
    """`key=value` arguments as a dictionary."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise NarrowsError(f"--set takes KEY=VALUE, not {text!r}")
        found[key] = value
    return found


def console(stderr: bool = False) -> Console:
    """A terminal with colours, or plain text in a pipe."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress | None]:
    """A bar on the error stream, where a person can see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda done, what: bar.update(task, completed=done, description=what)


def dump(data: Any) -> None:
    """JSON to standard output; arrays and numpy scalars become plain numbers."""
    click.echo(
        json.dumps(data, indent=2, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    )


@main.command()
@click.argument("name", default="here")
@click.option("--fresh", is_flag=True, help="Measure this machine again.")
@as_json
def machine(name: str, fresh: bool, as_json: bool) -> None:
    """What a machine has; without a name, this one, measured."""
    from narrows.door import machine as get

    with progress_bar(as_json) as progress:
        found = get(name, fresh=fresh, progress=progress)
    if as_json:
        return dump(asdict(found))
    from narrows.report import text

    return text.machine(console(), found)


@main.command()
@as_json
def machines(as_json: bool) -> None:
    """The catalogue."""
    from narrows.machines.load import catalogue

    found = catalogue()
    if as_json:
        return dump({"machines": [asdict(m) for m in found.values()]})
    from narrows.report import text

    return text.machines(console(), list(found.values()))


@main.command()
@asks_case
@click.option("--measured", default=None, metavar="SECONDS|FILE",
              help="A real run: total seconds, or a profile (JSON).")  # fmt: skip
@as_json
def bound(make_case: Callable[..., Case], measured: str | None, as_json: bool) -> None:
    """The narrowest resource of MODEL, and the distance from its limit."""
    from narrows.core.hierarchy import hierarchy

    with progress_bar(as_json) as progress:
        case = make_case(progress)
        found, near = case.bound(), hierarchy(case)
    if measured is not None:
        from narrows.measure.measured import against, read

        found = against(found, read(measured))
    if as_json:
        return dump({**bound_dict(found), "hierarchy": [asdict(row) for row in near]})
    from narrows.report import text

    return text.bound(console(), found, near)


def bound_dict(found: Any) -> dict[str, Any]:
    """The contract of `bound --json`: the dataclass, with its totals."""
    return {
        **asdict(found), "seconds": found.seconds, "limit_seconds": found.limit_seconds,
        "narrowest": found.narrowest, "fits": found.fits,
    }  # fmt: skip


def option_dict(option: Any) -> dict[str, Any]:
    """The contract of one row of `find --json`."""
    return {
        "key": option.key, "settings": option.settings, "gain": option.gain,
        "seconds": option.seconds, "price": asdict(option.price), "reason": option.reason,
        "relieves": option.relieves, "bytes_held": option.bytes_held,
    }  # fmt: skip


@main.command()
@asks_case
@as_json
def find(make_case: Callable[..., Case], as_json: bool) -> None:
    """Techniques that would widen the narrowest point of MODEL, by predicted gain."""
    from narrows.door import find as ask

    with progress_bar(as_json) as progress:
        case = make_case(progress)
        options = ask(case, progress=progress)
    if as_json:
        return dump({"options": [option_dict(o) for o in options]})
    from narrows.report import text

    return text.options(console(), options)


@main.command()
@click.argument("model", default="reference")
@click.option("--with", "key", required=True, metavar="KEY[:NAME=VALUE,...]")
@click.option("--save", required=True, type=click.Path(path_type=Path), help="A new directory.")
@as_json
def apply(model: str, key: str, save: Path, as_json: bool) -> None:
    """Apply a technique to MODEL and save what loads with narrows.load(DIR)."""
    from narrows.saved import save as write

    with progress_bar(as_json) as progress:
        saved = write(model, key, save, progress=progress)
    if as_json:
        return dump(saved)
    return click.echo(
        f"Saved {saved['technique']} on {saved['model']} to {save}.\n"
        f"Load it in Python:\n\n"
        f"    import narrows\n"
        f"    with narrows.load({str(save)!r}) as applied:\n"
        f"        applied.model.generate(...)\n"
    )


@main.command()
@click.argument("model", default="reference")
@click.option("--machine", default="here", help="Catalogue name, TOML file, or here.")
@click.option("--prompt", default=None, type=int,
              help="Tokens of a prompt.  [default: 4096; 8192 with --within]")  # fmt: skip
@click.option("--generate", default=128, show_default=True, help="Tokens generated.")
@click.option("--batch", default=None, type=int,
              help="Requests at a time.  [default: 4; 8 with --within]")  # fmt: skip
@click.option("--within", multiple=True, metavar="METRIC=SHARE",
              help="Search stacks losing at most this: ppl=1%, recall=1%, later=1%.")  # fmt: skip
@click.option("--text", "read", default=None, type=click.Path(path_type=Path), metavar="FILE",
              help="Text to judge perplexity by; else the model writes its own.")  # fmt: skip
@click.option("--report", default="report.html", show_default=True, type=click.Path(path_type=Path))
@as_json
def relieve(
    model: str, machine: str, prompt: int | None, generate: int, batch: int | None,
    within: tuple[str, ...], read: Path | None, report: Path, as_json: bool,
) -> None:  # fmt: skip
    """The whole job: measure, bound, find, apply the best, prove it, write a report."""
    from narrows.relieve import relieve as job

    with progress_bar(as_json) as progress:
        told = job(
            model, machine, prompt=prompt, generate=generate, batch=batch, within=within,
            text=read, progress=progress,
        )  # fmt: skip
    from narrows.report import html, text

    html.write(told, report)
    if as_json:
        return dump(asdict(told))
    text.report(console(), told)
    return click.echo(f"\nThe whole story, with pictures: {report}")


@main.command()
@click.argument("keys", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every system that is built.")
@click.option("--folder", default=None, help="Every built system of a folder.")
@click.option("--quick", is_flag=True, help="Only claims that take seconds.")
@click.option("--fresh", is_flag=True, help="Run again what stands already.")
@as_json
def prove(
    keys: tuple[str, ...], everything: bool, folder: str | None, quick: bool, fresh: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run the published figures of systems and keep the evidence."""
    from narrows import index
    from narrows.claims import prove as runner

    chosen = [e.key for e in index.built() if everything or (folder and e.folder == folder)]
    chosen = list(dict.fromkeys([*(index.get(k).key for k in keys), *chosen]))
    if not chosen:
        raise NarrowsError("name systems to prove, or --all, or a --folder that has built ones")
    from narrows.report import text

    show = None if as_json else text.claim_teller(console())
    found = [runner.prove(k, quick=quick, fresh=fresh, told=show) for k in chosen]
    if as_json:
        dump({"evidence": [asdict(e) for e in found]})
    else:
        text.verdicts(console(), list(runner.verdicts(found)))
    raise SystemExit(runner.exit_code(found))


@main.command()
@click.argument("words", nargs=-1)
@as_json
def methods(words: tuple[str, ...], as_json: bool) -> None:
    """The published systems narrows knows, searched by key, words or narrow point."""
    from narrows import index

    found = index.search(" ".join(words)) if words else list(index.entries())
    if as_json:
        rows = [
            {"key": e.key, "title": e.title, "folder": e.folder, "role": e.role,
             "relieves": e.relieves, "status": index.status(e), "what": e.what, "paper": e.paper}
            for e in found
        ]  # fmt: skip
        return dump({"methods": rows})
    from narrows.report import text

    return text.methods(console(), found)


@main.command()
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--machine", required=True, help="Catalogue name or TOML file.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Machine file to write."
)
@as_json
def calibrate(profiles: tuple[Path, ...], machine: str, out: Path, as_json: bool) -> None:
    """Fit a machine's constants to measured profiles."""
    from narrows.door import machine as get
    from narrows.machines.load import save
    from narrows.measure.calibrate import fit
    from narrows.measure.profiles import read

    start = get(machine)
    with progress_bar(as_json) as progress:
        profile = read(profiles, start)
        fitted = fit(profile, start, progress=progress)
    save(fitted, out)
    if as_json:
        return dump(
            {
                "machine": fitted.name,
                "out": str(out),
                "refused": [asdict(r) for r in profile.refused],
                "calibrations": {k: asdict(c) for k, c in fitted.calibrations.items()},
            }
        )
    from narrows.report import text

    return text.calibration(console(), fitted, profile.refused, out)


@main.command()
@click.argument("profiles", nargs=-1, type=click.Path(path_type=Path))
@click.option("--machine", default=None, help="Catalogue name or TOML file.")
@click.option("--here", is_flag=True, help="Check the measured machine on unseen workloads.")
@as_json
def validate(profiles: tuple[Path, ...], machine: str | None, here: bool, as_json: bool) -> None:
    """How far a machine's predictions are from measured rows."""
    if here == bool(profiles):
        raise NarrowsError("validate takes either measured profiles or --here")
    if here:
        return _validate_here(as_json)
    if machine is None:
        raise NarrowsError("validate PROFILE... needs --machine NAME or a machine file")
    from narrows.door import machine as get
    from narrows.measure.calibrate import validate as check
    from narrows.measure.profiles import read

    target = get(machine)
    checked = check(read(profiles, target), target)
    if as_json:
        return dump(checked.as_dict())
    from narrows.report import text

    return text.validation(console(), checked)


def _validate_here(as_json: bool) -> None:
    from narrows.measure.battery import validate_here
    from narrows.measure.here import load_or_measure

    with progress_bar(as_json) as progress:
        checked = validate_here(load_or_measure(progress=progress), progress=progress)
    if as_json:
        dump(checked.as_dict())
    else:
        from narrows.report import text

        text.here(console(), checked)
    if checked.verdict is None:
        raise SystemExit(INCONCLUSIVE)
    if not checked.verdict:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
