"""Do orders, floors of requests and faults leave nothing behind, wherever in a transition they meet? All 1,386 cases.

The test in the gate takes each 23rd of them. Columns: how many cases ended like that, and the first of them. Exit
status 1 if one does not hold. Last stdout line: one JSON document.

    python tests/stress/check_combinations.py

Takes one to three minutes on a core.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cpu.test_controller_combinations import Case, every_case, run


def main() -> int:
    """Run every case; those that fail are told by what they say."""
    logging.disable(logging.CRITICAL)  # aborts are what is tested
    broken: dict[str, list[Case]] = defaultdict(list)
    num_cases = 0
    for case in every_case():
        num_cases += 1
        try:
            run(case)
        except Exception as e:
            broken[f"{type(e).__name__}: {str(e)[:200]}"].append(case)
    for what, cases in broken.items():
        print(f"{len(cases):5d}  {cases[0]}  {what}")
    print(json.dumps({"cases": num_cases, "broken": sum(map(len, broken.values()))}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
