"""Memory and time of the driver per row: manifests, verdicts, dedup, splits, plan and index of a root made before.

python tests/bench/data_driver.py [--distance D] [rows ...]; each count in a process of its own, 40 % of the rows set
aside. Anonymous memory: what is mapped from scratch files the system may drop. `tests/data_pipeline_driver.py` tells
what the root holds; no picture and no network is needed for what the driver does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

DRIVER = Path(__file__).parent.parent / "data_pipeline_driver.py"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", type=lambda word: int(float(word)))
    parser.add_argument("--distance")
    given = parser.parse_args()
    found = []
    for rows in given.rows or [100_000, 400_000, 1_600_000]:
        with tempfile.TemporaryDirectory() as root:
            command = [sys.executable, str(DRIVER), root, str(rows)]
            command += ["--distance", given.distance] if given.distance else []
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
        print(json.dumps(found[-1]))
    first, last = found[0], found[-1]
    if last["rows"] > first["rows"]:
        more = last["rows"] - first["rows"]
        slope = (last["mib"] - first["mib"]) * 2**20 / more
        seconds = (last["seconds"] - first["seconds"]) / more * 1e6
        print(json.dumps({"bytes_per_row": round(slope, 1), "seconds_per_million_rows": round(seconds, 1)}))


if __name__ == "__main__":
    main()
