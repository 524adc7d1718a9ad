"""Errors keep their words and class on the way from a rank to the person."""

from __future__ import annotations

import pickle

import pytest

from svfap_dist import errors

CLASSES = [
    c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.SvfapError)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_error_survives_the_way_between_processes(cls):
    error = cls("It broke", where="here", found="pieces", do="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) == "It broke. Where: here. Found: pieces. Do: mend it."
    assert (again.what, again.where, again.found, again.do) == (
        "It broke",
        "here",
        "pieces",
        "mend it",
    )


def test_every_class_has_its_own_exit_code():
    codes = [cls.exit_code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert errors.ConfigError.exit_code == 2
