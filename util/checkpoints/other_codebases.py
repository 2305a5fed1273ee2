"""Detectors of related codebases, which this version does not have and which share names with those that it has."""

from collections.abc import Mapping

from torch import Tensor

from util.errors import UserError
from util.settings.registry import DETECTORS

# Detector -> parts of names; each must occur in some name. The first match counts.
MARKERS: dict[str, tuple[str, ...]] = {
    "RF-DETR": ("refpoint_embed.weight", "query_feat.weight"),
    "DINO": ("label_enc.weight", "transformer.tgt_embed.weight"),
    "DN-DETR": ("label_enc.weight", "refpoint_embed.weight"),
    "DAB-DETR": ("refpoint_embed.weight",),
    "DINO or DN-DETR": ("label_enc.weight", "transformer.decoder."),
    "DAB-DETR of Hugging Face transformers": ("query_refpoint_embeddings.weight",),
    "RT-DETR": ("denoising_class_embed.weight",),
    "RT-DETR without denoising": ("dec_score_head.", "enc_score_head."),
    "DETA": ("pix_trans.weight", "encoder_attn.sampling_offsets."),
    "detector of MMDetection": ("bbox_head.", "decoder.layers.0."),
    "detector of Detectron2": ("backbone.0.backbone.stem.",),
    "detector of detrex": ("transformer.decoder.layers.0.attentions.",),
}


def check_codebase(state: Mapping[str, Tensor], source: object) -> None:
    """Check that a state dict is not a detector of a related codebase.

    Raises:
        UserError: it is; the message names it.
    """
    names = "\n".join(state)
    for detector, parts in MARKERS.items():
        if all(part in names for part in parts):
            has_resnet = "backbone.0.body.conv1.weight" in state
            remedy = (
                f"use its backbone only, --backbone_weights {source}, or " if has_resnet else ""
            )
            raise UserError(
                f"{source} contains a {detector} (it has {parts[0].rstrip('.')}), which this version does not have "
                f"({', '.join(DETECTORS)}); {remedy}choose another file"
            )
