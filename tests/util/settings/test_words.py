"""`to_words`: flags become the words from which a parser reads the same values."""

import shlex

import pytest

from util.settings import PRETRAIN, given_flags, make_parser
from util.settings.words import to_words


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"lr": 1e-4, "epochs": 3, "pre_norm": True}, "--lr 0.0001 --epochs 3 --pre_norm"),
        ({"lr": 0.1234567890123, "dropout": 0.0}, "--lr 0.1234567890123 --dropout 0"),
        ({"feature_recon": False, "resume": None}, ""),
        ({"output_dir": "a b"}, "--output_dir 'a b'"),
        (
            {"voc_train": ["2007_trainval", "2012_trainval"]},
            "--voc_train 2007_trainval 2012_trainval",
        ),
    ],
)
def test_words_are_parsed_to_the_same_values(flags: dict, line: str) -> None:
    words = to_words(flags)
    assert words == shlex.split(line)
    given = given_flags(vars(make_parser(PRETRAIN).parse_args(words)))
    assert given == {
        name: value for name, value in flags.items() if value is not None and value is not False
    }
