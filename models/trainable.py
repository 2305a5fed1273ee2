"""What the trainer needs from a model: a detector, or a pretext around one."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from models.classification import Classification
from models.scripting import NotScriptable
from util.errors import UserError
from util.settings import Settings

if TYPE_CHECKING:
    from models.detector import Detector


class TrainableModel(NotScriptable, nn.Module):
    """Base class of detectors and pretexts.

    needs_targets: call the model as `model(samples, targets)`, otherwise `model(samples)`.
    losses: names of the losses that the criterion computes.
    classification: the classes that the model's head predicts.
    """

    needs_targets: bool = False
    losses: tuple[str, ...] = ("labels", "boxes", "cardinality")
    classification: Classification

    def base_detector(self) -> "Detector":
        """Return the detector itself, or the one inside a pretext."""
        raise NotImplementedError

    @property
    def normalization(self) -> dict[str, list[float]]:
        """`mean` and `std` of the images, RGB in 0..1, that the backbone was trained with."""
        backbone = self.base_detector().backbone[0]
        return {"mean": list(backbone.mean), "std": list(backbone.std)}

    def loss_weights(self, settings: Settings) -> dict[str, float]:
        """Return the weights of the losses that every decoder layer has."""
        return {
            "loss_ce": settings.cls_loss_coef,
            "loss_bbox": settings.bbox_loss_coef,
            "loss_giou": settings.giou_loss_coef,
        }

    def last_layer_weights(self, settings: Settings) -> dict[str, float]:
        """Return the weights of the losses that only the last decoder layer has."""
        return {}

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Return networks without gradients, by name.

        They are outside of state dict, optimizer and DDP, and have their own place in a checkpoint.
        With several ranks they start from the weights of rank 0.
        """
        return {}

    def load_frozen(self, stored: dict[str, dict[str, Tensor]], source: str) -> None:
        """Load the frozen parts of a checkpoint.

        stored: name -> state dict. source: the checkpoint's name, for errors.

        Raises:
            UserError: the checkpoint lacks one of them, or has another network in its place.
        """
        for name, part in self.frozen_parts().items():
            if name not in stored:
                raise UserError(
                    f"{source} lacks the frozen network {name} of this pretext: resume it with the flags "
                    "of the run that wrote it"
                )
            try:
                part.load_state_dict(stored[name])
            except RuntimeError as error:
                raise UserError(
                    f"{source} has another network as the frozen {name} of this pretext: resume it with the flags of "
                    "the run that wrote it"
                ) from error

    def after_step(self, progress: float) -> None:
        """Update after an optimizer step.

        progress: fraction of the training before that step, in [0, 1).
        """
