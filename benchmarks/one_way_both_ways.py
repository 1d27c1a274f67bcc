"""The head alone (one way), the head and the two top layers, body and head together (both ways), on three public sets.

The sets are not part of this project: `--data DIR` names a directory with mrpc/, rte/ and clinc150/. `--only NAME` measures one
of them, or another that `finetune_quality` knows, and keeps the other figures of the same commit.
"""

from __future__ import annotations

from benchmarks.figures import head, merge_result
from benchmarks.finetune_quality import MODEL, STAGE, arguments, chosen_cases, run_stage, score_of

WAYS = {"head_only": 0, "top2": 2, "full": "all"}
RATES = {"head_only": 10.0, "top2": 2.0, "full": 1.0}
"""Times the learning rate of the full training: fewer weights take larger steps."""


def main(argv: list[str]) -> None:
    """Measures, and writes results/one_way_both_ways.json."""
    chosen = arguments("one_way_both_ways", __doc__).parse_args(argv)
    data = chosen.data.resolve()
    for name, case in chosen_cases(chosen.only, data, ["mrpc", "rte", "clinc150"]):
        for way, layers in WAYS.items():
            rate = case.learning_rate * RATES[way]
            section = case.section(data, MODEL, layers=layers, learning_rate=rate)
            run = f"quality_{name}" if way == "full" else f"ways_{name}_{way}"  # the full training is that of finetune_quality
            record = run_stage({"finetune": section}, chosen.runs, run)
            score = score_of(case, chosen.runs / run / STAGE, record)
            command = f"python -m benchmarks one_way_both_ways --data {data.name}"
            print(merge_result("one_way_both_ways", command, head(), {f"{name}_{way}": score}))
