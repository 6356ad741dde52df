"""What the commands share: argument shapes, tables, and where a run's parts lie."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.store import Store

Handler = Callable[[argparse.Namespace], int]


def add_command(
    commands: Any, name: str, handler: Handler | None, help: str, description: str, example: str
) -> argparse.ArgumentParser:
    """Adds one sub-command with its one-line help, its description and an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if handler is not None:
        parser.set_defaults(handler=handler)
    return parser


def add_overrides(parser: argparse.ArgumentParser, what: str = "the config") -> None:
    """`key=value ...` after the other arguments."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"changes to {what}, with dotted keys: train.max_steps=200 resources.processes_per_node=1",
    )


def add_url(parser: argparse.ArgumentParser, help: str = "the run: a local path or any fsspec URL") -> None:
    parser.add_argument("url", metavar="URL", help=help)


def add_store(parser: argparse.ArgumentParser, of: str = "the store") -> None:
    """`-s key=value`, see `store_options`."""
    parser.add_argument(
        "-s",
        "--store",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"an option of {of}, such as deadline=300, endpoint_url=http://host:9000 or anon=true; may be repeated",
    )


def store_options(words: Sequence[str], flag: str = "--store") -> dict[str, Any]:
    """Options of a store from words such as `deadline=300` and `client_kwargs.verify=false`; values are read as YAML."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in words:
        if not all(word.partition("=")):
            raise ValueError(f"{flag} {word}: must be of the form KEY=VALUE")
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{flag} {' '.join(words)}: {' '.join(str(error).split())}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def open_run(url: str) -> Store:
    """The store of an existing run.

    Raises:
        ValueError: there is no run at `url`.
    """
    from datamodules.store import Store
    from trainer.config import absolute_url

    store = Store(absolute_url(url))
    if not store.exists("config.yaml"):
        raise ValueError(f"no run at {url}: it has no config.yaml; `keel train CONFIG url={url}` starts one")
    return store


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout; figures are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        figures = bool(cells) and all(_is_figure(row[index]) for row in cells)
        table.add_column(column, justify="right" if figures else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def number(value: object) -> str:
    """A value as people read it: 1,234 and 0.01234 and 1.2e-07."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3e}"
    return str(value)


def size(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _is_figure(text: str) -> bool:
    return text[:1].isdigit() or text[:1] == "-"
