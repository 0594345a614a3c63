"""What verbs say about runs: how one ended, where it stands, what one would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchproc.display import bar, duration, pace, size

if TYPE_CHECKING:
    from batchproc.distribute.clusters import Where
    from batchproc.distribute.plan import Plan
    from batchproc.distribute.prediction import Fit
    from batchproc.io.status import Driver, Status, Submitted
    from batchproc.job import RunSummary, Unscored

__all__ = ["tell_plan", "tell_run", "tell_status", "tell_submitted", "tell_unscored"]


def tell_run(summary: RunSummary) -> str:
    """How a run ended."""
    lines = [*_counts(summary.status), f"in {duration(summary.seconds)}"]
    if summary.stopped:
        lines.append("stopped: too many bugs; their tracebacks are in failures.parquet")
    if summary.left:
        lines.append(f"{summary.left} images were not tried: {_go_on(summary.status.run)} does them")
    if summary.problem:
        lines.append(summary.problem.rstrip())
    if summary.report is not None:
        lines.append(f"report: {summary.report}")
    return "\n".join(lines)


def tell_status(status: Status) -> str:
    """Where a run stands."""
    ended = status.done + status.failed + status.bugs
    lines = [f"{bar(ended / max(status.total, 1))} {ended / max(status.total, 1):.1%}"]
    lines += _counts(status)
    lines += _speed(status)
    if status.driver is not None:
        lines += _driver(status, status.driver)
    return "\n".join(lines)


def tell_submitted(run: str, submitted: Submitted) -> str:
    """A run that has not begun."""
    return (
        f"submitted as job {submitted.job} ({submitted.name}), and not begun yet: the queue knows why; "
        f"what the job says once it runs is in {run}/log/jobs"
    )


def tell_plan(plan: Plan, where: Where) -> str:
    """What a run would do."""
    from batchproc.distribute.clusters import expected_workers

    workers = expected_workers(where, plan.threads)
    lines = [
        *(f"changed: {change}" for change in plan.changes),
        f"{_counted(plan.images, 'image')}: {plan.done} done, {plan.failed} failed before, {plan.missing} to do",
        f"to read: {size(plan.bytes_in)}; to write: about {size(plan.bytes_out)} in {plan.files_out} files and folders",
    ]
    if plan.missing_files:
        are = "is" if plan.missing_files == 1 else "are"
        lines.append(f"{_counted(plan.missing_files, 'file')} {are} not there: see `batchproc manifest check`")
    if plan.missing:
        lines += [_tasks(plan, workers), _memory(plan.fit(where))]
    if plan.measured:
        lines.append(
            f"measured on {_counted(plan.measured, 'image')}: {duration(plan.seconds_per_image)} and up to "
            f"{size(plan.peak_memory_mb * 2**20)} of memory each"
        )
        if plan.missing:
            lines.append(
                f"for what is left: {_number(plan.cpu_hours)} CPU-hours, {duration(plan.seconds(workers))} "
                f"on {_counted(workers, 'worker')}"
            )
    else:
        lines.append("time is not known before some images are done: `--pilot N` measures N of them")
    return "\n".join(lines)


def _counts(status: Status) -> list[str]:
    line = f"{status.done} of {status.total} images done"
    for n, what in ((status.failed, "failed"), (status.bugs, "stopped by a bug"), (status.missing, "missing")):
        line += f", {n} {what}" if n else ""
    lines = [line, f"{status.n_candidates} candidates" + "".join(f", scored by {name}" for name in status.scores)]
    lines += [f"  {n} × {kind}" for kind, n in status.errors.items()]
    if status.errors:
        lines.append(f"see {status.run}/failures.parquet; `batchproc retry {status.run}` tries them again")
    return lines


def _speed(status: Status) -> list[str]:
    if not status.done:
        return []
    line = f"{_number(status.cpu_hours)} CPU-hours spent"
    if status.missing and status.cpu_hours_left is not None:
        line += f", about {_number(status.cpu_hours_left)} to go"
    if status.driver is not None and status.driver.running:
        line += f"; {pace(status.rate)}" if status.rate else ""
        line += f", {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    return [line]


def _driver(status: Status, driver: Driver) -> list[str]:
    job = f", {driver.batch_job}" if driver.batch_job else ""
    who = f"process {driver.pid} on {driver.host}{job}"
    if driver.running:
        lines = [f"at work: {driver.phase or driver.command or 'begun'}, {who}, since {_when(driver.since)}"]
        lines += [f"{_counted(driver.workers, 'worker')}, {_counted(driver.in_flight, 'image')} under way"]
        return lines + ([f"dashboard: {driver.dashboard}"] if driver.dashboard else [])
    how = "killed, or out of reach: last heard of" if driver.killed else "ended"
    lines = [f"nobody is at work: {who} {how} {_when(driver.heard)}"]
    again = f"`{status.submitted.again}`" if status.submitted else _go_on(status.run)
    return lines + ([f"{again} goes on"] if status.missing else [])


def _tasks(plan: Plan, workers: int) -> str:
    if plan.spread(workers) == "tiles":
        return (
            f"the tiles of each image ({plan.need.pixels / 1e6:.0f} Mpix) are spread over "
            f"{_counted(workers, 'worker')}, with {size(plan.tile_bytes(workers))} of them under way"
        )
    tasks = plan.tasks(workers)
    each = "an image each" if tasks == plan.missing else f"of about {plan.missing / tasks:.0f} images each"
    return f"{_counted(tasks, 'task')}, {each}; {min(workers, tasks)} at a time"


def _memory(fit: Fit) -> str:
    need = fit.need
    if not need.bytes:
        return "memory is not known: none of the images looked at can be read; see `batchproc manifest check`"
    text = (
        f"memory: up to {size(need.bytes)} a worker (image {need.image_id}, {need.shape[1]} x {need.shape[0]} pixels)"
    )
    return text if fit.limit is None else f"{text}, of {size(fit.limit)} that it may have"


def _go_on(run: str) -> str:
    return f"`batchproc run {run}/manifest.parquet --out {run}`"


def _when(time: str) -> str:
    """'2026-11-21 11:20:29 UTC'."""
    return f"{time[:19].replace('T', ' ')} UTC"


def _counted(n: int, what: str) -> str:
    """'1 image', '2 images'."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _number(value: float) -> str:
    """'0.0123', '12.3', '1,230'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tell_unscored(found: Unscored) -> str:
    """What `classify` would do, a line a model."""
    lines = [f"{found.candidates} candidates"]
    for name, n in found.lacking.items():
        lines.append(f"{name}: {n} to score" if n else f"{name}: has scored all")
    return "\n".join(lines)
