"""Both segmentation heads on a GPU: the same losses and results as on the CPU, and no wait but for the matching."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.test_heads import make_features, make_head, make_targets, total

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
task = pytest.mark.parametrize("task", ["instance-seg", "semantic-seg"])


@pytest.fixture
def debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@task
def test_a_step_does_not_wait(task: str, debug_mode: None) -> None:
    """Waits are errors, but for the copy of the matching costs, which an event ends."""
    head, features, targets = make_head(task).cuda(), [x.cuda() for x in make_features(3)], make_targets(2, 0, 3)
    for mode in ("default", "error"):  # the first step may set up libraries
        torch.cuda.set_sync_debug_mode(mode)
        total(head.loss(head(features, targets=targets), targets)).backward()
    torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())


@task
def test_losses_are_those_of_the_cpu(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.rand(3, 192, 2)
    monkeypatch.setattr("mvision.heads.instance_seg.points._draw_points", lambda boxes, *_: points.to(boxes.device))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head = make_head(task, **({"num_denoising": 0} if task == "instance-seg" else {})).eval()
    targets = make_targets(2, 0, 3)
    expected = head.loss(head(make_features(3), targets=targets), targets)
    found = head.cuda().loss(head([x.cuda() for x in make_features(3)], targets=targets), targets)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-2, atol=1e-3)


@task
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_those_of_the_cpu(task: str, dtype: torch.dtype) -> None:
    head, sizes = make_head(task).eval(), [(480, 640), (31, 17), (480, 640)]
    with torch.no_grad():
        outputs = {name: value.to(dtype) for name, value in head(make_features(3)).items()}
    on_gpu = head.postprocess({name: value.cuda() for name, value in outputs.items()}, sizes, threshold=0.0)
    for found, expected in zip(on_gpu, head.postprocess(outputs, sizes, threshold=0.0)):
        assert found.scores.tolist() == pytest.approx(expected.scores.tolist(), abs=1e-5)
        if dtype == torch.bfloat16 and task == "instance-seg":
            continue  # many scores are equal, and which of the last ones are kept is not defined
        assert sorted(found.labels.tolist()) == sorted(expected.labels.tolist())
        pixels = [np.sort(one.masks.areas) for one in (found, expected)]
        assert pixels[0].tolist() == pytest.approx(pixels[1].tolist(), rel=0.01, abs=3)
