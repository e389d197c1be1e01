"""From files to a ``Report``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from mini_sglang.bench.report.comparison import compare
from mini_sglang.bench.report.content import Report, Section, several
from mini_sglang.bench.report.kernels import kernels
from mini_sglang.bench.report.load import serve, sweep, sweeps_together, waits_of_all
from mini_sglang.bench.report.reading import Source, clean

TITLE = "mini-sglang benchmarks"
_TOLD = ("notes", "end")
"""Of the settings, what stands elsewhere in the section."""
_SECTIONS: Mapping[str, Callable[[Source], Section]] = MappingProxyType(
    {"local": compare, "server": compare, "serve": serve, "sweep": sweep, "kernels": kernels}
)


def prepare(sources: Sequence[Source], title: str = TITLE) -> Report:
    """A section for each file in the order given, then what several load files have in common.

    Raises:
        InvalidValueError: a field of a file that is not what its kind has there.
    """
    sections = []
    for source in sources:
        section = _SECTIONS[source.kind](source)
        section.facts.extend(facts(source))
        sections.append(section)
    sections.extend(_together(sources))
    machines = list(dict.fromkeys(machine_line(source) for source in sources))
    commits = list(dict.fromkeys(source.top.text("commit") or "unknown" for source in sources))
    files = f"{len(sources)} files" if len(sources) > 1 else sources[0].file
    where = machines[0] if len(machines) == 1 else f"{len(machines)} machines"
    commit = f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits"
    return Report(clean(title), f"{where} · {commit} · {files}", notices(machines, commits), sections)


def notices(machines: Sequence[str], commits: Sequence[str]) -> list[str]:
    """What a reader has to know before comparing anything."""
    found = []
    if len(machines) > 1:
        found.append(
            f"These files come from {len(machines)} machines, {several(machines)}: figures of different "
            "files are not to be compared."
        )
    if len(commits) > 1:
        found.append(
            f"These files come from {len(commits)} commits, {several(commits)}: a difference between files "
            "may be a change of the code."
        )
    changed = [commit for commit in commits if commit.endswith("-dirty")]
    if changed:
        found.append(f"The source tree had changes that are in no commit ({several(changed)}).")
    return found


def machine_line(source: Source) -> str:
    machine = source.machine
    cores, memory = machine.number("cores"), machine.number("memory_gb")
    parts = [machine.text("cpu") or "an unknown CPU"]
    if cores:
        parts.append(f"{cores:.0f} core{'s' * (cores != 1)}")
    if memory:
        parts.append(f"{memory:.0f} GB")
    return ", ".join(parts)


def facts(source: Source) -> list[tuple[str, str]]:
    """How it was measured, whatever the file says of it."""
    top, limits = source.top, source.limits
    bandwidth, matrix, threads = map(limits.number, ("bandwidth_gb_s", "matrix_gflop_s", "threads"))
    measured = []
    if bandwidth is not None:
        measured.append(f"{bandwidth:.1f} GB/s read")
    if matrix is not None:
        measured.append(f"{matrix:,.0f} GFLOP/s in bf16 products")
    if measured and threads is not None:
        measured.append(f"with {threads:.0f} thread{'s' * (threads != 1)}")
    return [
        ("File", source.file),
        ("Command", top.text("command") or "not in the file"),
        ("Started", top.text("started") or "not in the file"),
        ("Commit", top.text("commit") or "unknown: not run from a source tree"),
        ("Machine", _joined(source.machine.items())),
        ("Machine's limits", ", ".join(measured) or "not measured"),
        ("Versions", _joined(top.part("versions").items())),
        ("Settings", _joined([item for item in source.settings.items() if item[0] not in _TOLD])),
    ]


def _joined(items: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in items) or "not in the file"


def _together(sources: Sequence[Source]) -> list[Section]:
    loads = [source for source in sources if source.kind == "serve"]
    sweeps = [source for source in sources if source.kind == "sweep"]
    sections = []
    for found, kicker in ((loads, "Under load"), (sweeps, "Latency against load")):
        if len(found) < 2:
            continue
        charts = [waits_of_all(found)] if found is loads else sweeps_together(found)
        files = several([source.file for source in found])
        section = Section("All files of this kind together", kicker, files)
        section.charts.extend(chart for chart in charts if not chart.empty)
        sections.append(section)
    return sections
