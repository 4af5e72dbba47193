"""llama.cpp's own list of devices: this machine's, and with RPC servers as more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from rpc_servers import find_free_port, serve, start_rpc

from localmistral.engine.devices import (
    build_features,
    list_backends,
    list_devices,
    parse_features,
)
from localmistral.fit.hardware import probe_machine
from localmistral.fit.machine import Machine
from localmistral.fit.probes.found import BackendDevice


def test_the_cpu_is_always_among_the_devices() -> None:
    (cpu,) = [device for device in list_devices() if device.kind == "cpu"]
    assert (cpu.name, cpu.backend, cpu.pci_id) == ("CPU", "cpu", None)
    assert cpu.description
    assert 0 < cpu.free_bytes <= cpu.total_bytes
    assert "cpu" in list_backends()


def test_the_names_of_devices_differ() -> None:
    names = [device.name for device in list_devices()]
    assert len(set(names)) == len(names)


def test_features_of_the_build_are_those_that_are_one() -> None:
    text = "CUDA : ARCHS = 860 | CPU : SSE3 = 1 | AVX = 0 | AVX512_VNNI = 1 | REPACK = 1 | "
    assert parse_features(text) == {"sse3", "avx512_vnni", "repack"}
    assert parse_features("") == frozenset()
    assert build_features()


def list_and_probe() -> tuple[tuple[BackendDevice, ...], Machine]:
    devices = list_devices()
    return devices, probe_machine(devices)


def test_rpc_servers_are_cards_with_their_own_memory() -> None:
    with start_rpc(2) as rpc:
        devices, machine = rpc.call(list_and_probe)
    remote = [device for device in devices if device.backend == "rpc"]
    assert tuple(device.name for device in remote) == rpc.devices
    assert {device.kind for device in remote} == {"gpu"}
    assert [device.description for device in remote] == list(rpc.endpoints)
    assert all(0 < device.free_bytes <= device.total_bytes for device in remote)
    assert [gpu.device for gpu in machine.gpus if gpu.backend == "rpc"] == list(rpc.devices)


def test_servers_of_the_environment_are_listed_by_the_command() -> None:
    with serve() as endpoint:
        done = show_hardware(endpoint)
    assert done.returncode == 0, done.stderr
    (gpu,) = [gpu for gpu in json.loads(done.stdout)["gpus"] if gpu["backend"] == "rpc"]
    assert gpu["device"] == "RPC0"
    assert endpoint in gpu["name"]


@pytest.mark.parametrize("command", ["hardware", "doctor"])
def test_a_server_that_is_away_is_one_sentence(command: str) -> None:
    endpoint = f"127.0.0.1:{find_free_port()}"
    done = show_hardware(endpoint, command)
    if command == "hardware":
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
    else:
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert not document["ok"]
        (failed,) = [check for check in document["checks"] if check["status"] == "fail"]
        assert endpoint in failed["message"]


def show_hardware(servers: str, command: str = "hardware") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "localmistral", command, "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LOCALMISTRAL_RPC": servers},
    )
