"""Checkpoints: their entries, adopting the architecture, and loading weights into a model."""

import random
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import captured_log
from util import coco
from util.checkpoints.adoption import adopt_architecture, adopt_settings
from util.checkpoints.architecture import infer_resnet
from util.checkpoints.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from util.checkpoints.classes import infer_classes
from util.checkpoints.loading import load_pretrained, load_strict
from util.checkpoints.newest import resolve_resume_path
from util.errors import UserError
from util.random_state import get_rng_states, set_rng_states

D, WIDTH = 8, 12


def detector_shapes(kind="detr", classes=4, queries=6, pre_norm=False, layers=2, learned=False):
    """Return the names and shapes of a small detector with a stub as backbone."""
    shapes = {
        "backbone.0.body.conv1.weight": (2, 3, 1, 1),
        "input_proj.weight": (D, 2, 1, 1),
        "query_embed.weight": (queries, D),
    }
    shapes.update({"bbox_embed.layers.0.weight": (4, D), "bbox_embed.layers.0.bias": (4,)})
    rows = classes + (kind == "detr")
    shapes.update({"class_embed.weight": (rows, D), "class_embed.bias": (rows,)})
    for layer in range(layers):
        shapes[f"transformer.encoder.layers.{layer}.linear1.weight"] = (WIDTH, D)
        decoder = f"transformer.decoder.layers.{layer}."
        shapes.update({decoder + "linear1.weight": (WIDTH, D), decoder + "norm1.weight": (D,)})
        cross = (
            "ca_qpos_sine_proj.weight"
            if kind == "conditional_detr"
            else "multihead_attn.in_proj_weight"
        )
        shapes[decoder + cross] = (D, D)
    if pre_norm:
        shapes["transformer.encoder.norm.weight"] = (D,)
    if learned:
        shapes["backbone.1.row_embed.weight"] = (50, D // 2)
    return shapes


def detector_state(seed=0, **choices):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator)
        for key, shape in detector_shapes(**choices).items()
    }


def module_of(state, classification=None):
    """Return a module with this state dict. Its classification is the detector's default unless given."""
    root = nn.Module()
    for key, value in state.items():
        *path, leaf = key.split(".")
        module = root
        for name in path:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module._modules[name]
        module.register_parameter(leaf, nn.Parameter(value.clone()))
    root.classification = Namespace(
        kind=classification or ("focal" if any("ca_qpos" in key for key in state) else "softmax")
    )
    return root


def checkpoint_of(state, **entries):
    return Checkpoint.from_dict({"model": state, **entries}, "run/file.pth")


def one_line(excinfo, *words):
    text = str(excinfo.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return text


# ---------------------------------------------------------------------------------------------------- entries


def test_bare_and_wrapped_state_dicts_become_model(tmp_path):
    state = detector_state()
    for content in (state, {"state_dict": state, "meta": {}}, {"model": state}):
        torch.save(content, tmp_path / "f.pth")
        loaded = load_checkpoint(tmp_path / "f.pth").model
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_siamese_detr_names_become_detr_names(tmp_path):
    state = {
        "backbone.conv1.weight": torch.ones(1),
        "transformer.x": torch.ones(1),
        "pred_head.bbox_embed.w": torch.ones(1),
        "pred_head.criterion.empty_weight": torch.ones(3),
        "enc_head.0.w": torch.ones(1),
    }
    torch.save({"state_dict": state}, tmp_path / "f.pth")
    names = set(load_checkpoint(tmp_path / "f.pth").model)
    assert names == {
        "backbone.0.body.conv1.weight",
        "transformer.x",
        "bbox_embed.w",
        "enc_head.0.w",
    }


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WRAPPERS = {
    "ddp": lambda s: {"model": prefixed(s, "module.")},
    "lightning": lambda s: {
        "state_dict": {**prefixed(s, "model."), "criterion.empty_weight": torch.ones(3)}
    },
    "compiled": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "ddp_compiled": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "compiled_ddp_lightning": lambda s: {"state_dict": prefixed(s, "model._orig_mod.module.")},
    "averaged": lambda s: {"model": {**prefixed(s, "module."), "n_averaged": torch.tensor(3)}},
    "part_of_the_keys": lambda s: {
        "model": {("module." if "class" in key else "") + key: value for key, value in s.items()}
    },
    "compiled_part": lambda s: {
        "model": {key.replace("transformer.", "transformer._orig_mod."): s[key] for key in s}
    },
    "tutorial": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": {}},
    "ema": lambda s: {"ema": {"module": s, "updates": 3}},
    "only_the_average": lambda s: {"state_dict": prefixed(s, "ema_model.module.")},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_removed(tmp_path, wrapper):
    state = detector_state()
    torch.save(WRAPPERS[wrapper](state), tmp_path / "f.pth")
    loaded = load_checkpoint(tmp_path / "f.pth").model
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("DAB-DETR", ["refpoint_embed.weight"]),
        ("DN-DETR", ["refpoint_embed.weight", "label_enc.weight"]),
        ("DINO", ["label_enc.weight", "transformer.tgt_embed.weight"]),
        ("RF-DETR", ["refpoint_embed.weight", "query_feat.weight"]),
        ("RT-DETR", ["decoder.denoising_class_embed.weight"]),
        ("RT-DETR", ["model.denoising_class_embed.weight"]),
        ("detector of Detectron2", ["detr.backbone.0.backbone.stem.conv1.weight"]),
    ],
)
def test_related_detectors_are_named(tmp_path, name, keys):
    state = {**detector_state(), **{key: torch.zeros(2, 2) for key in keys}}
    for prefix in ("", "module."):
        torch.save({"model": prefixed(state, prefix)}, tmp_path / "f.pth")
        with pytest.raises(UserError) as excinfo:
            load_checkpoint(tmp_path / "f.pth")
        one_line(excinfo, f"f.pth contains a {name} (", "--backbone_weights", "another file")


def test_extension_with_names_of_a_related_detector_loads(tmp_path):
    state = {**detector_state(), "refpoint_embed.weight": torch.zeros(2, 2)}
    torch.save({"model": state, "args": {"script": "finetune_main.py"}}, tmp_path / "f.pth")
    assert load_checkpoint(tmp_path / "f.pth").model.keys() == state.keys()


@pytest.mark.parametrize("prefix", ["ema_model.module.", "model_ema.", "ema.module._orig_mod."])
def test_model_is_used_beside_its_average(tmp_path, prefix):
    state = detector_state()
    average = prefixed({key: value + 1 for key, value in state.items()}, prefix)
    counter = {"ema_model.n_averaged": torch.tensor(3)}
    torch.save(
        {"state_dict": {**prefixed(state, "model."), **average, **counter}}, tmp_path / "f.pth"
    )
    with captured_log() as lines:
        loaded = load_checkpoint(tmp_path / "f.pth").model
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    (line,) = lines
    assert "f.pth also has averaged weights (" in line


def test_metrics_of_a_lightning_module_are_dropped(tmp_path):
    """One of them starts at infinity, which is no sign of diverged training."""
    state = detector_state()
    metrics = {"val_map.scores": torch.zeros(3), "loss_metric.min_value": torch.tensor(torch.inf)}
    torch.save({"state_dict": {**prefixed(state, "model."), **metrics}}, tmp_path / "f.ckpt")
    with captured_log() as lines:
        loaded = load_checkpoint(tmp_path / "f.ckpt").model
    assert loaded.keys() == state.keys()
    assert any(
        "f.ckpt also has 2 tensors of metrics (val_map.scores, ...)" in line for line in lines
    )


@pytest.mark.parametrize("outer", ["", "model."])
def test_student_and_teacher_are_refused(tmp_path, outer):
    state = detector_state()
    halves = {**prefixed(state, f"{outer}student."), **prefixed(state, f"{outer}teacher.")}
    torch.save({"state_dict": halves}, tmp_path / "f.ckpt")
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(tmp_path / "f.ckpt")
    one_line(
        excinfo,
        "two models",
        f"{outer}student.*",
        f"{outer}teacher.*",
        "save the state dict of one",
    )


def test_two_models_in_one_state_dict_are_refused(tmp_path):
    state = detector_state()
    torch.save({"model": {**state, **prefixed(state, "module.")}}, tmp_path / "f.pth")
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(tmp_path / "f.pth")
    one_line(excinfo, "f.pth has the parameter", "twice", "one model only")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model", "frozen"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    state, other = detector_state(), detector_state()
    other["query_embed.weight"][1, 2] = value
    content = (
        {"model": other} if name == "model" else {"model": state, "frozen": {"teacher": other}}
    )
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(tmp_path / "f.pth")
    one_line(excinfo, "f.pth: 1 of", "query_embed.weight", "earlier checkpoint")


@pytest.mark.parametrize(
    "stored",
    [{0: "cat", 1: "dog"}, {"0": "cat", "1": "dog"}, {"cat": 0, "dog": 1}, ["cat", "dog"],
     {np.str_("cat"): np.int64(0), "dog": np.int64(1)}],
)  # fmt: skip
def test_class_names_are_read_by_id_and_by_name(stored):
    assert checkpoint_of(detector_state(), class_names=stored).class_names == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("num_classes", "names", "category_ids"),
    [
        (8, {3: "cat", 7: "dog"}, {3: 3, 7: 7}),
        (2, {0: "cat", 1: "dog"}, {0: 3, 1: 7}),
    ],
)
def test_categories_of_coco_name_the_rows_by_id_or_by_position(num_classes, names, category_ids):
    """The largest id has a row of its own, or there are as many rows as categories."""
    categories = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}]
    state = detector_state()
    for key, size in (
        ("class_embed.weight", (num_classes + 1, 16)),
        ("class_embed.bias", (num_classes + 1,)),
    ):
        state[key] = torch.zeros(size)
    classes = infer_classes(checkpoint_of(state, class_names=categories))
    assert classes.named
    assert (classes.names, classes.category_ids) == (names, category_ids)


def test_class_names_in_another_format_are_ignored():
    content = {"model": detector_state(), "class_names": {"cat": {}}, "category_ids": {"cat": 1}}
    checkpoint = Checkpoint.from_dict(content)
    assert not checkpoint.class_names
    assert not checkpoint.category_ids


def test_values_of_other_programs_can_be_saved_again(tmp_path):
    entries = {
        "epoch": np.int64(3),
        "best": np.float64(0.5),
        "seconds": torch.tensor(2.0),
        "args": Namespace(lr=np.float32(0.5), sizes=np.arange(2), device=torch.device("cpu")),
        "lr_scheduler": OrderedDict(milestones=Counter({np.int64(2): 1}), gamma=np.float64(0.1)),
        "history": defaultdict(list, {np.int64(1): [np.float64(0.25)], "shape": torch.Size([2])}),
        "dtype": torch.float32,
    }
    save_checkpoint(checkpoint_of(detector_state(), **entries), tmp_path / "f.pth")
    loaded = load_checkpoint(tmp_path / "f.pth")
    assert (loaded.epoch, loaded.best, loaded.seconds) == (3, 0.5, 2.0)
    assert {type(loaded.epoch), type(loaded.best)} == {int, float}
    assert loaded.args == {"lr": 0.5, "sizes": [0, 1], "device": "cpu"}
    assert type(loaded.lr_scheduler["milestones"]) is Counter
    assert loaded.extra["history"] == {1: [0.25], "shape": (2,)}
    assert loaded.extra["dtype"] == "torch.float32"


GROUP = {"lr": 1.0, "params": [0]}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [GROUP]}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({}, None),
        ({"lr_scheduler": None}, None),
        ({"optimizer": None}, "no optimizer"),
        ({"optimizer": {}}, "no optimizer"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "no optimizer"),
        ({"optimizer": {"param_groups": [GROUP]}}, "without its moments"),
        ({"optimizer": {**OPTIMIZER, "state": {0: {"exp_avg": torch.tensor([0, float("nan")])}}}},
         "NaN or infinite moments"),
        ({"epoch": None}, "no epoch"),
        ({"epoch": float("nan")}, "no epoch"),
        ({"epoch": "three"}, "no epoch"),
        ({"epoch": -2}, "no epoch"),
        ({"epoch": -1}, None),
    ],
)  # fmt: skip
def test_missing_training_state_is_named(change, missing):
    entries = {"optimizer": OPTIMIZER, "lr_scheduler": {"step_size": 2}, "epoch": 0, **change}
    found = checkpoint_of(detector_state(), **entries).missing_state()
    assert found == missing or missing in found


def test_removed_choice_is_not_adopted():
    stored = {"script": "finetune_main.py", "coco_evaluator": "removed", "num_queries": 6}
    checkpoint = checkpoint_of(detector_state(), args=stored)
    assert "coco_evaluator" not in adopt_settings(
        checkpoint, {"resume": "a.pth"}, "finetune_main.py"
    )


def test_evaluation_of_a_pretext_does_not_adopt_the_dataset():
    stored = {"script": "main.py", "dataset_file": "voc", "voc_path": "voc", "num_queries": 6}
    checkpoint = checkpoint_of(detector_state(), args=stored)
    given = {"resume": "a.pth", "coco_path": "coco"}
    assert adopt_settings(checkpoint, given, "main.py")["dataset_file"] == "voc"
    assert adopt_settings(checkpoint, {**given, "eval": True}, "main.py") == {"num_queries": 6}


def test_find_resume(tmp_path):
    assert resolve_resume_path("", tmp_path) is None
    assert resolve_resume_path("x.pth", None) == "x.pth"
    assert resolve_resume_path("auto", tmp_path) is None
    content = {"model": {"weight": torch.ones(1)}, "args": {"script": "main.py"}}
    save_checkpoint(content, tmp_path / "checkpoint.pth")
    assert resolve_resume_path("auto", tmp_path) == str(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="--output_dir"):
        resolve_resume_path("auto", "")


def test_random_states_survive_saving_and_loading(tmp_path):
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.normal(),
            np.random.rand(),
            torch.rand(2).tolist(),
        )

    draw()
    save_checkpoint({"model": {"w": torch.ones(1)}, "random": get_rng_states()}, tmp_path / "f.pth")
    first = draw()
    draw()
    set_rng_states(load_checkpoint(tmp_path / "f.pth").extra["random"])
    assert draw() == first


# ---------------------------------------------------------------------------------------------------- architecture


def adopted(state, given=None, source="run/file.pth", **stored):
    """Return what a run adopts from a checkpoint with these weights and stored settings."""
    checkpoint = Checkpoint(model=state, args=stored, source=source)
    values, _ = adopt_architecture(checkpoint, given or {})
    return values


@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_architecture_is_adopted_for_flags_not_given(kind):
    stored = {
        "detector": kind,
        "dilation": True,
        "nheads": 4,
        "backbone": "timm:x",
        "position_embedding": "sine_shifted",
        "backbone_norm": "live",
        "lr": 5.0,
    }
    checkpoint = checkpoint_of(detector_state(kind=kind, pre_norm=kind == "detr"), args=stored)
    values, lines = adopt_architecture(checkpoint, {"lr": 1e-4})
    expected = {
        "detector": kind,
        "pre_norm": kind == "detr",
        "enc_layers": 2,
        "dec_layers": 2,
        "hidden_dim": D,
        "dim_feedforward": WIDTH,
        "num_queries": 6,
        "position_embedding": "sine_shifted",
        "dilation": True,
        "nheads": 4,
        "backbone": "timm:x",
        "backbone_norm": "live",
    }
    if kind == "conditional_detr":
        expected["pre_norm"] = False
    assert values == expected
    assert any("--nheads 4" in line and "run/file.pth" in line for line in lines)
    assert adopt_architecture(checkpoint, values) == ({}, [])


def test_mask_head_tells_the_number_of_attention_heads():
    """Its first convolution reads the model width and one attention map per head."""
    state = {f"detr.{key}": value for key, value in detector_state(kind="detr").items()}
    state["mask_head.lay1.weight"] = torch.zeros(D + 4, D + 4, 3, 3)
    values, _ = adopt_architecture(checkpoint_of(state), {}, is_unchanged=True)
    assert values["masks"]
    assert values["nheads"] == 4


def test_flags_of_other_detectors_are_not_adopted():
    """They keep their defaults."""
    stored = {"detector": "detr", "enc_n_points": 4, "dec_n_points": 4}
    values, (line,) = adopt_architecture(
        checkpoint_of(detector_state(kind="detr"), args=stored), {}
    )
    assert "n_points" not in line
    assert not {"enc_n_points", "dec_n_points"} & set(values)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("pre_norm", True),
        ("dec_layers", 3),
        ("detector", "conditional_detr"),
        ("hidden_dim", 256),
        ("nheads", 8),
        ("position_embedding", "learned"),
    ],
)
def test_contradicting_flag_is_an_error(flag, value):
    checkpoint = checkpoint_of(detector_state(), args={"nheads": 4, "position_embedding": "sine"})
    with pytest.raises(UserError) as excinfo:
        adopt_architecture(checkpoint, {flag: value})
    one_line(excinfo, f"--{flag}", "on" if value is True else value, "run/file.pth")


def test_given_num_queries_may_differ():
    values, lines = adopt_architecture(checkpoint_of(detector_state()), {"num_queries": 9})
    assert "num_queries" not in values
    assert any("tiled" in line and "6" in line for line in lines)
    with pytest.raises(UserError, match="--num_queries 9 contradicts"):
        adopt_architecture(checkpoint_of(detector_state()), {"num_queries": 9}, is_unchanged=True)


def test_learned_positional_encoding_is_inferred_from_the_weights():
    assert adopted(detector_state(learned=True))["position_embedding"] == "learned"


@pytest.mark.parametrize(
    ("stored", "extra", "expected"),
    [
        ({"position_embedding": "sine"}, {}, "sine"),
        ({"position_embedding": "sine", "object_embedding_loss": True}, {}, "sine_shifted"),
        ({"position_embedding": "sine"}, {"feature_embed.layers.0.weight": (D, D)}, "sine_shifted"),
        (
            {"position_embedding": "sine", "detector": "detr"},
            {"feature_embed.layers.0.weight": (D, D)},
            "sine",
        ),
        ({}, {}, "sine"),
    ],
)
def test_detreg_calls_its_shifted_encoding_sine(stored, extra, expected):
    state = {**detector_state(), **{key: torch.ones(shape) for key, shape in extra.items()}}
    assert adopted(state, **stored)["position_embedding"] == expected


def test_dc5_without_args_is_inferred_from_the_file_name():
    assert adopted(detector_state(), source="detr-r50-dc5-f0fb7ef5.pth")["dilation"] is True


def test_architecture_of_a_mask_model():
    state = {f"detr.{key}": value for key, value in detector_state(pre_norm=True).items()}
    values = adopted(state)
    assert (values["pre_norm"], values["enc_layers"], values["num_queries"]) == (True, 2, 6)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_are_inferred_from_their_blocks(name):
    import torchvision

    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    assert infer_resnet(state) == name
    prefix = "backbone.0.body."
    assert infer_resnet({prefix + key: value for key, value in state.items()}, prefix) == name


# ---------------------------------------------------------------------------------------------------- loading


def test_load_strict_names_the_first_difference():
    state = detector_state(seed=1)
    model = module_of(detector_state(seed=2))
    load_strict(model, checkpoint_of(state))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for other, words in (
        (detector_state(classes=9), ("class_embed.weight", "[10, 8]", "2 differences")),
        (detector_state(pre_norm=True), ("also has transformer.encoder.norm.weight",)),
    ):
        with pytest.raises(UserError) as excinfo:
            load_strict(model, checkpoint_of(other))
        one_line(excinfo, "run/file.pth", *words)


PARTS = {"patch2query.weight": (D, 3), "feature_align.layers.0.weight": (D, D)}


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_pretext_gives_everything_but_class_head_and_its_own_parameters(kind, published):
    state = detector_state(seed=1, kind=kind, classes=2)
    if published:
        state.update({key: torch.ones(shape) for key, shape in PARTS.items()})
        checkpoint = checkpoint_of(state)
    else:
        checkpoint = checkpoint_of(
            state, args={"pretext": "random_query_patch"}, class_names={1: "cat"}
        )
    model = module_of(detector_state(seed=2, kind=kind, classes=2))
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_pretrained(model, checkpoint, {1: "cat"})
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if "class_embed" in key else state[key]), key
    assert set(report.reinitialized) == {"class_embed.weight", "class_embed.bias"}
    assert set(report.unused) == (set(PARTS) if published else set())
    assert set(report.loaded) | set(report.reinitialized) == set(fresh)
    table = report.table()
    assert table.splitlines()[0].split() == ["module", "loaded", "re-initialized", "unused"]
    assert any(line.split()[0] == "class_embed" for line in table.splitlines())


def test_class_rows_are_matched_by_name():
    old_names, new_names = {0: "cat", 1: "dog", 3: "cow"}, {0: "cow", 1: "pig", 2: "cat"}
    state = detector_state(seed=1, classes=4)
    model = module_of(detector_state(seed=2, classes=3))
    fresh = model.class_embed.weight.detach().clone()
    report = load_pretrained(model, checkpoint_of(state, class_names=old_names), new_names)
    head, old = model.class_embed.weight, state["class_embed.weight"]
    assert torch.equal(head[0], old[3])
    assert torch.equal(head[1], fresh[1])
    assert torch.equal(head[2], old[0])
    assert torch.equal(head[3], old[4]), "no object"
    assert torch.equal(model.class_embed.bias[2], state["class_embed.bias"][0])
    assert report.notes == ["class_embed: 2 of 3 class rows kept by name"]


def test_class_rows_that_the_data_lack_are_noted():
    """A COCO head without class names is loaded whole, also for data with other classes under its ids."""
    state = detector_state(seed=1, classes=91)
    model = module_of(detector_state(seed=2, classes=91))
    report = load_pretrained(model, checkpoint_of(state), {1: "square", 2: "disc", 3: "bar"})
    (note,) = report.notes
    assert "88 of 91 class rows are not classes of the data (such as 'motorcycle')" in note
    assert "--dataset_file custom" in note
    assert load_pretrained(model, checkpoint_of(state), coco.CLASS_NAMES).notes == []


def test_focal_head_has_no_background_row():
    state = detector_state(seed=1, kind="conditional_detr", classes=3)
    model = module_of(detector_state(seed=2, kind="conditional_detr", classes=3))
    fresh = model.class_embed.weight.detach().clone()
    load_pretrained(
        model, checkpoint_of(state, class_names={0: "a", 1: "b", 2: "c"}), {0: "a", 1: "x", 2: "y"}
    )
    assert torch.equal(model.class_embed.weight[0], state["class_embed.weight"][0])
    assert torch.equal(model.class_embed.weight[1:], fresh[1:])


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize(
    ("of_file", "of_model", "kept"),
    [
        ("focal", "focal", True),
        ("focal", "softmax", False),
        ("softmax", "focal", False),
        (None, "focal", False),
        (None, "softmax", True),
    ],
)
def test_class_head_needs_the_same_classification(of_file, of_model, kept, names):
    """Both heads have 5 rows: 5 focal classes, or 4 classes and "no object".

    Without a stored classification, the file has the published one: softmax for DETR.
    """
    classes = {row: f"class {row}" for row in range(5 if of_file == "focal" else 4)}
    state = detector_state(seed=1)
    model = module_of(detector_state(seed=2), of_model)
    fresh = model.class_embed.weight.detach().clone()
    entries = {"class_names": classes} if names else {}
    report = load_pretrained(
        model,
        checkpoint_of(state, args={"classification": of_file} if of_file else None, **entries),
        classes,
    )
    assert torch.equal(model.class_embed.weight, state["class_embed.weight"] if kept else fresh)
    assert ("class_embed.bias" in report.reinitialized) is not kept
    assert (
        any(
            "starts from scratch" in note and "focal" in note and "softmax" in note
            for note in report.notes
        )
        is not kept
    )
    assert torch.equal(model.query_embed.weight, state["query_embed.weight"])


def test_focal_detr_keeps_no_background_row():
    state, model = detector_state(seed=1), module_of(detector_state(seed=2), "focal")
    fresh = model.class_embed.weight.detach().clone()
    checkpoint = checkpoint_of(
        state, args={"classification": "focal"}, class_names={0: "a", 4: "e"}
    )
    load_pretrained(model, checkpoint, {0: "e", 4: "z"})
    assert torch.equal(model.class_embed.weight[0], state["class_embed.weight"][4])
    assert torch.equal(model.class_embed.weight[1:], fresh[1:])


@pytest.mark.parametrize(("classes", "kept"), [(4, True), (7, False)])
def test_head_without_names_is_loaded_if_shapes_are_equal(classes, kept):
    state = detector_state(seed=1, classes=4)
    model = module_of(detector_state(seed=2, classes=classes))
    report = load_pretrained(model, checkpoint_of(state), {0: "cat"})
    assert ("class_embed.weight" in report.loaded) is kept
    assert ("class_embed.weight" in report.reinitialized) is not kept


def test_equal_names_keep_rows_without_a_name_too():
    names = {1: "person", 3: "car"}  # 0 and 2 have no name
    state, model = detector_state(seed=1), module_of(detector_state(seed=2))
    load_pretrained(
        model,
        checkpoint_of(state, class_names={str(row): name for row, name in names.items()}),
        names,
    )
    assert torch.equal(model.class_embed.weight, state["class_embed.weight"])


@pytest.mark.parametrize("queries", [4, 15])
def test_queries_are_tiled_or_truncated(queries):
    state = detector_state(seed=1, queries=6)
    model = module_of(detector_state(seed=2, queries=queries))
    report = load_pretrained(model, checkpoint_of(state), None)
    for i in range(queries):
        assert torch.equal(model.query_embed.weight[i], state["query_embed.weight"][i % 6])
    assert "query_embed" in report.notes[0]


def test_mask_model_loads_into_a_box_model_and_back():
    state = detector_state(seed=1)
    with_masks = {
        **{f"detr.{key}": value for key, value in state.items()},
        "mask_head.lay1.weight": torch.ones(2, 2),
    }
    model = module_of(detector_state(seed=2))
    report = load_pretrained(model, checkpoint_of(with_masks), None)
    assert torch.equal(model.query_embed.weight, state["query_embed.weight"])
    assert list(report.unused) == ["mask_head.lay1.weight"]
    mask_model = module_of(with_masks)
    report = load_pretrained(mask_model, checkpoint_of(detector_state(seed=3)), None)
    assert list(report.reinitialized) == ["mask_head.lay1.weight"]


@pytest.mark.parametrize(
    ("file", "model", "words"),
    [
        (
            detector_state(kind="conditional_detr"),
            detector_state(),
            ("conditional_detr", "--detector conditional_detr"),
        ),
        (
            {"layer1.0.conv1.weight": torch.ones(1), "conv1.weight": torch.ones(1)},
            detector_state(),
            ("--backbone_weights",),
        ),
        ({"some.weight": torch.ones(1)}, detector_state(), ("no detector",)),
        (detector_state(pre_norm=True), detector_state(), ("encoder.norm", "--pre_norm")),
        (detector_state(), detector_state(pre_norm=True), ("encoder.norm", "--pre_norm")),
        (detector_state(layers=3), detector_state(), ("layers.2", "--enc_layers")),
        (
            {**detector_state(), "input_proj.weight": torch.ones(D, 3, 1, 1)},
            detector_state(),
            ("input_proj", "--backbone"),
        ),
    ],
)
def test_mismatch_is_an_error_and_changes_nothing(file, model, words):
    model = module_of(model)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as excinfo:
        load_pretrained(model, checkpoint_of(file), None)
    one_line(excinfo, "run/file.pth", *words)
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())
