"""Two hundred cases of ``docs/scripts/fuzz.py``: hostile data sets, configs, weights and options end with one line.

Here are the kinds that take milliseconds, in this process. The script has all of them, each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from mvision.config import load_config
from mvision.model import Model
from mvision.structures import Category
from mvision.weights import save_weights

SCRIPTS = Path(__file__).resolve().parent.parent / "docs" / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")  # which the script sets: here they are put back afterwards
        yield


@pytest.fixture(scope="module")
def base(scripts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound inputs that need no training."""
    import fuzz_files

    base = tmp_path_factory.mktemp("base")
    fuzz_files.write_coco(base / "coco")
    for form in ("box", "polygon", "pose"):
        fuzz_files.write_yolo(base / f"yolo-{form}", form)
    config = load_config(overrides=fuzz_files.SMALL).model
    config.categories = [Category(id=1, name="blue"), Category(id=2, name="red")]
    save_weights(Model(config), base / "run" / "best.safetensors")
    return base


@pytest.mark.parametrize(
    ("kind", "count"), [("coco", 65), ("yolo", 50), ("config", 35), ("options", 35), ("weights", 15)]
)
def test_hostile_input(
    kind: str,
    count: int,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Only the first command of a case, which is the quickest, and no training: there is no data for one."""
    import fuzz

    wrong = []
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        case = fuzz.KINDS[kind](Random(f"tests:{number}"), base, folder)
        if kind in ("config", "options"):
            (folder / "data").unlink()
        arguments = case.commands[0]
        try:
            code: int | str = fuzz.run_command(arguments)
        except Exception as error:  # noqa: BLE001 - whatever leaves the command line is what is looked for
            code = f"{type(error).__name__}: {error}"
        captured = capfd.readouterr()
        wrong += [f"{number}: {case.what}: {fault}" for fault in fuzz.faults(code, captured.out, captured.err)]
        wrong += [f"{number}: {case.what}: code was run" for _ in folder.rglob("ran")]
    assert wrong == []


def test_a_case_is_a_function_of_its_number(base: Path, tmp_path: Path) -> None:
    import fuzz

    for kind, function in fuzz.KINDS.items():
        if kind in ("pictures", "exports", "runs"):
            continue  # they start from files that only the script makes
        places = [tmp_path / f"{kind}{copy}" for copy in "ab"]
        for place in places:
            place.mkdir()
        first, second = (function(Random("0:7"), base, place) for place in places)
        assert first == second
        names = [sorted(str(path.relative_to(place)) for path in place.rglob("*")) for place in places]
        assert names[0] == names[1]


def test_what_counts_as_a_failure(scripts: None) -> None:
    import fuzz

    assert fuzz.faults(0, "done\n", "") == fuzz.faults(2, "", "error: no\n") == fuzz.faults(2, "not usable", "") == []
    assert fuzz.faults(0, "", "\rreading: 1img\r       \r") == []
    for code, out, err in [
        ("ValueError: x", "", ""),
        (1, "", "error: no\n"),
        (2, "", ""),
        (2, "", "error: no\nsecond line\n"),
        (0, "\x1b[31mred", ""),
        (2, "", "error: \u202eno\n"),
        (0, "", "Traceback (most recent call last)\n"),
        (0, "", "x.py:5: UserWarning: odd\n  warn()\n"),
    ]:
        assert fuzz.faults(code, out, err), (code, out, err)
