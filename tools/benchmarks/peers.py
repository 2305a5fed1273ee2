"""Contenders of other packages, with our weights: Hugging Face transformers and ONNX Runtime.

A package that is not installed is a row that says so, with the command that installs it.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model
from tools.benchmarks.measure import Comparison, Local
from tools.benchmarks.work import BF16_TOLERANCE, Case, make_settings
from tools.exports.formats import ONNX_PACKAGES, onnx_detector
from tools.exports.graph import Graph
from util.checkpoints.hugging_face import from_hugging_face
from util.checkpoints.hugging_face_folder import architecture_entries
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.settings import Settings


def missing(*packages: str) -> str:
    """Return what to install, or "" if all packages are there."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(absent)}" if absent else ""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# ---- transformers ----


def origins(peer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our name -> for each row of that tensor, the position in `peer` of the tensor it comes from.

    peer: a state dict of transformers. Its tensors are replaced by their position, and translated.
    """
    return from_hugging_face(
        {
            name: torch.full((len(value) if value.ndim else 1,), i)
            for i, (name, value) in enumerate(peer.items())
        }
    )


def to_hugging_face(state: Mapping[str, Tensor], peer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights with the names of transformers: the inverse of `from_hugging_face`."""
    names = list(peer)
    return {
        names[i]: state[ours][rows == i]
        for ours, rows in origins(peer).items()
        if ours in state
        for i in rows.unique().tolist()
    }


def with_peer_eps(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights for the frozen norms of transformers, which add 1e-5 to every variance, as ResNets do.

    timm's networks add another value: the difference goes into the variances.
    """
    changed = dict(weights)
    for name, module in model.named_modules():
        variance = f"{name}.running_var"
        if variance in changed:
            changed[variance] = changed[variance] + (module.eps - 1e-5)
    return changed


def freeze_as_ours(peer: nn.Module, trainable: set[str]) -> None:
    """Train the same parameters as ours, whose names are given."""
    names = list(peer.state_dict())
    trained = {
        names[i]
        for ours, rows in origins(peer.state_dict()).items()
        if ours in trainable
        for i in rows.unique().tolist()
    }
    for name, parameter in peer.named_parameters():
        parameter.requires_grad_(name in trained)


def build_transformers(settings: Settings, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the transformers model of these settings with our weights, dropout and trained parameters.

    Raises:
        UserError: a setting that transformers lacks, or weights that do not fit.
    """
    import transformers

    names = {
        "detr": "Detr",
        "conditional_detr": "ConditionalDetr",
        "deformable_detr": "DeformableDetr",
    }
    if settings.detector not in names:
        raise UserError(f"transformers has no {settings.detector}")
    if settings.pre_norm or settings.dilation or settings.masks:
        raise UserError("transformers has no such variant of this detector")
    kind = names[settings.detector]
    config = getattr(transformers, f"{kind}Config")(**_config(settings))
    peer = getattr(transformers, f"{kind}ForObjectDetection")(config)

    given = to_hugging_face(weights, peer.state_dict())
    lacking = [name for name in peer.state_dict() if name not in given]
    lacking = [name for name in lacking if not name.endswith("num_batches_tracked")]
    if lacking:
        raise UserError(f"transformers has weights that ours lack, the first is {lacking[0]}")
    peer.load_state_dict(given, strict=False)
    if settings.backbone.startswith("timm:"):
        restore_activations(peer, settings.backbone.removeprefix("timm:"))
    return peer


def restore_activations(peer: nn.Module, backbone: str) -> None:
    """Give the frozen norms of transformers the activations of the norms that they replaced.

    timm has layers that are norm and activation in one. transformers 5 replaces them by frozen norms alone, so its
    network would lack most of its activations, and be another one than timm's.
    """
    import timm
    from timm.layers import BatchNormAct2d

    body = timm.create_model(backbone, pretrained=False, features_only=True)
    activations = {
        name: module.act
        for name, module in body.named_modules()
        if isinstance(module, BatchNormAct2d)
    }
    for name, module in peer.named_modules():
        own = name.rpartition("backbone.")[2].removeprefix("conv_encoder.").removeprefix("model.")
        if own in activations and not isinstance(module, BatchNormAct2d):
            module.register_forward_hook(lambda _m, _x, y, act=activations[own]: act(y))


def _config(settings: Settings) -> dict[str, Any]:
    return {
        "use_timm_backbone": True,
        "backbone": settings.backbone.removeprefix("timm:"),
        "use_pretrained_backbone": False,
        "num_labels": settings.num_classes,
        **architecture_entries(settings),
        "auxiliary_loss": settings.aux_loss,
        # It accepts whole numbers only.
        "class_cost": int(settings.set_cost_class),
        "bbox_cost": int(settings.set_cost_bbox),
        "giou_cost": int(settings.set_cost_giou),
        "bbox_loss_coefficient": int(settings.bbox_loss_coef),
        "giou_loss_coefficient": int(settings.giou_loss_coef),
        "eos_coefficient": settings.eos_coef,
        "focal_alpha": settings.focal_alpha,
    }


class TransformersStep:
    """A training step of transformers' model, on our batch, with AdamW and gradient clipping.

    Raises:
        UserError: it does not train as many parameters as ours.
    """

    def __init__(self, peer: nn.Module, ours: Any, amp: bool, fused: bool) -> None:
        self.peer, self.amp, self.device = peer, amp, ours.device
        self.weights = ours.run.criterion.weight_dict
        samples = ours.samples
        self.inputs = {
            "pixel_values": samples.tensors,
            "pixel_mask": (~samples.mask).long(),
            "labels": [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in ours.targets],
        }
        count = sum(p.numel() for p in peer.parameters() if p.requires_grad)
        if count != ours.trained_parameters():
            raise UserError(
                f"transformers trains {count} parameters and ours {ours.trained_parameters()}"
            )
        self.parameters = [p for p in peer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=ours.run.optimizer.param_groups[0]["lr"],
            weight_decay=ours.run.optimizer.param_groups[0]["weight_decay"],
            fused=fused or None,
        )
        self.max_norm = ours.run.clip_max_norm

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.peer(**self.inputs).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        self.peer.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            found = self.peer(**self.inputs)
        self.peer.train()
        # Its total weighs the classes of some detectors otherwise.
        losses = [found.loss_dict[k].float() * w for k, w in self.weights.items()]
        return [found.logits.float(), found.pred_boxes.float(), sum(losses[1:], losses[0])]


def add_training_peers(
    comparison: Comparison, case: Case, ours: Any, enabled: bool, bf16: bool
) -> None:
    """Add transformers in float32, and in bfloat16 if one of ours is, with PyTorch's default and the fused AdamW."""
    if not enabled:
        return
    reason = missing("transformers", "timm")
    if reason:
        comparison.skipped["transformers"] = reason
        return
    trainable = {name for name, p in ours.run.model.named_parameters() if p.requires_grad}
    try:
        weights = with_peer_eps(ours.run.model, torch.load(case["weights"], weights_only=True))
        peer = build_transformers(make_settings(case), weights)
        peer.to(ours.device).train()
        freeze_as_ours(peer, trainable)
        for amp in (False, True)[: 1 + bf16]:
            for fused in (False, True):
                name = f"transformers{', bf16' if amp else ''}{', fused AdamW' if fused else ''}"
                step = TransformersStep(peer, ours, amp, fused)
                comparison.contenders[name] = Local(step.step, step.outputs, ours.device)
                if amp:
                    comparison.tolerances[name] = BF16_TOLERANCE
    except Exception as error:  # noqa: BLE001 - whatever fails in another package is a skipped row
        comparison.skipped["transformers"] = first_line(error)


class TransformersDetector(nn.Module):
    """transformers' model with the inputs and outputs of ours."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        found = self.peer(pixel_values=samples.tensors, pixel_mask=(~samples.mask).long())
        return {"pred_logits": found.logits, "pred_boxes": found.pred_boxes}


class OnnxDetector(nn.Module):
    """Our detector in ONNX Runtime on the CPU, as `tools/export.py` exports it: with dynamic batch and image size."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.run = onnx_detector(Graph(detector).eval())

    def forward(self, samples: NestedTensor) -> dict[str, Tensor]:
        found = self.run({"images": samples.tensors})
        return {"pred_logits": found["logits"], "pred_boxes": found["boxes"]}


def add_inference_peers(comparison: Comparison, case: Case, ours: Any) -> None:
    """Add transformers, in the precision of ours, and ONNX Runtime, in float32 on a CPU."""
    for name, packages, build in (
        ("transformers", ("transformers", "timm"), _transformers_inference),
        ("ONNX Runtime", ONNX_PACKAGES, _onnx_inference),
    ):
        reason = missing(*packages)
        try:
            if not reason:
                comparison.contenders[name] = build(case, ours).contender()
        except Exception as error:  # noqa: BLE001 - whatever fails in another package is a skipped row
            reason = first_line(error)
        if reason:
            comparison.skipped[name] = reason


def _transformers_inference(case: Case, ours: Any) -> Any:
    weights = torch.load(case["weights"], weights_only=True)
    # A model of its own: ours may have folded its norms.
    plain, _, _ = build_model(make_settings(case))
    peer = build_transformers(make_settings(case), with_peer_eps(plain, weights))
    return ours.with_model(TransformersDetector(peer.to(ours.predictor.device).eval()))


def _onnx_inference(case: Case, ours: Any) -> Any:
    if ours.predictor.device.type != "cpu" or ours.predictor.amp:
        raise UserError("measured in float32 on CPUs only")
    if ours.samples.padded:
        raise UserError("exported for batches without padding")
    return ours.with_model(OnnxDetector(ours.predictor.model))
