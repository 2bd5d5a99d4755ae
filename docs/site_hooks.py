"""What MkDocs cannot do by itself: the page on the command line, and links in docstrings."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

COMMANDS = "reference/cli.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page on the command line, made from the Typer app."""
    files.append(File.generated(config, COMMANDS, content=command_page()))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - MkDocs calls by name
    """Docstrings are written for Sphinx's roles: make :func:`x` a link where x is on the page, and code elsewhere."""
    anchors = set(re.findall(r'id="(digit\.[\w.]+)"', html))

    def link(match: re.Match[str]) -> str:
        name = match[1].removeprefix("~")
        found = [anchor for anchor in anchors if anchor == name or anchor.endswith(f".{name}")]
        code = f"<code>{name.rpartition('.')[2] if match[1].startswith('~') else name}</code>"
        return f'<a href="#{found[0]}">{code}</a>' if len(found) == 1 else code

    return re.sub(r":[a-z]+:<code>([^<]+)</code>", link, html)


# -- the command line --------------------------------------------------------------------------------------------------


def command_page() -> str:
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
    prose, examples = split(command.help or "")
    lines = [f"## {name}", "", "```text", usage, "```", "", *prose]
    lines += ["For example:", "", "```text", *examples, "```", ""] if examples else []
    rows = [param.get_help_record(context) for param in command.get_params(context)]
    table = [f"| {cell(option, code=True)} | {cell(text)} |" for option, text in filter(None, rows)]
    return [*lines, "| argument or option | |", "|---|---|", *table, ""] if table else lines


def split(text: str) -> tuple[list[str], list[str]]:
    """A command's docstring: its paragraphs, and its examples."""
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = " ".join(paragraph.split())
        match = re.match(r"(?:Examples?|On several GPUs):\s*(.*)", words)
        if match or re.match(r"(digit|torchrun|accelerate) ", words):
            examples += [match[1] if match else words]
        else:
            prose += [words, ""]
    return prose, [example for example in examples if example]


def cell(text: str, code: bool = False) -> str:
    """Text that is safe in a table."""
    text = text.replace("|", "\\|")
    return f"`{text}`" if code else re.sub(r"([<>*_\[\]])", r"\\\1", text)
