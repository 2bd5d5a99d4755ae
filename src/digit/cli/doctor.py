"""``doctor``: is this installation well."""

from __future__ import annotations

import typer

from digit.core.progress import console


def doctor() -> None:
    """Check this installation: devices, compiler, optional packages, write access, disk, Hub; and say what to do.

    The exit code is 1 if something needed is broken.
    """
    from rich.table import Table
    from rich.text import Text

    from digit.cli.diagnosis import examine

    findings = examine()
    marks = {"ok": Text("ok", "green"), "note": Text("note", "yellow"), "broken": Text("broken", "bold red")}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for one in findings:
        words = Text(one.what)
        if one.advice:
            words.append(f"\n-> {one.advice}", "dim")
        table.add_row(marks[one.state], Text(one.topic, "bold"), words)
    say = console().print
    say(table)
    broken = sum(one.state == "broken" for one in findings)
    if broken:
        say(f"\n{broken} {'thing is' if broken == 1 else 'things are'} broken; see above for what to do.")
        raise typer.Exit(1)
    say("\nEverything that is needed works.")
