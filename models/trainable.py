"""What the trainer asks of a model, be it a detector or a pretext around one."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.classification import Classification
from util.errors import UserError
from util.settings import Settings

if TYPE_CHECKING:
    from models.detector import Detector


class TrainableModel(nn.Module):
    """Base of detectors and pretexts.

    needs_targets: the model is called `model(samples, targets)`, otherwise `model(samples)`. losses: names of the
    losses that the criterion computes. classification: the classes that its head tells apart.
    """

    needs_targets: bool = False
    losses: tuple[str, ...] = ("labels", "boxes", "cardinality")
    classification: Classification

    def base_detector(self) -> "Detector":
        """The detector itself, or the one inside a pretext."""
        raise NotImplementedError  # the contract

    @property
    def normalization(self) -> dict[str, list[float]]:
        """`mean` and `std` of the images, for RGB in 0..1, that the backbone was trained with."""
        backbone = self.base_detector().backbone[0]
        return {"mean": list(backbone.mean), "std": list(backbone.std)}

    def loss_weights(self, settings: Settings) -> dict[str, float]:
        """Weight in the total of each loss that all decoder layers have."""
        return {
            "loss_ce": settings.cls_loss_coef,
            "loss_bbox": settings.bbox_loss_coef,
            "loss_giou": settings.giou_loss_coef,
        }

    def last_layer_weights(self, settings: Settings) -> dict[str, float]:
        """Weight of each loss that only the last decoder layer has."""
        return {}

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Networks without gradients: outside of state dict, optimizer and DDP, and stored apart in checkpoints. With
        several processes they start as those of rank 0.
        """
        return {}

    def load_frozen(self, stored: dict[str, dict[str, Tensor]], source: str) -> None:
        """Fills the frozen parts from what a checkpoint holds of them: name -> state dict. `source` names it in errors.

        Raises:
            UserError: the checkpoint lacks one of them.
        """
        for name, part in self.frozen_parts().items():
            if name not in stored:
                raise UserError(
                    f"{source} lacks the frozen network {name} of this pretext: resume it with the flags that it was "
                    "made with"
                )
            part.load_state_dict(stored[name])

    def after_step(self, progress: float) -> None:
        """Called after each step of the optimizer. progress, in [0, 1): of the training, before that step."""
