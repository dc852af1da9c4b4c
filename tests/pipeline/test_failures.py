"""A job fails when too large a share of its items does, and says of what."""

import pickle

import pyarrow as pa
import pytest

from pipeline.failures import FailureBound
from pipeline.stage import StageOutcome, ToDo
from schemas.errors import FailureRateError

BOUND = FailureBound(max_ratio=0.25, min_failed=3)


@pytest.mark.parametrize(
    ("num_done", "failed"),
    [(0, {}), (0, {"Corrupt": 2}), (9, {"Corrupt": 3}), (0, {"TooManyPixels": 50}), (3, {"Corrupt": 1, "Empty": 9})],
    ids=["nothing", "too few to tell", "just as many as allowed", "rejected", "mostly rejected"],
)
def test_within_the_bound(num_done: int, failed: dict[str, int]) -> None:
    BOUND.check("media", num_done, failed)


def test_beyond_the_bound_the_commonest_reason_comes_first() -> None:
    failed = {"Truncated": 1, "ImportError": 30, "Empty": 7, "DecodeTimeout": 1}
    with pytest.raises(FailureRateError) as caught:
        BOUND.check("media", 8, failed)
    message = str(caught.value)
    assert "32 of 40 media failed" in message
    assert "30 ImportError, 1 DecodeTimeout, 1 Truncated." in message
    assert "Empty" not in message
    assert "max_ratio=0.25" in message
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.counts) == (message, caught.value.counts)
    assert caught.value.counts["done"] == 8


@pytest.mark.parametrize("max_ratio", [0.0, 0.5, 0.99])
def test_a_job_that_did_nothing_but_fail_has_failed_however_few_items_it_had(max_ratio: float) -> None:
    bound = FailureBound(max_ratio=max_ratio, min_failed=10)
    for num_failed in (3, 9):
        with pytest.raises(FailureRateError, match=f"{num_failed} of {num_failed} media failed"):
            bound.check("media", 0, {"ImportError": num_failed})
    bound.check("media", 0, {"ImportError": 2})  # two bad files are no broken library
    bound.check("media", 1, {"ImportError": 9})  # and something worked


def test_just_the_share_that_is_allowed_is_within_the_bound_whatever_its_digits() -> None:
    for percent in range(1, 101):
        bound = FailureBound(max_ratio=percent / 100, min_failed=1)
        for many in (100, 700):
            allowed = percent * many // 100
            bound.check("media", many - allowed, {"Corrupt": allowed})
            if percent < 100:
                with pytest.raises(FailureRateError):
                    bound.check("media", many - allowed - 1, {"Corrupt": allowed + 1})


def test_a_bound_of_one_never_fails_a_job() -> None:
    FailureBound(max_ratio=1.0, min_failed=1).check("media", 0, {"Corrupt": 1000})


def test_what_failed_before_counts_when_more_is_done() -> None:
    """Else a job would look clean after one item more, and failed again when nothing is left."""
    left = ToDo(pa.table({"item": ["new"]}), {"Corrupt": 4}, num_before=1)
    for outcome in (None, StageOutcome(1, 0, {}, {}, 0.0), StageOutcome(0, 1, {"Corrupt": 1}, {}, 0.0)):
        with pytest.raises(FailureRateError, match=r"[45] of [56] media failed"):
            left.check(BOUND, "media", outcome)
    left.check(BOUND, "media", StageOutcome(11, 0, {}, {}, 0.0))
