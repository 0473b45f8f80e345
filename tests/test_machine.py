"""What the machine can do, and what is done about it."""

import pytest
import timm
import torch

from mvision.errors import UserError
from mvision.machine import channels_last_is_safe, resolve_device, resolve_precision


def test_an_unusable_device_is_one_line():
    with pytest.raises(UserError, match="--device banana: not usable here") as caught:
        resolve_device("banana")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line():
    with pytest.raises(UserError, match="--device cuda: not usable here"):
        resolve_device("cuda")


def test_precision_is_kept_where_it_was_chosen(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_precision("bf16", cpu) == "bf16"
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("mvision.machine.cpu_has_bf16", lambda has=has: has)
        assert resolve_precision("auto", cpu) == expected


def test_networks_that_crash_in_channels_last_are_known():
    assert not channels_last_is_safe(timm.create_model("repvgg_a0"), torch.device("cpu"))
    assert channels_last_is_safe(timm.create_model("repvgg_a0"), torch.device("cuda"))
    assert channels_last_is_safe(timm.create_model("resnet18d"), torch.device("cpu"))
