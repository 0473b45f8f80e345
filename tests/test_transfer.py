"""Several tensors between the CPU and a GPU in one copy."""

import pytest
import torch

from mvision.structures import transfer

TENSORS = {
    "labels": torch.tensor([[1, 2], [3, 4]]),
    "valid": torch.tensor([True, False, True]),
    "boxes": torch.rand(3, 4),
    "empty": torch.zeros(0, 4),
    "half": torch.rand(5).to(torch.bfloat16),
    "turned": torch.rand(3, 2).T,
    "number": torch.tensor(2.5, dtype=torch.float64),
}


def test_cpu_tensors_are_given_as_they_are() -> None:
    for moved in (transfer.to_device(TENSORS, "cpu"), transfer.to_host(TENSORS)):
        assert moved.keys() == TENSORS.keys()
        assert all(moved[name].data_ptr() == tensor.data_ptr() for name, tensor in TENSORS.items())


def test_results_have_no_gradient() -> None:
    assert not transfer.to_host({"x": torch.ones(2, requires_grad=True)})["x"].requires_grad


def test_parts_of_a_block_hold_every_type_and_shape() -> None:
    starts, total = transfer._places(TENSORS)
    block = torch.empty(total, dtype=torch.uint8)
    for name, tensor in TENSORS.items():
        transfer._part(block, starts[name], tensor).copy_(tensor)
    for name, tensor in TENSORS.items():
        part = transfer._part(block, starts[name], tensor)
        assert part.dtype == tensor.dtype
        assert torch.equal(part, tensor)
        assert starts[name] % transfer.ALIGNMENT == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_there_and_back() -> None:
    moved = transfer.to_device(TENSORS, "cuda")
    back = transfer.to_host(moved)
    for name, tensor in TENSORS.items():
        assert moved[name].device.type == "cuda"
        assert back[name].device.type == "cpu"
        assert torch.equal(back[name], tensor)
