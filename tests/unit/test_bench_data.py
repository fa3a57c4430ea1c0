"""`bench data` measures the training loader."""

import json

import pytest

from torchpi.bench.data import wait_share
from torchpi.cli import main


def test_wait_share_with_and_without_workers():
    assert wait_share(0.1, 0.3, workers=0) == pytest.approx(0.25)  # loading and training alternate
    assert wait_share(0.1, 0.3, workers=2) == 0  # the batch is ready before the step ends
    assert wait_share(0.4, 0.3, workers=2) == pytest.approx(0.25)


@pytest.mark.parametrize("arguments", [["--embodiment", "metaworld", "--step-seconds", "0.2"], []])
def test_json_is_one_document(arguments, golden_root, capsys):
    path = str(golden_root / "datasets/lerobot_v3_image")
    main(["bench", "data", path, "--workers", "0", "--batch", "4", "--repeats", "2", "--json", *arguments])
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["samples_per_second"] == pytest.approx(4 / result["batch_seconds"])
    assert result["frame_ms"] > 0
    assert result["cameras"] == ["observation.images.base", "observation.images.wrist"]
    if arguments:
        assert result["wait_share"] == pytest.approx(wait_share(result["batch_seconds"], 0.2, workers=0))
        assert "would wait for data" in shown.err
    else:
        assert result["wait_share"] is None


@pytest.mark.slow
def test_worker_processes(golden_root, capsys):
    main(["bench", "data", str(golden_root / "datasets/lerobot_v3_video"), "--workers", "2", "--batch", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["workers"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no folder nowhere"),
        (["SET", "--batch", "0"], "positive"),
        (["SET", "--embodiment", "droid"], "embodiment 'droid' requires"),
    ],
)
def test_wrong_options_print_one_line(arguments, message, golden_root, capsys):
    path = str(golden_root / "datasets/lerobot_v3_image")
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "data", *(path if argument == "SET" else argument for argument in arguments)])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
