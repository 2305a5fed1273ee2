"""Checks of a model case: our model, with the golden weights, against values of the published implementation.

tests/golden/README.md has the tolerances and the rule that generates the weights.
"""

import functools
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models import build_model
from models.criterion import Losses, SetCriterion
from models.detector import Memory
from models.pretext import Pretext
from models.segmentation import SegmentationOutputs
from tests.tiny import without_initialization
from util.checkpoints.architecture import infer_detector
from util.masks import decode_masks
from util.nested_tensor import NestedTensor
from util.runs.optimizer import build_optimizer
from util.settings import FINETUNE, PRETRAIN, Settings, make_parser, resolve

# Part of a parameter name -> pretext.
PRETEXT_OF = {"patch2query": "random_query_patch", "feature_embed": "region_prior"}


def unsupported(meta: dict) -> str | None:
    """Return why this version has no model for a case, or None if it has one."""
    if "state_dict" not in meta:
        return "part of a model, which tests/models/pretext/test_region_prior.py checks"
    return None


@dataclass
class Case:
    """A golden case with our model. meta: content of the JSON file, arrays: of the .npz file."""

    meta: dict
    arrays: dict
    model: nn.Module
    criterion: SetCriterion
    postprocessors: dict[str, nn.Module]
    args: Settings

    @property
    def is_pretext(self) -> bool:
        return isinstance(self.model, Pretext)


def load(name: str, folder: Path) -> tuple[dict, dict]:
    """Return content of a case's JSON file and its arrays."""
    meta = json.loads((folder / f"{name}.json").read_text())
    return meta, np.load(folder / f"{name}.npz")


@functools.cache
def load_fill(folder: Path):
    """Import the generator of the weights, golden_fill.py, from the folder of golden files.

    All cases have one seed, so it keeps the arrays of the last case: most share their backbone.
    """
    spec = importlib.util.spec_from_file_location("golden_fill", folder / "golden_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.fill_array = functools.lru_cache(maxsize=600)(module.fill_array)
    return module


def our_args(meta: dict) -> Settings:
    """Translate the published flags of a case to settings."""
    keys, published = meta["state_dict"], meta["args"]
    pretext = next(
        (name for part, name in PRETEXT_OF.items() if any(part in key for key in keys)), None
    )
    args = make_parser(PRETRAIN if pretext else FINETUNE).parse_args([])
    args.pretext = pretext
    args.detector = infer_detector(keys)
    for name, value in published.items():
        if hasattr(args, name) and name not in (
            "resume",
            "output_dir",
            "eval",
            "device",
            "dist_url",
        ):
            setattr(args, name, value)
    if args.detector != "deformable_detr":
        # DETReg's parser has these flags for DETR too, which does not read them.
        args.num_feature_levels = args.lr_linear_proj_names = None
    shifted = args.detector == "deformable_detr" or pretext == "region_prior"
    if shifted and published["position_embedding"] == "sine":
        args.position_embedding = "sine_shifted"  # which Deformable DETR and DETReg call sine
    args.backbone_weights, args.backbone_norm, args.device = "none", "frozen", "cpu"
    args.reproduce_published, args.num_workers = True, 0
    if args.dataset_file != "coco_panoptic":
        args.dataset_file = None
    return resolve(args).replace(lr_backbone=published["lr_backbone"])


def build(name: str, folder: Path) -> Case:
    """Build our model for a case, check its state-dict keys, and load the golden weights."""
    meta, arrays = load(name, folder)
    args = our_args(meta)
    num_classes = None
    if args.masks:
        num_classes = meta["state_dict"]["detr.class_embed.weight"]["shape"][0] - 1
    with without_initialization():
        model, criterion, postprocessors = build_model(args, num_classes)
    shapes = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    published = [
        (key, entry["shape"])
        for key, entry in meta["state_dict"].items()
        if not key.endswith("empty_weight")
    ]
    assert dict(shapes) == dict(published)
    # Deformable DETR also has the published order, except in DETReg.
    in_order = args.detector == "deformable_detr" and args.pretext != "region_prior"
    assert shapes == published or not in_order
    fill = load_fill(folder)
    weights = fill.fill_shapes(fill.float_entries(meta), meta["seed"], meta["tied_groups"])
    for key, value in weights.items():
        np.testing.assert_allclose(
            value.astype(np.float64).sum(), meta["state_dict"][key]["sum"], rtol=1e-6, atol=1e-4
        )
    model.load_state_dict(
        {key: torch.from_numpy(value) for key, value in weights.items()}, strict=True
    )
    if args.pretext == "region_prior":
        # The targets of a case already have embeddings in place of crops.
        object.__setattr__(model, "target_encoder", nn.Identity())
    return Case(meta, arrays, model, criterion, postprocessors, args)


def inputs(case: Case, dtype: torch.dtype) -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    """Return the two padded images and their targets. Files store pixels times 32, as integers."""
    images = [case.arrays[f"image{i}_q32"] for i in range(2)]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(2, 3, height, width, dtype=dtype)
    mask = torch.ones(2, height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image).to(dtype) / 32
        mask[i, : image.shape[1], : image.shape[2]] = False
    assert np.array_equal(mask.numpy(), case.arrays["mask"])
    targets = []
    for i in range(2):
        target = {
            "boxes": torch.from_numpy(case.arrays[f"boxes{i}"]).to(dtype),
            "labels": torch.from_numpy(case.arrays[f"labels{i}"]),
        }
        if f"masks{i}" in case.arrays:
            target["masks"] = torch.from_numpy(case.arrays[f"masks{i}"]).bool()
        if f"patches{i}_q32" in case.arrays:
            target["patches"] = torch.from_numpy(case.arrays[f"patches{i}_q32"]).to(dtype) / 32
        if f"patch_features{i}" in case.arrays:
            target["patches"] = torch.from_numpy(case.arrays[f"patch_features{i}"]).to(dtype)
        targets.append(target)
    return NestedTensor(batch, mask), targets


def forward(case: Case, samples: NestedTensor, targets: list[dict]) -> dict:
    return case.model(samples, targets) if case.is_pretext else case.model(samples)


def assert_close(actual, expected, rtol: float = 0.0, atol: float = 0.0) -> None:
    actual = actual.detach().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=rtol, atol=atol)


def check_outputs(case: Case, outputs: dict, prefix: str = "out/") -> None:
    arrays = case.arrays
    # A two-stage model selects proposals by rank, which amplifies rounding.
    loose = 10 if "out/enc/pred_boxes" in arrays else 1
    assert_close(outputs["pred_logits"], arrays[f"{prefix}pred_logits"], atol=1e-4 * loose)
    assert_close(outputs["pred_boxes"], arrays[f"{prefix}pred_boxes"], atol=1e-5 * loose)
    if f"{prefix}aux_query_idx" in arrays:
        index = arrays[f"{prefix}aux_query_idx"]
        for layer, aux in enumerate(outputs["aux_outputs"]):
            assert_close(
                aux["pred_logits"][:, index],
                arrays[f"{prefix}aux{layer}/pred_logits"],
                atol=1e-4 * loose,
            )
            assert_close(
                aux["pred_boxes"], arrays[f"{prefix}aux{layer}/pred_boxes"], atol=1e-5 * loose
            )
    if f"{prefix}pred_masks" in arrays:
        masks = outputs["pred_masks"]  # of all queries, in chunks
        assert_close(
            masks[:, arrays[f"{prefix}pred_masks_query_idx"]],
            arrays[f"{prefix}pred_masks"],
            atol=1e-4,
        )
        assert_close(masks.double().mean((2, 3)), arrays[f"{prefix}pred_masks_mean"], atol=1e-5)
        assert_close(
            masks.double().std((2, 3), correction=0), arrays[f"{prefix}pred_masks_std"], atol=1e-4
        )
    if f"{prefix}enc/pred_boxes" in arrays:
        proposals = outputs["enc_outputs"]
        assert_close(
            proposals["pred_logits"][..., 0], arrays[f"{prefix}enc/pred_logits_c0"], atol=1e-4
        )
        assert_close(
            proposals["pred_logits"][:, arrays[f"{prefix}enc/token_idx"]],
            arrays[f"{prefix}enc/pred_logits"],
            atol=1e-4,
        )
        assert_close(proposals["pred_boxes"], arrays[f"{prefix}enc/pred_boxes"], atol=1e-5)
    feature = next(
        (name for name in (f"{prefix}pred_feature", f"{prefix}pred_features") if name in arrays),
        None,
    )
    if feature:
        expected = arrays[feature]
        ours = outputs["pred_features"][..., : expected.shape[-1]]
        ours = ours[:, arrays["out/aux_query_idx"]] if expected.shape[1] != ours.shape[1] else ours
        assert_close(ours, expected, atol=1e-4)


def forward_with_encoder(case: Case, samples: NestedTensor, targets: list[dict]) -> dict:
    """Run the model, and check backbone and encoder first: a mismatch shows where outputs start to differ."""
    detector = case.model.detr if case.args.masks else case.model.base_detector()
    encode = detector.encode

    def checked(samples: NestedTensor) -> Memory:
        memory = encode(samples)
        check_encoder(case, memory)
        return memory

    with mock.patch.object(detector, "encode", side_effect=checked) as encoder:
        outputs = forward(case, samples, targets)
    encoder.assert_called_once()
    return outputs


def check_encoder(case: Case, memory: Memory) -> None:
    prefix = "mid/detr." if case.args.masks else "mid/"
    last_map = case.arrays[f"{prefix}backbone.0"]
    assert_close(memory.features[-1].tensor[:, :8], last_map, atol=2e-4)
    encoded, tokens = case.arrays[f"{prefix}transformer.encoder"], memory.tokens[..., :8]
    assert_close(
        tokens if encoded.shape == tokens.shape else tokens.transpose(0, 1), encoded, atol=2e-4
    )


def check_matches(case: Case, losses: Losses, prefix: str = "") -> None:
    pairs = losses.matches.pairs
    names = [f"aux{layer}" for layer in range(len(pairs) - 1)] + ["last"]
    if f"{prefix}match/enc/img0" in case.arrays:
        pairs, names = [*pairs, *losses.proposal_matches.pairs], [*names, "enc"]
    for name, per_image in zip(names, pairs, strict=True):
        for image, (query, target) in enumerate(per_image):
            key = f"{prefix}match/{name}/img{image}"
            if key in case.arrays:
                assert np.array_equal(np.stack([query, target]), case.arrays[key]), key


def check_cost(case: Case, outputs: dict, targets: list[dict]) -> None:
    cost = case.criterion.matcher.cost_matrix(
        outputs["pred_logits"][None], outputs["pred_boxes"][None], targets
    )[0]
    loose = 10 if "out/enc/pred_boxes" in case.arrays else 1  # as its logits
    counts = [len(target["labels"]) for target in targets]
    for image, own in enumerate(cost.split(counts)):  # [n, Q]
        assert_close(
            own.T,
            case.arrays[f"cost/last/img{image}"],
            rtol=1e-5,
            atol=1e-4 * loose,
        )


def check_losses(case: Case, losses: dict, expected: dict, rtol: float) -> None:
    """Check all losses and their weighted sum.

    In float32 the boxes of a two-stage detector differ by up to 1.4e-5 between CPUs and numbers of threads (table in
    tests/golden/README.md), and their losses by up to 1.16e-5: these get twice the tolerance. In float64 none does.
    """
    assert set(losses) == set(expected)
    if rtol > 1e-7 and "out/enc/pred_boxes" in case.arrays:
        rtol = 2 * rtol
    for name, value in expected.items():
        assert_close(losses[name], value, rtol=rtol, atol=1e-6 if rtol > 1e-7 else 1e-9)
    total = sum(
        expected[name] * case.meta["weight_dict"][name]
        for name in expected
        if name in case.meta["weight_dict"]
    )
    assert_close(case.criterion.total_loss(losses), total, rtol=rtol)


def check_weights_and_groups(case: Case) -> None:
    expected = {
        name: weight
        for name, weight in case.meta["weight_dict"].items()
        if name in case.meta["losses"]
    }
    assert case.criterion.weight_dict == expected
    parameters = list(case.model.parameters())
    assert sum(p.numel() for p in parameters) == case.meta["total_params"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == case.meta["trainable_params"]
    names = [public_name(name) for name, p in case.model.named_parameters() if p.requires_grad]
    # DETReg's Deformable DETR has the pretext's parameters between those of the detector.
    assert names == case.meta["grad_names"] or (
        case.args.pretext == "region_prior" and set(names) == set(case.meta["grad_names"])
    )


def public_name(name: str) -> str:
    return name.removeprefix("detector.")


def check_gradients(
    case: Case, norms: np.ndarray, total: float, rtol: float, compare_values: bool
) -> None:
    parameters = {
        public_name(name): p for name, p in case.model.named_parameters() if p.requires_grad
    }
    ours = np.array(
        [float(parameters[name].grad.double().norm()) for name in case.meta["grad_names"]]
    )
    np.testing.assert_allclose(
        ours, norms, rtol=rtol, atol=1e-6 * norms.max() if rtol > 1e-7 else 1e-9 * norms.max()
    )
    assert_close(np.sqrt((ours**2).sum()), total, rtol=1e-4 if rtol > 1e-7 else 1e-7)
    for key in case.arrays if compare_values else ():
        if key.startswith("grad/"):
            expected = case.arrays[key]
            gradient = parameters[key.removeprefix("grad/")].grad[: len(expected)].numpy()
            # Single entries differ by rounding through 50 layers; the gradient as a whole does not.
            assert (
                np.linalg.norm(gradient - expected)
                <= 1e-2 * np.linalg.norm(expected) + 1e-6 * norms.max()
            ), key


# Scores this assert_close are equal up to rounding: which of them ranks first depends on the CPU.
TIED = 1e-6


def check_post(case: Case, outputs: dict) -> None:
    """Check that results have the published order.

    Only tied scores may swap: in cond_r50_dc5 the scores at ranks 74 and 75 are bit-exact equal.
    """
    results = case.postprocessors["bbox"](outputs, torch.tensor(case.meta["target_sizes"]))
    for image, result in enumerate(results):
        scores, labels, boxes = (
            case.arrays[f"post/img{image}/{name}"] for name in ("scores", "labels", "boxes")
        )
        # Twice the tolerance for a two-stage model, which selects proposals by rank: rounding of the folded norms
        # moves one score of deform_r50_twostage by 1.35e-5.
        two_stage = "out/enc/pred_boxes" in case.arrays
        assert_close(result["scores"], scores, atol=2e-5 if two_stage else 1e-5)
        own, published = tie_order(scores, result["boxes"].numpy()), tie_order(scores, boxes)
        assert np.array_equal(result["labels"].numpy()[own], labels[published])
        assert_close(result["boxes"][own], boxes[published], atol=1e-2)


def check_masks(case: Case, outputs: dict) -> None:
    """Check instance masks at the size of the file, as tensors and as RLE, and panoptic id maps."""
    target_sizes = torch.tensor(case.meta["target_sizes"])
    sizes = torch.tensor(case.meta["image_sizes"])
    results = case.postprocessors["bbox"](outputs, target_sizes)
    queries = [result["queries"] for result in results]
    encoded = case.postprocessors["segm"].encode(queries, outputs, target_sizes, sizes)
    case.postprocessors["segm"](results, outputs, target_sizes, sizes)
    assert [list(r["masks"].shape) for r in results] == case.meta["post_masks_shape"]
    for image, (result, rles) in enumerate(zip(results, encoded, strict=True)):
        area = case.arrays[f"post/img{image}/masks_area"]
        # A pixel whose probability is 0.5 up to rounding may differ.
        np.testing.assert_allclose(result["masks"].sum((1, 2, 3)), area, atol=20)
        chosen = result["masks"][case.arrays[f"post/img{image}/masks_query_idx"], 0].numpy()
        packed = case.arrays[f"post/img{image}/masks_packed"]
        expected = np.unpackbits(packed, axis=-1)[..., : chosen.shape[-1]]
        assert (chosen != expected).mean() < 1e-4
        assert np.array_equal(decode_masks(rles), result["masks"][:, 0].numpy())

    if "panoptic" in case.meta:
        check_panoptic(case, outputs, case.meta["panoptic"])


def check_panoptic(case: Case, outputs: dict, expected: dict) -> None:
    logits = outputs["pred_logits"] * expected["logit_scale"]
    logits[..., 201:250] -= expected["classes_201_249_minus"]
    scaled = SegmentationOutputs({**outputs, "pred_logits": logits}, outputs.predict_masks)
    sizes = (torch.tensor(expected[name]) for name in ("processed_sizes", "target_sizes"))
    for image, result in enumerate(case.postprocessors["panoptic"](scaled, *sizes)):
        with Image.open(io.BytesIO(result["png_string"])) as png:
            channels = np.array(png).astype(np.int64)
        ids = channels @ [1, 256, 65536]
        assert (ids != case.arrays[f"panoptic/img{image}/id_map"]).mean() < 1e-4
        rows = [{k: v for k, v in row.items() if k != "score"} for row in result["segments_info"]]
        assert rows == expected["segments_info"][image]


def tie_order(scores: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return indices in the order of the scores, and among tied scores by the left border of the box."""
    rank = np.append(0, np.cumsum(scores[:-1] - scores[1:] > TIED))
    return np.lexsort((boxes[:, 0], rank)) if is_ranked(scores) else np.arange(len(scores))


def is_ranked(scores: np.ndarray) -> bool:
    """Return whether scores are sorted: focal results are, softmax results have the order of the queries."""
    return bool((scores[:-1] >= scores[1:]).all())


def check_float32(case: Case) -> None:
    """Check outputs, matching, losses, gradients and post-processing in evaluation mode, in float32."""
    case.model.eval()
    case.criterion.train()
    samples, targets = inputs(case, torch.float32)
    outputs = forward_with_encoder(case, samples, targets)
    check_outputs(case, outputs)
    if "post/img0/scores" in case.arrays:
        with torch.no_grad():
            check_post(case, outputs)
            if case.args.masks:
                check_masks(case, outputs)
    if "losses" not in case.meta:
        return
    check_weights_and_groups(case)
    losses = case.criterion(outputs, targets)
    check_matches(case, losses)
    with torch.no_grad():
        check_cost(case, outputs, targets)
    check_losses(case, losses, case.meta["losses"], rtol=1e-5)
    case.criterion.total_loss(losses).backward()
    check_gradients(
        case,
        case.arrays["grad_norms"],
        case.meta["grad_total_norm"],
        rtol=5e-3,
        compare_values=True,
    )
    case.model.zero_grad()
    check_without_targets(case, outputs, targets)


def check_without_targets(case: Case, outputs: dict, targets: list[dict]) -> None:
    """Check losses without targets, where the published criterion has any; ours has its own tests of zeros."""
    none = {name: value[:0] for name, value in targets[0].items()}
    for name, changed in (("zero_img0", [none, targets[1]]), ("zero_all", [none, none])):
        if "losses" not in case.meta.get(name, {}):
            continue
        if case.args.pretext == "region_prior":
            outputs = {
                **outputs,
                "target_features": torch.cat([target["patches"] for target in changed]),
            }
        with torch.no_grad():
            losses = case.criterion(outputs, changed)
        check_matches(case, losses, f"{name}/")
        check_losses(case, losses, case.meta[name]["losses"], rtol=1e-5)


def check_float64(case: Case, num_steps: int | None = None) -> None:
    """Check the same in float64, with tolerances of rounding alone, and the published optimizer steps.

    num_steps: number of losses to check before a step each; default: all, five.
    """
    model = case.model.double()
    case.criterion.double().train()
    model.eval()
    samples, targets = inputs(case, torch.float64)
    outputs = forward(case, samples, targets)
    logits, boxes = case.arrays["f64/pred_logits"], case.arrays["f64/pred_boxes"]
    # The only difference is rounding to the dtype of the file.
    rounding = 1e-9 if logits.dtype == np.float64 else 1e-6
    chosen = (
        case.arrays["out/aux_query_idx"]
        if logits.shape[1] < outputs["pred_logits"].shape[1]
        else slice(None)
    )
    assert_close(
        outputs["pred_logits"][:, chosen, : logits.shape[-1]], logits, rtol=rounding, atol=rounding
    )
    assert_close(outputs["pred_boxes"][:, chosen], boxes, rtol=rounding, atol=rounding)
    losses = case.criterion(outputs, targets)
    check_losses(case, losses, case.meta["float64"]["losses"], rtol=1e-9)
    case.criterion.total_loss(losses).backward()
    check_gradients(
        case,
        case.arrays["f64/grad_norms"],
        case.meta["float64"]["grad_total_norm"],
        rtol=1e-7,
        compare_values=False,
    )
    model.zero_grad()
    if "step_losses" in case.meta["float64"]:
        check_steps(case, samples, targets, num_steps)


def fix_keep_mask(case: Case, uniforms: np.ndarray) -> None:
    """Drop the patch features that the published run dropped. uniforms: its random draws, [1, Q, B, 1]."""
    keep = torch.from_numpy(uniforms[0]).permute(1, 0, 2) > case.args.mask_ratio
    case.model.keep_mask = lambda batch, num_queries, device: keep[:, :num_queries].float()


def check_steps(
    case: Case, samples: NestedTensor, targets: list[dict], num_steps: int | None
) -> None:
    """Check the loss before each of the AdamW steps in training mode."""
    model, expected = case.model.train(), case.meta["float64"]["step_losses"][:num_steps]
    args = case.args
    optimizer = build_optimizer(
        model,
        args.lr,
        args.lr_backbone,
        case.meta["adamw"]["weight_decay"],
        args.lr_backbone_names,
        args.lr_linear_proj_names,
        args.lr_linear_proj_mult,
    )
    groups = [group["n"] for group in case.meta["adamw"]["groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    assert ours + [0] * (len(groups) - len(ours)) == groups
    for step, value in enumerate(expected):
        if "steps/rand_uniform" in case.arrays:
            fix_keep_mask(case, case.arrays["steps/rand_uniform"][step : step + 1])
        is_last = step == len(expected) - 1  # no later loss would show what its step does
        with torch.set_grad_enabled(not is_last):
            outputs = forward(case, samples, targets)
            total = case.criterion.total_loss(case.criterion(outputs, targets))
        assert_close(total, value, rtol=1e-9)
        if is_last:
            break
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), case.meta["adamw"]["clip_max_norm"])
        optimizer.step()


def check_patch_queries(case: Case) -> None:
    """Check what only UP-DETR has: its attention mask, fewer patches at evaluation, dropped queries in training."""
    samples, targets = inputs(case, torch.float32)
    case.model.eval()
    with torch.no_grad():
        few = [{**target, "patches": target["patches"][:3]} for target in targets]
        check_outputs(case, forward(case, samples, few), "eval_3patches/")
        features = case.model.patch_features(torch.cat([target["patches"] for target in targets]))
        assert_close(features[:, :128], case.arrays["patch_gt_feature"], atol=1e-4)
        allowed = case.arrays["attention_mask_is_zero"].squeeze()
        block = torch.arange(len(allowed)) // (len(allowed) // case.model.num_patches)
        assert np.array_equal((block[:, None] == block).numpy(), allowed)
        fix_keep_mask(case, case.arrays["train/rand_uniform"])
        case.model.train()
        outputs = forward(case, samples, targets)
        check_outputs(case, outputs, "train/out/")
        check_losses(
            case, case.criterion(outputs, targets), case.meta["train_mode"]["losses"], rtol=1e-5
        )
