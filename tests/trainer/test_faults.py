"""What befalls a training that runs for days: kills, signals, full disks, damaged files, dead or
differing processes. In the end stands the run that nothing happened to."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from tests.stress import kills
from tests.trainer import toy_training
from trainer.checkpoint import list_states, save_state
from trainer.config import TrainConfig
from trainer.distributed import World, setup
from trainer.engine import StoppedBySignal, TrainingStopped
from trainer.logger import draw_curves, read_rows
from trainer.trackers import Tracker, open_tracker

TOY = Path(toy_training.__file__)
MEASURED = kills.MEASURED


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def toy(out: str, *flags: str, epochs: int = 2) -> None:
    toy_training.main(["--out_dir", out, "--epochs", str(epochs), *flags])


def harmed(monkeypatch, harm: str, expected, out: str, *flags: str) -> str:
    """The toy, harmed; returns the message it ended with."""
    monkeypatch.setenv("HARM", harm)
    with pytest.raises(expected) as caught:
        toy(out, *flags)
    monkeypatch.delenv("HARM")
    return str(caught.value)


def lines(out: str, file: str = "metrics.jsonl") -> list[dict]:
    rows = map(json.loads, Path(out, "run", file).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def weights(out: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(out, "run.pth"))


def same(a: str, b: str) -> bool:
    pairs = zip(weights(a).values(), weights(b).values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and lines(a) == lines(b)


def states(out: str) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_states(Path(out, "run"))]


def test_a_damaged_state_is_passed_over_for_the_one_before(monkeypatch, capsys):
    toy("whole")
    harmed(monkeypatch, "raise:0:10", RuntimeError, "out", "--keep_last", "3")
    assert states("out") == [8, 6, 4]
    newest = list_states(Path("out/run"))[0]
    newest.write_bytes(newest.read_bytes()[:-5] + b"wrong")
    toy("out")
    said = capsys.readouterr()
    assert f"warning: {newest} is damaged" in said.err and "steps 6 to 24" in said.out
    assert same("out", "whole") and states("out") == [24]


def test_a_run_without_any_whole_state_is_not_begun_again(monkeypatch):
    harmed(monkeypatch, "raise:0:4", RuntimeError, "out")
    list_states(Path("out/run"))[0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged, and no earlier one is whole; --resume never"):
        toy("out")
    toy("out", "--resume", "never")
    assert states("out") == [24]


def test_an_earlier_state_can_be_named(monkeypatch):
    toy("whole")
    harmed(monkeypatch, "raise:0:10", RuntimeError, "out")
    toy("out", "--resume", str(list_states(Path("out/run"))[1]))
    assert same("out", "whole")


def test_a_write_that_fails_leaves_the_states_as_they_were(tmp_path):
    save_state(tmp_path, 1, {}, keep=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state(tmp_path, 2, {"weights": torch.zeros(9999)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (3000, r"step 4: .*File too large(.|\n)*state-00000002"),
        (100, r"File too large: 'out/run/metrics.jsonl'"),
    ],
)
def test_a_full_disk_ends_the_run_and_keeps_its_last_good_state(monkeypatch, limit, said):
    toy("whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        message = harmed(monkeypatch, f"full:{limit}:0:4", (TrainingStopped, OSError), "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(said, message), message
    assert states("out") == [2] and not Path("out/run/state.tmp").exists()
    toy("out")
    assert same("out", "whole")


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    harmed(monkeypatch, "raise:0:4", RuntimeError, "out")
    run = tmp_path / "out/run"
    run.chmod(0o555)
    if os.geteuid() == 0:  # root may write everywhere; nobody may not even come here
        os.seteuid(65534)
    try:
        with pytest.raises((ValueError, OSError), match=r"Permission denied.*out/run"):
            toy(str(tmp_path / "out"))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        run.chmod(0o755)
    assert states("out") == [2]


def test_a_signal_saves_and_no_line_of_metrics_is_cut(monkeypatch, capsys):
    flags = ("--log_interval", "10", "--save_interval", "0")
    toy("whole", *flags)
    assert harmed(monkeypatch, "term:0:7", StoppedBySignal, "out", *flags) == "143"
    said = capsys.readouterr().out
    assert "SIGTERM: saved step 6 of 24; the same command resumes from there" in said
    assert states("out") == [6] and not Path("out/run/metrics.jsonl").exists()
    toy("out", *flags)
    assert same("out", "whole") and len(lines("out")) == 3
    assert len(lines("out", "quarantine.jsonl")) == 1


def test_lines_that_a_kill_cut_or_that_are_trained_again_do_not_stay(monkeypatch):
    toy("whole")
    harmed(monkeypatch, "raise:0:8", RuntimeError, "out")
    with Path("out/run/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    toy("out")
    assert same("out", "whole")


# ------------------------------------------------------------------------------- many processes


def together(out: str, *flags: str, processes: int = 2, **environment: str) -> tuple[list, str]:
    """Exit codes of the toy's processes, and all that they said."""
    kills.preload()
    log = Path(f"{out}.log").resolve()
    arguments = [["--out_dir", str(Path(out).resolve()), *flags]]
    team = kills.start(toy_training.run, arguments, log, processes, **environment)
    for process in team:
        process.join(600)
    return [process.exitcode for process in team], log.read_text()


def test_the_error_of_one_process_is_what_the_others_repeat():
    codes, said = together("out", HARM="raise:1:4")
    assert codes == [1, 1]
    assert "stopped because of process 1 on" in said and "the disk is on fire" in said
    assert "gloo" not in said and states("out") == [2]


def test_processes_that_differ_do_not_start():
    codes, said = together("out", "--epochs", "1{rank}")
    assert codes == [1, 1]
    assert "epochs: 10 in process 0 on" in said and "; 11 in process 1 on" in said
    assert not Path("out").exists()


def test_another_number_of_processes_goes_on_with_the_same_updates(monkeypatch):
    codes, said = together("out", HARM="kill:1:5", DROPOUT="0")
    assert codes == [1, -9] and "process 1 on" in said and "no longer answers" in said
    assert states("out") == [4, 2]
    monkeypatch.setenv("DROPOUT", "0")
    toy("out", epochs=1)  # alone, it takes in two what two took at once
    toy("whole", "--batch_size", "4", epochs=1)
    pairs = zip(weights("out").values(), weights("whole").values(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-6


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "process 0 of 2 .* can't join .* 1/2 clients joined"),
        (1, "process 1 of 2 .* can't join"),
    ],
)
def test_a_process_that_waits_in_vain_says_for_whom(monkeypatch, rank, said):
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(random.randint(20000, 30000))}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        setup("cpu", timeout=0.5)


def test_one_process_agrees_with_itself():
    World(torch.device("cpu")).check_consistent({"epochs": 1})


def test_torchrun_restarts_after_a_death_and_ends_as_if_there_had_been_none():
    """Two processes as a user starts them, a broken sample in one; one is killed and comes back."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", "2", str(TOY), "--out_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HARM": "kill:1:5"}
    result = subprocess.run(
        [*command, "out", "--epochs", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "steps 0 to 12" in result.stdout and "steps 4 to 12" in result.stdout
    codes, _ = together("whole", "--epochs", "2")
    assert codes == [0, 0] and same("out", "whole")
    assert lines("out", "quarantine.jsonl") == lines("whole", "quarantine.jsonl")


def test_a_signal_to_loading_processes_too_lets_the_run_save(tmp_path):
    """As torchrun and Slurm send it: to all of a job's processes, in whatever order."""
    kills.preload()
    kills.make_data(tmp_path)
    arguments, log = kills.command(tmp_path, "out", 1, 9999), tmp_path / "log"
    arguments += ["--num_workers", "2", "--eval_interval", "0"]
    (process,) = kills.start(kills.pretrain, [arguments], log)
    run = tmp_path / "out/run"
    while process.is_alive() and kills.last_update(run) < 10:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for victim in (*workers, process):
        os.kill(victim.pid, signal.SIGTERM)
        time.sleep(0.05)
    process.join(60)
    said = log.read_text()
    assert process.exitcode == 143, said[-2000:]
    saved = int(re.search(r"SIGTERM: saved step (\d+) of 9999", said)[1])
    assert saved == states(tmp_path / "out")[0] >= 10
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


def test_three_kills_leave_no_trace(tmp_path):
    kills.preload()
    kills.make_data(tmp_path)
    row = kills.measure(tmp_path, processes=1, kills=3, updates=30, seed=1)
    assert row["difference"] == row["lost"] == row["more"] == 0 and row["lines"] == 31


# ------------------------------------------------------------------------------------- trackers


def test_a_tracker_hears_each_line_once_and_may_fail(tmp_path):
    heard = []
    tracker = Tracker("some", lambda row, step: heard.append(step), lambda: None, last_logged=2)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": 1.0, "val_loss": None})
    assert heard == [3]

    def fail(row, step):
        raise ConnectionError("the server is down")

    tracker = Tracker("some", fail, lambda: None)
    with pytest.warns(UserWarning, match="some failed and is left out from here.*server is down"):
        tracker.log({"step": 1})
    tracker.log({"step": 2})


def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it weren't there
    with pytest.raises(ValueError, match="pip install trackio"):
        open_tracker("trackio", tmp_path, asdict(TrainConfig()), 0, 0)


def test_curves_are_drawn(tmp_path):
    toy("out", epochs=1)
    assert Path("out/run/curves.png").read_bytes().startswith(b"\x89PNG")
    rows = read_rows(Path("out/run/metrics.jsonl"))
    draw_curves({"empty": [], "run": rows}, tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 5000
