"""`python -m benchmarks` shows every result beside its target; `python -m benchmarks NAME` measures one again.

`python -m benchmarks --readme` writes the demo's table into README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys

from rich.console import Console

from benchmarks.figures import HERE, ROOT, Figure, Target, number, read_results, read_targets, rows, span, verdict
from engine.errors import USER_ERROR, UserError, did_you_mean
from engine.terminal import ReaderGone, printing

START, END = "<!-- demo-table -->", "<!-- /demo-table -->"
STYLES = {"met": "green", "missed": "bold red", "measured": "", "not measured": "dim"}
TITLES = {
    "demo_minutes": "`make demo` on a fresh clone, installation included",
    "test_minutes": "`make test` on a fresh clone, installation included",
    "teacher_accuracy": "accuracy of the teacher (MiniLM-L6, fp32), test split",
    "engine_accuracy": "accuracy of the served int8 engine, test split",
    "accuracy_drop_points": "drop from teacher to engine",
    "speedup_vs_torch_fp32": "speed-up over the teacher in PyTorch fp32, batch 1",
    "speedup_vs_onnx_fp32": "speed-up over the teacher in ONNX Runtime fp32, batch 1",
    "weight_bytes_ratio": "bytes of weights, engine to teacher",
    "pretrain_gain_points": "what pretraining gains over random initialisation, after one epoch of fine-tuning",
}


def known() -> list[str]:
    """Returns the benchmarks that can be run: modules with a target table of their name."""
    return [name for name in read_targets() if (HERE / f"{name}.py").exists()]


def show(console: Console) -> None:
    """Prints the table of all figures."""
    from rich import box
    from rich.table import Table

    results = read_results()
    table = Table(box=box.SIMPLE, caption="in parentheses: 95 % interval")
    table.add_column("figure", no_wrap=True)
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    table.add_column("verdict")
    before = None
    for name, key, entry, target in rows(results, read_targets()):
        if name != before:
            made = f"{results[name]['commit'][:8]}, {results[name]['date'][:10]}" if name in results else ""
            table.add_section()
            table.add_row(f"[bold]{name}[/bold]", f"[dim]{made}[/dim]")
            before = name
        outcome = verdict(entry, target)
        table.add_row(f"  {key}", shown(entry) if entry else "", str(target or ""), outcome, style=STYLES[outcome])
    console.print(table)


def shown(entry: Figure) -> str:
    """Formats value, unit and interval of a figure."""
    between = f" ({span(entry)})" if entry["low"] is not None else ""
    return with_unit(entry) + between


def with_unit(entry: Figure) -> str:
    """Formats value and unit of a figure."""
    unit = {"ratio": "", "×": "×"}.get(entry["unit"], f" {entry['unit']}")
    return number(entry["value"]) + unit


def demo_table() -> str:
    """Returns README's table of the demo's figures in Markdown, from the result file."""
    result = read_results().get("demo")
    if result is None:
        return "Not measured yet: `python -m benchmarks demo`."
    targets = read_targets()["demo"]
    lines = ["| | measured | 95 % interval | target |", "| --- | ---: | ---: | ---: |"]
    for key, title in TITLES.items():
        if key in result["figures"]:
            lines.append(_line(title, result["figures"][key], targets[key]))
    machine = result["machine"]
    units = f" with {', '.join(machine['instructions'])}" if "instructions" in machine else ""
    where = f"{machine['cores']} cores of {machine['processor']}{units}, {machine['memory_gib']:.0f} GiB"
    lines += [
        "",
        f"Measured on {result['date'][:10]} at commit `{result['commit'][:8]}` on {where}; again: `{result['command']}`.",
    ]
    return "\n".join(lines)


def _line(title: str, entry: Figure, target: Target) -> str:
    return f"| {title} | {with_unit(entry)} | {span(entry)} | {target} |"


def with_table(readme: str, table: str) -> str:
    """Returns the README with `table` between its markers.

    Raises:
        UserError: the markers are not there.
    """
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"README.md: no {START} … {END} to write the table between: put the two markers back")
    return f"{before}{START}\n{table}\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    """Command line of the benchmarks."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", action="store_true", help="write the demo's table into README.md")
    parser.add_argument("name", nargs="?", help=f"measure again: {', '.join(known())}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of that benchmark")
    chosen = parser.parse_args(argv)
    try:
        if chosen.readme:
            path = ROOT / "README.md"
            path.write_text(with_table(path.read_text(encoding="utf-8"), demo_table()), encoding="utf-8")
        elif chosen.name is None:
            show(Console(highlight=False))
        elif chosen.name not in known():
            raise UserError(f"no benchmark '{chosen.name}'{did_you_mean(chosen.name, known())}")
        else:
            importlib.import_module(f"benchmarks.{chosen.name}").main(chosen.arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    with contextlib.suppress(ReaderGone), printing():
        main()
