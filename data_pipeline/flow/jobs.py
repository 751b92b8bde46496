"""Units of work through workers, with a live line: rate, time left, rows by status."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.stages.scratch_db import WorkList
from data_pipeline.stages.stage import OK
from infra.errors import UserError
from infra.log import Progress, get_logger
from infra.runner import Task, UnitResult, WorkerPool, run_tasks

log = get_logger("pipeline")


class JobRunner:
    """Runs passes on one pool of workers; keeps what failed (by unit) and how many rows each pass computed."""

    def __init__(self, workers: WorkerPool, *, keep_going: bool = False) -> None:
        self.workers, self.keep_going = workers, keep_going
        self.failed: dict[str, str] = {}
        self.computed: dict[str, int] = {}

    def run_pass(
        self,
        title: str,
        task: Task,
        todo: WorkList,
        *,
        workers: WorkerPool | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> Iterator[UnitResult]:
        """Reports of the units that worked, as they come. The others stop the run before anything is published."""
        if not len(todo):
            log.info("%s: nothing missing", title)
            return
        done = rows = 0
        failed: dict[str, str] = {}
        with Progress(todo.rows, "rows", desc=title) as progress:
            bad: Counter[str] = Counter()
            for result in run_tasks(task, todo, workers or self.workers, runtime_env=environment):
                if result["error"]:
                    failed[result["id"]] = result["error"]
                    if result["fatal"]:
                        raise UserError(f"{title}: no worker can start: {result['error']}")
                    continue
                done += 1
                rows += result["rows"]
                bad += _count_not_ok(result)
                if todo.rows is None:
                    progress.total = round(rows / done * len(todo))
                extra: dict[str, object] = {"failed_units": len(failed)} if failed else {}
                progress.update(result["rows"], **bad, **extra)
                yield result
        self.computed[title] = rows
        if failed:
            self._report_failures(title, failed, len(todo))

    def _report_failures(self, title: str, failed: dict[str, str], total: int) -> None:
        self.failed |= failed
        name, reason = next(iter(failed.items()))
        line = f"{title}: {len(failed)} of {total} units failed, first {name}: {reason}"
        if not self.keep_going:
            raise UserError(f"{line}; what worked is kept: run the same command again, or add --keep-going")
        log.error("%s; going on without them", line)


def _count_not_ok(result: UnitResult) -> Counter[str]:
    """Rows by status, as the last stage that judges them says."""
    judging = {stage: counts for stage, counts in result["counts"].items() if stage not in ("ingest", "measure")}
    return Counter({name: n for counts in judging.values() for name, n in counts.items() if name != OK})
