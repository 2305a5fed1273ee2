"""Random query patch detection, the pretext of UP-DETR (Dai et al., CVPR 2021), on any detector.

Random patches are cropped from an image. The pooled backbone feature of a patch is added to the
positions of a group of object queries. The decoder learns to localize the patch in the image and to
reconstruct its feature.

Shapes: B images, M patches per image, Q queries, D model width, F backbone channels, S x S patches.
"""

import torch
from torch import Tensor, nn

from models.detector import Detector, Queries
from models.pretext import QueryPatchPretext, check_region_queries, pooled_features
from models.transformer import MLP
from util.nested_tensor import as_nested_tensor
from util.packed_targets import Targets
from util.settings import Settings


class RandomQueryPatch(QueryPatchPretext):
    """UP-DETR's pretext.

    Query n belongs to patch n // (Q / M). Queries of one patch attend only to each other in
    self-attention (section 3.2), by query groups. In training each query loses its patch feature
    with probability `mask_ratio`. At evaluation an image may have any number x <= M of patches: the
    first x * Q / M queries are used.

    Args:
        query_shuffle: assign the learned queries to other patches in every training step (the
            authors found no gain).
        feature_recon: predict the patch feature; its target is detached.
    """

    def __init__(
        self,
        detector: Detector,
        num_patches: int,
        *,
        mask_ratio: float = 0.1,
        query_shuffle: bool = False,
        feature_recon: bool = True,
    ) -> None:
        super().__init__(detector)
        check_region_queries(detector, num_patches)
        self.num_patches, self.mask_ratio = num_patches, mask_ratio
        self.query_shuffle, self.feature_recon = query_shuffle, feature_recon

        channels, dim = sum(detector.backbone[0].num_channels), detector.hidden_dim
        self.patch2query = nn.Linear(channels, dim)
        self.losses = ("labels", "boxes", "cardinality")
        if feature_recon:
            self.feature_align = MLP(dim, dim, channels, num_layers=2)
            self.losses += ("features",)

    @classmethod
    def from_settings(cls, settings: Settings, detector: Detector) -> "RandomQueryPatch":
        return cls(
            detector,
            settings.num_patches,
            mask_ratio=settings.mask_ratio,
            query_shuffle=settings.query_shuffle,
            feature_recon=settings.feature_recon,
        )

    def forward(self, samples, targets: Targets) -> dict:
        """Detect the patches of each image.

        Args:
            samples: normalized images.
            targets: `patches` [M, 3, S, S] of each image, normalized like the images.

        Returns:
            The detector's outputs, with `pred_features` [B, Q, F] in each layer and
            `target_features` [B * M, F].

        Raises:
            ValueError: images have different numbers of patches, or more than `num_patches`.
        """
        patches = self._stack_patches(targets)  # [B, M, 3, S, S]
        batch, num_patches = patches.shape[:2]
        memory = self.detector.encode(as_nested_tensor(samples))
        features = self.patch_features(patches.flatten(0, 1))  # [B * M, F]
        queries = self.patch_queries(features, batch, num_patches)
        states = self.detector.decode(memory, queries, query_groups=num_patches)
        outputs = self.detector.predict(states)
        if self.feature_recon:
            # Detached: no gradient reaches a backbone that trains through its own target.
            return self.with_features(outputs, states.layers, features.detach())
        return outputs

    def _stack_patches(self, targets: Targets) -> Tensor:
        counts = {len(target["patches"]) for target in targets}
        if len(counts) != 1 or max(counts) > self.num_patches:
            raise ValueError(
                f"every image must have the same number of patches, at most {self.num_patches}; "
                f"got {sorted(counts)}"
            )
        return torch.stack([target["patches"] for target in targets])

    def patch_features(self, patches: Tensor) -> Tensor:
        """Return the pooled backbone features of patches: [N, 3, S, S] -> [N, F]."""
        return pooled_features(self.detector.backbone[0], patches)

    def patch_queries(self, features: Tensor, batch: int, num_patches: int) -> Queries:
        """Build the queries of all patches from their features [B * M, F].

        Fewer patches than `self.num_patches` use the first learned queries only.
        """
        queries_per_patch = self.detector.num_queries // self.num_patches
        from_patches = self.patch2query(features).view(batch, num_patches, -1)  # [B, M, D]
        from_patches = from_patches.repeat_interleave(queries_per_patch, dim=1)  # [B, Q, D]
        num_queries = from_patches.shape[1]
        learned = self.detector.learned_queries(batch, num_queries)

        if self.training:
            keep = self.keep_mask(batch, num_queries, features.device)  # [B, Q, 1]
            from_patches = from_patches * keep
            if self.query_shuffle:
                order = torch.randperm(num_queries, device=features.device)  # one for all images
                content = None if learned.content is None else learned.content[:, order]
                learned = Queries(learned.position[:, order], content)
        return Queries(learned.position + from_patches, learned.content)

    def keep_mask(self, batch: int, num_queries: int, device: torch.device) -> Tensor:
        """Draw which queries keep their patch feature: 1 keeps, 0 drops, float32 [B, Q, 1]."""
        return (torch.rand(batch, num_queries, 1, device=device) > self.mask_ratio).float()
