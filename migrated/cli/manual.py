"""The manual pages, made from what the programs say about themselves: migratectl(1), migrated(8), migrated.toml(5).

The rule of the file: commands, options and keys are never written down here: they come from the command line's own
definitions and from ``config/migrated.toml``, so that a page cannot tell another story than ``--help``. Format: man(7).

Run: ``python -m migrated.cli.manual --config config/migrated.toml --date 2026-11-26 DIRECTORY``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from migrated.cli.app import app
from migrated.control.commands import VERSION
from migrated.daemon.app import argument_parser

EXIT_STATUS = {
    "0": "stopped in order, or the configuration is valid (--check-config)",
    "1": "it could not start, or failed",
    "2": "wrong usage",
    "78": "the configuration or a key is wrong; systemd does not try again",
}
SIGNALS = {
    "SIGTERM, SIGINT": "Stop. A migration is cancelled and the machine goes on here; a switchover that is under way is"
    " waited for. Workloads are never ended with their daemon.",
    "SIGHUP": "Read keys and [peers] again.",
}
FILES = {
    "/etc/migrated/NAME.toml": "configuration of migrated@NAME.service; migrated.service has migrated.toml",
    "/etc/migrated/pki": "keys of this host, see migratectl pki",
    "/run/migrated/NAME/qmp.sock": "control socket",
    "/run/migrated/NAME/attach.sock": "attach socket, for workloads",
    "/var/lib/migrated/NAME": "ownership record and snapshots",
}
ENVIRONMENT = {
    "NO_COLOR": "No colours.",
    "COLUMNS": "Width of the terminal, where it is not found out.",
}

_KEY = re.compile(r"# ([a-z][a-z0-9-]* = .*)")
_RULER = re.compile(r"# -{20,}")


def escape(text: str) -> str:
    """Return text as roff prints it: hyphens that can be copied, no requests at the beginning of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def _bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def _item(term: str, text: str) -> Iterator[str]:
    yield from (".TP", _bold(term), escape(text) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (".PP", escape(" ".join(paragraph.split())))


def _head(title: str, section: int, date: str, what: str) -> Iterator[str]:
    yield '.\\" Made by migrated.cli.manual; not to be edited.'
    yield f'.TH "{title.upper()}" "{section}" "{date}" "migrated {VERSION["package"]}" "Live migration"'
    yield from (".SH NAME", f"{escape(title)} \\- {escape(what)}")


def _table(heading: str, rows: dict[str, str]) -> Iterator[str]:
    yield f".SH {heading}"
    for term, text in rows.items():
        yield from _item(term, text)


def _see_also(*pages: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    yield ",\n".join(f"\\fB{escape(page.partition('(')[0])}\\fR({page.partition('(')[2]}" for page in pages)


# -- migratectl(1) -----------------------------------------------------------------------------------------------


def migratectl_page(date: str) -> Iterator[str]:
    """Return the lines of migratectl(1)."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root, info_name="migratectl")
    about, _, codes = root.help.partition("\n\n")
    yield from _head("migratectl", 1, date, "move running machines between hosts")
    yield from (".SH SYNOPSIS", f"{_bold('migratectl')} {escape(' '.join(root.collect_usage_pieces(context)))}")
    yield from (".SH DESCRIPTION", escape(about))
    yield from _paragraphs("It steers one migrated(8) on this host, over its control socket, which speaks QMP.")
    yield ".SH OPTIONS"
    yield from _parameters(root, context)
    yield from _paragraphs("--json and --help also go behind every command.")
    yield ".SH COMMANDS"
    for name, command in root.commands.items():
        yield from _command(name, command, context)
    yield ".SH EXIT STATUS"
    yield from _paragraphs(codes)
    yield from _table("ENVIRONMENT", ENVIRONMENT)
    yield from _see_also("migrated(8)", "migrated.toml(5)")


def _command(path: str, command: Any, parent: Any) -> Iterator[str]:
    """Describe a command, or all those of a group."""
    context = typer.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    subcommands = getattr(command, "commands", {})
    yield f'.SS "{escape(" ".join([path, *command.collect_usage_pieces(context)]))}"'
    yield from list(_paragraphs(command.help or ""))[1:]
    if not subcommands:
        yield from _parameters(command, context)
    for name, subcommand in subcommands.items():
        yield from _command(f"{path} {name}", subcommand, context)


def _parameters(command: Any, context: Any) -> Iterator[str]:
    for parameter in command.get_params(context):
        if not {"--json", "--help"}.isdisjoint(parameter.opts) and context.parent is not None:
            continue  # said once for all
        if record := parameter.get_help_record(context):
            yield from _item(*(" ".join(part.split()) for part in record))


# -- migrated(8) -------------------------------------------------------------------------------------------------


def migrated_page(date: str) -> Iterator[str]:
    """Return the lines of migrated(8)."""
    parser = argument_parser()
    yield from _head("migrated", 8, date, parser.description or "")
    usage = " ".join(parser.format_usage().split()).removeprefix("usage: migrated ")
    yield from (".SH SYNOPSIS", f"{_bold('migrated')} {escape(usage)}")
    yield ".SH DESCRIPTION"
    yield from _paragraphs(
        "A daemon keeps one machine: the memory and device states of one or more attached processes, the workloads."
        " It moves that machine to a daemon on another host, or to a QEMU, and takes machines in."
        " migratectl(1) steers it.\n\n"
        "More machines on a host are more instances: migrated@NAME.service keeps machine NAME, with the configuration"
        " /etc/migrated/NAME.toml. The units' first lines say what their sandbox forbids, and how to allow it again."
    )
    yield ".SH OPTIONS"
    # argparse shows its own list nowhere else.
    for action in parser._actions:  # noqa: SLF001
        takes = f" {action.metavar or action.dest.upper()}" if action.nargs != 0 else ""
        yield from _item(", ".join(action.option_strings) + takes, action.help or "")
    yield from _table("SIGNALS", SIGNALS)
    yield from _table("EXIT STATUS", EXIT_STATUS)
    yield from _table("FILES", FILES)
    yield from _see_also("migratectl(1)", "migrated.toml(5)", "systemd.unit(5)")


# -- migrated.toml(5) --------------------------------------------------------------------------------------------


def configuration_page(date: str, example: str) -> Iterator[str]:
    """Return the lines of migrated.toml(5), from the text of ``config/migrated.toml``."""
    yield from _head("migrated.toml", 5, date, "configuration of migrated, one file for each machine")
    yield from (".SH SYNOPSIS", "/etc/migrated/migrated.toml\n.br\n/etc/migrated/\\fINAME\\fR.toml", ".SH DESCRIPTION")
    for block in example.split("\n\n"):
        lines = [line for line in block.splitlines() if not _RULER.fullmatch(line)]
        keys = [match[1] for line in lines if (match := _KEY.fullmatch(line))]
        section = next((line for line in lines if line.startswith("[")), "")
        text = [line.removeprefix("#").strip() for line in lines if line.startswith("#") and not _KEY.fullmatch(line)]
        if section:
            yield f'.SH "{escape(section)}"'
        if keys:
            yield from _keys(keys, " ".join(text))
        elif any(text):
            yield from _paragraphs("\n\n".join(_split_empty(text)))
    yield from _see_also("migrated(8)", "migratectl(1)")


def _keys(keys: list[str], text: str) -> Iterator[str]:
    """Describe keys that share a text."""
    for number, key in enumerate(keys):
        yield from (".TP" if number == 0 else ".TQ", _bold(key))
    yield escape(text) or "\\&"


def _split_empty(lines: list[str]) -> list[str]:
    """Return the paragraphs of comment lines, which empty ones part."""
    return "\n".join(lines).strip().split("\n\n")


def main() -> None:
    """Write the pages below a directory, as man(1) looks for them."""
    parser = argparse.ArgumentParser(prog="python -m migrated.cli.manual", description="write the manual pages")
    parser.add_argument("--config", required=True, type=Path, help="config/migrated.toml")
    parser.add_argument("--date", required=True, help="date of the pages, YYYY-MM-DD")
    parser.add_argument("directory", type=Path, help="where man1, man5 and man8 are, or are made")
    arguments = parser.parse_args()
    example = arguments.config.read_text(encoding="utf-8")
    pages = {
        "man1/migratectl.1": migratectl_page(arguments.date),
        "man5/migrated.toml.5": configuration_page(arguments.date, example),
        "man8/migrated.8": migrated_page(arguments.date),
    }
    for name, lines in pages.items():
        path = arguments.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
