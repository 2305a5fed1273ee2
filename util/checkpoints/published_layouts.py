"""Names of parameters in files of Siamese DETR's code base, and their names everywhere else.

DETR, Conditional DETR, Deformable DETR, UP-DETR, DETReg and this project name the parameters of a detector alike
("DETR's names"). Siamese DETR's code base keeps the backbone at `backbone.`, the heads below `pred_head.` (`head.` in
its re-implementation of UP-DETR), one head for all decoder layers of Deformable DETR, and there the two halves of the
queries in two tables.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from util.errors import UserError

SIAMESE_HEADS = {
    "siamese": "pred_head.",
    "random_query_patch": "head.",
}  # pretext -> where that code base keeps the heads
BODY = "backbone.0.body."
CONTENT, QUERIES = "transformer.tgt_embed.weight", "query_embed.weight"
EOS_COEF = (
    0.1  # of all published configs of that code base, whose criterion keeps it in the state dict
)


def siamese_pretext(state: Mapping[str, Tensor]) -> str | None:
    """The pretext behind a state dict with the names of Siamese DETR's code base; None for any other names."""
    if "backbone.conv1.weight" not in state or not any(
        key.startswith("transformer.") for key in state
    ):
        return None
    found = (
        pretext
        for pretext, head in SIAMESE_HEADS.items()
        if any(key.startswith(head) for key in state)
    )
    return next(found, "siamese")


def to_detr_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DETR's names for a state dict of Siamese DETR's code base or of its `convert_to_detr`; any other as it is.

    In Deformable DETR `query_embed` [Q, D] (position) and `tgt_embed` [Q, D] (content) become `query_embed` [Q, 2 D],
    and the head gets the index of each decoder layer. The criterion's class weights are left out.
    """
    if siamese_pretext(state) is not None:
        renamed = {
            re.sub(r"^backbone\.", BODY, re.sub(r"^(pred_head|head)\.", "", key)): value
            for key, value in state.items()
        }
        state = {key: value for key, value in renamed.items() if not key.startswith("criterion.")}
    return _standard_deformable(state) if CONTENT in state and QUERIES in state else dict(state)


def _standard_deformable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = {
        int(match[1])
        for match in (re.match(r"transformer\.decoder\.layers\.(\d+)\.", key) for key in state)
        if match
    }
    standard = {}
    for key, value in state.items():
        head = re.match(r"(class_embed|bbox_embed)\.(?!\d)(.+)", key)
        if head:
            standard.update({f"{head[1]}.{layer}.{head[2]}": value for layer in sorted(layers)})
        elif key == QUERIES:
            standard[key] = torch.cat([value, state[CONTENT]], dim=1)
        elif key != CONTENT:
            standard[key] = value
    return standard


def to_siamese_names(
    state: Mapping[str, Tensor], pretext: str, source: object
) -> dict[str, Tensor]:
    """The inverse of `to_detr_names`, with the criterion's class weights.

    `pretext` (`siamese` or `random_query_patch`) decides where the heads are.

    Raises:
        UserError: decoder layers have heads of their own, or positions are learned: that code base has no names for
            them.
    """
    renamed = {}
    for key, value in state.items():
        head = re.match(r"(class_embed|bbox_embed|feature_align)\.(?:(\d+)\.)?(.+)", key)
        if head:
            name = f"{SIAMESE_HEADS[pretext]}{head[1]}.{head[3]}"
            if not torch.equal(renamed.setdefault(name, value), value):
                raise UserError(
                    f"{source} has a {head[1]} for each decoder layer (--with_box_refine), Siamese DETR's code base "
                    "has one for all; choose another --to"
                )
            if name.endswith(".class_embed.bias"):
                renamed[f"{SIAMESE_HEADS[pretext]}criterion.empty_weight"] = _class_weights(
                    len(value)
                )
        elif key.startswith("backbone.1."):
            raise UserError(
                f"{source} has learned positions ({key}), for which Siamese DETR's code base has no name; choose "
                f"another --to"
            )
        elif key == QUERIES and any("sampling_offsets" in other for other in state):
            renamed[QUERIES], renamed[CONTENT] = (half.clone() for half in value.chunk(2, dim=1))
        else:
            renamed[re.sub(r"^backbone\.0\.body\.", "backbone.", key)] = value
    return renamed


def _class_weights(rows: int) -> Tensor:
    weights = torch.ones(rows)
    weights[-1] = EOS_COEF
    return weights
