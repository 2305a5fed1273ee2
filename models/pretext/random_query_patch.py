"""Random query patch detection, the pretext of UP-DETR (Dai et al., CVPR 2021), on any detector.

Patches are cut out of an image; the pooled backbone feature of a patch is added to the position of a group of object
queries; the decoder has to find where in the image the patch comes from, and to reconstruct its feature.
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
    """Shapes: B images, M patches an image, Q queries, D model width, F backbone channels.

    Query n belongs to patch n // (Q / M). Queries of one patch see only each other in self-attention (section 3.2, done
    by query groups). In training a query lacks its patch feature with probability `mask_ratio`. At evaluation
    any number x <= M of patches may be given: the first x * Q / M queries are used.

    Args:
        query_shuffle: assign learned queries to other patches in each training step (the authors found no gain).
        feature_recon: predict the patch's feature; the target is detached.
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
        self.num_patches, self.mask_ratio, self.query_shuffle = (
            num_patches,
            mask_ratio,
            query_shuffle,
        )
        self.feature_recon = feature_recon
        channels = sum(detector.backbone[0].num_channels)
        self.patch2query = nn.Linear(channels, detector.hidden_dim)
        if feature_recon:
            self.feature_align = MLP(
                detector.hidden_dim, detector.hidden_dim, channels, num_layers=2
            )
        self.losses = ("labels", "boxes", "cardinality") + (("features",) if feature_recon else ())

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
        """samples: normalised images; each target has `patches` [M, 3, S, S], normalised like the images.

        Returns the detector's outputs, with `pred_features` [B, Q, F] in each layer and `target_features` [B * M, F].

        Raises:
            ValueError: images bring different numbers of patches, or more than `num_patches`.
        """
        patches = self._stack_patches(targets)
        memory = self.detector.encode(as_nested_tensor(samples))
        features = self.patch_features(patches.flatten(0, 1))
        states = self.detector.decode(
            memory, self.patch_queries(features, *patches.shape[:2]), query_groups=patches.shape[1]
        )
        outputs = self.detector.predict(states)
        if self.feature_recon:
            self.predict_features(outputs, states.layers, features.detach())
        return outputs

    def _stack_patches(self, targets: Targets) -> Tensor:
        counts = {len(target["patches"]) for target in targets}
        if len(counts) != 1 or max(counts) > self.num_patches:
            raise ValueError(
                f"every image must bring the same number of patches, at most {self.num_patches}; got {sorted(counts)}"
            )
        return torch.stack([target["patches"] for target in targets])

    def patch_features(self, patches: Tensor) -> Tensor:
        """Pooled maps of the backbone: [N, 3, S, S] -> [N, F]; several levels are joined."""
        return pooled_features(self.detector.backbone[0], patches)

    def patch_queries(self, features: Tensor, batch: int, num_patches: int) -> Queries:
        """[B * M, F] -> queries for M * Q / num_patches of the detector's slots."""
        repeats = self.detector.num_queries // self.num_patches
        from_patches = (
            self.patch2query(features)
            .view(batch, num_patches, -1)
            .repeat_interleave(repeats, dim=1)
        )
        learned = self.detector.learned_queries(batch, from_patches.shape[1])
        if self.training:
            from_patches = from_patches * self.keep_mask(
                batch, from_patches.shape[1], features.device
            )
            if self.query_shuffle:
                order = torch.randperm(from_patches.shape[1], device=features.device)
                content = None if learned.content is None else learned.content[:, order]
                learned = Queries(learned.position[:, order], content)
        return Queries(learned.position + from_patches, learned.content)

    def keep_mask(self, batch: int, num_queries: int, device: torch.device) -> Tensor:
        """1 where a query keeps its patch feature, 0 where it is dropped: [B, Q, 1]."""
        return (torch.rand(batch, num_queries, 1, device=device) > self.mask_ratio).float()
