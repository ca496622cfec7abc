"""Searches that measure on a device: made-up measurements on loopback, plumbing and not speed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import nas
from ir.errors import InputError, TargetUnavailable
from nas.cli.app import app
from nas.objectives.latency import Latency
from nas.remeasure import remeasure
from nas.search import load_study
from nas.storages.journal import read_journal
from nas.study import Study
from nas.testing.spaces import Grid
from tests.codegen.fake_device import FakeWorker, Network, device_at, serving


@pytest.fixture(autouse=True)
def compile_nothing(monkeypatch, tmp_path):
    """Stand in for the compiler: a file whose bytes, which are its milliseconds here, tell the trial."""

    def compile_to(_self, context, folder):
        path = folder / "candidate.nas"
        path.write_bytes(b"x" * (100 + context.number))
        return path

    monkeypatch.setattr(Latency, "compile", compile_to)
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "cache"))


def run(folder, device, trials: int = 3) -> Study:
    return nas.search(
        Grid(),
        task=nas.get_task("induction"),
        objectives=[Latency(settle_seconds=0.0)],
        strategy="random",
        budget=trials,
        storage=folder / "run",
        device=device,
        threads=1,
    )


def test_a_search_takes_latency_from_its_device(tmp_path):
    """Values, the device's name beside each, and in the settings; the device is free afterwards."""
    with serving(tmp_path / "device") as (server, port):
        study = run(tmp_path, f"127.0.0.1:{port}")
        assert [trial.values["latency"] for trial in study.trials] == [100.0, 101.0, 102.0]
        details = study.trials[0].quantities["latency"].details
        assert (details["device"], details["machine"]) == (f"board (127.0.0.1:{port})", "made up")
        assert server.leases.describe() is None
    target = read_journal(tmp_path / "run")[0]["settings"]["target"]
    assert target["device"] == "board"
    assert target["fingerprint"].endswith("-t1")


def test_a_search_goes_on_with_its_device_and_with_no_other(tmp_path):
    """Under another address, but the same name; measuring here, or elsewhere, would be another study."""
    with serving(tmp_path / "device") as (server, port):
        run(tmp_path, f"127.0.0.1:{port}")
        network = Network(port)
        assert len(run(tmp_path, f"127.0.0.1:{network.port}", 4).trials) == 4
        network.close()
        server.name = "another"
        for other in (f"127.0.0.1:{port}", None):
            with pytest.raises(InputError, match="another target"):
                run(tmp_path, other)


def test_a_model_that_takes_the_device_down_fails_with_its_reason(tmp_path):
    """Its trial alone, and the journal says so."""
    network: list[Network] = []

    def script(worker: FakeWorker, time: int) -> None:
        if 2 <= time <= 4:
            network[0].cut()
            worker.hang()

    with serving(tmp_path / "device", FakeWorker(script)) as (_, port):
        network.append(Network(port))
        study = run(tmp_path, f"127.0.0.1:{network[0].port}")
        network[0].close()
    assert [trial.state for trial in study.trials] == ["finished", "failed", "finished"]
    failed = next(record for record in read_journal(tmp_path / "run") if record["event"] == "failed")
    assert "went away 3 times" in failed["reason"]


def test_a_search_whose_device_stays_away_ends_and_goes_on_later(tmp_path, monkeypatch):
    """No trial fails by it, and none is repeated."""
    monkeypatch.setattr("codegen.devices.server.GRACE_S", 0.1)  # for the lease of the search that ended
    network: list[Network] = []

    def script(_worker: FakeWorker, time: int) -> None:
        if time == 2:
            network[0].close()

    worker = FakeWorker(script)
    with serving(tmp_path / "device", worker) as (_, port):
        network.append(Network(port))
        with pytest.raises(TargetUnavailable, match="cannot be reached"):
            run(tmp_path, device_at(network[0].port, wait_s=0.0))
        study = run(tmp_path, f"127.0.0.1:{port}")
    assert [trial.values["latency"] for trial in study.trials] == [100.0, 101.0, 102.0]
    assert len(worker.seen) == 4


def test_a_front_is_measured_again_on_the_device_alone(tmp_path):
    """Without its address nothing is mixed up: the points stay, and it is said why."""
    with serving(tmp_path / "device") as (_, port):
        run(tmp_path, f"127.0.0.1:{port}")
        notices: list[str] = []

        class Listener(nas.Callback):
            def on_notice(self, message: str) -> None:
                notices.append(message)

        with load_study(tmp_path / "run", hold=True) as study:
            remeasure(study, callback=Listener())
        assert notices
        assert all("was measured on the device board" in notice for notice in notices)


def test_status_and_list_show_devices(tmp_path):
    """One that cannot be reached is in the list, with its reason."""
    with serving(tmp_path / "device") as (_, port):
        address = f"127.0.0.1:{port}"
        found = CliRunner().invoke(app, ["device", "status", "--device", address])
        assert found.exit_code == 0
        assert "board" in found.output
        assert "by nobody" in found.output
        network = Network(port)
        network.close()
        away = f"127.0.0.1:{network.port}"
        listed = CliRunner().invoke(app, ["device", "list", "--device", address, "--device", away, "--json"])
        facts = json.loads(listed.stdout)["devices"]
    assert (facts[0]["name"], facts[0]["lease"]) == ("board", None)
    assert facts[0]["target"].startswith(("cpu-", "arm64-"))
    assert "cannot be reached" in facts[1]["error"]
