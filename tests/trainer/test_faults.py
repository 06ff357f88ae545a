"""What befalls a training that runs for days: kills, signals, full disks, damaged files, dead or
differing processes. In the end stands the run that nothing happened to."""

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.stress import kills
from tests.trainer import processes, toy_training
from trainer.checkpoint import list_states
from trainer.distributed import setup
from trainer.engine import TrainingStopped
from trainer.interrupt import StoppedBySignal

TOY, HOST = Path(toy_training.__file__), socket.gethostname()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """The folder of the run that nothing happened to."""
    out = str(tmp_path_factory.mktemp("whole"))
    toy(out)
    return out


def toy(out: str, *flags: str, epochs: int = 2) -> None:
    toy_training.main(["--out_dir", out, "--epochs", str(epochs), *flags])


def toy_with_fault(monkeypatch, fault: str, expected, *flags: str) -> str:
    """The toy in `out`; returns the message it ended with."""
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(expected) as caught:
        toy("out", *flags)
    monkeypatch.delenv("FAULT")
    return str(caught.value)


def lines(out: str, file: str = "metrics.jsonl") -> list[dict]:
    rows = map(json.loads, Path(out, "run", file).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in kills.MEASURED} for row in rows]


def largest_difference(a: str, b: str) -> float:
    weights = [torch.load(Path(out, "run.pth")).values() for out in (a, b)]
    return max((x - y).abs().max().item() for x, y in zip(*weights, strict=True))


def same(a: str, b: str) -> bool:
    return largest_difference(a, b) == 0 and lines(a) == lines(b)


def states(out: str | Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_states(Path(out, "run"))]


def test_a_damaged_state_is_passed_over_for_the_one_before(monkeypatch, capsys, whole):
    """The line that the kill cut and those of steps that are trained again go, too."""
    toy_with_fault(monkeypatch, "raise:0:10", RuntimeError, "--keep_last", "3")
    assert states("out") == [8, 6, 4]
    newest = list_states(Path("out/run"))[0]
    newest.write_bytes(newest.read_bytes()[:-5] + b"wrong")
    with Path("out/run/metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    toy("out")
    output = capsys.readouterr()
    assert f"warning: {newest} is damaged" in output.err and "steps 6 to 24" in output.out
    assert same("out", whole) and states("out") == [24]
    assert Path("out/run/curves.png").read_bytes().startswith(b"\x89PNG")
    list_states(Path("out/run"))[0].write_bytes(b"")
    with pytest.raises(ValueError, match="damaged, and no earlier one is whole; --resume never"):
        toy("out")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (3000, r"out/run: .*File too large(.|\n)*last good state is out/run/state-00000002"),
        (100, r"File too large: 'out/run/metrics.jsonl'(.|\n)*state-00000002"),
    ],
)
def test_a_full_disk_ends_the_run_and_keeps_its_last_good_state(monkeypatch, limit, message, whole):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        reason = toy_with_fault(monkeypatch, f"full:{limit}:0:4", TrainingStopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(message, reason), reason
    assert states("out") == [2] and not Path("out/run/state.tmp").exists()
    toy("out")
    assert same("out", whole)


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    toy_with_fault(monkeypatch, "raise:0:4", RuntimeError)
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


def test_a_signal_saves_and_no_line_of_metrics_is_cut(monkeypatch, capsys, whole):
    flags = ("--log_interval", "10", "--save_interval", "0")
    assert toy_with_fault(monkeypatch, "term:0:7", StoppedBySignal, *flags) == "143"
    output = capsys.readouterr().out
    assert "SIGTERM: saved step 6 of 24; the same command resumes from there" in output
    assert states("out") == [6] and not Path("out/run/metrics.jsonl").exists()
    toy("out", *flags)
    assert largest_difference("out", whole) == 0 and len(lines("out")) == 3
    assert len(lines("out", "quarantine.jsonl")) == 1


def test_a_second_training_of_the_same_name_is_refused_while_the_first_lives(whole):
    argv, log = ["--out_dir", str(Path("out").resolve()), "--epochs", "2"], Path("log").resolve()
    (first,) = processes.start(toy_training.run, argv, log, FAULT="hang:0:5")
    while first.is_alive() and not (Path("out/run").is_dir() and 4 in states("out")):
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"out/run: process {first.pid} on .* is training there"):
        toy("out")
    first.kill()  # a dead owner's lock doesn't hold
    first.join()
    toy("out")
    assert same("out", whole)


# ------------------------------------------------------------------------------- many processes


def toy_processes(out: str, *flags: str, number: int = 2, **environment: str) -> tuple[list, str]:
    """Exit codes of the toy's processes, and all that they printed."""
    log = Path(f"{out}.log").resolve()
    argv = ["--out_dir", str(Path(out).resolve()), *flags]
    team = processes.start(toy_training.run, argv, log, number, **environment)
    for process in team:
        process.join(600)
    return [process.exitcode for process in team], log.read_text()


@pytest.mark.parametrize(
    ("flags", "said", "left"),
    [
        ([], "stopped because of process 1 on .*the disk is on fire", [2]),
        (["--epochs", "1{rank}"], "epochs: 10 in process 0 on .*; 11 in process 1 on", []),
    ],
    ids=["one fails", "flags differ"],
)
def test_all_processes_end_with_the_reason(flags, said, left):
    codes, output = toy_processes("out", *flags, FAULT="raise:1:4")
    assert codes == [1, 1] and re.search(said, output) and "gloo" not in output
    assert states("out") == left and Path("out").exists() == bool(left)


@pytest.mark.parametrize(
    ("number", "fault", "flags", "expected"),
    [(4, "kill:2:2", [], [1, 1, -9, 1]), (2, "hang:1:4", ["--timeout", "3"], [1, 1])],
)
def test_a_lost_process_is_named_and_no_other(number, fault, flags, expected):
    """A survivor that has no connection to it notices later than those that have."""
    codes, output = toy_processes("out", *flags, number=number, FAULT=fault)
    assert codes == expected
    named = set(re.findall(r"train: process (.*) no longer answers: .* hangs", output))
    assert named == {f"{fault.split(':')[1]} on {HOST}"}


def test_another_number_of_processes_resumes_with_the_same_steps(monkeypatch):
    codes, _ = toy_processes("out", FAULT="kill:1:5", DROPOUT="0")
    assert codes == [1, -9] and states("out") == [4, 2]
    monkeypatch.setenv("DROPOUT", "0")
    toy("out", epochs=1)  # alone, it takes in two what two took at once
    toy("whole", "--batch_size", "4", epochs=1)
    assert largest_difference("out", "whole") < 1e-6


@pytest.mark.parametrize(("rank", "reason"), [(0, "1/2 clients joined"), (1, "trying to connect")])
def test_a_process_that_waits_in_vain_says_for_whom(monkeypatch, rank, reason):
    port = str(random.randint(20000, 30000))
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    message = f"process {rank} of 2 .* can't join .* 127.0.0.1:{port} within 0.5 s .* {reason}"
    with pytest.raises(ValueError, match=message):
        setup("cpu", timeout=0.5)


def test_torchrun_restarts_after_a_death_and_ends_as_if_there_had_been_none():
    """Two processes as a user starts them, a broken sample in one; one is killed and comes back."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", "2", str(TOY), "--out_dir", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": "kill:1:5"}
    result = subprocess.run(
        [*command, "--epochs", "2"], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "steps 0 to 12" in result.stdout and "steps 4 to 12" in result.stdout
    codes, _ = toy_processes("whole", "--epochs", "2")
    assert codes == [0, 0] and same("out", "whole")
    assert lines("out", "quarantine.jsonl") == lines("whole", "quarantine.jsonl")


def test_a_signal_to_loading_processes_too_lets_the_run_save(tmp_path):
    """As torchrun and Slurm send it: to all of a job's processes, in whatever order."""
    kills.make_data(tmp_path)
    flags, log = kills.training_flags(tmp_path, "out", 1, 9999), tmp_path / "log"
    flags += ["--num_workers", "2", "--eval_interval", "0"]
    (process,) = processes.start(kills.pretrain, flags, log)
    while process.is_alive() and kills.last_step(tmp_path / "out/run") < 10:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for victim in (*workers, process):
        os.kill(victim.pid, signal.SIGTERM)
        time.sleep(0.05)
    process.join(60)
    output = log.read_text()
    assert process.exitcode == 143, output[-2000:]
    saved = int(re.search(r"SIGTERM: saved step (\d+) of 9999", output)[1])
    assert saved == states(tmp_path / "out")[0] >= 10
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


def test_three_kills_leave_no_trace(tmp_path):
    kills.make_data(tmp_path)
    row = kills.measure(tmp_path, processes=1, kills=3, steps=30, seed=1)
    assert row["difference"] == row["lost"] == row["more"] == 0 and row["lines"] == 31


def test_a_tracker_gets_each_line_once_and_may_fail(monkeypatch):
    runs, steps = [], []

    def log(row, step):
        if step == 20:
            raise ConnectionError("the server is down")
        steps.append(step)

    tracker = SimpleNamespace(init=lambda **settings: runs.append(settings["name"]), log=log)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    # Line 5 was sent before the fault, and step 5 is trained again after it.
    toy_with_fault(monkeypatch, "raise:0:6", RuntimeError, "--tracker", "trackio")
    with pytest.warns(UserWarning, match="left out from here.*server is down"):
        toy("out", "--tracker", "trackio")
    assert steps == list(range(1, 20)) and runs[0] == runs[1]


def test_a_tracker_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it weren't there
    with pytest.raises(ValueError, match="pip install trackio"):
        toy("out", "--tracker", "trackio")
