"""DETReg (Bar et al., CVPR 2022): detect the boxes of a proposal method and predict an embedding of
the content of each.

Shapes: B images, Q queries, N_i proposals of image i, F embedding channels, S x S size of a crop.
"""

from typing import Any

from torch import Tensor, nn

from models.classification import Classification, matching_costs
from models.detector import Detector, full_precision
from models.feature_head import add_features
from models.pretext import Pretext
from models.target_encoder import IntermediateEncoder, build_target_encoder, encode_crops
from models.transformer import MLP
from util.errors import UserError
from util.nested_tensor import as_nested_tensor
from util.packed_targets import Targets
from util.settings import Settings


class RegionPrior(Pretext):
    """DETReg's pretext. The detector uses its own queries; targets are proposals, all of one class.

    Args:
        target_encoder: frozen network that encodes the crop of each proposal. `feature_embed`
            learns to predict this embedding from the last decoder layer (section 3.2). None: no
            object embedding loss. The encoder is in neither state dict nor optimizer; checkpoints
            keep it apart.
        published_batch_norm: see `models.target_encoder.encode_crops`.
    """

    target_encoder: Any

    def __init__(
        self, detector: Detector, target_encoder: Any = None, published_batch_norm: bool = False
    ) -> None:
        super().__init__(detector)
        self.losses = ("labels", "boxes", "cardinality")
        self.published_batch_norm = published_batch_norm
        # Bypasses nn.Module: a submodule would be in state dict, parameters and DDP.
        object.__setattr__(self, "target_encoder", target_encoder)
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
        # `intermediate` has frozen batch norm: the published training mode changes only `head`.
        published = settings.reproduce_published and settings.obj_embedding_head == "head"
        return cls(detector, encoder, published)

    @staticmethod
    def build_classification(settings: Settings) -> Classification:
        """Return the detector's own classification.

        As published, objectness is label 1 of 91. With `--num_classes 1` it is the only class.
        """
        return Classification(
            settings.classification, settings.num_classes, **matching_costs(settings)
        )

    def last_layer_weights(self, settings: Settings) -> dict[str, float]:
        if "object_embedding" not in self.losses:
            return {}
        return {"loss_object_embedding": settings.object_embedding_coef}

    def forward(self, samples, targets: Targets) -> dict:
        """Detect proposals.

        Args:
            samples: normalized images.
            targets: with object embeddings, `patches` [N_i, 3, S, S] of each image, normalized like
                the images: the crops of its proposals.

        Returns:
            The detector's outputs, with object embeddings also `pred_features` [B, Q, F] of the
            last layer and `target_features` [sum N_i, F].
        """
        memory = self.detector.encode(as_nested_tensor(samples))
        states = self.detector.decode(memory)
        outputs = self.detector.predict(states)
        if self.target_encoder is not None:
            crops = [target["patches"] for target in targets]
            features = encode_crops(self.target_encoder, crops, self.published_batch_norm)
            outputs["target_features"] = full_precision(features)  # [sum N_i, F]
            return add_features(outputs, self.feature_embed, states.layers[-1:])
        return outputs

    def frozen_parts(self) -> dict[str, nn.Module]:
        return {} if self.target_encoder is None else {"target_encoder": self.target_encoder}

    def load_frozen(self, stored: dict[str, dict[str, Tensor]], source: str) -> None:
        """Load the target encoder of a checkpoint, see `TrainableModel.load_frozen`.

        A published checkpoint has none. If its backbone never trained, the backbone still has the
        encoder's weights.

        Raises:
            UserError: the encoder cannot be recovered from the checkpoint.
        """
        backbone = self.detector.backbone[0]
        if stored or self.target_encoder is None:
            super().load_frozen(stored, source)
        elif isinstance(self.target_encoder, IntermediateEncoder) and backbone.frozen:
            self.target_encoder.copy_weights(backbone)
        else:
            raise UserError(
                f"{source} lacks the target encoder of --object_embedding_loss: start a new run from "
                "--backbone_weights"
            )
