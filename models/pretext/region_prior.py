"""DETReg (Bar et al., CVPR 2022): detect the boxes of a proposal method, and predict an embedding of what is in
each.
"""

from typing import Any

from torch import Tensor, nn

from models.classification import Classification, matching_costs
from models.detector import Detector, full_precision, without_autocast
from models.pretext import Pretext
from models.target_encoder import IntermediateEncoder, build_target_encoder, encode_crops
from models.transformer import MLP
from util.errors import UserError
from util.nested_tensor import as_nested_tensor
from util.packed_targets import Targets
from util.settings import Settings


class RegionPrior(Pretext):
    """The detector sees whole images with its own queries; targets are proposals, all of one class.

    With `target_encoder`, `feature_embed` predicts from the last decoder layer that frozen network's embedding
    of the crop of each matched proposal. The encoder is in neither state dict nor optimizer; checkpoints keep it apart.

    Args:
        published_statistics: see `models.target_encoder.encode_crops`.
    """

    target_encoder: Any

    def __init__(
        self, detector: Detector, target_encoder: Any = None, published_statistics: bool = False
    ) -> None:
        super().__init__(detector)
        self.losses = ("labels", "boxes", "cardinality")
        self.published_statistics = published_statistics
        object.__setattr__(
            self, "target_encoder", target_encoder
        )  # not a submodule: outside of state dict, parameters and DDP
        if target_encoder is not None:
            self.feature_embed = MLP(
                detector.hidden_dim, detector.hidden_dim, target_encoder.num_channels, num_layers=2
            )
            self.losses += ("object_embedding",)

    @classmethod
    def from_settings(cls, settings: Settings, detector: Detector) -> "RegionPrior":
        if not settings.object_embedding_loss:
            return cls(detector)
        encoder = build_target_encoder(
            settings.obj_embedding_head, detector.backbone[0], settings.backbone_weights
        )
        return cls(
            detector,
            encoder,
            settings.reproduce_published and settings.obj_embedding_head == "head",
        )

    @staticmethod
    def build_classification(settings: Settings) -> Classification:
        """As the detector's own: objectness is one of its classes (published: label 1 of 91), or the only one with
        `--num_classes 1`.
        """
        return Classification(
            settings.classification, settings.num_classes, **matching_costs(settings)
        )

    def last_layer_weights(self, settings: Settings) -> dict[str, float]:
        return (
            {"loss_object_embedding": settings.object_embedding_coef}
            if "object_embedding" in self.losses
            else {}
        )

    def forward(self, samples, targets: Targets) -> dict:
        """samples: normalised images; with embeddings each target has `patches` [N_i, 3, S, S], normalised like the
        images.

        Returns the detector's outputs, with `pred_features` [B, Q, F] of the last layer and `target_features` [sum N_i,
        F].
        """
        memory = self.detector.encode(as_nested_tensor(samples))
        states = self.detector.decode(memory)
        outputs = self.detector.predict(states)
        if self.target_encoder is not None:
            last = full_precision(states.layers[-1])
            with without_autocast(last):
                outputs["pred_features"] = self.feature_embed(last)
            crops = [target["patches"] for target in targets]
            outputs["target_features"] = full_precision(
                encode_crops(self.target_encoder, crops, self.published_statistics)
            )
        return outputs

    def frozen_parts(self) -> dict[str, nn.Module]:
        return {} if self.target_encoder is None else {"target_encoder": self.target_encoder}

    def load_frozen(self, stored: dict[str, dict[str, Tensor]], source: str) -> None:
        """A published checkpoint has no encoder; where its backbone never trained, that one is the encoder's beginning.

        Raises:
            UserError: the encoder can't be told from the file.
        """
        if stored or self.target_encoder is None:
            super().load_frozen(stored, source)
        elif (
            isinstance(self.target_encoder, IntermediateEncoder)
            and self.detector.backbone[0].frozen
        ):
            self.target_encoder.copy_weights(self.detector.backbone[0])
        else:
            raise UserError(
                f"{source} lacks the target encoder of --object_embedding_loss: start a new run from --backbone_weights"
            )
