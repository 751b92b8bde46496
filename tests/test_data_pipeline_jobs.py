"""The live line of a pass: rate, rows and rows by status."""

import re
from dataclasses import dataclass

from data_pipeline.flow.jobs import JobRunner
from data_pipeline.stages.scratch_db import WorkList
from infra.runner import WorkerPool


@dataclass(frozen=True)
class Judged:
    """Two rows a unit: one ok, one of the status that the unit names."""

    def open(self):
        return lambda unit: {"rows": 2, "counts": {"ingest": {"odd": 2}, "filter": {"ok": 1, unit["says"]: 1}}}


def units() -> WorkList:
    todo = WorkList()
    for number, word in enumerate(("corrupt", "nsfw", "corrupt")):
        todo.add({"id": str(number), "says": word}, rows=2)
    return todo


def test_the_live_line_shows_rows_by_status(capsys):
    jobs = JobRunner(WorkerPool(0))
    results = list(jobs.run_pass("filter", Judged(), units()))
    assert (len(results), jobs.computed) == (3, {"filter": 6})
    line = capsys.readouterr().err.splitlines()[-1]
    shown = re.fullmatch(r"filter: 6/6 rows \(100%\), [\d,.]+ rows/s, \S+ taken, (.+)", line)
    assert shown, line
    assert dict(field.split("=") for field in shown[1].split()) == {"corrupt": "2", "nsfw": "1"}
