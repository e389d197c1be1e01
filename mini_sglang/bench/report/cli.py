"""``mini-sglang bench report``: files in, a page and pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mini_sglang.bench.report import style
from mini_sglang.bench.report.content import Report, Section
from mini_sglang.bench.report.drawing import check_matplotlib, png, svg
from mini_sglang.bench.report.page import page
from mini_sglang.bench.report.prepare import TITLE, prepare
from mini_sglang.bench.report.reading import read_source
from mini_sglang.cli.args import Parser
from mini_sglang.cli.terminal import Terminal
from mini_sglang.errors import MiniSglangError

PAGE = "index.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; the exit status."""
    terminal = Terminal()
    try:
        parser = Parser(
            prog="mini-sglang bench report",
            description="One HTML page that needs nothing else, and PNG files, from benchmarks' JSON files.",
        )
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what --json wrote")
        parser.add_argument(
            "--out", type=Path, default=Path("bench-report"), metavar="FOLDER", help="default: bench-report"
        )
        parser.add_argument("--title", default=TITLE, help=f"of the page; default: {TITLE}")
        options = parser.parse(argv)
        check_matplotlib()
        report = prepare([read_source(path) for path in options.files], options.title)
        for written in write(report, options.out):
            terminal.write(f"{written}\n")
    except MiniSglangError as error:
        terminal.error(str(error))
        return 2
    return 0


def write(report: Report, folder: Path) -> list[Path]:
    """The page and a PNG of every chart, in ``folder``; what was written.

    Raises:
        MiniSglangError: it cannot be written there.
    """
    files = {PAGE: page(report, svg).encode("utf-8")}
    for place, section in enumerate(report.sections, 1):
        for chart in section.charts:
            files[f"{place:02}-{chart.slug}.png"] = png(chart, style.WIDE, _source(report, section))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise MiniSglangError(f"--out: {str(folder)!r} cannot be written to: {error.strerror}.") from None
    return [folder / name for name in files]


def _source(report: Report, section: Section) -> str:
    return f"{section.title} · {report.summary if len(report.sections) == 1 else section.file}"


if __name__ == "__main__":
    raise SystemExit(main())
