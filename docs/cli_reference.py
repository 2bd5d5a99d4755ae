"""The page on the command line, made from the Typer app when the site is built: an MkDocs hook."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "reference/cli.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the site."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """Every command: usage, what it does, examples, arguments and options."""
    import typer

    from digit.cli.app import app

    top = typer.main.get_command(app)
    lines = ["# Command line", "", "Made from the commands themselves; `digit COMMAND --help` shows the same.", ""]
    for name, command in sorted(commands(top)):
        lines += section(name, command)
    return "\n".join(lines)


def commands(group: Any, path: str = "digit") -> list[tuple[str, Any]]:
    """All commands below a group, with their full names."""
    found = []
    for name, command in group.commands.items():
        full = f"{path} {name}"
        found += commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return found


def section(name: str, command: Any) -> list[str]:
    """One command."""
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [f"## {name}", "", *prose(command.help or ""), "", "```text", usage, "```", ""]
    rows = [param.get_help_record(context) for param in command.get_params(context)]
    table = [f"| {cell(option, code=True)} | {cell(text)} |" for option, text in filter(None, rows)]
    return [*lines, "| | |", "|---|---|", *table, ""] if table else lines


def prose(text: str) -> list[str]:
    """A docstring: paragraphs, and its examples as code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = paragraph.strip()
        match = re.match(r"(?:Examples?|On several GPUs):\s*(.*)", words, re.DOTALL)
        example = match[1] if match else words if re.match(r"(digit|torchrun|accelerate) ", words) else None
        if example is None:
            lines += [words, ""]
        elif example:
            lines += ["```text", " ".join(example.split()), "```", ""]
    return lines


def cell(text: str, code: bool = False) -> str:
    """Text that is safe in a table."""
    text = text.replace("|", "\\|")
    return f"`{text}`" if code else re.sub(r"([<>*_\[\]])", r"\\\1", text)
