"""Which caption speaks for a medium."""

from pipeline.caption_provided import CAPTIONER_ID, caption_row, provided_caption


def place(uri: str, caption: str | None, source: str | None) -> dict[str, str | None]:
    return {"uri": uri, "caption": caption, "caption_source": source}


def test_a_manifest_wins_over_sidecars() -> None:
    found = provided_caption(
        [
            place("/a", "by text", "sidecar_txt"),
            place("/b", "by list", "manifest"),
            place("/c", "by json", "sidecar_json"),
        ]
    )
    assert found == ("by list", "manifest")


def test_without_any_caption_there_is_none() -> None:
    assert provided_caption([place("/a", None, None), place("/b", "", "sidecar_txt")]) is None


def test_the_order_of_places_does_not_matter() -> None:
    places = [place("/b", "second", "manifest"), place("/a", "first", "manifest")]
    assert provided_caption(places) == provided_caption(places[::-1]) == ("first", "manifest")


def test_a_row_spans_the_whole_clip() -> None:
    clip = {"clip_id": "m-000000000-000002000", "start_ms": 0, "end_ms": 2000}
    row = caption_row(clip, "a red circle", "manifest")
    assert (row["window"], row["window_start_ms"], row["window_end_ms"]) == (0, 0, 2000)
    assert row["captioner_id"] == CAPTIONER_ID
