"""Files of every published codebase: identify them, load them with --pretrain and --resume, convert them and back."""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from models import build_model
from tests.published_files import (
    SMALL,
    detreg,
    filled,
    patch_layers,
    published_files,
    settings,
    shapes,
    siamese,
    siamese_file,
    updetr,
)
from tests.tiny import ROOT, captured_log
from tools import convert_checkpoint, convert_to_detr
from util.checkpoints.adoption import is_pretext
from util.checkpoints.architecture import infer_architecture
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint, parse_checkpoint
from util.checkpoints.classes import count_classes, infer_classification
from util.checkpoints.conversion import convert, infer_codebase, infer_pretext
from util.checkpoints.loading import load_pretrained, load_strict
from util.checkpoints.parameter_check import check_parameters
from util.checkpoints.weight_files import read_weights
from util.errors import UserError
from util.runs.session import start_session
from util.settings import FINETUNE, Settings, make_parser

FILES = published_files()
PRETEXTS = {
    "updetr": "random_query_patch",
    "detreg detr": "region_prior",
    "siamese detr": "siamese",
    "siamese conditional": "siamese",
    "siamese updetr": "random_query_patch",
    "detreg": "region_prior",
    "siamese deformable": "siamese",
    "siamese single scale": "siamese",
}
DETECTORS = sorted(set(FILES) - set(PRETEXTS) - {"masks"})
CODEBASES = {
    "detr": "detr",
    "conditional": "conditional_detr",
    "masks": "detr",
    "updetr": "updetr",
    "updetr finetuned": "updetr",
    "detreg detr": "detreg",
    "siamese detr": "siamese",
    "siamese conditional": "siamese",
    "siamese updetr": "siamese",
    "deformable": "deformable_detr",
    "deformable two-stage": "deformable_detr",
    "detreg": "detreg",
    "siamese deformable": "siamese",
    "siamese single scale": "siamese",
}


@pytest.fixture
def file_of(tmp_path: Path):
    """Return a function that saves a published file of a kind, or any content, and returns its path."""

    def save(kind: str | dict, name: str = "file.pth") -> Path:
        torch.save(FILES[kind] if isinstance(kind, str) else kind, tmp_path / name)
        return tmp_path / name

    return save


def run(*words: object, tool=convert_checkpoint) -> str:
    with captured_log() as lines:
        tool.main(tool.parse([str(word) for word in words]))
    return "\n".join(lines)


def refused(*words: object, tool=convert_checkpoint) -> str:
    with pytest.raises(UserError) as caught:
        run(*words, tool=tool)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def start(flag: str, path: Path, *flags: str) -> tuple[torch.nn.Module, Checkpoint, Settings]:
    """Return what finetune_main.py builds from a file: (model with its weights, checkpoint, settings)."""
    session = start_session(
        make_parser(FINETUNE).parse_args([flag, str(path), "--device", "cpu", *flags])
    )
    settings, checkpoint = session.settings, session.checkpoint
    count = (count_classes(checkpoint.model, "focal") or 5) - (settings.classification == "softmax")
    model = build_model(settings, count)[0]
    if flag == "--pretrain":
        load_pretrained(model, checkpoint, None)
    else:
        load_strict(model, checkpoint)
    return model, checkpoint, settings


def assert_equal(state: dict, other: dict) -> None:
    assert set(state) == set(other)
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("detector", ["detr", "conditional_detr", "deformable_detr"])
def test_published_pre_training_with_patches_uses_softmax(detector: str) -> None:
    """On every detector. A focal head would take "no object" for a class."""
    assert infer_classification(Checkpoint(model=siamese(detector))) == "softmax"
    assert infer_classification(Checkpoint(model=shapes(detector))) == (
        "softmax" if detector == "detr" else "focal"
    )


# ---------------------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("state", "number"),
    [
        (lambda: shapes("detr", outputs=92), 458),
        (lambda: shapes("conditional_detr"), 564),
        (lambda: updetr("--pre_norm", backbone="resnet50"), 466),
        (lambda: detreg("detr", "--pre_norm"), 464),
        (lambda: siamese("detr", channels=2048), 495),
        (lambda: siamese("conditional_detr", "--num_queries", "100", channels=2048), 601),
        (lambda: shapes("deformable_detr"), 561),
        (lambda: shapes("deformable_detr", "--with_box_refine"), 597),
        (lambda: shapes("deformable_detr", "--with_box_refine", "--two_stage"), 630),
        (lambda: detreg("deformable_detr"), 565),
        (lambda: siamese("deformable_detr", channels=3584), 559),
        (lambda: siamese("deformable_detr", "--num_feature_levels", "1", channels=2048), 547),
    ],
)
def test_full_size_files_have_the_published_number_of_tensors(state, number: int) -> None:
    """The real files, which the synthetic ones stand for, have this many."""
    state = state()
    assert len(state) == number
    checkpoint = parse_checkpoint({"model": state}, "x.pth")
    assert checkpoint.num_tensors == number
    check_parameters(checkpoint, build_model)


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", FILES)
def test_codebase_and_pretext_are_inferred(kind: str) -> None:
    checkpoint = parse_checkpoint(FILES[kind], "x.pth")
    assert infer_codebase(checkpoint) == CODEBASES[kind]
    assert infer_pretext(checkpoint) == PRETEXTS.get(kind)
    assert is_pretext(checkpoint) is (kind in PRETEXTS)
    check_parameters(checkpoint, build_model)


@pytest.mark.parametrize("kind", PRETEXTS)
def test_pretrain_reads_every_published_pre_training(kind: str, file_of) -> None:
    model, checkpoint, args = start("--pretrain", file_of(kind))
    state, source = model.state_dict(), checkpoint.model
    heads = {key for key in state if "class_embed" in key}
    assert heads
    for key in set(state) - heads:
        assert torch.equal(state[key], source[key]), key
    assert args.pre_norm is (kind in ("updetr", "detreg detr"))
    assert args.position_embedding == ("sine_shifted" if kind.startswith("detreg") else "sine")
    assert args.num_queries == 20


@pytest.mark.parametrize("kind", DETECTORS)
def test_resume_reads_every_published_detector_strictly(kind: str, file_of) -> None:
    model, _, args = start("--resume", file_of(kind), "--eval")
    assert_equal(model.state_dict(), FILES[kind]["model"])
    assert args.position_embedding == ("sine_shifted" if kind.startswith("deformable") else "sine")


def test_flop_counters_in_published_files_are_ignored(file_of) -> None:
    counters = {
        f"transformer.{name}": torch.zeros(1) for name in ("total_ops", "encoder.total_params")
    }
    path = file_of(
        {"model": {**FILES["deformable"]["model"], **counters}, "args": FILES["deformable"]["args"]}
    )
    model, _, _ = start("--resume", path, "--eval")
    assert_equal(model.state_dict(), FILES["deformable"]["model"])
    assert "checked    all names" in run(path)


def test_siamese_deformable_queries_are_joined_as_position_then_content() -> None:
    raw = FILES["siamese deformable"]["state_dict"]
    state = parse_checkpoint(FILES["siamese deformable"], "x.pth").model
    assert torch.equal(state["query_embed.weight"][:, :32], raw["query_embed.weight"])
    assert torch.equal(state["query_embed.weight"][:, 32:], raw["transformer.tgt_embed.weight"])
    for layer in range(2):
        assert torch.equal(
            state[f"bbox_embed.{layer}.layers.0.weight"],
            raw["pred_head.bbox_embed.layers.0.weight"],
        )
    assert "transformer.tgt_embed.weight" not in state


def test_module_prefix_and_bare_state_dicts() -> None:
    state = FILES["updetr"]["model"]
    for content in (
        {"model": {f"module.{key}": value for key, value in state.items()}},
        dict(state),
        {"state_dict": state},
    ):
        checkpoint = parse_checkpoint(content, "x.pth")
        assert infer_codebase(checkpoint) == "updetr"
        check_parameters(checkpoint, build_model)


# -------------------------------------------------------------------------------------------------- the tool: identify


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "detr",
            (
                "UP-DETR and DETReg",
                "a trained detector",
                "91 classes and `no object`",
                "the weights don't show: dilation and nheads",
            ),
        ),
        (
            "conditional",
            (
                "Conditional DETR\n",
                "91 classes (sigmoid)",
                "epoch 49",
                "nheads 4, dilation False",
                "--eval --resume",
            ),
        ),
        ("masks", ("with a mask head", "250 classes", "coco_panoptic", "--eval --resume")),
        (
            "updetr",
            (
                "UP-DETR\n",
                "pre-training (random_query_patch",
                "2 classes and `no object`",
                "--pre_norm",
                "--pretrain",
            ),
        ),
        (
            "detreg detr",
            (
                "DETReg\n",
                "region_prior",
                "position_embedding sine_shifted",
                "91 classes and `no object`",
            ),
        ),
        (
            "siamese conditional",
            (
                "Siamese DETR\n",
                "iteration 300000",
                "optimizer",
                "--num_queries 20",
                "checked    all names and shapes",
            ),
        ),
    ],
)
def test_tool_identifies_a_file(kind: str, words: tuple[str, ...], file_of) -> None:
    text = run(file_of(kind))
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("extra", "origin"),
    [({"prototypes.weight": (4, 4)}, "SwAV"), ({"fc.weight": (4, 4)}, "torchvision")],
)
def test_backbone_is_identified_and_not_converted(
    extra: dict, origin: str, file_of, tmp_path: Path
) -> None:
    body = {
        key.removeprefix("backbone.0.body."): value
        for key, value in FILES["detr"]["model"].items()
        if key.startswith("backbone.")
    }
    path = file_of(
        {
            f"module.{key}": value
            for key, value in {
                **body,
                **{key: torch.ones(size) for key, size in extra.items()},
            }.items()
        }
    )
    text = run(path)
    assert "resnet18" in text
    assert origin in text
    assert f"--backbone resnet18 --backbone_weights {path}" in text
    assert "no detector" in refused(path, "--to", "predetr", "--out", tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


# --------------------------------------------------------------------------------------------------- the tool: convert


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("detr", "detr"),
        ("conditional", "detr"),
        ("updetr", "updetr"),
        ("updetr finetuned", "updetr"),
        ("detreg detr", "detreg"),
        ("siamese detr", "siamese"),
        ("siamese conditional", "siamese"),
        ("siamese updetr", "siamese"),
        ("deformable", "detr"),
        ("deformable two-stage", "detr"),
        ("detreg", "detreg"),
        ("siamese deformable", "siamese"),
        ("siamese single scale", "siamese"),
    ],
)
def test_round_trip_is_bit_exact(kind: str, to: str, file_of, tmp_path: Path) -> None:
    first = file_of(kind)
    run(first, "--to", "predetr", "--out", tmp_path / "ours.pth")
    text = run(tmp_path / "ours.pth", "--to", to, "--out", tmp_path / "back.pth")
    assert "warning" not in text
    entry = "state_dict" if to == "siamese" else "model"
    assert_equal(read_weights(tmp_path / "back.pth")[entry], FILES[kind][entry])
    ours, theirs = load_checkpoint(tmp_path / "ours.pth"), load_checkpoint(first)
    assert (infer_pretext(ours), ours.converted_from) == (
        infer_pretext(theirs),
        infer_codebase(theirs),
    )
    certain, likely = infer_architecture(theirs)
    known, probable = infer_architecture(ours)
    assert {**likely, **certain}.items() <= {**probable, **known}.items()
    assert "PreDETR, converted from" in run(tmp_path / "ours.pth")
    assert infer_codebase(load_checkpoint(tmp_path / "back.pth")) == (
        CODEBASES[kind] if kind != "updetr finetuned" else "detr"
    )


@pytest.mark.parametrize("kind", FILES)
def test_converted_to_predetr_it_loads_like_the_original(
    kind: str, file_of, tmp_path: Path
) -> None:
    run(file_of(kind), "--to", "predetr", "--out", tmp_path / "ours.pth")
    model, checkpoint, args = start(
        "--pretrain" if kind in PRETEXTS else "--resume", tmp_path / "ours.pth"
    )
    source = parse_checkpoint(FILES[kind], "x.pth").model
    for key, value in model.state_dict().items():
        assert kind in PRETEXTS and "class_embed" in key or torch.equal(value, source[key]), key
    assert checkpoint.epoch == FILES[kind].get("epoch")
    assert args.position_embedding == (
        "sine_shifted" if kind.startswith(("detreg", "deformable")) else "sine"
    )


def detector_of_masks() -> dict:
    state = FILES["masks"]["model"]
    return {key[5:]: value for key, value in state.items() if key.startswith("detr.")}


def test_mask_head_stays_where_the_codebase_has_one(file_of, tmp_path: Path) -> None:
    settings = start("--resume", file_of("masks"), "--eval")[2]  # which uses it
    assert (settings.masks, settings.nheads, settings.num_classes) == (True, 4, 250)
    for to in ("predetr", "detr"):
        text = run(file_of("masks"), "--to", to, "--out", tmp_path / f"{to}.pth")
        assert "dropped" not in text
        assert_equal(read_weights(tmp_path / f"{to}.pth")["model"], FILES["masks"]["model"])
        model, _, settings = start("--resume", tmp_path / f"{to}.pth", "--eval")
        assert settings.masks
        assert_equal(model.state_dict(), FILES["masks"]["model"])
    text = run(file_of("masks"), "--to", "updetr", "--out", tmp_path / "updetr.pth")
    assert "dropped: 32 tensors of bbox_attention, mask_head" in text
    assert "--masks" not in text.splitlines()[-1]
    assert_equal(read_weights(tmp_path / "updetr.pth")["model"], detector_of_masks())


def test_mask_head_can_be_left_out(file_of, tmp_path: Path) -> None:
    """Of a published file, and of one of this project, which is no conversion otherwise."""
    run(file_of("masks"), "--to", "predetr", "--out", tmp_path / "ours.pth")
    for path in (file_of("masks"), tmp_path / "ours.pth"):
        out = tmp_path / f"boxes of {path.name}"
        text = run(path, "--drop_masks", "--to", "predetr", "--out", out)
        assert "dropped: 32 tensors of bbox_attention, mask_head" in text
        model, _, settings = start("--resume", out, "--eval")
        assert not settings.masks
        assert_equal(model.state_dict(), detector_of_masks())
    text = refused(file_of("detr"), "--drop_masks", "--to", "predetr", "--out", tmp_path / "x.pth")
    assert "has no mask head; omit it" in text


def test_other_codebases_get_only_the_parameters_they_have(file_of, tmp_path: Path) -> None:
    """Parameters of another pretext are dropped with a note. DETReg reads `args` as a Namespace."""
    text = run(file_of("detreg detr"), "--to", "updetr", "--out", tmp_path / "up.pth")
    assert "dropped: 4 tensors of feature_embed" in text
    warning = (
        "warning: trained with the positional encoding sine_shifted, but UP-DETR computes sine"
    )
    assert warning in text
    assert "--pre_norm" in text
    assert set(read_weights(tmp_path / "up.pth")) == {"model"}
    text = run(file_of("updetr"), "--to", "detreg", "--out", tmp_path / "reg.pth")
    assert "dropped: 6 tensors of feature_align, patch2query" in text
    assert "Namespace" in text
    content = read_weights(tmp_path / "reg.pth")
    assert isinstance(content["args"], Namespace)
    assert content["args"].seed == 7
    text = run(file_of("siamese conditional"), "--to", "detr", "--out", tmp_path / "detr.pth")
    assert "dropped: 2 tensors of class_embed" in text
    assert_equal(
        read_weights(tmp_path / "detr.pth")["model"],
        {
            key: value
            for key, value in load_checkpoint(file_of("conditional")).model.items()
            if "class_embed" not in key
        }
        | {
            key: value
            for key, value in parse_checkpoint(FILES["siamese conditional"], "x").model.items()
            if not key.startswith(("class_embed", "patch2query", "feature_align", "enc_head"))
        },
    )


@pytest.mark.parametrize(
    ("detector", "channels"), [("detr", 512), ("conditional_detr", 512), ("deformable_detr", 896)]
)
def test_own_pre_training_converts_to_each_codebase_with_the_detector(
    detector: str, channels: int, file_of, tmp_path: Path
) -> None:
    state = filled({**shapes(detector, *SMALL, outputs=3), **patch_layers(32, channels)})
    stored = {
        "script": "main.py",
        "pretext": "random_query_patch",
        "detector": detector,
        "nheads": 4,
        "position_embedding": "sine",
    }
    path = file_of({"model": state, "args": stored, "version": 1, "epoch": 3, "optimizer": {}})
    for to in ("detr", "updetr", "detreg", "siamese"):
        if (
            to == "updetr"
            and detector != "detr"
            or to == "detreg"
            and detector == "conditional_detr"
        ):
            assert "does not have" in refused(path, "--to", to, "--out", tmp_path / "no.pth")
            continue
        text = run(path, "--to", to, "--out", tmp_path / f"{to}.pth")
        shifted = to == "detreg" or to == "detr" and detector == "deformable_detr"
        assert ("warning: trained with the positional encoding sine" in text) is shifted
        back = load_checkpoint(tmp_path / f"{to}.pth").model
        left_out = {
            "detr": ("class_embed.", "patch2query.", "feature_align."),
            "detreg": ("patch2query.", "feature_align."),
        }.get(to, ())
        assert_equal(
            back,
            {
                key: value
                for key, value in state.items()
                if not (left_out and key.startswith(left_out))
            },
        )
    raw = read_weights(tmp_path / "siamese.pth")["state_dict"]
    assert torch.equal(raw["head.criterion.empty_weight"], torch.tensor([1.0, 1.0, 0.1]))
    assert "already" in refused(path, "--to", "predetr", "--out", tmp_path / "no.pth")
    assert not (tmp_path / "no.pth").exists()


@pytest.mark.parametrize(
    ("kind", "to", "words"),
    [
        ("conditional", "updetr", ("conditional_detr", "UP-DETR does not have", "another --to")),
        ("conditional", "detreg", ("conditional_detr", "DETReg does not have")),
        ("detr", "siamese", ("no pretext", "--to detr")),
        ("detreg detr", "siamese", ("no pretext of Siamese DETR",)),
    ],
)
def test_layout_without_the_detector_or_pretext_is_refused(
    kind: str, to: str, words: tuple[str, ...], file_of, tmp_path: Path
) -> None:
    text = refused(file_of(kind), "--to", to, "--out", tmp_path / "new.pth")
    assert all(word in text for word in words)
    assert not (tmp_path / "new.pth").exists()


def test_different_heads_per_layer_are_not_merged() -> None:
    state = {
        "bbox_embed.0.layers.0.weight": torch.ones(2),
        "bbox_embed.1.layers.0.weight": torch.zeros(2),
    }
    checkpoint = parse_checkpoint(
        {"model": {**FILES["siamese conditional"]["state_dict"]}}, "x.pth"
    )
    checkpoint.model.update(state)
    with pytest.raises(UserError, match="--with_box_refine"):
        convert(checkpoint, "siamese")


def test_existing_files_are_not_overwritten(file_of, tmp_path: Path) -> None:
    path, taken = file_of("siamese conditional"), tmp_path / "taken.pth"
    taken.write_text("mine")
    (tmp_path / "detr_file.pth").write_text("mine")
    assert "exists" in refused(path, "--to", "predetr", "--out", taken)
    assert "exists" in refused("--ckpt", path, "--out", tmp_path, tool=convert_to_detr)
    assert taken.read_text() == (tmp_path / "detr_file.pth").read_text() == "mine"
    with pytest.raises(SystemExit):
        convert_checkpoint.parse([str(path), "--to", "predetr"])


# -------------------------------------------------------------------------------------------------------------- refused


def without(state: dict, word: str) -> dict:
    return {key: value for key, value in state.items() if word not in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: without(s, "decoder.layers.1.linear"),
            ("lacks 4 of the", "transformer.decoder.layers.1.linear1.weight", "..."),
        ),
        (
            lambda s: {**s, "novel.weight": torch.ones(1), "novel.bias": torch.ones(1)},
            ("has 2 names", "novel.weight, novel.bias"),
        ),
        (
            lambda s: {**s, "input_proj.weight": torch.ones(32, 9, 1, 1)},
            ("other shapes", "input_proj.weight [32, 9, 1, 1] (not [32, 512,"),
        ),
        (lambda s: without(s, "class_embed.bias"), ("lacks 1", "class_embed.bias")),
        (lambda s: without(s, "layer3"), ("lacks", "tensors of its detr: backbone.0.body.")),
        (lambda s: {f"x.{key}": value for key, value in s.items()}, ("x.",)),
        (
            lambda s: {"a.weight": torch.ones(2), "b.weight": torch.ones(2)},
            ("no detector", "2 tensors", "a.weight"),
        ),
    ],
)
def test_files_that_fit_no_detector_are_refused_with_the_names(
    change, words: tuple[str, ...], file_of, tmp_path: Path
) -> None:
    path = file_of({"model": change(FILES["detr"]["model"])})
    for extra in ((), ("--to", "predetr", "--out", tmp_path / "new.pth")):
        text = refused(path, *extra)
        assert str(path) in text
        assert all(word in text for word in words), text
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "deformable",
            lambda s: {f"other.{key}": value for key, value in s.items()},
            "unknown in a deformable_detr.*: other.transformer.",
        ),
        (
            "conditional",
            lambda s: without(s, "transformer.encoder."),
            r"lacks 72 .*transformer.encoder.layers.0.self_attn",
        ),
        (
            "deformable",
            lambda s: {**s, "_extra_state": {}},
            r"'model' contains '_extra_state' \(dict\), which is not a named tensor",
        ),
    ],
)
def test_files_that_almost_fit_a_detector_are_refused(
    kind: str, change, words: str, file_of
) -> None:
    """By the tool and by --pretrain."""
    path = file_of({"model": change(FILES[kind]["model"])})
    assert re.search(words, refused(path))
    with pytest.raises(UserError, match=f"{path}.*(lacks|contains)"):
        start("--pretrain", path)


@pytest.mark.parametrize(
    "entries",
    [
        {"args": ["--lr", "1"]},
        {"args": "text"},
        {"args": {"nheads": "4", "detector": {"type": "x"}}},
        {"meta": "v1"},
        {"class_names": ["cat", "dog"]},
        {"model": "deformable_detr", "state_dict": FILES["deformable"]["model"]},
    ],
    ids=lambda entries: " ".join(entries),
)
def test_unknown_entries_of_other_programs_are_ignored(entries: dict, file_of) -> None:
    text = run(file_of({"model": FILES["deformable"]["model"], **entries}))
    assert "checked    all names and shapes are those of a deformable_detr" in text
    assert ("cat, dog" in text) is ("class_names" in entries)


def test_pretext_converted_without_its_head_loads_with_pretrain(file_of, tmp_path: Path) -> None:
    """A two-stage detector has its class head under two names. Only the user knows the number of attention heads."""
    state = filled(detreg("deformable_detr", *SMALL, "--two_stage", "--with_box_refine"))
    stored = settings(object_embedding_loss=True, num_queries=20)
    text = run(
        file_of({"model": state, "args": stored}), "--to", "detr", "--out", tmp_path / "new.pth"
    )
    assert "dropped: 4 tensors of feature_embed" in text
    assert "dropped: 12 tensors of class_embed" in text
    assert "--two_stage" in text.splitlines()[-1]
    assert_equal(
        read_weights(tmp_path / "new.pth")["model"],
        without(without(state, "feature_embed"), "class_embed"),
    )
    text = run(tmp_path / "new.pth")
    for words in ("a detector to be fine-tuned", "no class head", f"--pretrain {tmp_path}/new.pth"):
        assert words in text
    model, _, args = start("--pretrain", tmp_path / "new.pth", "--nheads", "4")
    assert (args.enc_n_points, args.dec_n_points) == (4, 4)
    assert torch.equal(model.transformer.enc_output.weight, state["transformer.enc_output.weight"])


def test_flags_of_this_project_are_not_suggested_for_other_codebases(
    file_of, tmp_path: Path
) -> None:
    live = {
        **vars(settings(object_embedding_loss=True)),
        "backbone_norm": "live",
        "position_embedding": "sine_shifted",
        "detector": "detr",
    }
    text = run(
        file_of({"model": FILES["detreg detr"]["model"], "args": live}),
        "--to",
        "detreg",
        "--out",
        tmp_path / "new.pth",
    )
    assert [
        flag in text.splitlines()[-1] for flag in ("--pre_norm", "--backbone_norm", "sine_shifted")
    ] == [
        True,
        False,
        False,
    ]


def test_unknown_positional_encoding_is_refused(file_of) -> None:
    text = refused(
        file_of({"model": FILES["detr"]["model"], "args": {"position_embedding": "rotary"}})
    )
    assert text.startswith("--position_embedding rotary is unknown: choose one of sine")


def test_truncated_files_and_text_files_are_refused(file_of, tmp_path: Path) -> None:
    path = file_of("updetr")
    path.write_bytes(path.read_bytes()[:-3000])
    assert "incomplete" in refused(path)
    path.write_text("<html>not found</html>")
    assert "text file" in refused(path)
    assert "no such file" in refused(tmp_path / "nothing.pth")
    assert "'model'" in refused(file_of({"epoch": 3}))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["tools/convert_checkpoint.py"], id="convert_checkpoint"),
        pytest.param(
            ["tools/convert_to_detr.py", "--ckpt"], id="convert_to_detr", marks=pytest.mark.slow
        ),
    ],
)
def test_tools_run_from_any_directory_and_fail_in_one_line(
    words: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / words[0]), *words[1:], "nothing.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("error: nothing.pth: no such file")
    assert done.stdout.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ convert_to_detr


@pytest.mark.parametrize("flag", ["--export", "--out"])
@pytest.mark.parametrize("kind", [kind for kind in PRETEXTS if kind.startswith("siamese")])
def test_convert_to_detr_writes_a_file_for_pretrain(
    kind: str, flag: str, file_of, tmp_path: Path
) -> None:
    path = file_of(kind, "iter_300000.pth")
    deform = ["--deform"] if "deformable" in kind and flag == "--export" else []
    text = run("--ckpt", path, flag, tmp_path / "new", *deform, tool=convert_to_detr)
    out = tmp_path / "new" / "detr_iter_300000.pth"
    assert str(out) in text
    state = without(read_weights(out)["model"], "patch2query")
    model, checkpoint, args = start("--pretrain", out)
    assert set(state) == {key for key in model.state_dict() if "class_embed" not in key}
    source = parse_checkpoint(FILES[kind], "x.pth").model
    assert all(
        torch.equal(value, source[key])
        for key, value in model.state_dict().items()
        if "class_embed" not in key
    )
    assert args.position_embedding == "sine"
    assert infer_codebase(checkpoint) == "predetr"


def test_convert_to_detr_refuses_other_codebases_and_detectors(file_of, tmp_path: Path) -> None:
    assert "not from Siamese DETR" in refused(
        "--ckpt", file_of("updetr"), "--out", tmp_path / "a", tool=convert_to_detr
    )
    assert "--deform" in refused(
        "--ckpt", file_of("siamese detr"), "--out", tmp_path / "a", "--deform", tool=convert_to_detr
    )
    assert not (tmp_path / "a").exists()


def test_full_size_conditional_detr_converts_to_564_tensors(file_of, tmp_path: Path) -> None:
    """As the published tool gives: with `patch2query` and without class head."""
    path = file_of(siamese_file(siamese("conditional_detr", "--num_queries", "100", channels=2048)))
    run("--ckpt", path, "--out", tmp_path / "new.pth", tool=convert_to_detr)
    assert len(read_weights(tmp_path / "new.pth")["model"]) == 564


def test_synthetic_tensors_differ_between_names() -> None:
    """With equal values, round trips would not show that two names were swapped."""
    state = filled(shapes("detr", *SMALL))
    assert not torch.equal(
        state["transformer.decoder.layers.0.norm1.weight"],
        state["transformer.decoder.layers.1.norm1.weight"],
    )
    assert (
        state["backbone.0.body.layer4.0.conv1.weight"].flatten()[0]
        != state["backbone.0.body.layer4.0.conv2.weight"].flatten()[0]
    )
