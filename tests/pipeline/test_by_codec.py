"""What is kept does not hang on the codec that the same source was written with, nor on its rate."""

from pathlib import Path

import pytest

from benchmarks.by_codec import ENCODERS, PLAIN, SHOT_MS, SHOTS, Scanned, scanned, spreads, verdicts, write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Coders change the scores of coding itself, and whether a still is the same to the bit. Of these the motion of a soft or
# faint pan is what they change most: a sixth of its range.
STEADY = (
    "motion.motion",
    "technical.sharpness",
    "technical.luma_mean",
    "text.text_coverage_max",
    "technical.colourfulness",
)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scanned]:
    folder: Path = tmp_path_factory.mktemp("codecs")
    return {name: scanned(write(name, folder / f"{index}.mkv")) for index, name in enumerate(ENCODERS)}


@pytest.mark.parametrize("name", ENCODERS)
def test_cuts_come_at_the_same_times(encoded: dict[str, Scanned], name: str) -> None:
    assert [start for start, _ in encoded[name].spans] == [SHOT_MS * shot for shot in range(len(SHOTS))]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_rule_says_the_same(encoded: dict[str, Scanned], name: str) -> None:
    assert verdicts(encoded[name]) == verdicts(encoded[PLAIN])


def test_shots_fall_on_both_sides_of_the_rules(encoded: dict[str, Scanned]) -> None:
    """Or the test above would hold for any scorer."""
    rejected = {
        shot: {rule for rule, passed in answer.items() if not passed}
        for shot, answer in zip(SHOTS, verdicts(encoded[PLAIN]), strict=True)
    }
    assert rejected["pan"] == rejected["object on a still"] == set()
    assert rejected["still"] == rejected["grain on a still"] == {"motion"}
    assert rejected["blurred pan"] == {"sharpness"}
    assert rejected["dark pan"] == {"sharpness"}
    assert rejected["bright pan"] == {"sharpness", "exposure"}
    assert rejected["grey pan"] == {"colour"}
    assert rejected["page of text"] == {"text"}


def test_scores_that_decide_lie_close(encoded: dict[str, Scanned]) -> None:
    apart = {score: share for score, share, _, _ in spreads(encoded)}
    assert {score: apart[score] for score in STEADY if apart[score] > 0.2} == {}
