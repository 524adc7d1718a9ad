"""How the text after `synthetic:` is parsed, and which clips it lists."""

import collections
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.sources.synthetic import SyntheticSet, parse, samples
from data_sharding.sources.synthetic_face.motion import EXPRESSIONS
from svfap_dist.errors import ConfigError

DFEW = ["happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"]


def test_a_bare_number_is_the_number_of_clips():
    assert parse("12") == SyntheticSet(clips=12)


@given(
    clips=st.integers(1, 1000),
    seed=st.integers(0, 99),
    frames=st.integers(2, 500),
    size=st.integers(16, 128).map(lambda n: 4 * n),
    crop=st.integers(64, 224),
    identities=st.integers(1, 100),
    first_identity=st.integers(0, 1000),
)
def test_every_field_is_read_back(**fields: int):
    text = ", ".join(f"{key} = {value}" for key, value in fields.items())
    assert parse(text) == SyntheticSet(**fields)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "clips="),
        ("many", "clips=many"),
        ("clips=0", "clips=0"),
        ("clips=-3", "clips=-3"),
        ("clips=2.5", "clips=2.5"),
        ("clips=\u00b2", "clips=\u00b2"),
        ("clip=3", "unknown key 'clip'"),
        ("clips=3,clips=4", "clips given twice"),
        ("3,frames=1", "frames=1"),
        ("3,size=226", "size=226"),
        ("3,size=4096", "size=4096"),
        ("3,crop=60", "crop=60"),
        ("3,identities=20,first_identity=9990", "identities up to 10009"),
    ],
)
def test_bad_texts_are_refused_in_full_sentences(text: str, found: str):
    with pytest.raises(ConfigError) as caught:
        samples(text)  # at once, not when the first clip is read
    assert caught.value.found == found
    assert caught.value.where == f"synthetic:{text}"
    assert caught.value.do


def test_clips_are_listed_with_unique_keys_and_the_same_every_time():
    listed, again = list(samples("clips=40,identities=6")), list(samples("clips=40,identities=6"))
    keys = [clip.key for clip in listed]
    assert keys == [clip.key for clip in again]
    assert [clip.stamp for clip in listed] == [clip.stamp for clip in again]
    assert len(set(keys)) == 40
    assert keys[7] == "synthetic/id0001/clip00007"
    assert not any("." in key for key in keys)


def test_labels_say_who_and_what():
    assert list(EXPRESSIONS) == DFEW
    for clip in samples("clips=30,identities=5,first_identity=3"):
        labels = clip.labels
        assert labels["set"] == "synthetic"
        assert clip.key.split("/")[1] == labels["identity"]
        assert DFEW[labels["expression_index"]] == labels["expression"]
        meant = EXPRESSIONS[labels["expression"]]
        assert labels["subject"] == labels["identity"]
        assert (labels["class"], labels["class_name"]) == (
            labels["expression_index"],
            labels["expression"],
        )
        assert labels["values"] == {name: labels[name] for name in ("valence", "arousal")}
        assert labels["valence"] == pytest.approx(labels["intensity"] * meant.valence, abs=1e-3)
        assert labels["arousal"] == pytest.approx(labels["intensity"] * meant.arousal, abs=1e-3)
        if labels["expression"] == "neutral":
            assert labels["intensity"] == 0
        else:
            assert 0.75 <= labels["intensity"] <= 1


def test_each_person_shows_every_expression_equally_often():
    seen = collections.Counter(
        (clip.labels["identity"], clip.labels["expression"]) for clip in samples("42,identities=3")
    )
    assert len(seen) == 3 * 7
    assert set(seen.values()) == {2}


def test_ranges_that_do_not_overlap_share_nobody():
    train = {clip.labels["identity"] for clip in samples("50,identities=8")}
    held_out = {clip.labels["identity"] for clip in samples("50,identities=8,first_identity=8")}
    assert len(train) == len(held_out) == 8
    assert not train & held_out


def test_each_person_is_tested_in_one_of_five_folds():
    fold_of: dict[str, set[int]] = {}
    for clip in samples("clips=60,identities=12,first_identity=3"):
        fold_of.setdefault(clip.labels["subject"], set()).add(clip.labels["fold"])
    assert all(len(folds) == 1 for folds in fold_of.values())
    counts = collections.Counter(fold for folds in fold_of.values() for fold in folds)
    assert sorted(counts.items()) == [(1, 2), (2, 2), (3, 2), (4, 3), (5, 3)]


def test_stamps_change_with_what_the_clip_is_made_from():
    texts = ["7", "7,seed=1", "7,frames=80", "7,size=160", "7,first_identity=20", "7,crop=104"]
    assert len({next(samples(text)).stamp for text in texts}) == len(texts)


def test_a_stamp_without_a_crop_is_that_of_shards_made_before_there_were_crops():
    assert next(samples("1")).stamp == "1:(0, 0, 0, 'happy', 72, 224)"


def test_reading_can_be_sent_to_another_process():
    clip = next(samples("clips=1,frames=2,size=64"))
    assert pickle.loads(pickle.dumps(clip)).read() == clip.read()
