"""The training run: what it leaves, resuming, data without objects, divergence, several processes."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from mvision.commands.train import run_config
from mvision.config import load_config
from mvision.engine.optim import Ema, build_optimizer, set_learning_rate
from mvision.engine.train import train
from mvision.errors import UserError
from mvision.model import create_model
from mvision.storage.run_folder import RunFolder
from mvision.weights import load
from tests.conftest import write_squares

FAST = {
    "train.batch_size": 2,
    "train.val_interval": 1,
    "train.warmup_steps": 2,
    "train.precision": "fp32",
    "data.workers": 0,
    "model.image_size": 64,
    "model.neck.embed_dim": 32,
    "model.heads.detection": {
        "embed_dim": 32,
        "num_queries": 10,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 32,
        "num_denoising": 4,
        "dense_weight": 1.0,
    },
}


MASKS = {
    **{key: value for key, value in FAST.items() if key != "model.heads.detection"},
    "model.heads.instance-seg": {
        **FAST["model.heads.detection"],
        "pixel_dim": 16,
        "mask_dim": 8,
        "mask_points": 64,
    },
}


def fast_config(data, **more):
    overrides = {**FAST, "data.root": str(data), **{key.replace("__", "."): value for key, value in more.items()}}
    return load_config("tiny", overrides=overrides)


def run_in_process(data, output, **more):
    return train(fast_config(data, **more), output=output, device="cpu")


def steps_of(run):
    return RunFolder(run).records()


def test_a_run_leaves_everything_it_promises(squares, tmp_path, capsys):
    run = run_in_process(squares, tmp_path / "run", train__epochs=2)
    expected = {"best.safetensors", "last", "config.yaml", "metrics.jsonl", "results.png", "predictions.jpg"}
    assert {path.name for path in run.iterdir()} == expected | {"metrics.json"}
    figures = json.loads((run / "metrics.json").read_text())
    assert {"AP", "AP50", "AP/blue", "AP/red"} <= set(figures["detection"])
    records = steps_of(run)
    assert [record["step"] for record in records] == [2, 4]
    assert figures["detection"] == max((r["metrics"]["detection"] for r in records), key=lambda m: m["AP"])
    assert cv2.imread(str(run / "predictions.jpg")) is not None
    assert cv2.imread(str(run / "results.png")) is not None
    model = load(run)
    assert model.categories[1].name == "red"
    assert "Average Precision" in capsys.readouterr().out


def test_masks_are_trained_evaluated_and_predicted(squares, tmp_path, capsys):
    from mvision.commands.predict import predict_job
    from mvision.commands.val import validate

    overrides = {**MASKS, "data.root": str(squares), "train.epochs": 2}
    config = load_config("tiny", tasks=["instance-seg"], overrides=overrides)
    run = train(config, output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())["instance-seg"]
    assert {"AP", "AP50", "AP_small", "AR100", "AP/blue", "bbox/AP", "bbox/AP75", "bbox/AP/red"} <= set(figures)
    printed = capsys.readouterr().out
    assert "instance-seg, segm\n" in printed
    assert "instance-seg, bbox\n" in printed
    assert {"instance-seg/decoder_mask", "instance-seg/denoising_dice"} <= set(steps_of(run)[0]["loss"])
    assert cv2.imread(str(run / "predictions.jpg")) is not None
    assert "instance-seg, segm" in validate(str(run), output=tmp_path / "val", device="cpu", workers=0)
    assert json.loads((tmp_path / "val" / "metrics.json").read_text())["instance-seg"] == figures

    summary = predict_job(
        tasks=["instance-seg"], weights=str(run), threshold=0, output=tmp_path / "found", device="cpu"
    )
    assert summary.images == 4
    entries = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert {tuple(entry["segmentation"]["size"]) for entry in entries} == {(64, 64)}
    assert cv2.imread(str(tmp_path / "found" / "val_0.jpg")).shape == (64, 64, 3)


def test_masks_start_from_detection(squares, tmp_path, capsys):
    from mvision.commands.train import run_config

    detection = run_in_process(squares, tmp_path / "detection", train__epochs=1)
    options = {"data.root": str(squares), "data.workers": 0, "train.epochs": 1, "train.precision": "fp32"}
    config = run_config(tasks=["instance-seg"], init=str(detection), options=options)
    head = config.model.heads["instance-seg"]
    assert (head.num_queries, head.ffn_dim, head.dense_weight) == (10, 32, 1.0)  # the decoder is the detector's
    train(config, output=tmp_path / "masks", init=str(detection), device="cpu")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights ")]
    assert "backbone taken; neck taken; head instance-seg 5" in line
    assert "(new: mask_embed, pixels)" in line


def test_training_learns(squares, tmp_path):
    run = run_in_process(squares, tmp_path / "run", train__epochs=30, train__val_interval=30)
    records = steps_of(run)
    first, last = (sum(records[index]["loss"].values()) for index in (0, -1))
    assert last < 0.85 * first


def test_a_resumed_run_equals_the_uninterrupted_one(squares, tmp_path):
    whole = run_in_process(squares, tmp_path / "whole", train__epochs=3)

    class Stop(Exception):
        pass

    import mvision.engine.train as module

    original, seen = module.train_epoch, []

    def stop_in_the_third_epoch(trainer, loader, epoch):
        seen.append(epoch)
        if epoch == 2:
            raise Stop
        return original(trainer, loader, epoch)

    module.train_epoch = stop_in_the_third_epoch
    try:
        with pytest.raises(Stop):
            run_in_process(squares, tmp_path / "killed", train__epochs=3)
    finally:
        module.train_epoch = original
    assert seen == [0, 1, 2]
    torch.manual_seed(12345)  # another process would start with another state
    resumed = train(load_config(file=tmp_path / "killed" / "config.yaml"), resume=tmp_path / "killed", device="cpu")

    def without_time(run):
        return [{key: value for key, value in record.items() if key != "seconds"} for record in steps_of(run)]

    assert without_time(resumed) == without_time(whole)
    first, second = load(whole).state_dict(), load(resumed).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_epoch_without_objects_trains(tmp_path, precision):
    data = write_squares(tmp_path / "empty", images=3, objects=0)
    kept = write_squares(tmp_path / "kept", images=3, objects=1)
    # At least one label is needed for there to be anything to learn at all: it is in the last image alone.
    content = json.loads((kept / "annotations" / "train.json").read_text())
    content["annotations"] = content["annotations"][-1:]
    (data / "annotations" / "train.json").write_text(json.dumps(content))
    run = run_in_process(
        data, tmp_path / "run", train__epochs=2, train__batch_size=1, train__precision=precision, data__augment__crop=0
    )
    for record in steps_of(run):
        assert all(np.isfinite(value) for value in record["loss"].values())
    assert all(value.isfinite().all() for value in load(run).state_dict().values() if value.is_floating_point())


def test_a_damaged_image_is_named_and_left_out(squares, tmp_path, capsys):
    (squares / "images" / "train_1.jpg").write_bytes(b"no picture")
    run = run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert (run / "best.safetensors").is_file()
    printed = capsys.readouterr()
    assert "train_1.jpg" in printed.out + printed.err


def test_divergence_ends_with_one_clear_line(squares, tmp_path, monkeypatch):
    monkeypatch.setattr("mvision.engine.train.MAX_BAD_STEPS", 2)
    monkeypatch.setattr("mvision.model.Model.loss", lambda self, outputs, targets: {"detection/class": _nan(outputs)})
    with pytest.raises(UserError, match=r"diverged: no finite gradient in 2 steps.*lr"):
        run_in_process(squares, tmp_path / "run", train__epochs=1)
    assert not (tmp_path / "run" / "best.safetensors").exists()


def _nan(outputs):
    return outputs["detection"]["logits"].sum() * float("nan")


def test_early_stop(squares, tmp_path, monkeypatch):
    figures = iter([0.5, 0.4, 0.3, 0.2, 0.5])
    monkeypatch.setattr("mvision.engine.train.evaluate_all", lambda *args, **kwargs: {"detection": _ap(next(figures))})
    run = run_in_process(squares, tmp_path / "run", train__epochs=9, train__patience=3)
    assert len(steps_of(run)) == 4


def _ap(value):
    return {"AP": value, "AP50": value}


def test_frozen_parts_stay_as_they_were(squares, tmp_path):
    config = fast_config(squares, train__epochs=1, train__freeze=["backbone"], train__ema_decay=0)
    torch.manual_seed(config.train.seed)
    run = train(config, output=tmp_path / "run", device="cpu")
    from accelerate.utils import set_seed

    set_seed(config.train.seed)
    from mvision.model import Model

    fresh, trained = Model(config.model).state_dict(), load(run).state_dict()
    assert all(torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("backbone."))
    assert any(not torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("neck."))


def test_init_takes_the_weights_of_another_run(squares, tmp_path, capsys):
    first = run_in_process(squares, tmp_path / "first", train__epochs=1)
    config = fast_config(squares, train__epochs=1, train__lr=1e-9, train__ema_decay=0)
    second = train(config, output=tmp_path / "second", init=str(first), device="cpu")
    before, after = load(first).state_dict(), load(second).state_dict()
    weight = "neck.projections.0.conv.weight"
    torch.testing.assert_close(before[weight], after[weight], atol=1e-6, rtol=0)


def add_corners(root):
    """Red squares get their corners as keypoints, blue ones their centre; every third square is not labelled."""
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["categories"][0] |= {"keypoints": ["centre"]}
        content["categories"][1] |= {
            "keypoints": ["left_top", "right_top", "left_end", "right_end"],
            "sigmas": [0.1] * 4,
        }
        for number, entry in enumerate(content["annotations"]):
            x, y, side, _ = entry["bbox"]
            corners = [(x + i * side, y + j * side) for j in (0, 1) for i in (0, 1)]
            points = [(x + side / 2, y + side / 2)] if entry["category_id"] == 2 else corners
            visible = 2 * bool(number % 3)
            entry["keypoints"] = [value for point in points for value in (*point, visible)]
        file.write_text(json.dumps(content))


def test_keypoints_start_from_a_detection_run(squares, tmp_path, capsys):
    """Two classes with different numbers of points, through training, evaluation, pictures and prediction."""
    add_corners(squares)
    first = run_in_process(squares, tmp_path / "first", train__epochs=1)
    options = {
        "train.epochs": 2,
        "train.warmup_steps": 2,
        "train.batch_size": 2,
        "train.val_interval": 2,
        "train.precision": "fp32",
        "data.workers": 0,
        "data.root": str(squares),
        "model.heads.keypoints.embed_dim": 16,
    }
    config = run_config(tasks=["keypoints"], init=str(first), options=options)
    assert config.model.neck.embed_dim == 32
    run = train(config, output=tmp_path / "second", init=str(first), device="cpu")
    assert "backbone taken; neck taken; head keypoints new" in capsys.readouterr().out
    figures = json.loads((run / "metrics.json").read_text())["keypoints"]
    assert {"AP", "AP50", "AR", "AP/blue", "AP/red", "bbox/AP"} <= set(figures)
    assert {"keypoints/one_oks", "keypoints/many_class"} <= set(steps_of(run)[0]["loss"])
    assert cv2.imread(str(run / "predictions.jpg")) is not None
    model = load(run)
    assert [category.sigmas for category in model.categories] == [[], [0.1] * 4]
    (found,) = model.predict(str(squares / "images" / "val_0.jpg"), threshold=0.0)
    assert found.keypoints.shape == (len(found), 4, 3)
    found.draw(np.zeros((*found.size, 3), np.uint8))


def test_very_many_points_and_very_many_instances(tmp_path):
    """One point and 133, sixty objects in one image and none in the next: trained, evaluated and drawn."""
    root = write_squares(tmp_path / "data", images=2, objects=60, size=256)
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] == 1]
        assert len(content["annotations"]) == 60
        for category, count in zip(content["categories"], (1, 133)):
            category["keypoints"] = [f"point {index}" for index in range(count)]
        for entry in content["annotations"]:
            x, y, side, _ = entry["bbox"]
            count = 1 if entry["category_id"] == 2 else 133
            entry["keypoints"] = [v for i in range(count) for v in (x + side * i / count, y + side / 2, 2)]
        file.write_text(json.dumps(content))
    options = {key: value for key, value in FAST.items() if key != "model.heads.detection"}
    head = {"embed_dim": 16, "pixel_dim": 16, "map_dim": 8, "num_instances": 100}
    options |= {"train.epochs": 1, "data.root": str(root), "model.image_size": 128, "model.heads.keypoints": head}
    run = train(load_config("tiny", tasks=["keypoints"], overrides=options), output=tmp_path / "run", device="cpu")
    figures = json.loads((run / "metrics.json").read_text())["keypoints"]
    assert figures["AP/blue"] >= 0
    assert figures["AP/red"] >= 0
    crowded, empty = load(run).predict([str(root / "images" / f"val_{i}.jpg") for i in (0, 1)], threshold=0.0)
    for found in (crowded, empty):
        assert found.keypoints.shape == (100, 133, 3)
        assert found.draw(np.zeros((*found.size, 3), np.uint8)).any()
    assert crowded.filter(np.arange(0)).draw(np.zeros((256, 256, 3), np.uint8)).max() == 0


def test_an_output_folder_in_use_is_refused(squares, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*not empty"):
        run_in_process(squares, tmp_path / "run", train__epochs=1)


def test_resuming_a_folder_without_state_is_refused(tmp_path):
    with pytest.raises(UserError, match="no saved state"):
        RunFolder.resume(tmp_path)


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(RunFolder.create(None, ["detection"]).path) == "runs/detection/1"
    assert str(RunFolder.create(None, ["detection"]).path) == "runs/detection/2"


def test_the_state_survives_a_kill_between_the_two_renames(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / ".last.old").mkdir()
    (tmp_path / ".last.old" / "progress.json").write_text("{}")
    assert (run.state() / "progress.json").is_file()


def test_two_processes_train_and_agree_on_the_figures(squares, tmp_path):
    """Gloo on CPU: one run folder, and the figures that one process measures for its weights; objects in one image."""
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom mvision.config import load_config\n"
        "from mvision.engine.train import train\n"
        "if __name__ == '__main__':\n"
        "    train(load_config(file=sys.argv[1]), output=Path(sys.argv[2]), device='cpu')\n"
    )
    content = json.loads((squares / "annotations" / "train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    (squares / "annotations" / "train.json").write_text(json.dumps(content))
    config = tmp_path / "config.yaml"
    config.write_text(fast_config(squares, train__epochs=2).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(script), str(config), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    from mvision.commands.val import validate

    validate(str(tmp_path / "run"), data=str(squares), output=tmp_path / "val", device="cpu")
    one = json.loads((tmp_path / "val" / "metrics.json").read_text())
    two = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert one == two


def test_learning_rate_warms_up_and_falls(squares):
    config = fast_config(squares, train__warmup_steps=4, train__final_lr=0.1, train__lr=1e-3).train
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, config.model_copy(update={"backbone_lr": 1e-4}))
    factors = [set_learning_rate(optimizer, config, step, 24) for step in range(25)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == pytest.approx(1.0)
    assert factors[14] == pytest.approx(0.55)
    assert factors[24] == pytest.approx(0.1)
    rates = {group["peak_lr"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({1e-3: 1e-4, 1e-4: 1e-5})


def test_norms_biases_and_embeddings_are_not_decayed(squares):
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, fast_config(squares, train__weight_decay=0.05).train)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    assert plain | decayed == set(names.values())
    assert "heads.detection.decoder.label_embed.weight" in plain
    assert all(not name.endswith("bias") for name in decayed)


def test_muon_takes_the_matrices_and_leaves_the_rest_to_adamw(squares):
    model = create_model("tiny", num_classes=2)
    optimizer = build_optimizer(model, fast_config(squares, train__optimizer="muon", train__weight_decay=0.05).train)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for g in optimizer.param_groups if g["use_muon"] for p in g["params"]}
    assert {names[id(p)] for g in optimizer.param_groups for p in g["params"]} == set(names.values())
    projection = "heads.detection.decoder.layers.0.self_attention.q_proj.weight"
    assert {"neck.projections.0.conv.weight", projection} <= matrices
    assert not any(name.endswith("bias") or "norm" in name or "embed" in name.split(".")[-2] for name in matrices)
    assert "heads.detection.decoder.memory_class.weight" not in matrices  # two rows: as many as classes
    weight = model.get_parameter(projection)
    before = weight.detach().clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad = noise * torch.logspace(0, -1, weight.shape[1])
    optimizer.step()
    step = ((weight - before) / optimizer.param_groups[0]["lr"]).flatten(1)
    # An orthogonalised step moves all directions nearly alike, whatever the gradient's spectrum: three Newton-Schulz
    # steps bring the upper half of the singular values within a factor of two.
    gradient, moved = (torch.linalg.svdvals(matrix) for matrix in (weight.grad, step))
    assert gradient.max() / gradient.median() > 4
    assert moved.max() / moved.median() < 2


def test_the_average_follows_quickly_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.9, warmup=10)
    torch.nn.init.ones_(model.weight)
    ema.update(model, step=0)
    assert ema.module.weight.item() == pytest.approx(1 - 0.9 * (1 - np.exp(-0.1)), abs=1e-5)
    assert ema.get_decay(1000) == pytest.approx(0.9)
