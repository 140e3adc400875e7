"""Fills in what the README and other pages say about speed, from the result files: all between their markers.

    python benchmarks/readme.py            # rewrites them; `make readme-figures` draws the figures first
    python benchmarks/readme.py --check    # changes nothing; exit status 1 where it would

A block stands between `<!-- results: NAME -->` and `<!-- end of NAME -->`; `blocks` says what goes into each, and
`DOCUMENTS` where they may stand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plan_cliffs
import plan_map
import plan_table
import quantization
import recompute
import sixteen_bit
import stack_model
import step_model
import variants
from plot import BACKENDS, Figure, described, figures_of
from records import (
    BESIDE,
    CELLS,
    DTYPES,
    KEPT,
    REPEAT,
    RESULTS,
    WORKLOADS,
    Change,
    Record,
    Row,
    changes,
    condition,
    in_conditions,
    in_order,
    is_loop,
    is_served,
    is_variant,
    load_all,
    loaded,
    mean_ratio,
    quantizes,
    whole_lines,
    worst,
)
from rnnfast.benchmark.cores import Nearness

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
DOCUMENTS = (
    README,
    *(ROOT / "docs" / name for name in ("performance.md", "predicted.md")),
    ROOT / "examples" / "README.md",
)

# The README's few numbers are of this suite.
SUMMARY = "sizes"
# A suite of shapes for tests has nothing to say to readers.
NOT_SHOWN = {"smoke"}
# Rows that are named as slower than torch.nn; more are only counted.
MOST_NAMED = 6


def paragraph(text: str) -> str:
    """In lines as long as the pages' own."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def read(results: Path, name: str) -> dict[str, Any]:
    """A demo's result file."""
    data: dict[str, Any] = json.loads((results / name).read_text(encoding="utf-8"))
    return data


def shape(row: Row) -> str:
    """The row's shape in words short enough for a table."""
    model = f"{row['model']}: " if row.get("model") else ""
    dtype = f", {row['dtype']}" if row["dtype"] != "float32" else ""
    return f"{model}B={row['B']}, H={row['H']}{dtype}"


def versions(record: Record) -> str:
    """The device and the libraries."""
    data = record.data
    return ", ".join(
        [data["device"], *(f"{name} {data[name]}" for name in ("torch", "cuda", "cudnn") if data.get(name))]
    )


def summary(records: Sequence[Record]) -> str:
    """The README's table: of each cell and workload of one suite the mean, the lowest and the highest ratio."""
    (record,) = [record for record in records if record.suite == SUMMARY]
    workloads = in_order(WORKLOADS, [row["workload"] for row in record.rows])
    lines = ["| | " + " | ".join(workloads) + " |", "| --- |" + " --- |" * len(workloads)]
    for cell in in_order(CELLS, [row["cell"] for row in record.rows]):
        line = [cell]
        for workload in workloads:
            group = [row for row in record.rows if (row["cell"], row["workload"]) == (cell, workload)]
            ratios = [row["ratio"] for row in group]
            line.append(f"{mean_ratio(group):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append("| " + " | ".join(line) + " |")

    def all_of(key: str) -> str:
        return ", ".join(str(value) for value in sorted({row[key] for row in record.rows}))

    shapes = f"T = {all_of('T')} steps, batches of B = {all_of('B')}, hidden sizes H = {all_of('H')}"
    about = f"Measured on {versions(record)}; {all_of('dtype')}, {shapes}: geometric mean, and lowest to highest."
    return "\n".join(lines) + "\n\n" + paragraph(about)


def summary_figure(records: Sequence[Record]) -> str:
    """The README's one figure: the training heat map of the same suite."""
    (record,) = [record for record in records if record.suite == SUMMARY]
    kinds = {(figure.kind, figure.workload): figure for figure in figures_of(record)}
    return link(record, kinds["ratio", "training"], "docs/figures")


def speeds(records: Sequence[Record]) -> str:
    """A table: of every suite and cell (and backend, if there are several) the mean and the worst of each workload."""
    lines = []
    for device in dict.fromkeys(record.device for record in records):
        own = [record for record in records if record.device == device and record.suite not in NOT_SHOWN]
        rows = [row for record in own for row in record.rows]
        workloads = in_order(WORKLOADS, [row["workload"] for row in rows])
        several = len({row["backend"] for row in rows}) > 1
        lines += [f"Ratio of torch.nn's time to rnnfast's: {versions(own[0])}.", ""]
        heads = ["suite, cell" + ", backend" * several]
        for workload in workloads:
            heads += [f"{workload}: mean", "worst"]
        lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: | --- |" * len(workloads)]
        for record in own:
            for cell in in_order(CELLS, [row["cell"] for row in record.rows]):
                of_cell = [row for row in record.rows if row["cell"] == cell]
                for backend in sorted({row["backend"] for row in of_cell}):
                    line = [f"{record.suite}, {cell}" + f", {backend}" * several]
                    for workload in workloads:
                        group = [row for row in of_cell if (row["workload"], row["backend"]) == (workload, backend)]
                        low = worst(group) if group else None
                        line += [f"{mean_ratio(group):.2f}" if group else ""]
                        line += [f"{low['ratio']:.2f} ({shape(low)})" if low else ""]
                    lines.append("| " + " | ".join(line) + " |")
        lines.append("")
        if far := timed_far(rows):
            lines += [f"{far} of the {len(rows)} rows were timed while the machine's cores were far apart.", ""]
        if beside := sum(loaded([row]) for row in rows):
            lines += [f"{beside} of the {len(rows)} rows were timed {BESIDE}.", ""]
    return "\n".join(lines).strip()


def loops(record: Record) -> bool:
    """Whether it has loops of cells: these stand in a block of their own."""
    return any(map(is_loop, record.data["rows"]))


def cell_speeds(records: Sequence[Record]) -> str:
    """A table: of every cell and number of steps, and of every model, the mean and the worst of each workload; then the
    rows in which torch.nn is faster, and the figures."""
    if not records:
        return "There is no result file of the suite `cells` yet."
    parts = []
    for record in records:
        rows = [row for row in record.rows if is_loop(row)]
        workloads = in_order(WORKLOADS, [row["workload"] for row in rows])
        several = len({row["backend"] for row in rows}) > 1
        parts.append(f"Ratio of torch.nn's time to rnnfast's: {versions(record)}.")
        lines = ["| cell |" + "".join(f" {workload}: mean | worst |" for workload in workloads)]
        lines.append("| --- |" + " ---: | --- |" * len(workloads))
        by_line: dict[str, list[Row]] = {}
        for row in rows:
            words = f"{row['cell']}Cell, T = {row['T']}" + f", {row['backend']}" * several
            by_line.setdefault(f"{row['model']}: {words}" if row["model"] else words, []).append(row)
        for words, own in by_line.items():
            line = [words]
            for group in ([row for row in own if row["workload"] == workload] for workload in workloads):
                low = worst(group) if group else None
                line += [f"{mean_ratio(group):.2f}" if group else ""]
                # The model's name stands in the first column.
                line += [f"{low['ratio']:.2f} ({shape({**low, 'model': ''})})" if low else ""]
            lines.append("| " + " | ".join(line) + " |")
        parts.append("\n".join(lines))
        if beside := sum(loaded([row]) for row in rows):
            parts.append(f"{beside} of the {len(rows)} rows were timed {BESIDE}.")
    return "\n\n".join([*parts, slower(records), *filter(None, [figures(records)])])


def varies(record: Record) -> bool:
    """Whether it has layers with options: these stand in a block of their own."""
    return any(map(is_variant, record.data["rows"]))


def timed_far(rows: Sequence[Row]) -> int:
    """How many of the rows were timed with cores far apart, by the nearest of them."""
    nearness = Nearness(patience=0.0)
    for row in rows:
        nearness.see(row.get("core_to_core_ns"))
    return sum(nearness.far(row.get("core_to_core_ns")) for row in rows)


def slower(records: Sequence[Record]) -> str:
    """The rows in which torch.nn is faster, the slowest first."""
    shown = [record for record in records if record.suite not in NOT_SHOWN]
    count = sum(len(record.rows) for record in shown)
    behind = [(row, record.suite) for record in shown for row in record.rows if row["ratio"] < 1]
    wrong = sum(len(record.failures) for record in shown)
    text = f"Of {count} rows in these files torch.nn is faster in {len(behind)}"
    if behind:
        behind.sort(key=lambda pair: pair[0]["ratio"])
        named = [
            f"{row['cell']} {row['workload']}, T={row['T']}, {shape(row)}: {row['ratio']:.2f} "
            f"({row['p20']:.2f} to {row['p80']:.2f})"
            for row, _ in behind[:MOST_NAMED]
        ]
        more = len(behind) - len(named)
        text += " (20th to 80th percentile in brackets): " + "; ".join(named) + (f"; and {more} more" if more else "")
    text += "."
    if wrong:
        text += f" {wrong} rows gave wrong results or failed, and were not timed."
    return paragraph(text)


def packed(records: Sequence[Record]) -> str:
    """What packing costs, against the same rows padded."""
    rows = [row for record in records for row in record.rows if "over_padded" in row]

    def span(key: str) -> str:
        numbers = [row[key] for row in rows]
        return f"{min(numbers):.2f} to {max(numbers):.2f}"

    return paragraph(
        f"A packed batch takes {span('over_padded')} of the time of the same rows padded "
        f"(torch.nn: {span('torch_over_padded')}), and {span('over_dense')} of that of a dense batch of "
        f"exactly as many tokens (torch.nn: {span('torch_over_dense')})."
    )


def memory(records: Sequence[Record]) -> str:
    """The peak memory of training, of torch.nn's. Single steps, which torch.nn's own ops run, are left out."""
    each: dict[str, list[tuple[float, Row]]] = {}
    for row in (row for record in records for row in record.rows):
        theirs, ours = row.get("torch_peak_memory_bytes"), row.get("peak_memory_bytes")
        if row["workload"] == "training" and row["T"] > 1 and theirs and ours:
            each.setdefault(row["cell"], []).append((ours / theirs, row))
    if not each:
        return "No result file says so yet."
    lines = ["| cell | peak memory of training, of torch.nn's: mean | most |", "| --- | ---: | --- |"]
    for cell in in_order(CELLS, list(each)):
        shares = [share for share, _ in each[cell]]
        most, row = max(each[cell], key=lambda found: found[0])
        kind = "packed, " * row["packed"] + "lengths, " * row["lengths"]
        lines.append(f"| {cell} | {statistics.geometric_mean(shares):.2f} | {most:.2f} ({kind}{shape(row)}) |")
    return "\n".join(lines)


def serves(record: Record) -> bool:
    """Whether it has cases with pauses or neighbours: these stand in a block of their own."""
    return any(map(is_served, record.data["rows"]))


def service(records: Sequence[Record]) -> str:
    """A table: of each condition and backend the mean ratios of the medians and of the 90th percentiles, and the worst
    of the former; then the figures."""
    if not records:
        return "There is no result file of the suite `service` yet."
    parts = []
    for record in records:
        rows = [row for row in record.rows if is_served(row)]
        backends = in_order(BACKENDS, [row["backend"] for row in rows])
        what = (
            "Ratio of torch.nn's time of a call to the backend's: of the calls that were timed in turn the median, its"
        )
        what += " worst case, and the ratio of the 90th percentiles of both."
        parts.append(paragraph(f"{what} Suite `{record.suite}`, {versions(record)}."))
        lines = ["| condition | cases |" + "".join(f" {name}: median | worst | 90th percentile |" for name in backends)]
        lines.append("| --- | ---: |" + " ---: | --- | ---: |" * len(backends))
        for words in in_conditions(rows):
            own = [row for row in rows if condition(row) == words]
            line = [words, str(len({row["case"] for row in own}))]
            for group in ([row for row in own if row["backend"] == name] for name in backends):
                if not group:
                    line += ["", "", ""]
                    continue
                low = worst(group)
                far = statistics.geometric_mean(row["torch_p90_us_per_step"] / row["p90_us_per_step"] for row in group)
                line += [f"{mean_ratio(group):.2f}", f"{low['ratio']:.2f} ({low['cell']}, {shape(low)})", f"{far:.2f}"]
            lines.append("| " + " | ".join(line) + " |")
        parts.append("\n".join(lines))
        if beside := sum(loaded([row]) for row in rows):
            parts.append(f"{beside} of the {len(rows)} rows were timed {BESIDE}.")
    return "\n\n".join([*parts, *filter(None, [figures(records)])])


def demo(results: Path, name: str) -> str:
    """What a demo's run said, and its chart."""
    data = read(results, f"{name}-cpu.json")
    losses = "the same losses" if data["agree"] else "losses that differ"
    unit = data["unit"]
    text = (
        f"In the run that is kept: {losses}, and {data['ratio']:.2f} times as many {unit} a second ({data['device']})."
    )
    return f"{paragraph(text)}\n\n![losses and {unit} a second](../benchmarks/results/{name}-cpu.png)"


def online(results: Path) -> str:
    """The errors of the online example's run, and its chart."""
    data = read(results, "online-series-cpu.json")
    lines = [
        "| | the thousand steps before the change | after it | the last thousand | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, errors in data["error"].items():
        seconds = data["seconds"].get(name, "")
        lines.append("| " + " | ".join([name, *(f"{error:.2f}" for error in errors), str(seconds)]) + " |")
    text = f"In the run that is kept, the error in standard deviations, with k1 = {data['k1']} ({data['device']}):"
    chart = "![the error over the stream](../benchmarks/results/online-series-cpu.png)"
    return "\n\n".join([text, "\n".join(lines), chart])


def textbook(results: Path) -> str:
    data = read(results, "cpu-textbook.json")
    sizes = ", ".join(f"{size} = {data[size]}" for size in "TBH")
    return paragraph(
        f"In the run that is kept ({sizes}) it was {data['inference']['ratio']:.1f} times as fast in inference and "
        f"{data['training']['ratio']:.1f} times in training."
    )


def figures(records: Sequence[Record]) -> str:
    """Links to each device's figures: over H and B of the grid, or of the first suite that has such, a scaling, and the
    bars and latencies of the suites that have no heat map."""
    links = []
    for device in dict.fromkeys(record.device for record in records):
        drawn = {record.suite: (record, figures_of(record)) for record in records if record.device == device}
        mapped = [suite for suite, (_, own) in drawn.items() if any(figure.kind == "ratio" for figure in own)]
        shown = "grid" if "grid" in mapped else next(iter(mapped), "")
        pairs = [(record, figure) for record, own in drawn.values() for figure in own]
        chosen = [
            (record, figure) for record, figure in pairs if record.suite == shown and figure.kind in ("ratio", "time")
        ]
        chosen += [(record, figure) for record, figure in pairs if figure.kind == "scaling"][-1:]
        chosen += [(record, figure) for record, figure in pairs if figure.kind in ("bars", "latency")]
        links += [link(record, figure, "figures") for record, figure in chosen]
    return "\n\n".join(links)


def link(record: Record, figure: Figure, folder: str) -> str:
    """The figure, and what it shows for who does not see it; `folder` as the page sees it."""
    return f"![{described(record, figure)}]({folder}/{figure.name})"


def worst_cases(records: Sequence[Record], count: int = 10) -> str:
    """A table of the rows with the lowest ratios: where to look first."""
    shown = [(row, record) for record in records if record.suite not in NOT_SHOWN for row in record.rows]
    if not shown:
        return "There are no result files yet."
    shown.sort(key=lambda pair: pair[0]["ratio"])
    lines = [
        "| suite | case | workload | backend | us/step | torch.nn | ratio (20th to 80th percentile) | % of limit |"
    ]
    lines.append("| --- | --- | --- | --- | ---: | ---: | --- | ---: |")
    for row, record in shown[:count]:
        limit = f"{100 * row['limit_us_per_step'] / row['us_per_step']:.0f}" if row["limit_us_per_step"] else ""
        spread = f"{row['ratio']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})"
        lines.append(
            f"| {record.suite} | {row['case']} | {row['workload']} | {row['backend']} "
            f"| {row['us_per_step']:.2f} | {row['torch_us_per_step']:.2f} | {spread} | {limit} |"
        )
    return "\n".join(lines)


def repeated(results: Path) -> str:
    """How far two runs of the CPU's suites agree: each suite's means, and the largest change of a part of it."""
    folders = (results / REPEAT, results)
    parts = changes_on_cpu(*folders)
    again = {part.suite for part in parts}
    far = [
        timed_far([row for record in on_cpu(folder) if record.suite in again for row in record.rows])
        for folder in folders
    ]
    lines = ["| suite | cases | first run | second run | change | largest of a cell and workload | largest of a case |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for whole in [part for part in parts if part.cell == "all"]:
        own = [part for part in parts if part.suite == whole.suite and part.cell != "all"]
        most = max(own, key=lambda part: abs(math.log(part.now / part.before)))
        means = f"{whole.before:.2f} | {whole.now:.2f} | {whole.now / whole.before - 1:+.1%}"
        lines.append(
            f"| {whole.suite} | {whole.cases} | {means} "
            f"| {most.now / most.before - 1:+.1%} ({most.cell}, {most.workload}) "
            f"| {whole.factor - 1:+.1%} ({whole.most}) |"
        )
    lines += ["", f"Cases that were timed with cores far apart: {far[0]} in the first run, {far[1]} in the second."]
    return "\n".join(lines)


def kept(results: Path) -> str:
    """What the ratios are when the allocator keeps freed memory."""
    lines = ["| suite, cell | workload | default allocator | it keeps freed memory | what changed most |"]
    lines.append("| --- | --- | ---: | ---: | --- |")
    for part in changes_on_cpu(results, results / KEPT):
        if part.cell != "all":
            lines.append(
                f"| {part.suite}, {part.cell} | {part.workload} | {part.before:.2f} | {part.now:.2f} "
                f"| {part.factor - 1:+.0%} ({part.most}) |"
            )
    return "\n".join(lines)


def on_cpu(folder: Path) -> list[Record]:
    return [record for record in load_all(folder) if record.device == "cpu"]


def changes_on_cpu(before: Path, now: Path) -> list[Change]:
    return changes(on_cpu(before), on_cpu(now))


def way(row: Row) -> tuple[Any, ...]:
    """What a measurement of `benchmarks/microbench` has besides sizes."""
    return tuple(row.get(key) for key in ("what", "way", "ctas", "clusters", "error"))


def by_way(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    result: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        result.setdefault(way(row), []).append(row)
    return result


def microbenchmarks(results: Path) -> str:
    """The measured constants of a card, one table for each thing that was measured."""
    texts = []
    for path in sorted(results.glob("*microbench.jsonl")):
        rows = whole_lines(path)
        # Of a machine without a card there is nothing but errors.
        if not any(row["what"] == "device" for row in rows):
            continue
        device = next((row["name"] for row in rows if row["what"] == "device"), path.stem)
        for what in dict.fromkeys(row["what"] for row in rows if row["what"] != "device"):
            own = [row for row in rows if row["what"] == what]
            # Of the sizes of a state the smallest and 32 KB (H = 1024, B = 16 in 16 bits) say enough.
            least = {key: min(row.get("bytes", 0) for row in group) for key, group in by_way(own).items()}
            own = [row for row in own if row.get("bytes", 0) in (least[way(row)], 32768)]
            keys = list(dict.fromkeys(key for row in own for key in row if key not in ("what", "correct")))
            lines = [f"{device}, {what}:", "", f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
            lines += [f"| {' | '.join(str(row.get(key, '')) for key in keys)} |" for row in own]
            texts.append("\n".join(lines))
    return "\n\n".join(texts) or "None yet: there is no result file of `benchmarks/microbench`."


def gpu(records: Sequence[Record]) -> str:
    cards = [record for record in records if record.device != "cpu"]
    if not cards:
        return "There is no result file from a GPU yet, so no speed is claimed for one."
    dtypes = ", ".join(in_order(DTYPES, [row["dtype"] for record in cards for row in record.rows]))
    note = f"Types: {dtypes}. `-graph`: rnnfast and torch.nn both inside a CUDA graph."
    return f"{speeds(cards)}\n\n{note}\n\n{slower(cards)}"


def blocks(results: Path = RESULTS) -> dict[str, Callable[[], str]]:
    """What makes each block's text, by name."""
    every = [record for record in load_all(results) if record.suite not in NOT_SHOWN]
    records = [record for record in every if not quantizes(record)]
    cpu = [record for record in records if record.device == "cpu" and not serves(record)]
    # A table of its own: measured on one machine, where the types' instructions decide.
    narrow = [record for record in cpu if record.suite == sixteen_bit.SUITE]
    stepped = [record for record in cpu if loops(record)]
    # Their ratios are those of loops of PyTorch's operations.
    varied = [record for record in cpu if varies(record)]
    cpu = [record for record in cpu if record not in (*narrow, *stepped, *varied)]
    served = [record for record in records if record.device == "cpu" and serves(record)]
    cards = [record for record in records if record.device != "cpu"]
    found = {
        "cpu summary": lambda: summary(cpu),
        "cpu figure": lambda: summary_figure(cpu),
        "cpu speeds": lambda: speeds(cpu),
        "cpu slower": lambda: slower(cpu),
        "cpu packed": lambda: packed(cpu),
        "cpu memory": lambda: memory(cpu),
        "cpu service": lambda: service(served),
        "cell speeds": lambda: cell_speeds(stepped),
        "quantized speeds": lambda: quantization.speed_table([record for record in every if quantizes(record)]),
        "sixteen-bit speeds": lambda: "\n\n".join(part for part in (speeds(narrow), figures(narrow)) if part),
        "sixteen-bit memory": lambda: memory(narrow),
        "sixteen-bit types": lambda: sixteen_bit.table(results),
        "recompute": lambda: recompute.table(results),
        "quantized errors": lambda: quantization.errors_table(results),
        "cpu figures": lambda: figures(cpu),
        "character model": lambda: demo(results, "charlm-lstm"),
        "digits": lambda: demo(results, "digits-gru"),
        "online series": lambda: online(results),
        "textbook": lambda: textbook(results),
        "gpu": lambda: gpu(records),
        "gpu figures": lambda: figures(cards) or "There are no figures yet.",
        "cpu worst": lambda: worst_cases(cpu),
        "cpu repeat": lambda: repeated(results),
        "cpu kept": lambda: kept(results),
        "gpu worst": lambda: worst_cases(cards),
        "gpu constants": lambda: microbenchmarks(results),
        "step model": step_model.table,
        "plan": plan_table.table,
        "plan constants": plan_table.constants,
        "plan ratios": plan_map.summary,
        "plan cliffs": plan_cliffs.table,
        "stacks": stack_model.all_tables,
    }
    if varied:
        found["variant speeds"] = lambda: "\n\n".join(filter(None, [variants.speed_table(varied), figures(varied)]))
    return found


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with every block as the result files have it now.

    Raises:
        ValueError: a block that nobody makes, or that does not end.
    """
    makers = blocks(results)

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in makers:
            raise ValueError(f"no block is called {name!r}; there are {', '.join(sorted(makers))}")
        # Without the empty lines some renderers take the text for a part of the comment.
        return f"<!-- results: {name} -->\n\n{makers[name]()}\n\n<!-- end of {name} -->"

    result = re.sub(r"<!-- results: (.+?) -->\n.*?<!-- end of \1 -->", fill, text, flags=re.DOTALL)
    opened = re.findall(r"<!-- results: (.+?) -->", text)
    closed = re.findall(r"<!-- end of (.+?) -->", text)
    if opened != closed:
        raise ValueError(f"blocks begin as {opened} and end as {closed}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; say whether all is as the result files are"
    )
    options = parser.parse_args()
    if not any(record.suite == SUMMARY and record.device == "cpu" for record in load_all()):
        parser.error(f"{RESULTS}: expected the result file of suite {SUMMARY!r} on the CPU, got none: run `make bench`")
    status = 0
    for path in DOCUMENTS:
        name, before = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        after = filled(before)
        if before == after:
            print(f"{name}: up to date")
        elif options.check:
            print(f"{name} differs: run `make readme-figures`")
            status = 1
        else:
            path.write_text(after, encoding="utf-8")
            print(f"{name}: rewritten")
    return status


if __name__ == "__main__":
    sys.exit(main())
