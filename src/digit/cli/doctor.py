"""``doctor``: is this installation well."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from digit.core.progress import console

_STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}


def doctor() -> None:
    """Check this installation: devices, compiler, optional packages, write access, disk, Hub; and say what to do.

    The exit code is 1 if something needed is broken.
    """
    from digit.cli.diagnosis import examine

    findings, table = examine(), Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for topic, state, what, advice in findings:
        words = Text(what)
        if advice:
            words.append(f"\n-> {advice}", "dim")
        table.add_row(Text(state, _STYLES[state]), Text(topic, "bold"), words)
    console().print(table)
    if broken := sum(one.state == "broken" for one in findings):
        things = "1 thing is" if broken == 1 else f"{broken} things are"
        console().print(f"\n{things} broken; see above for what to do.")
        raise typer.Exit(1)
    console().print("\nEverything that is needed works.")
