"""Rolling finished images up while the campaign runs: which go together, what to make of what comes back."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import count

from batchproc.distribute.executors import Executor, Outcome, WorkerDiedError
from batchproc.distribute.tasks import Job, pack_images
from batchproc.distribute.transient import is_transient
from batchproc.errors import ClusterError, StorageError
from batchproc.io.events import NullEvents
from batchproc.io.packs import PACK_IMAGES, RollUp, loose_images, next_pack_number, plan_roll_ups
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry

__all__ = ["Packing"]

_TRIALS = 6  # of a roll-up whose worker dies, or that an error stops which may heal
_BACKOFF_S = 10.0  # after the first such error; twice as long after each more


class Packing:
    """The roll-ups of one campaign, as tasks before all others: each image is in the hands of one of them at most.

    Parameters
    ----------
    folder : RunFolder
    job : Job
    executor : Executor
    events : EventLog
    tell : callable
        Takes a line for the person who waits.
    """

    def __init__(
        self, folder: RunFolder, job: Job, executor: Executor, events: NullEvents, tell: Callable[[str], None]
    ) -> None:
        self._folder, self._job, self._executor = folder, job, executor
        self._events, self._tell = events, tell
        self._loose = loose_images(folder)  # of earlier drivers
        self._entries: dict[str, ManifestEntry] = {}  # of this one, until they are in a pack
        self._numbers = count(next_pack_number(folder))
        self._under_way: dict[Hashable, tuple[RollUp, int]] = {}
        self._later: list[tuple[float, RollUp, int]] = []  # when to try it again
        self._rest_planned = False

    def __contains__(self, ticket: Hashable) -> bool:
        return ticket in self._under_way

    @property
    def idle(self) -> bool:
        """Whether no roll-up is under way, or waits for its next trial."""
        return not (self._under_way or self._later)

    def add(self, entry: ManifestEntry) -> None:
        """An image is done."""
        self._loose.append(entry.image_id)
        self._entries[entry.image_id] = entry
        self.submit_full()

    def submit_full(self) -> None:
        """Submit what makes full packs."""
        while len(self._loose) >= PACK_IMAGES:
            block, self._loose = self._loose[:PACK_IMAGES], self._loose[PACK_IMAGES:]
            self._submit(RollUp(tuple(block)))

    def submit_due(self, now: float) -> None:
        """Submit again what has waited for an error to heal."""
        due = [later for later in self._later if later[0] <= now]
        self._later = [later for later in self._later if later[0] > now]
        for _, plan, trials in due:
            self._submit(plan, trials)

    def submit_rest(self) -> None:
        """Submit what is left at the end, with small packs that there are: once, and when nothing else is at work."""
        if not self._rest_planned:
            self._rest_planned = True
            self._loose = []
            for plan in plan_roll_ups(self._folder):
                self._submit(plan)

    def receive(self, ticket: Hashable, outcome: Outcome, now: float) -> list[ManifestEntry]:
        """What became of a roll-up; images of this campaign that turned out damaged, and are not done any more.

        Raises
        ------
        StorageError
            The disk does not take the pack. What it is made of is untouched.
        ClusterError
            Its worker died, or what may heal did not, time and again. What it is made of is untouched as well.
        """
        plan, trials = self._under_way.pop(ticket)
        if outcome.error is None:
            packed = outcome.value
            if packed.n_images:
                self._events.write("packed", images=packed.n_images, bytes=packed.n_bytes)
            for image_id, why in packed.bad.items():
                self._tell(f"{image_id} was found damaged when it was rolled up, and is to be done again: {why}")
            entries = {image_id: self._entries.pop(image_id, None) for image_id in plan.image_ids}
            return [entry for image_id in packed.bad if (entry := entries.get(image_id)) is not None]
        if isinstance(outcome.error, StorageError):
            raise outcome.error
        died = isinstance(outcome.error, WorkerDiedError)
        if not (died or isinstance(outcome.error, OSError) or is_transient(outcome.error)):
            raise outcome.error
        if trials >= _TRIALS:
            raise ClusterError(
                f"finished images could not be rolled up, tried {trials} times: {outcome.error}; nothing is lost: the "
                "same command again goes on"
            ) from outcome.error
        if died:
            self._submit(plan, trials + 1)
        else:
            self._later.append((now + _BACKOFF_S * 2 ** (trials - 1), plan, trials + 1))
        return []

    def _submit(self, plan: RollUp, trials: int = 1) -> None:
        ticket = self._executor.submit(pack_images, self._job, next(self._numbers), plan, priority=1)
        self._under_way[ticket] = plan, trials
