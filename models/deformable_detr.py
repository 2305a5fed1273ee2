"""Deformable DETR (Zhu et al., ICLR 2021), single-scale and multi-scale, with iterative bounding
box refinement and the two-stage variant.

Shapes: B images, Q queries, D model width, L levels (feature maps), S tokens of all levels,
N decoder layers, C class outputs, h x w size of a feature map.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import BackboneWithPositions, FeatureMap, resize_mask
from models.classification import Classification
from models.deformable_transformer import (
    DeformableAttention,
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    DeformableMemory,
    DeformableTransformer,
    apply_box_deltas,
    initial_proposals,
    sine_embed_boxes,
    valid_size_wh,
)
from models.detector import (
    Detector,
    Queries,
    States,
    flatten_map,
    to_weight_dtype,
    without_autocast,
)
from models.ms_deform_attn import select_implementation
from models.transformer import MLP, get_clones
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.settings import Settings


class DeformableDETR(Detector):
    """Deformable DETR.

    `class_embed` and `bbox_embed` list one head per decoder layer, and in a two-stage model one
    more for the encoder proposals. Without box refinement all decoder layers share one head.

    Attributes are assigned in the published order: a published optimizer state addresses parameters
    by index.

    Args:
        num_levels: number of feature maps. The last ones of the backbone come first; each further
            map has half the size of the one before. A backbone with a single map (a vision
            transformer of stride 16) gets one of twice the size before its own if there are three
            levels or more, so that they have the strides of a ResNet's.
        with_box_refine: every decoder layer refines the boxes of the layer before (section 4.2).
        two_stage: queries come from encoder proposals (section 4.2).
    """

    def __init__(
        self,
        backbone: BackboneWithPositions,
        transformer: DeformableTransformer,
        classification: Classification,
        *,
        num_queries: int,
        hidden_dim: int,
        num_levels: int,
        with_box_refine: bool,
        two_stage: bool,
        aux_loss: bool,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        num_layers = len(transformer.decoder.layers)
        class_head = nn.Linear(hidden_dim, classification.num_outputs)
        box_head = MLP(hidden_dim, hidden_dim, 4, num_layers=3)
        classification.init_head(class_head)
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)

        self.class_embed = _build_heads(class_head, num_layers, with_box_refine, two_stage)
        self.bbox_embed = _build_heads(box_head, num_layers, with_box_refine, two_stage)
        # One table of position and content, [Q, 2 D].
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * hidden_dim)
        # With a mask head the backbone returns all its maps, of which these are read here.
        num_channels = backbone[0].num_channels[-min(num_levels, 3) :]
        self.num_backbone_levels = len(num_channels)
        self.num_upsampled = int(len(num_channels) == 1 and num_levels >= 3)
        self.input_proj = _build_input_projections(
            num_channels, hidden_dim, num_levels, self.num_upsampled
        )
        self.backbone = backbone

        self.num_queries, self.hidden_dim = num_queries, hidden_dim
        self.aux_loss, self.two_stage = aux_loss, two_stage
        self.classification = classification
        if not two_stage:
            # Boxes start with sides of sigmoid(-2) = 0.12 of the image. With refinement only those
            # of the first layer do, the others start from the layer before. Proposals have their
            # own size.
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)
        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed

    def encode(self, samples: NestedTensor) -> DeformableMemory:
        if torch.jit.is_tracing():
            # A trace records the map sizes as constants: other image sizes would give wrong outputs.
            raise UserError(
                "torch.jit.trace: a trace of Deformable DETR gives wrong results at any other image "
                "size; export with tools/export.py (ONNX or torch.export, docs/export.md)"
            )
        features = self.backbone(samples)
        maps = self._project(features[-self.num_backbone_levels :], samples)
        shapes = [(x.tensor.shape[-2], x.tensor.shape[-1]) for x in maps]

        tokens = torch.cat([flatten_map(x.tensor) for x in maps], 1)  # [B, S, D]
        # The level embedding tells apart cells of several levels at one position (section 4.1).
        level_embed = self.transformer.level_embed  # [L, D]
        position = torch.cat(
            [flatten_map(x.position) + level for x, level in zip(maps, level_embed, strict=True)], 1
        )  # [B, S, D]
        padding_mask = None
        if samples.padded:
            padding_mask = torch.cat([x.mask.flatten(1) for x in maps], 1)  # [B, S]

        last_level = self.num_upsampled + self.num_backbone_levels - 1
        sizes_wh = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)
        memory = DeformableMemory(
            features,
            tokens=tokens,
            position=position,
            padding_mask=padding_mask,
            shapes=shapes,
            projected_map=maps[last_level].tensor,
            last_level=last_level,
            sizes_wh=sizes_wh.to(tokens.device, non_blocking=True),  # [L, 2]
            valid_sizes_wh=torch.stack([valid_size_wh(x.mask) for x in maps], 1),  # [B, L, 2]
        )
        memory.tokens = self.transformer.encoder(memory)  # [B, S, D]
        return memory

    def _project(self, features: list[FeatureMap], samples: NestedTensor) -> list[FeatureMap]:
        """Project all levels to the model width.

        The first level beyond the backbone's, and one that is upsampled, read the backbone's last map,
        before any projection. Each further one reads the level before.
        """
        # A patch of a vision transformer is padding or not, at every level.
        in_patches = self.backbone[0].patch_size is not None
        finest_mask = features[-1].mask if in_patches else samples.mask
        maps: list[FeatureMap] = []
        for level, projection in enumerate(self.input_proj, start=-self.num_upsampled):
            if 0 <= level < len(features):
                source = features[level]
                projected = projection(source.tensor)  # [B, D, h, w]
                maps.append(FeatureMap(projected, source.mask, source.position))
                continue
            source = features[-1] if level <= len(features) else maps[-1]
            projected = projection(source.tensor)  # [B, D, 2 h, 2 w], or half the size, rounded up
            mask = resize_mask(finest_mask, projected.shape[-2:])
            position = self.backbone[1](mask).to(projected.dtype)
            maps.append(FeatureMap(projected, mask, position))
        return maps

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """See `Detector.kernels`.

        Raises:
            UserError: the requested implementation cannot run on this device.
        """
        layer = self.transformer.decoder.layers[0]
        deformable = select_implementation(layer.cross_attn.implementation, device, dtype)
        return {"deformable attention": deformable, **layer.self_attn.kernels(device, dtype)}

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        """Return the learned queries, see `Detector.learned_queries`.

        Raises:
            ValueError: a two-stage model, which has none.
        """
        if self.query_embed is None:
            raise ValueError("a two-stage detector has no learned queries")
        table = self.query_embed.weight[:count].expand(batch, -1, -1)  # [B, Q, 2 D]
        position, content = table.chunk(2, dim=-1)  # [B, Q, D] each; position first, as published
        return Queries(position, content)

    def decode(  # type: ignore[override]  # needs the memory of its own `encode`
        self, memory: DeformableMemory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        """Decode queries against the memory, see `Detector.decode`.

        Raises:
            ValueError: queries are given to a two-stage model.
        """
        proposals = None
        if self.two_stage:
            if queries is not None:
                raise ValueError("a two-stage detector makes its own queries")
            queries, references, proposals = self._select_proposals(memory)
        else:
            queries = queries or self.learned_queries(memory.tokens.shape[0])
            with without_autocast(memory.tokens):
                head = self.transformer.reference_points
                references = head(to_weight_dtype(queries.position, head)).sigmoid()  # [B, Q, 2]

        content = torch.zeros_like(queries.position) if queries.content is None else queries.content
        layers, layer_references = self.transformer.decoder(
            content, queries.position, references, memory, query_groups
        )  # [N, B, Q, D], N x [B, Q, 2 or 4]
        return States(layers, layer_references, proposals)

    def _select_proposals(
        self, memory: DeformableMemory
    ) -> tuple[Queries, Tensor, dict[str, Tensor]]:
        """Build queries and reference boxes [B, Q, 4] from the tokens with the highest scores.

        Also returns `pred_logits` [B, S, C] and `pred_boxes` [B, S, 4] of all tokens, for the loss.
        As published, the score is the first class output: the criterion gives every target of the
        proposals label 0. An image with fewer tokens than queries uses all its tokens.
        """
        transformer = self.transformer
        with without_autocast(memory.tokens):
            box_priors, valid = initial_proposals(memory)  # logits [B, S, 4], bool [B, S]
            tokens = to_weight_dtype(memory.tokens, transformer)
            tokens = tokens.masked_fill(~valid[..., None], 0.0)  # [B, S, D]
            tokens = transformer.enc_output_norm(transformer.enc_output(tokens))
            logits = self.class_embed[-1](tokens)  # [B, S, C]
            box_logits = self.bbox_embed[-1](tokens) + box_priors  # [B, S, 4]

            num_selected = min(self.num_queries, logits.shape[1])
            best = logits[..., 0].topk(num_selected, dim=1).indices  # [B, Q]
            index = best[..., None].expand(-1, -1, 4)  # [B, Q, 4]
            # Detached: the proposals learn from their own loss only.
            references = box_logits.detach().gather(1, index).sigmoid()  # [B, Q, 4]

            embedded = sine_embed_boxes(references, self.hidden_dim)  # [B, Q, 2 D]
            embedded = to_weight_dtype(embedded, transformer.pos_trans)
            embedded = transformer.pos_trans_norm(transformer.pos_trans(embedded))  # [B, Q, 2 D]
            position, content = embedded.chunk(2, dim=-1)  # [B, Q, D] each
        proposals = {"pred_logits": logits, "pred_boxes": box_logits.sigmoid()}
        return Queries(position, content), references, proposals

    def predict(self, states: States) -> dict:
        """Predict classes and boxes of all decoder layers.

        A two-stage model also returns `enc_outputs`: `pred_logits` [B, S, C] and `pred_boxes`
        [B, S, 4] of the encoder's tokens.
        """
        assert states.references is not None
        layers = to_weight_dtype(states.layers, self.class_embed)  # [N, B, Q, D]
        with without_autocast(layers):
            logits = _apply_heads(self.class_embed, layers)  # [N, B, Q, C]
            deltas = _apply_heads(self.bbox_embed, layers)  # [N, B, Q, 4]
            if all(x is states.references[0] for x in states.references):
                boxes = apply_box_deltas(deltas, states.references[0])  # [N, B, Q, 4]
            else:
                per_layer = zip(deltas, states.references, strict=True)
                boxes = torch.stack([apply_box_deltas(x, points) for x, points in per_layer])
            outputs = self.build_outputs(logits, boxes)
        if states.encoder_proposals is not None:
            outputs["enc_outputs"] = states.encoder_proposals
        return outputs


def _build_heads(head: nn.Module, num_layers: int, refine: bool, two_stage: bool) -> Any:
    """Return a head per decoder layer, and one for the encoder proposals of a two-stage model."""
    copies = get_clones(head, num_layers + 1)
    # Without refinement one module is listed several times: published checkpoints have it under
    # every index.
    heads = list(copies[:-1]) if refine else [copies[0]] * num_layers
    if two_stage:
        heads.append(copies[-1])
    return nn.ModuleList(heads)


def _apply_heads(heads: Any, layers: Tensor) -> Tensor:
    """Apply the head of each layer: [N, B, Q, D] -> [N, B, Q, outputs]; in one call where layers share a head."""
    heads = heads[
        : len(layers)
    ]  # the last head of a two-stage model belongs to the encoder proposals
    if all(head is heads[0] for head in heads):
        return heads[0](layers)
    return torch.stack([head(x) for head, x in zip(heads, layers, strict=True)])


def _build_input_projections(
    channels: list[int], dim: int, num_levels: int, num_upsampled: int
) -> nn.ModuleList:
    """Return 1x1 convolutions for the backbone's maps, then strided 3x3 ones, with group norm.

    Levels that are upsampled come first: a transposed convolution, as in ViTDet's simple feature
    pyramid (Li et al., ECCV 2022, section 3).
    """
    convs: list[nn.Conv2d | nn.ConvTranspose2d] = [
        nn.ConvTranspose2d(channels[-1], dim, kernel_size=2, stride=2) for _ in range(num_upsampled)
    ]
    convs += [nn.Conv2d(width, dim, kernel_size=1) for width in channels]
    for extra in range(num_levels - len(convs)):
        width = channels[-1] if extra == 0 else dim
        convs.append(nn.Conv2d(width, dim, kernel_size=3, stride=2, padding=1))
    for conv in convs:
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)

    # 32 groups as published. A narrow model has fewer, with at least 4 channels each: a group of
    # one channel would normalize a map of a single cell to 0.
    groups = math.gcd(32, dim // 4)
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(groups, dim)) for conv in convs)


def build(
    settings: Settings, backbone: BackboneWithPositions, classification: Classification
) -> DeformableDETR:
    """Build Deformable DETR.

    Raises:
        UserError: `--pre_norm`.
    """
    if settings.pre_norm:
        raise UserError(
            "--pre_norm: Deformable DETR is defined post-norm only and no pre-norm weights exist; remove "
            "--pre_norm"
        )
    dim, num_levels = settings.hidden_dim, settings.num_feature_levels

    def build_attention(num_points: int) -> DeformableAttention:
        return DeformableAttention(
            dim,
            num_heads=settings.nheads,
            num_levels=num_levels,
            num_points=num_points,
            implementation=settings.ms_deform_attn,
        )

    encoder_layer = DeformableEncoderLayer(
        build_attention(settings.enc_n_points), dim, settings.dim_feedforward, settings.dropout
    )
    decoder_layer = DeformableDecoderLayer(
        build_attention(settings.dec_n_points),
        dim,
        num_heads=settings.nheads,
        dim_feedforward=settings.dim_feedforward,
        dropout=settings.dropout,
    )
    transformer = DeformableTransformer(
        DeformableEncoder(encoder_layer, settings.enc_layers),
        DeformableDecoder(decoder_layer, settings.dec_layers),
        dim=dim,
        num_levels=num_levels,
        two_stage=settings.two_stage,
    )
    return DeformableDETR(
        backbone,
        transformer,
        classification,
        num_queries=settings.num_queries,
        hidden_dim=dim,
        num_levels=num_levels,
        with_box_refine=settings.with_box_refine,
        two_stage=settings.two_stage,
        aux_loss=settings.aux_loss,
    )
