"""The published architectures give the reference implementation's numbers: maps, predictions, losses, gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers.models.rt_detr.modeling_rt_detr as reference_v1
import transformers.models.rt_detr_v2.modeling_rt_detr_v2 as reference_v2
from transformers.loss.loss_rt_detr import RTDetrLoss

import mvision.heads.detection
from mvision import Model, load
from mvision.boxes import inverse_sigmoid
from mvision.denoising import Denoising
from mvision.published import our_name
from tests.reference import as_labels, build_reference, random_images, random_targets, same_order, save_reference

SIZE = (96, 64)
CLASSES = 7
MODELS = ["r18", "r34", "r50", "r101", "v2_r18", "v2_r50"]


@dataclass
class Pair:
    """A reference model and ours, loaded from what the reference saved."""

    theirs: nn.Module
    ours: Model

    def to(self, dtype: torch.dtype) -> Pair:
        self.theirs.to(dtype)
        self.ours.to(dtype)
        return self


def make_pair(folder: Path, name: str, **settings: Any) -> Pair:
    theirs = build_reference(name, **{"num_labels": CLASSES, "num_queries": 60, "num_denoising": 20, **settings})
    return Pair(theirs, load(save_reference(theirs, folder)))


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=["r18", "v2_r18"])
def small_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param).to(torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.std() > 0.05, "nothing to compare"
    return float((a - b).abs().max())


@torch.no_grad()
def differences(pair: Pair, images: Tensor) -> dict[str, float]:
    """Largest absolute differences of everything on the way."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        pair.ours.backbone.register_forward_hook(lambda _, __, maps: seen.update(backbone=list(maps))),
        pair.ours.neck.register_forward_hook(lambda _, __, maps: seen.update(neck=list(maps))),
        pair.theirs.model.backbone.register_forward_hook(
            lambda _, __, maps: seen.update(maps=[map for map, _ in maps])
        ),
    ]
    ours, theirs = pair.ours(images)["detection"], pair.theirs(images)
    for hook in hooks:
        hook.remove()
    ordered = same_order(theirs.logits, theirs.pred_boxes, ours["logits"], ours["boxes"])
    return {
        "backbone": max(difference(a, b) for a, b in zip(seen["maps"], seen["backbone"])),
        "neck": max(difference(a, b) for a, b in zip(theirs.encoder_last_hidden_state, seen["neck"])),
        "logits": difference(theirs.logits, ordered[0]),
        "boxes": difference(theirs.pred_boxes, ordered[1]),
    }


def test_same_numbers(pair: Pair) -> None:
    exact = differences(pair.to(torch.float64), random_images(2, *SIZE, dtype=torch.float64))
    assert max(exact.values()) <= 1e-9, exact
    single = differences(pair.to(torch.float32), random_images(2, *SIZE))
    # Maps of dozens of random layers reach 10 and more: for them it is relative.
    assert max(single["logits"], single["boxes"]) <= 1e-4, single
    assert max(single["backbone"], single["neck"]) <= 1e-3, single


def test_same_numbers_after_fusing(small_pair: Pair, tmp_path: Path) -> None:
    images = random_images(1, *SIZE, dtype=torch.float64)
    fused = load(save_reference(small_pair.theirs, tmp_path)).double().fuse()
    found = differences(Pair(small_pair.theirs, fused), images)
    assert max(found.values()) <= 1e-9, found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("v2_r18", {"decoder_method": "discrete"}),
        ("v2_r18", {"decoder_offset_scale": 0.3}),
        ("r18", {"encode_proj_layers": [1, 2], "encoder_layers": 2}),
        ("r18", {"num_queries": 300, "decoder_n_points": 3, "decoder_attention_heads": 4}),
    ],
)
def test_other_settings(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    pair = make_pair(tmp_path, name, **settings).to(torch.float64)
    found = differences(pair, random_images(1, 160, 128, dtype=torch.float64))
    assert max(found.values()) <= 1e-9, found


def term_names(layers: int) -> dict[str, str]:
    """The library's names of the loss terms by ours."""
    places = {"": "", "_encoder": f"_aux_{layers - 1}"}
    places |= {f"_{index}": f"_aux_{index}" for index in range(layers - 1)}
    places |= {f"_denoising_{index}": f"_dn_{index}" for index in range(layers)}
    terms = {"class": "loss_vfl", "box": "loss_bbox", "giou": "loss_giou"}
    return {term + place: terms[term] + theirs for term in terms for place, theirs in places.items()}


def assert_same_terms(ours: dict[str, Tensor], theirs: dict[str, Tensor], layers: int) -> None:
    names = term_names(layers)
    assert {f"detection/{name}" for name in names} == set(ours)
    assert set(names.values()) == set(theirs)
    for name, other in names.items():
        value = ours[f"detection/{name}"].item()
        assert value > 0
        assert abs(value - theirs[other].item()) <= 1e-9 * max(1.0, value), name


def test_every_loss_term(small_pair: Pair) -> None:
    """The criterion alone, on the same predictions, with an image that has no object."""
    torch.manual_seed(0)
    targets = random_targets([4, 0, 7], CLASSES)
    ours = copy.deepcopy(small_pair.ours).train()
    outputs = ours(random_images(3, *SIZE, dtype=torch.float64), targets)
    found = outputs["detection"]
    layers = [{"logits": a, "pred_boxes": b} for a, b in zip(found["layer_logits"], found["layer_boxes"])]
    encoder = {"logits": found["encoder_logits"], "pred_boxes": found["encoder_boxes"]}
    noisy = zip(found["denoising_logits"], found["denoising_boxes"])
    theirs = RTDetrLoss(small_pair.theirs.config)(
        {
            **layers[-1],
            "auxiliary_outputs": [*layers[:-1], encoder],
            "dn_auxiliary_outputs": [{"logits": a, "pred_boxes": b} for a, b in noisy],
            "denoising_meta_values": {
                "dn_positive_idx": [row.nonzero()[:, 0] for row in found["denoising_assigned"] >= 0],
                "dn_num_group": int(found["denoising_groups"]),
            },
        },
        as_labels(targets),
    )
    assert_same_terms(ours.loss(outputs, targets), theirs, len(layers))


@pytest.fixture
def same_denoising(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference gets the denoising queries that our model has just made."""
    made: list[Denoising] = []
    make = mvision.heads.detection.make_denoising

    def recording(*arguments: Any) -> Denoising | None:
        made.append(make(*arguments))
        return made[-1]

    def replay(targets: Any, num_classes: int, num_queries: int, class_embed: Any, **_: Any) -> tuple[Any, ...]:
        noise = made[-1]
        mask = torch.zeros(noise.mask.shape, dtype=torch.float64).masked_fill(~noise.mask, -torch.inf)
        meta = {
            "dn_positive_idx": [row.nonzero()[:, 0] for row in noise.assigned >= 0],
            "dn_num_group": noise.groups,
            "dn_num_split": [noise.labels.shape[1], num_queries],
        }
        return class_embed(noise.labels), inverse_sigmoid(noise.boxes.double()), mask, meta

    monkeypatch.setattr(mvision.heads.detection, "make_denoising", recording)
    for module in (reference_v1, reference_v2):
        monkeypatch.setattr(module, "get_contrastive_denoising_training_group", replay)
    yield
    assert made


@pytest.mark.usefixtures("same_denoising")
def test_training_step_and_gradients(small_pair: Pair) -> None:
    """Losses of a whole forward pass in training, and the gradient of every parameter that both have."""
    torch.manual_seed(0)
    targets = random_targets([5, 2], CLASSES)
    images = random_images(2, *SIZE, dtype=torch.float64)
    ours, theirs = copy.deepcopy(small_pair.ours).train(), small_pair.theirs.train()
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours.backbone.eval()  # the reference's norms there are frozen
    terms = ours.loss(ours(images, targets), targets)
    other = theirs(images, labels=as_labels(targets))
    assert_same_terms(terms, other.loss_dict, len(small_pair.theirs.model.decoder.layers))

    sum(terms.values()).backward()
    other.loss.backward()
    gradients = {our_name(name): value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    compared = 0
    for name, value in ours.named_parameters():
        if name in gradients:
            assert value.grad is not None, name
            assert (value.grad - gradients[name]).abs().max() <= 1e-9 * max(1.0, float(gradients[name].abs().max())), (
                name
            )
            compared += 1
    assert compared == len(gradients)
    theirs.zero_grad()
    theirs.load_state_dict(before)
    theirs.eval()
