"""How many items of a job may fail before the job has: a broken decoder library must not look like a clean run."""

from collections.abc import Mapping

from pydantic import Field

from schemas.errors import FailureRateError
from schemas.recipe import Config

NUM_REASONS = 5
ALL_FAILED = 3  # in a row by chance: one in a thousand even where a tenth of all files is bad. One or two prove nothing
REJECTIONS = frozenset(
    {
        "Empty", "EmptyText", "FolderSeen", "LinkLoop", "NameNotUtf8", "NoText", "NotAFile", "NotMedia", "NoVideoStream",
        "Playlist", "TextTooLong", "TooLong", "TooManyBytes", "TooManyFrames", "TooManyPixels", "UrlNotAllowed",
        "WrongExtension",
    }
)  # fmt: skip
"""Reasons of what a rule of ours refuses, whatever the libraries can do. Every other reason is a failure."""


class FailureBound(Config):
    """The share of items that may fail, and how many must have failed before the share says anything.

    Where nothing succeeded, `ALL_FAILED` failures say enough, whatever `min_failed` is.
    """

    max_ratio: float = Field(0.5, ge=0.0, le=1.0)
    min_failed: int = Field(10, ge=1)

    def check(self, what: str, num_done: int, failed: Mapping[str, int]) -> None:
        """Items that succeeded, and the others by reason -> nothing. Rejections are no failures. `what` names the items.

        Raises: FailureRateError if the share is beyond the bound.
        """
        failed = {reason: count for reason, count in failed.items() if reason not in REJECTIONS}
        num_failed = sum(failed.values())
        num_all = num_done + num_failed
        enough = self.min_failed if num_done else min(self.min_failed, ALL_FAILED)
        if num_failed < enough or num_failed / num_all <= self.max_ratio:
            return
        counts = sorted(failed.items(), key=lambda one: (-one[1], one[0]))
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts[:NUM_REASONS])
        more = f" and {len(counts) - NUM_REASONS} more reasons" if len(counts) > NUM_REASONS else ""
        raise FailureRateError(
            f"{num_failed} of {num_all} {what} failed, which is more than failures.max_ratio={self.max_ratio:g} allows: "
            f"{reasons}{more}. What succeeded is kept. `outback show attempts` has the messages; mend the cause and give "
            "--retry-failed, or raise the bound",
            {"done": num_done, "failed": num_failed, "failed_by_reason": dict(counts)},
        )
