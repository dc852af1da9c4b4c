"""The shape world: what is drawn is what is said, and the judge sees it even through a poor decoder."""

import cv2
import numpy as np
import pytest

from jobs import shapes
from jobs.shapes import Pixels, ShapeFacts

UNSEEN = 10**6  # seeds that no corpus is drawn from


def renderings(count: int, size_px: int = 64) -> list[tuple[str, Pixels]]:
    facts = shapes.all_facts(moving=False)
    pairs = []
    for index in range(count):
        asked = facts[index % len(facts)]
        image = shapes.render_image(shapes.make_scene(asked, UNSEEN + index), 512)
        seen = np.asarray(cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA), np.uint8)
        pairs.append((shapes.write_caption(asked), seen))
    return pairs


def through_poor_decoder(image: Pixels, rng: np.random.Generator) -> Pixels:
    """What a weak vector-quantised autoencoder does: coarse grid, blur, noise, few levels."""
    coarse = cv2.resize(cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA), image.shape[1::-1])
    noisy = cv2.GaussianBlur(coarse, (0, 0), 1.0) + rng.normal(0, 12, image.shape)
    return np.asarray(np.clip(noisy // 24 * 24 + 12, 0, 255), np.uint8)


@pytest.mark.parametrize("size_px", [64, 96, 256])
def test_judge_names_true_renderings_at_any_size(size_px: int) -> None:
    score = shapes.score_images(renderings(180, size_px))
    assert score.num_judged == 180
    assert score.exact >= 0.99


def test_judge_names_renderings_through_a_poor_decoder() -> None:
    rng = np.random.default_rng(0)
    score = shapes.score_images([(text, through_poor_decoder(image, rng)) for text, image in renderings(240)])
    assert score.colour >= 0.98
    assert score.shape >= 0.95


def test_shuffled_prompts_score_at_chance() -> None:
    score = shapes.score_images(renderings(120))
    assert score.shuffled_colour == pytest.approx(1 / 4, abs=0.01)
    assert score.shuffled_shape == pytest.approx(1 / 3, abs=0.01)
    assert score.shuffled_exact == pytest.approx(1 / 12, abs=0.01)


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((64, 64, 3), 60, np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ],
    ids=["ground alone", "noise", "black"],
)
def test_judge_sees_no_shape_where_there_is_none(pixels: Pixels) -> None:
    assert shapes.judge_shape(pixels)[1] is None
    assert shapes.judge_direction(np.stack([pixels] * 4)) is None


def test_judge_sees_colour_but_no_shape_in_a_scrawl() -> None:
    pixels = np.full((64, 64, 3), 60, np.uint8)
    cv2.rectangle(pixels, (4, 4), (60, 60), shapes.COLOURS["green"], 3)
    assert shapes.judge_shape(pixels) == ("green", None)


def test_judge_names_direction_of_every_clip() -> None:
    pairs = []
    for index, facts in enumerate(shapes.all_facts(moving=True)):
        frames = shapes.render_video(shapes.make_scene(facts, UNSEEN + index), 24, 12, 64)
        pairs.append((shapes.write_caption(facts), frames[:: 1 + index % 6]))
    score = shapes.score_videos(pairs)
    assert score.exact >= 0.98
    assert score.shuffled_direction == pytest.approx(1 / 4, abs=0.01)


@pytest.mark.parametrize(("num_frames", "fps"), [(24, 12), (8, 4), (240, 24)])
def test_moving_shape_stays_in_frame(num_frames: int, fps: float) -> None:
    for index, facts in enumerate(shapes.all_facts(moving=True)):
        frames = shapes.render_video(shapes.make_scene(facts, index), num_frames, fps, 128)[:: num_frames - 1]
        border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
        assert int(np.ptp(border.astype(int), axis=1).max()) < 20, f"{facts} touches the border"


def test_a_two_second_clip_crosses_much_of_the_frame() -> None:
    frames = shapes.render_video(shapes.make_scene(ShapeFacts("red", "circle", "left"), 5), 24, 12, 64)
    columns = [np.nonzero(frame[..., 0] > 150)[1].mean() / 64 for frame in frames[[0, -1]]]
    assert columns[0] - columns[1] > 0.35


def test_captions_come_back_as_facts() -> None:
    for facts in shapes.all_facts(moving=False) + shapes.all_facts(moving=True):
        assert shapes.parse_caption(shapes.write_caption(facts)) == facts


@pytest.mark.parametrize(
    "text",
    ["", "a red", "a purple circle", "a red circle moving sideways", "a red circle and a blue square", "red circle"],
)
def test_other_text_is_no_caption(text: str) -> None:
    assert shapes.parse_caption(text) is None


def test_a_scene_may_have_its_place_given() -> None:
    for facts in shapes.all_facts(moving=True):
        places = shapes.all_places(facts)
        assert len(set(places)) == len(places) >= 10
        scene = shapes.make_scene(facts, 3, places[-1])
        assert (scene.centre, scene.radius) == (places[-1].centre, places[-1].radius)
        assert scene.ground == shapes.make_scene(facts, 3).ground


def test_scenes_repeat_by_seed_and_vary_with_it() -> None:
    facts = ShapeFacts("blue", "square")
    assert shapes.make_scene(facts, 7) == shapes.make_scene(facts, 7)
    scenes = {shapes.make_scene(facts, seed) for seed in range(20)}
    assert len(scenes) == 20
    assert len({scene.centre for scene in scenes}) > 5
    assert len({scene.radius for scene in scenes}) == len(shapes.STILL_RADII)


def test_prompts_outside_the_grammar_are_refused() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="not of the grammar"):
        shapes.score_images([("a dog", image)])
    with pytest.raises(ValueError, match="no direction"):
        shapes.score_videos([("a red circle", image[None])])
    with pytest.raises(ValueError, match="not of this world"):
        shapes.make_scene(ShapeFacts("purple", "circle"), 0)


def test_the_height_of_a_drawing_is_where_its_shape_stands() -> None:
    for facts in shapes.all_facts(moving=False):
        for place in shapes.all_places(facts):
            drawn = shapes.render_image(shapes.make_scene(facts, 3, place), 64)[None]
            tolerance = 0.04  # the middle of a triangle's box lies above the middle of its circle
            assert shapes.score_height("anything", drawn) == pytest.approx(1.0 - place.centre[1], abs=tolerance)
    with pytest.raises(ValueError, match="found no shape"):
        shapes.score_height("anything", np.full((1, 64, 64, 3), 52, np.uint8))
