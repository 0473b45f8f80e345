"""A reference model and ours: the differences of maps, predictions, losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.models.rt_detr.modeling_rt_detr as reference_v1
import transformers.models.rt_detr_v2.modeling_rt_detr_v2 as reference_v2
from torch import Tensor, nn

import mvision.heads.query.head
from mvision import Model, load
from mvision.heads.query.denoising import Denoising
from mvision.heads.query.matching import PaddedTargets
from mvision.structures import Targets
from mvision.structures.boxes import inverse_sigmoid
from mvision.weights.rtdetr import mvision_name
from tests.reference import as_labels, build_reference, same_order, save_reference


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
    """A model of ``tests.reference.MODELS`` with these settings, and ours as loaded from where it was saved."""
    theirs = build_reference(name, **settings)
    return Pair(theirs, load(save_reference(theirs, folder)))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute one between tensors in which there is something to compare."""
    assert a.shape == b.shape
    assert a.std() > 0.05
    return float((a - b).abs().max())


@torch.no_grad()
def differences(pair: Pair, images: Tensor) -> dict[str, float]:
    """Largest absolute differences: the maps of the backbone, of the neck (of the same maps), logits and boxes."""
    maps, theirs = reference_maps(pair.theirs, images)
    ours = pair.ours(images)["detection"]
    ordered = same_order(theirs.logits, theirs.pred_boxes, ours["logits"], ours["boxes"])
    found, fused = pair.ours.backbone(images), pair.ours.neck(maps)
    return {
        "backbone": max(difference(a, b) for a, b in zip(maps, found)),
        "neck": max(difference(a, b) for a, b in zip(theirs.encoder_last_hidden_state, fused)),
        "logits": difference(theirs.logits, ordered[0]),
        "boxes": difference(theirs.pred_boxes, ordered[1]),
    }


@torch.no_grad()
def reference_maps(theirs: nn.Module, images: Tensor) -> tuple[list[Tensor], Any]:
    """The maps of the reference's backbone, and all that it gives."""
    seen: list[Tensor] = []
    hook = theirs.model.backbone.register_forward_hook(lambda _, __, maps: seen.extend(map for map, _ in maps))
    output = theirs(images)
    hook.remove()
    return seen, output


@dataclass
class Step:
    """Loss terms and gradients of one training step of both, by our names; only what both have."""

    terms: dict[str, Tensor]
    reference_terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    reference_gradients: dict[str, Tensor]


def training_step(pair: Pair, images: Tensor, targets: list[Targets]) -> Step:
    """Forward and backward in training, with the same denoising queries; both models are left as they were."""
    ours, theirs = copy.deepcopy(pair.ours).train(), pair.theirs.train()
    ours.backbone.eval()  # the reference's norms there are frozen
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    with _same_denoising():
        terms = ours.loss(ours(images, targets), targets)
        found = theirs(images, labels=as_labels(targets))
    sum(terms.values()).backward()
    found.loss.backward()
    other = {mvision_name(name): value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    own = {name: value.grad for name, value in ours.named_parameters() if name in other}
    theirs.zero_grad()
    theirs.load_state_dict(before)
    theirs.eval()
    names = term_names(len(theirs.model.decoder.layers))
    assert set(names.values()) == set(found.loss_dict)
    reference_terms = {f"detection/{name}": found.loss_dict[key] for name, key in names.items()}
    return Step(terms, reference_terms, own, other)


def term_names(layers: int) -> dict[str, str]:
    """The library's names of the loss terms by ours."""
    places = {"": "", "_encoder": f"_aux_{layers - 1}"}
    places |= {f"_{index}": f"_aux_{index}" for index in range(layers - 1)}
    places |= {f"_denoising_{index}": f"_dn_{index}" for index in range(layers)}
    terms = {"class": "loss_vfl", "box": "loss_bbox", "giou": "loss_giou"}
    return {term + place: terms[term] + theirs for term in terms for place, theirs in places.items()}


def denoising_positives(padded: PaddedTargets) -> list[torch.Tensor]:
    """The positive denoising queries of every image, as the library wants them."""
    first = padded.denoising.host[padded.denoising.host[:, 0] == 0]
    return [torch.from_numpy(first[first[:, 1] == image, 2]) for image in range(len(padded.counts))]


@contextmanager
def _same_denoising() -> Iterator[None]:
    """The reference gets the denoising queries that our model has just made."""
    made: list[tuple[PaddedTargets, Denoising]] = []
    make = mvision.heads.query.head.make_denoising

    def record(*arguments: Any) -> Denoising | None:
        noise = make(*arguments)
        made.append((arguments[0], noise))
        return noise

    def replay(targets: Any, num_classes: int, num_queries: int, class_embed: Any, **_: Any) -> tuple[Any, ...]:
        padded, noise = made[-1]
        dtype = class_embed.weight.dtype
        mask = torch.zeros(noise.mask.shape, dtype=dtype).masked_fill(~noise.mask, -torch.inf)
        meta = {
            "dn_positive_idx": denoising_positives(padded),
            "dn_num_group": padded.groups,
            "dn_num_split": [noise.labels.shape[1], num_queries],
        }
        return class_embed(noise.labels), inverse_sigmoid(noise.boxes.to(dtype)), mask, meta

    name = "get_contrastive_denoising_training_group"
    with (
        mock.patch.object(mvision.heads.query.head, "make_denoising", record),
        mock.patch.object(reference_v1, name, replay),
        mock.patch.object(reference_v2, name, replay),
    ):
        yield
    assert made
