"""Parameter names of Siamese DETR's codebase, and their translation to DETR's names and back.

DETR, Conditional DETR, Deformable DETR, UP-DETR, DETReg and this project use the same parameter names ("DETR's names").
Siamese DETR's codebase differs in four ways:

- the backbone is at `backbone.`, not `backbone.0.body.`
- the heads are below `pred_head.`, or `head.` in its re-implementation of UP-DETR
- Deformable DETR has one head for all decoder layers, not one per layer
- Deformable DETR has two query tables, position and content, not one of double width

Shapes in comments: Q queries, D width.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from util.errors import UserError

SIAMESE_HEADS = {"siamese": "pred_head.", "random_query_patch": "head."}  # pretext -> prefix
BODY = "backbone.0.body."
CONTENT, QUERIES = "transformer.tgt_embed.weight", "query_embed.weight"

# Weight of "no object" in all published configs. That codebase stores it, with its criterion, in the state dict.
EOS_COEF = 0.1


def infer_siamese_pretext(state: Mapping[str, Tensor]) -> str | None:
    """Return the pretext of a state dict with the names of Siamese DETR's codebase; None for any other names."""
    has_transformer = any(key.startswith("transformer.") for key in state)
    if "backbone.conv1.weight" not in state or not has_transformer:
        return None
    for pretext, head in SIAMESE_HEADS.items():
        if any(key.startswith(head) for key in state):
            return pretext
    return "siamese"


def to_detr_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of Siamese DETR's codebase, or of its `convert_to_detr`, to DETR's names.

    In Deformable DETR, `query_embed` [Q, D] (position) and `tgt_embed` [Q, D] (content) become `query_embed` [Q, 2 D],
    and the head is repeated for each decoder layer. The criterion's class weights are dropped. Any other state dict is
    returned unchanged.
    """
    if infer_siamese_pretext(state) is not None:
        renamed = {
            re.sub(r"^backbone\.", BODY, re.sub(r"^(pred_head|head)\.", "", key)): value
            for key, value in state.items()
        }
        state = {key: value for key, value in renamed.items() if not key.startswith("criterion.")}
    if CONTENT in state and QUERIES in state:
        return _to_standard_deformable(state)
    return dict(state)


def _to_standard_deformable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pattern = re.compile(r"transformer\.decoder\.layers\.(\d+)\.")
    layers = sorted({int(match[1]) for match in map(pattern.match, state) if match})

    standard = {}
    for key, value in state.items():
        head = re.match(r"(class_embed|bbox_embed)\.(?!\d)(.+)", key)
        if head:
            standard.update({f"{head[1]}.{layer}.{head[2]}": value for layer in layers})
        elif key == QUERIES:
            standard[key] = torch.cat([value, state[CONTENT]], dim=1)  # 2 x [Q, D] -> [Q, 2 D]
        elif key != CONTENT:
            standard[key] = value
    return standard


def to_siamese_names(
    state: Mapping[str, Tensor], pretext: str, source: object
) -> dict[str, Tensor]:
    """Translate DETR's names to those of Siamese DETR's codebase, with the criterion's class weights.

    Args:
        pretext: `siamese` or `random_query_patch`, which have their heads below different prefixes.
        source: path of the file, for messages.

    Raises:
        UserError: heads differ between decoder layers, or the positional encoding is learned, which that codebase does
            not have.
    """
    prefix = SIAMESE_HEADS[pretext]
    is_deformable = any("sampling_offsets" in key for key in state)
    renamed = {}
    for key, value in state.items():
        head = re.match(r"(class_embed|bbox_embed|feature_align)\.(?:(\d+)\.)?(.+)", key)
        if head:
            name = f"{prefix}{head[1]}.{head[3]}"
            if not torch.equal(renamed.setdefault(name, value), value):
                raise UserError(
                    f"{source} has a {head[1]} for each decoder layer (--with_box_refine), Siamese DETR's codebase "
                    "has one for all; choose another --to"
                )
            if name.endswith(".class_embed.bias"):
                renamed[f"{prefix}criterion.empty_weight"] = _class_weights(len(value))
        elif key.startswith("backbone.1."):
            raise UserError(
                f"{source} has a learned positional encoding ({key}), for which Siamese DETR's codebase has no name; "
                "choose another --to"
            )
        elif key == QUERIES and is_deformable:
            # [Q, 2 D] -> 2 x [Q, D], cloned: as views both would be saved with the whole storage.
            renamed[QUERIES], renamed[CONTENT] = (half.clone() for half in value.chunk(2, dim=1))
        else:
            renamed[re.sub(r"^backbone\.0\.body\.", "backbone.", key)] = value
    return renamed


def _class_weights(rows: int) -> Tensor:
    weights = torch.ones(rows)
    weights[-1] = EOS_COEF  # "no object" is the last row
    return weights
