"""Settings of the query decoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from mvision.settings import MAX_LAYERS, MAX_OBJECTS, MAX_WIDTH, Replacement, Settings

Points = Annotated[int, Field(gt=0, le=1024)]


class DecoderConfig(Settings):
    """Settings of the query decoder. The defaults are RT-DETR's; what other families have is said below.

    Attributes:
        embed_dim: width of queries and memory.
        num_queries: largest number of objects that can be predicted in an image; may be changed after training.
        num_layers: decoder layers.
        num_heads, ffn_dim, dropout: of every decoder layer.
        num_points: sampled points per attention head and level; one number, or one for each level.
        sampling, offset_scale: see ``DeformableAttention``.
        shared_class_head: one classifier for the tokens and for all layers, and layers that start as the identity, so
            that in the first step the decoder classifies its queries as the tokens were classified. Trains faster from
            random weights; most published weights have one classifier per layer.
        shared_box_head: likewise one MLP for the change of boxes, of the tokens and in all layers (Mask-RT-DETR). For
            ``direct`` boxes alone.
        output_norm: a norm of tokens and queries before they are classified, and before masks (Mask-RT-DETR). The
            selection of tokens and the boxes go without.
        act: activation of the feed-forward networks and of all MLPs: ``relu`` (RT-DETR, D-FINE), ``silu`` (DEIM,
            RT-DETRv4, EdgeCrafter) or ``gelu``.
        input_projection: a convolution on every map of the neck: ``always``, or ``if_needed``, where the map has not
            ``embed_dim`` channels already (D-FINE).
        memory_projection: a linear layer and a norm on the tokens before the selection (EdgeCrafter has none).
        position_mlp: from a reference box to its embedding: ``wide``, two layers of which the first is twice as wide,
            or ``deep``, three (DEIM-RT-DETRv2, EdgeCrafter).
        position_limit: largest absolute value of that embedding (10 in D-FINE); None for no limit.
        position_once: keep the embedding of the selected boxes in all layers instead of that of the layer before
            (EdgeCrafter).
        attention_projections: see ``DeformableAttention`` (D-FINE has none).
        gate: a gate in place of the sum and norm after the deformable attention, see ``Gate`` (D-FINE).
        box_refinement: ``direct``, each layer moves the box of the one before; ``distribution``, see
            ``mvision.heads.query.distribution`` (D-FINE).
        num_bins, bin_scale, bin_reach: see ``bin_values``; an even number of bins. For ``distribution`` alone.
        location_quality: add to the scores what the distributions of the sides say about the quality of the box
            (D-FINE). For ``distribution`` alone.
    """

    embed_dim: int = Field(256, gt=0, le=MAX_WIDTH)
    num_queries: int = Field(300, gt=0, le=MAX_OBJECTS)
    num_layers: int = Field(6, ge=1, le=MAX_LAYERS)
    num_heads: int = Field(8, gt=0, le=MAX_WIDTH)
    ffn_dim: int = Field(1024, gt=0, le=8 * MAX_WIDTH)
    num_points: Points | list[Points] = 4
    dropout: float = Field(0.0, ge=0, lt=1)
    sampling: Literal["default", "discrete"] = "default"
    offset_scale: float = Field(0.5, gt=0)
    shared_class_head: bool = False
    shared_box_head: bool = False
    output_norm: bool = False
    act: Literal["relu", "silu", "gelu"] = "relu"
    input_projection: Literal["always", "if_needed"] = "always"
    memory_projection: bool = True
    position_mlp: Literal["wide", "deep"] = "wide"
    position_limit: float | None = Field(None, gt=0)
    position_once: bool = False
    attention_projections: bool = True
    gate: bool = False
    box_refinement: Literal["direct", "distribution"] = "direct"
    num_bins: int = Field(32, ge=4, le=1024, multiple_of=2)
    bin_scale: float = Field(4.0, gt=0, le=1e4)
    bin_reach: float = Field(0.5, gt=0, le=1e4)
    location_quality: bool = False

    retired = {"learned_queries": [Replacement(False)]}

    @field_validator("box_refinement")
    @classmethod
    def _heads_fit(cls, value: str, info: ValidationInfo) -> str:
        if value == "distribution" and info.data.get("shared_box_head"):
            raise ValueError(
                "distributions of the layers cannot come from the tokens' head: set shared_box_head: false"
            )
        return value

    @field_validator("location_quality")
    @classmethod
    def _has_distributions(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("box_refinement") == "direct":
            raise ValueError("it is estimated from distributions, so it needs box_refinement: distribution")
        return value
