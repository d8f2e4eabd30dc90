"""What a worker tells of its work, and what a run tells at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastsimgan.refinement.manifest import Totals


@dataclass
class Progress:
    """Images through the refiner and work units committed since a worker's last report; its stages' seconds so far."""

    images: int = 0
    work_units: int = 0
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    backend: str = ""
    peak_bytes: int = 0  # of a device's memory


@dataclass
class Report:
    """What a run has done, all its workers and all its starts together."""

    images: int = 0  # refined and written
    failed: int = 0  # left out
    others: int = 0
    mean_change: float = 0.0  # mean of |R(x) - x| over pixels and images, in grey levels of 255, whatever the bit depth
    now: int = 0  # images of this call
    seconds: float = 0.0  # of this call
    working: float = 0.0  # of the worker that was at work longest, once its refiner was loaded
    busy: dict[str, float] = field(default_factory=dict)  # seconds that the threads of each stage were at work
    threads: dict[str, int] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)  # that refined, by name
    peak_bytes: int = 0  # of a device's memory, of the worker that took most

    def add_worker(self, part: Progress) -> None:
        """Take in a worker's last report."""
        self.working = max(self.working, part.seconds)
        self.backends |= {part.backend} - {""}
        self.peak_bytes = max(self.peak_bytes, part.peak_bytes)
        for stage, seconds in part.busy.items():
            self.busy[stage] = self.busy.get(stage, 0.0) + seconds
        for stage, threads in part.threads.items():
            self.threads[stage] = self.threads.get(stage, 0) + threads

    def take_totals(self, totals: Totals) -> None:
        """Take in what the records say of the whole."""
        self.images, self.failed, self.others = totals.counts.images, totals.counts.failed, totals.counts.others
        self.mean_change = totals.change / max(1, self.images)
