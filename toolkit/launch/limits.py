"""``limits`` of a profile: a submission that would pass them is refused, with the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.errors import BusyError, LimitError
from toolkit.launch import costs, report

if TYPE_CHECKING:
    from toolkit.launch.chain import Draft


def check(made: Draft) -> None:
    """Refuse a chain that the profile does not allow now.

    Raises:
        BusyError: Too many chains are under way.
        LimitError: It could use more GPU-hours than are left.
    """
    _check_concurrent(made)
    _check_gpu_hours(made)


def _check_concurrent(made: Draft) -> None:
    limit, jobs = made.profile.limits.concurrent, made.folder.parent
    if limit is None:
        return
    ours = [c["id"] for c in report.chains(jobs) if c["profile"] == made.profile.name]
    active = [chain for chain in ours if not report.is_over(jobs / chain)]
    if len(active) >= limit:
        raise BusyError(
            f"profile {made.profile.name} allows {limit} at once, and {len(active)} are under way: "
            + ", ".join(active[:5]),
            f"wait for one (toolkit jobs wait {active[0]}), or raise limits.concurrent",
        )


def _check_gpu_hours(made: Draft) -> None:
    limit, jobs = made.profile.limits.gpu_hours, made.folder.parent
    if limit is None:
        return
    ours = [c["id"] for c in report.chains(jobs) if c["profile"] == made.profile.name]
    used = sum(costs.of_chain(jobs / chain) for chain in ours)
    asked = sum(costs.at_most(job) for job in made.jobs)
    if used + asked > limit:
        raise LimitError(
            f"profile {made.profile.name} allows {limit:g} GPU-hours: {used:.2f} are used, and this "
            f"asks for up to {asked:.2f} more",
            "shorten resources.time_limit, or raise limits.gpu_hours",
        )
