"""Deformable DETR in checkpoints and scripts: detected architecture, and runs from pre-training to evaluation."""

import shlex
from pathlib import Path

import pytest
import torch

from models import build_model
from tests.tiny import (
    fine_tune,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from util.checkpoints.architecture import infer_architecture
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.loading import load_pretrained
from util.settings import FINETUNE, make_parser, resolve


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_feature_levels", "2", "--with_box_refine"],
        ["--two_stage"],
        ["--two_stage", "--with_box_refine", "--enc_n_points", "2"],
    ],
    ids=" ".join,
)
def test_architecture_from_a_checkpoint(flags: list[str]) -> None:
    args = tiny_args(FINETUNE, "--detector", "deformable_detr", *flags)
    state = build_model(args)[0].state_dict()
    certain, _ = infer_architecture(Checkpoint(model=state, args={"nheads": 4}))
    wanted = {
        "detector": "deformable_detr",
        "with_box_refine": args.with_box_refine,
        "two_stage": args.two_stage,
        "num_feature_levels": args.num_feature_levels,
        "enc_layers": 1,
        "dec_layers": 2,
        "hidden_dim": 32,
    }
    assert wanted.items() <= certain.items()
    known = {**infer_architecture(Checkpoint(model=state, args={"nheads": 4}))[1], **certain}
    assert (known["enc_n_points"], known["dec_n_points"]) == (args.enc_n_points, args.dec_n_points)


def test_sampling_points_of_a_published_checkpoint() -> None:
    """Without settings eight heads are assumed, as in every published checkpoint."""
    flags = ["--detector", "deformable_detr", "--backbone_weights", "none", "--enc_n_points", "2"]
    with torch.device("meta"):
        state = build_model(resolve(make_parser(FINETUNE).parse_args(flags)))[0].state_dict()
    certain, likely = infer_architecture(Checkpoint(model=state))
    assert (likely["enc_n_points"], likely["dec_n_points"]) == (2, 4)
    assert certain["num_queries"] == 300
    assert likely["position_embedding"] == "sine_shifted"


def test_objectness_head_is_kept_with_other_classes() -> None:
    source, model = (
        build_model(
            tiny_args(
                FINETUNE, "--detector", "deformable_detr", "--two_stage", "--num_classes", number
            )
        )[0]
        for number in "94"
    )
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    file = Checkpoint(model=source.state_dict(), class_names={1: "cat"})
    load_pretrained(model, file, {2: "dog", 3: "cat"})
    state = model.state_dict()
    assert torch.equal(state["class_embed.2.weight"][0], source.class_embed[2].weight[0])
    assert torch.equal(state["class_embed.2.weight"][1:], fresh["class_embed.2.weight"][1:])
    assert torch.equal(state["class_embed.0.weight"][3], source.class_embed[0].weight[1])
    assert torch.equal(state["class_embed.0.weight"][:3], fresh["class_embed.0.weight"][:3])
    assert torch.equal(
        state["transformer.decoder.class_embed.0.weight"], state["class_embed.0.weight"]
    )


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow, id="plain"),
        pytest.param(
            ["--with_box_refine", "--num_feature_levels", "2"], marks=pytest.mark.slow, id="refine"
        ),
    ],
)
def test_pre_train_fine_tune_resume_evaluate(flags: list[str], tmp_path: Path) -> None:
    """Through the scripts: pre-train with patches, fine-tune without repeating a flag, resume, evaluate."""
    pre_train(
        "--detector",
        "deformable_detr",
        "--feature_recon",
        *flags,
        "--imagenet_path",
        write_images(tmp_path / "images"),
        "--output_dir",
        tmp_path / "pretrain",
        "--epochs",
        1,
    )
    checkpoint = tmp_path / "pretrain" / "checkpoint.pth"
    source = read_checkpoint(checkpoint)["model"]
    data = ("--coco_path", write_coco(tmp_path / "coco"), "--output_dir", tmp_path / "finetune")
    fine_tune(
        *data,
        "--pretrain",
        checkpoint,
        *shlex.split(
            "--epochs 1 --lr 1e-12 --lr_backbone 1e-12 --clip_max_norm 0 --weight_decay 0 "
            "--lr_drop_epochs 1 2"
        ),
    )
    tuned = read_checkpoint(tmp_path / "finetune" / "checkpoint.pth")
    assert tuned["args"]["detector"] == "deformable_detr"
    assert tuned["args"]["with_box_refine"] is bool(flags)
    assert tuned["args"]["num_feature_levels"] == (2 if flags else 4)
    kept = [
        key
        for key in tuned["model"]
        if "class_embed" not in key and not key.endswith(("running_mean", "running_var"))
    ]
    for key in kept:
        torch.testing.assert_close(tuned["model"][key], source[key], rtol=0, atol=1e-8)
    assert len(kept) > 100
    fine_tune(*data, "--resume", "auto", "--epochs", 2)
    assert [record["epoch"] for record in read_log(tmp_path / "finetune")] == [0, 1]
    optimizer = read_checkpoint(tmp_path / "finetune" / "checkpoint.pth")["optimizer"]
    assert len(optimizer["param_groups"][2]["params"]) > 0
    # Kept because the learning rate drops after this epoch.
    assert (tmp_path / "finetune" / "checkpoint0000.pth").exists()
    fine_tune(
        "--coco_path",
        tmp_path / "coco",
        "--resume",
        tmp_path / "finetune" / "checkpoint.pth",
        "--eval",
    )
