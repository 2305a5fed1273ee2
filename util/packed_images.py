"""The images of a batch without padding: what dataloader workers send, and what is copied to the device.

Shapes: B images, [H, W] the padded size, [h, w] the size of one image, P pixels of all images, rounded up to a multiple
of ROW.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from util.nested_tensor import NestedTensor

ROW = 1024  # pixels


@dataclass
class PackedImages:
    """Images one after the other, each row by row, with the three channels of a pixel together.

    Padding is added on the device (`pad`): it would be most of a batch of images of different shapes, in the shared
    memory between processes and on the way to the device.

    pixels: [P / ROW, 3 * ROW]: rows of many pixels, because operations on three channels at a time are slow on a CPU.
    sizes_hw: (h, w) of each image. On the host, so that nothing waits for the device.
    height, width: of the padded batch.
    """

    pixels: Tensor
    sizes_hw: list[tuple[int, int]]
    height: int
    width: int

    @classmethod
    def pack(cls, images: Sequence[Tensor], multiple: int = 1) -> "PackedImages":
        """Pack images uint8 [3, h, w]. The padded size is a multiple of `multiple`."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (
            -(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True)
        )
        num_pixels = sum(h * w for h, w in sizes)
        rest = images[0].new_zeros(-num_pixels % ROW * 3)
        # Decoded images are channels-last in memory: a copy of each as a whole.
        flat = torch.cat([*(image.permute(1, 2, 0).flatten() for image in images), rest])  # [3 P]
        return cls(flat.view(-1, 3 * ROW), sizes, height, width)

    def __len__(self) -> int:
        return len(self.sizes_hw)

    @property
    def padded(self) -> bool:
        """Whether any image has padding."""
        return any(size != (self.height, self.width) for size in self.sizes_hw)

    @property
    def padding_fraction(self) -> float:
        """The fraction of the padded batch's pixels that are padding."""
        used = sum(h * w for h, w in self.sizes_hw)
        return 1 - used / (len(self) * self.height * self.width)

    @property
    def tensors(self) -> Tensor:
        """The padded images, [B, 3, H, W]; padded again at each access."""
        return self.pad().tensors

    @property
    def mask(self) -> Tensor:
        """bool [B, H, W], True on padding."""
        device = self.pixels.device
        # non_blocking: the host must not wait for the device in the middle of a training step.
        sizes = torch.tensor(self.sizes_hw).to(device, non_blocking=True)  # [B, 2]
        below = torch.arange(self.height, device=device) >= sizes[:, :1]  # [B, H]
        beyond = torch.arange(self.width, device=device) >= sizes[:, 1:]  # [B, W]
        return below[:, :, None] | beyond[:, None]

    def pad(self) -> NestedTensor:
        """Pad with zeros at the bottom and the right. The images are channels-last in memory."""
        pixels = self.pixels.view(-1, 3)  # [P, 3]
        lengths = [h * w for h, w in self.sizes_hw]
        if not self.padded:
            whole = pixels[: sum(lengths)].view(len(self), self.height, self.width, 3)
            return NestedTensor(whole.permute(0, 3, 1, 2), self.mask, False)
        padded = pixels.new_zeros(len(self), self.height, self.width, 3)
        images = pixels[: sum(lengths)].split(lengths)
        for image, target, (h, w) in zip(images, padded, self.sizes_hw, strict=True):
            target[:h, :w] = image.view(h, w, 3)
        return NestedTensor(padded.permute(0, 3, 1, 2), self.mask, True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedImages":
        pixels = self.pixels.to(device, non_blocking=non_blocking)
        return PackedImages(pixels, self.sizes_hw, self.height, self.width)

    def pin_memory(self) -> "PackedImages":
        return PackedImages(self.pixels.pin_memory(), self.sizes_hw, self.height, self.width)
