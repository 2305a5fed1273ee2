"""Deformable DETR (Zhu et al., ICLR 2021): one or several maps, iterative box refinement, and the two-stage variant."""

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
    cell_proposals,
    embed_boxes,
    valid_size,
)
from models.detector import Detector, Queries, States, as_weights, flatten_map, without_autocast
from models.ms_deform_attn import choose
from models.transformer import MLP, clones
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.settings import Settings


class DeformableDETR(Detector):
    """Attributes stand in the published order, on which the state of a published optimizer depends.

    `class_embed` and `bbox_embed` have one head for each decoder layer (the same one, unless boxes are refined), and in
    a two-stage model one more for the encoder's proposals.

    Args:
        num_levels: maps that are read. The backbone gives its last ones; each further map has half the size of the one
            before it.
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
        class_head, box_head = (
            nn.Linear(hidden_dim, classification.num_outputs),
            MLP(hidden_dim, hidden_dim, 4, num_layers=3),
        )
        classification.init_head(class_head)
        nn.init.zeros_(box_head.layers[-1].weight)
        nn.init.zeros_(box_head.layers[-1].bias)
        self.class_embed = _heads(class_head, num_layers, with_box_refine, two_stage)
        self.bbox_embed = _heads(box_head, num_layers, with_box_refine, two_stage)
        self.query_embed = None if two_stage else nn.Embedding(num_queries, 2 * hidden_dim)
        self.input_proj = _input_projections(backbone[0].num_channels, hidden_dim, num_levels)
        self.backbone = backbone
        self.num_queries, self.hidden_dim, self.aux_loss, self.two_stage = (
            num_queries,
            hidden_dim,
            aux_loss,
            two_stage,
        )
        self.classification = classification
        if (
            not two_stage
        ):  # boxes start with a side of sigmoid(-2) = 0.12 of the image, proposals with their own
            nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)
        if with_box_refine:
            transformer.decoder.bbox_embed = self.bbox_embed
        if two_stage:
            transformer.decoder.class_embed = self.class_embed

    def encode(self, samples: NestedTensor) -> DeformableMemory:
        features = self.backbone(samples)
        maps = self._project(features, samples)
        shapes = [(x.tensor.shape[-2], x.tensor.shape[-1]) for x in maps]
        tokens = torch.cat([flatten_map(x.tensor) for x in maps], 1)
        position = torch.cat(
            [
                flatten_map(x.position) + level
                for x, level in zip(maps, self.transformer.level_embed, strict=True)
            ],
            1,
        )
        padding_mask = torch.cat([x.mask.flatten(1) for x in maps], 1) if samples.padded else None
        sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32)
        valid_sizes = torch.stack([valid_size(x.mask) for x in maps], 1)
        memory = DeformableMemory(
            features,
            tokens=tokens,
            position=position,
            padding_mask=padding_mask,
            shapes=shapes,
            sizes=sizes.to(tokens.device, non_blocking=True),
            valid_sizes=valid_sizes,
        )
        memory.tokens = self.transformer.encoder(memory)
        return memory

    def _project(self, features: list[FeatureMap], samples: NestedTensor) -> list[FeatureMap]:
        """All levels at model width. The first map beyond the backbone's is made of its last one, the next ones of the
        one before.
        """
        maps = []
        for level, projection in enumerate(self.input_proj):
            if level < len(features):
                source = features[level]
                maps.append(FeatureMap(projection(source.tensor), source.mask, source.position))
                continue
            x = projection(features[-1].tensor if level == len(features) else maps[-1].tensor)
            mask = resize_mask(samples.mask, x.shape[-2:])
            maps.append(FeatureMap(x, mask, self.backbone[1](mask).to(x.dtype)))
        return maps

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """
        Raises:
            UserError: the implementation that was asked for can't run there.
        """
        layer = self.transformer.decoder.layers[0]
        deformable = choose(layer.cross_attn.implementation, device, dtype)
        return {"deformable attention": deformable, **layer.self_attn.kernels(device, dtype)}

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        """Raises ValueError in a two-stage model, which has none."""
        if self.query_embed is None:
            raise ValueError("a two-stage detector has no learned queries")
        position, content = self.query_embed.weight[:count].expand(batch, -1, -1).chunk(2, dim=-1)
        return Queries(position, content)

    def decode(  # type: ignore[override]  # it takes what its own `encode` gives
        self, memory: DeformableMemory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        """Raises ValueError when a two-stage model is given queries."""
        proposals = None
        if self.two_stage:
            if queries is not None:
                raise ValueError("a two-stage detector makes its own queries")
            queries, references, proposals = self._propose(memory)
        else:
            queries = queries or self.learned_queries(memory.tokens.shape[0])
            with without_autocast(memory.tokens):
                points = self.transformer.reference_points
                references = points(as_weights(queries.position, points)).sigmoid()
        content = torch.zeros_like(queries.position) if queries.content is None else queries.content
        layers, references = self.transformer.decoder(
            content, queries.position, references, memory, query_groups
        )
        return States(layers, references, proposals)

    def _propose(self, memory: DeformableMemory) -> tuple[Queries, Tensor, dict[str, Tensor]]:
        """Queries and references [B, Q, 4] of the tokens that score best, and the predictions of all tokens for their
        loss.

        The first class output is the score, whatever the classes (published). Small images have fewer tokens than
        queries: then all are taken.
        """
        transformer = self.transformer
        with without_autocast(memory.tokens):
            start, valid = cell_proposals(memory)
            tokens = transformer.enc_output(
                as_weights(memory.tokens, transformer).masked_fill(~valid[..., None], 0.0)
            )
            tokens = transformer.enc_output_norm(tokens)
            logits, box_logits = self.class_embed[-1](tokens), self.bbox_embed[-1](tokens) + start
            best = logits[..., 0].topk(min(self.num_queries, logits.shape[1]), dim=1).indices
            references = box_logits.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
            embedded = as_weights(embed_boxes(references, self.hidden_dim), transformer.pos_trans)
            code = transformer.pos_trans_norm(transformer.pos_trans(embedded))
        return (
            Queries(*code.chunk(2, dim=-1)),
            references,
            {"pred_logits": logits, "pred_boxes": box_logits.sigmoid()},
        )

    def predict(self, states: States) -> dict:
        """In a two-stage model also `enc_outputs`: `pred_logits` [B, S, C] and `pred_boxes` [B, S, 4] of the encoder's
        tokens.
        """
        assert states.references is not None
        layers = as_weights(states.layers, self.class_embed)
        with without_autocast(layers):
            # Without zip's check: the last head of a two-stage model is the encoder's.
            logits = torch.stack(
                [head(x) for head, x in zip(self.class_embed, layers, strict=False)]
            )
            offsets = [head(x) for head, x in zip(self.bbox_embed, layers, strict=False)]
            boxes = torch.stack(
                [
                    apply_box_deltas(x, start)
                    for x, start in zip(offsets, states.references, strict=True)
                ]
            )
            outputs = self.layer_outputs(logits, boxes)
        if states.encoder_proposals is not None:
            outputs["enc_outputs"] = states.encoder_proposals
        return outputs


def _heads(head: nn.Module, num_layers: int, refine: bool, two_stage: bool) -> Any:
    """A head for each decoder layer, and one for the encoder's proposals in a two-stage model."""
    own = clones(head, num_layers + 1)
    heads = list(own[:-1]) if refine else [own[0]] * num_layers
    return nn.ModuleList([*heads, own[-1]] if two_stage else heads)


def _input_projections(channels: list[int], dim: int, num_levels: int) -> nn.ModuleList:
    """1x1 convolutions of the backbone's maps, then 3x3 ones of stride 2, each with group norm."""
    convs = [nn.Conv2d(width, dim, kernel_size=1) for width in channels]
    for level in range(len(channels), num_levels):
        width = channels[-1] if level == len(channels) else dim
        convs.append(nn.Conv2d(width, dim, kernel_size=3, stride=2, padding=1))
    for conv in convs:
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    groups = math.gcd(
        32, dim // 4
    )  # 32 as published; small models need a few channels in each, for maps of one cell
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(groups, dim)) for conv in convs)


def build(
    settings: Settings, backbone: BackboneWithPositions, classification: Classification
) -> DeformableDETR:
    if settings.pre_norm:
        raise UserError(
            "--pre_norm: Deformable DETR is defined post-norm only and no pre-norm weights exist: leave --pre_norm out"
        )
    dim, levels = settings.hidden_dim, settings.num_feature_levels

    def attention(points: int) -> DeformableAttention:
        return DeformableAttention(
            dim,
            num_heads=settings.nheads,
            num_levels=levels,
            num_points=points,
            implementation=settings.ms_deform_attn,
        )

    encoder_layer = DeformableEncoderLayer(
        attention(settings.enc_n_points), dim, settings.dim_feedforward, settings.dropout
    )
    decoder_layer = DeformableDecoderLayer(
        attention(settings.dec_n_points),
        dim,
        num_heads=settings.nheads,
        dim_feedforward=settings.dim_feedforward,
        dropout=settings.dropout,
    )
    transformer = DeformableTransformer(
        DeformableEncoder(encoder_layer, settings.enc_layers),
        DeformableDecoder(decoder_layer, settings.dec_layers),
        dim=dim,
        num_levels=levels,
        two_stage=settings.two_stage,
    )
    return DeformableDETR(
        backbone,
        transformer,
        classification,
        num_queries=settings.num_queries,
        hidden_dim=dim,
        num_levels=levels,
        with_box_refine=settings.with_box_refine,
        two_stage=settings.two_stage,
        aux_loss=settings.aux_loss,
    )
