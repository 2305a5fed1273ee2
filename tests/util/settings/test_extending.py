"""Extensions from outside the tree: a detector, pretext, dataset, proposal method and backbone of one file and one
registry entry each, trained.
"""

import textwrap
from pathlib import Path

import pytest

from tests.tiny import (
    captured_log,
    fine_tune,
    pre_train,
    read_checkpoint,
    read_log,
    write_coco,
    write_images,
)
from util.errors import UserError
from util.settings import FINETUNE, make_parser, registry, resolve
from util.settings.registry import DatasetEntry, DetectorEntry, PretextEntry

FILES = {
    "toy_detector": '''
        """DETR whose boxes are never wider than half the image."""
        from models.detr import DETR, Decoder, DecoderLayer, Transformer, build_encoder, detector_kwargs, layer_kwargs


        class HalfDETR(DETR):
            def boxes(self, offsets, states):
                return super().boxes(offsets, states) / 2


        def build(args, backbone, classification):
            layer = DecoderLayer(args.hidden_dim, **layer_kwargs(args))
            transformer = Transformer(build_encoder(args), Decoder(layer, args.dec_layers, args.hidden_dim))
            return HalfDETR(backbone, transformer, classification, **detector_kwargs(args))
    ''',
    "toy_pretext": '''
        """Random query patch detection without the patches."""
        from torch import nn

        from models.classification import Classification, matching_costs
        from models.pretext import Pretext
        from util.nested_tensor import as_nested_tensor


        class Blind(Pretext):
            losses = ("labels", "boxes")

            def __init__(self, detector):
                super().__init__(detector)
                self.blind_shift = nn.Linear(1, detector.hidden_dim)

            @classmethod
            def from_settings(cls, args, detector):
                return cls(detector)

            @staticmethod
            def build_classification(args):
                return Classification("softmax", 2, **matching_costs(args))

            def loss_weights(self, args):
                return {"loss_ce": 1.0, "loss_bbox": args.bbox_loss_coef, "loss_giou": 2.0}

            def forward(self, samples, targets):
                memory = self.detector.encode(as_nested_tensor(samples))
                queries = self.detector.learned_queries(len(targets))
                queries.position = queries.position + self.blind_shift.bias
                return self.detector.predict(self.detector.decode(memory, queries))
    ''',
    "toy_data": '''
        """COCO's validation images, for training, too."""
        from datasets.labelled.coco import build_coco


        def build(image_set, args, classes=None):
            return build_coco("val", args, classes)
    ''',
    "toy_proposals": '''
        """The left half of the image, repeated as often as there are patches."""
        import torch


        class LeftHalf:
            def __init__(self, count):
                self.count = count

            def __call__(self, image, rng, name):
                height, width = image.shape[-2:]
                return torch.tensor([[0, 0, width // 2, height]], dtype=torch.float32).repeat(self.count, 1)


        def build(args):
            return LeftHalf(args.num_patches)
    ''',
    "toy_backbone": '''
        """One convolution of stride 32 with a learned scale."""
        from torch import nn

        from models.backbone import Body


        class OneConvolution(nn.Module):
            def __init__(self):
                super().__init__()
                self.convolution = nn.Conv2d(3, 24, 32, 32)

            def forward(self, images):
                return [self.convolution(images)]


        def build(name, norm, dilation, stages):
            normalization = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
            return Body(OneConvolution(), strides=[32], num_channels=[24], **normalization, early_names=set())
    ''',
}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the files into a folder on Python's path, and an entry each into the registries."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)
    entry = DetectorEntry(
        "toy_detector:build", state_dict_marker=".toy_attention.", defaults={"num_queries": 8}
    )
    monkeypatch.setitem(registry.DETECTORS, "toy", entry)
    pretext = PretextEntry(
        "toy_pretext:Blind",
        "datasets.pretext.random_query_patch:build_query_patch_dataset",
        parameter_prefixes=("blind_shift.",),
        flags=("num_patches",),
        defaults={"epochs": 3, "num_classes": 2},
    )
    monkeypatch.setitem(registry.PRETEXTS, "blind", pretext)
    monkeypatch.setitem(registry.DATASETS, "validation_twice", DatasetEntry("toy_data:build"))
    monkeypatch.setitem(registry.PROPOSALS, "left_half", "toy_proposals:build")
    monkeypatch.setitem(registry.BACKBONES, "one_convolution", "toy_backbone:build")


def test_extensions_of_every_kind_pre_train_and_fine_tune(toys: None, tmp_path: Path) -> None:
    images, coco = write_images(tmp_path / "images"), write_coco(tmp_path / "coco")
    model = ("--detector", "toy", "--backbone", "one_convolution")
    task = ("--pretext", "blind", "--proposals", "left_half")
    pre_train(*model, *task, "--imagenet_path", images, "--output_dir", tmp_path / "a")
    assert len(read_log(tmp_path / "a")) == 3  # the pretext's own default
    first = read_checkpoint(tmp_path / "a" / "checkpoint.pth")
    assert {"blind_shift.bias", "backbone.0.body.convolution.weight"} <= set(first["model"])
    assert first["args"]["proposals"] == "left_half"

    data = ("--dataset_file", "validation_twice", "--coco_path", coco)
    start = ("--pretrain", tmp_path / "a" / "checkpoint.pth", "--output_dir", tmp_path / "b")
    fine_tune(*model, *data, *start, "--epochs", "1", "--lr_backbone", "1e-4")
    second = read_checkpoint(tmp_path / "b" / "checkpoint.pth")
    assert "blind_shift.bias" not in second["model"]
    assert second["args"]["num_queries"] == 20, "the flag wins over the detector's default"

    with captured_log() as lines:
        pre_train("--pretext", "random_query_patch", *data, "--dry_run")
    assert any(
        "3 images of --dataset_file validation_twice, without their labels" in line
        for line in lines
    )
    with captured_log() as lines:
        fine_tune("--eval", "--resume", tmp_path / "b" / "checkpoint.pth", *data, *model)
    assert any("evaluating on 3 images" in line for line in lines)


def test_defaults_of_a_new_detector_apply(toys: None) -> None:
    assert resolve(make_parser(FINETUNE).parse_args(["--detector", "toy"])).num_queries == 8


def test_an_unknown_name_lists_the_new_ones(toys: None) -> None:
    with pytest.raises(UserError, match=r"--backbone resnet999 is unknown.*one_convolution"):
        registry.lookup(registry.BACKBONES, "--backbone", "resnet999")
