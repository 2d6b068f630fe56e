"""Tests for known.py."""

import re

import pytest

from mlp_mixer import known

CROPS = {"inception": 1, "resize_crop": 2, "resize": 3}


def test_a_known_name_picks_its_entry():
    assert known.pick("crop", "resize", CROPS) == 3
    known.require("crop", "resize", CROPS)


@pytest.mark.parametrize("call", [known.pick, known.require])
def test_an_unknown_name_lists_all_of_them_the_nearest_first(call):
    said = "crop 'resize_crp' is unknown; try resize_crop, resize, inception."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        call("crop", "resize_crp", CROPS)


@pytest.mark.parametrize("name", [None, 3, ["resize"], ""])
def test_what_is_no_name_is_refused_in_the_same_words(name):
    with pytest.raises(ValueError, match=f"crop {re.escape(repr(name))} is unknown"):
        known.pick("crop", name, CROPS)


def test_case_does_not_make_a_name_another():
    assert known.nearest("TIMM", ["ours", "timm"]) == "timm, ours"


def test_nearest_lists_as_many_as_are_wanted():
    assert known.nearest("resize", CROPS, 2) == "resize, resize_crop"
    assert known.nearest("resize", []) == ""
