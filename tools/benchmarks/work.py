"""What is trained and run: settings, weights and samples, the same for every contender.

Shapes: B images, V views, n boxes of an image, S patch size.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models import build_model
from models.trainable import TrainableModel
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN, Settings, given_flags, make_parser, settings
from util.settings.registry import DETECTORS, PRETEXTS

BF16_TOLERANCE = 0.1  # of outputs in bfloat16
NUM_BOXES = 7  # objects of a labelled image: the mean of COCO
Case = dict[str, Any]  # what to build, as JSON can store it: another checkout gets it too

# Flags of the published pre-training runs that are not defaults. Boxes come with the samples.
PRETEXT_FLAGS: dict[str, dict[str, Any]] = {
    "random_query_patch": {"feature_recon": True, "fre_cnn": True},
    "region_prior": {"object_embedding_loss": True, "lr_backbone": 0},
    "siamese": {},
}


def expand_models(names: Sequence[str]) -> list[str]:
    """Return model names, DETECTOR or PRETEXT/DETECTOR, with `finetuning` and `pretraining` written out.

    Raises:
        UserError: no such model.
    """
    groups = {
        "finetuning": list(DETECTORS),
        "pretraining": [f"{pretext}/{detector}" for pretext in PRETEXTS for detector in DETECTORS],
    }
    expanded = [model for name in names for model in groups.get(name, [name])]
    known = [model for group in groups.values() for model in group]
    for model in expanded:
        if model not in known:
            raise UserError(
                f"--models {model}: choose among {', '.join([*groups, *known])} (PRETEXT/DETECTOR pre-trains)"
            )
    return expanded


def model_flags(model: str) -> dict[str, Any]:
    """Return the flags of a model name, see `expand_models`."""
    pretext, _, detector = model.rpartition("/")
    if not pretext:
        return {"detector": detector}
    flags = {"pretext": pretext, "detector": detector, **PRETEXT_FLAGS.get(pretext, {})}
    if pretext == "random_query_patch" and detector == "detr":
        flags["pre_norm"] = True  # as published
    return flags


def script_of(flags: Mapping[str, Any]) -> str:
    return PRETRAIN if flags.get("pretext") else FINETUNE


def parse_flags(words: str | Sequence[str], script: str) -> dict[str, Any]:
    """Return the flags of a training command that are given, by name."""
    words = shlex.split(words) if isinstance(words, str) else list(words)
    given = given_flags(make_parser(script).parse_args(words))
    given.pop("script", None)
    return given


def make_settings(case: Case) -> Settings:
    """Return the settings of a case: its flags, and random weights."""
    flags = {"backbone_weights": "none", "backbone_norm": "frozen", **case["flags"]}
    flags |= {"device": case["device"], "batch_size": case["batch_size"], "num_workers": 0}
    return settings(script_of(flags), **flags)


# ---- weights ----


def calibrated_weights(case: Case) -> dict[str, Tensor]:
    """Return random weights of the case's model, with running statistics that fit them.

    Frozen norms that keep their initial statistics would let the values grow or fade from block to block, as in no
    trained model.
    """
    chosen = make_settings(case)
    torch.manual_seed(0)
    model, _, _ = build_model(chosen.replace(backbone_norm="batch"))
    body = model.base_detector().backbone[0]
    for module in body.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # the statistics of one batch
    with torch.no_grad():
        body.train()(torch.randn(2, 3, 256, 256))
    state = model.state_dict()
    return {
        name: value for name, value in state.items() if not name.endswith("num_batches_tracked")
    }


def load_weights(model: nn.Module, path: str | Path) -> None:
    model.load_state_dict(torch.load(path, weights_only=True))


# ---- samples ----


class Samples(Dataset):
    """A list of samples as a dataset."""

    def __init__(self, samples: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.samples[key[1] if isinstance(key, tuple) else key]


def make_samples(case: Case) -> Samples:
    """Return random samples of the size of a case, always the same ones.

    With `padded` all images but the first are smaller, so that a tenth of the batch or more is padding.
    """
    chosen = make_settings(case)
    generator = torch.Generator().manual_seed(1)
    samples = []
    for i in range(case["batch_size"]):
        height, width = case["size"]
        if case.get("padded") and i > 0:
            height, width = height - height // 8 * (i % 2), width - width // 8
        views = [
            _sample(i, height, width, chosen, generator)
            for _ in range(2 if chosen.pretext == "siamese" else 1)
        ]
        samples.append(views[0] if len(views) == 1 else _stack_views(views))
    return Samples(samples)


def _sample(
    index: int, height: int, width: int, chosen: Settings, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one sample, see datasets/__init__.py."""
    count = NUM_BOXES
    if chosen.pretext:
        count = chosen.max_prop if chosen.pretext == "region_prior" else chosen.num_patches
    centers = torch.rand(count, 2, generator=generator) * 0.4 + 0.3
    sizes = torch.rand(count, 2, generator=generator) * 0.4 + 0.1
    first = min(1, chosen.num_classes - 1)  # of a single class: 0, as in the datasets
    labels = torch.full((count,), first)
    if not chosen.pretext:
        last = min(chosen.num_classes, 91)
        labels = torch.randint(first, last, (count,), generator=generator)
    target = {
        "boxes": torch.cat([centers, sizes], 1),  # [n, 4]
        "labels": labels,
        "image_id": torch.tensor([index]),
        "area": sizes.prod(1) * height * width,
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }
    if chosen.pretext and (chosen.pretext != "region_prior" or chosen.object_embedding_loss):
        target["patches"] = _pixels(count, chosen.patch_size, chosen.patch_size, generator)
    image = _pixels(1, height, width, generator)[0]
    return image.contiguous(memory_format=torch.contiguous_format), target


def _pixels(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return smooth random images, uint8 [count, 3, height, width]."""
    coarse = torch.rand(count, 3, max(height // 16, 2), max(width // 16, 2), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def _stack_views(
    views: Sequence[tuple[Tensor, dict[str, Tensor]]],
) -> tuple[Tensor, dict[str, Tensor]]:
    targets = [target for _, target in views]
    return torch.stack([image for image, _ in views]), {
        key: torch.stack([target[key] for target in targets]) for key in targets[0]
    }


# ---- files for other processes ----


def save_case(case: Case, folder: Path, weights: Mapping[str, Tensor]) -> Case:
    """Return the case with paths of its weights and samples, which every contender reads."""
    weights_file, samples_file = folder / "weights.pth", folder / "samples.pth"
    torch.save(dict(weights), weights_file)
    torch.save(list(make_samples(case).samples), samples_file)
    return {**case, "weights": str(weights_file), "samples": str(samples_file)}


def load_samples(case: Case) -> Samples:
    return Samples(torch.load(case["samples"], weights_only=True))


def build_calibrated(case: Case) -> tuple[TrainableModel, Any, Any, Settings]:
    """Return model, criterion, post-processors and settings of a case, with its weights, as the entry scripts do."""
    chosen = make_settings(case)
    torch.manual_seed(0)  # parts that the weights lack, such as a target encoder
    model, criterion, postprocessors = build_model(chosen)
    load_weights(model, case["weights"])
    device = torch.device(case["device"])
    model.to(device).to(memory_format=torch.channels_last)
    return model, criterion.to(device), postprocessors, chosen
