"""Settings for the class-agnostic evaluation of a pretext's detector."""

import pytest

from evaluation import validation_settings
from util.errors import UserError
from util.settings import PRETRAIN, make_parser, resolve

RUN = {"pretext": "region_prior", "device": "cpu"}
TRAINED = {"batch_size": 16, "amp": "bf16", "image_size": 320, "seed": 3}


def pretext(adopted: dict | None = None, **given):
    return resolve({**RUN, **given}, adopted, PRETRAIN)


def test_eval_ignores_training_settings_of_checkpoint() -> None:
    given = {"eval": True, "resume": "a.pth", "coco_path": "coco"}
    ours = validation_settings(pretext(TRAINED, **given))
    assert ours == validation_settings(pretext(**given))
    assert (ours.batch_size, ours.amp, ours.image_size, ours.dataset_file) == (2, "no", 800, "coco")


@pytest.mark.parametrize("size", [320, 480, 800])
def test_eval_uses_given_image_size(size: int) -> None:
    given = {"eval": True, "resume": "a.pth", "coco_path": "coco", "image_size": size}
    assert validation_settings(pretext(**given)).image_size == size


def test_eval_during_training_uses_run_data_and_default_size() -> None:
    ours = validation_settings(pretext(coco_path="coco", batch_size=5, amp="bf16"))
    assert (ours.coco_path, ours.batch_size, ours.amp, ours.image_size) == ("coco", 5, "bf16", 800)


@pytest.mark.parametrize("flag", ["eval", "viz"])
def test_eval_needs_checkpoint(flag: str) -> None:
    args = make_parser(PRETRAIN).parse_args(
        [f"--{flag}", "--pretext", "region_prior", "--device", "cpu"]
    )
    with pytest.raises(
        UserError, match=f"--{flag} needs the detector to evaluate: add --resume PATH"
    ):
        resolve(args)
