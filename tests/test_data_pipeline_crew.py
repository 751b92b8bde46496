"""The live line of a pass: rows by status, rate, and what a million images cost where the price is known."""

import re
from dataclasses import dataclass

from data_pipeline.flow.crew import Crew
from data_pipeline.stages.ledger import Todo
from infra.runner import WorkerPool


@dataclass(frozen=True)
class Judged:
    """Two rows a unit: one ok, one of the status that the unit names."""

    def open(self):
        return lambda unit: {"rows": 2, "counts": {"ingest": {"odd": 2}, "filter": {"ok": 1, unit["says"]: 1}}}


def units() -> Todo:
    todo = Todo()
    for number, word in enumerate(("corrupt", "nsfw", "corrupt")):
        todo.add({"id": str(number), "says": word}, rows=2)
    return todo


def test_the_live_line_shows_rows_by_status_and_dollars_per_million_images(capsys):
    crew = Crew(WorkerPool(0), dollars_per_hour=36.0)
    reports = list(crew.work("filter", Judged(), units()))
    assert (len(reports), crew.computed) == (3, {"filter": 6})
    line = capsys.readouterr().err.splitlines()[-1]
    shown = re.fullmatch(r"filter: 6/6 rows \(100%\), [\d,.]+ rows/s, \S+ taken, (.+)", line)
    assert shown, line
    fields = dict(field.split("=") for field in shown[1].split())
    price = float(fields.pop("dollars_per_million"))
    assert fields == {"corrupt": "2", "nsfw": "1"}
    # 36 dollars an hour are a cent a second: a million rows at six in less than a minute cost below 100,000 dollars
    assert 0 < price < 100_000
    assert list(Crew(WorkerPool(0)).work("filter", Judged(), units()))
    assert "dollars" not in capsys.readouterr().err  # where no price is known
