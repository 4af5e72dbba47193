"""How fast a download runs beside a plain one by curl or wget, and how much memory it takes.

    python scripts/bench_download.py --gib 4 --rounds 5

A server in a process of its own hands out one file of zeros, all holes, as fast as the kernel can
copy it. curl (else wget) and `download_files` fetch it in turns into the same folder, each in a
fresh process; medians are shown. Ours includes what curl leaves out: the journal, forcing the data
to disk, and the sha256 of the whole file. --in-memory fetches into a folder in memory (Linux), to
see what the program costs where no disk is in the way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK_BYTES = 8 << 20
COMMIT = "0" * 40
REPOSITORY = "bench/zeros"
NAME = "zeros.gguf"


def serve(path: Path) -> None:
    """Hand out one file for every address, whole or by range, until the process is ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=answer, args=(client, path), daemon=True).start()


def answer(client: socket.socket, path: Path) -> None:
    """One connection's requests, one after the other."""
    size = path.stat().st_size
    with client, path.open("rb") as file, suppress(ConnectionError):
        pending = b""
        while True:
            while b"\r\n\r\n" not in pending:
                received = client.recv(1 << 16)
                if not received:
                    return
                pending += received
            head, pending = pending.split(b"\r\n\r\n", 1)
            if b" /api/" in head:  # the Hub's library asks for more than files
                client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            asked = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head)
            start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
            status = "206 Partial Content" if asked else "200 OK"
            lines = [
                f"HTTP/1.1 {status}",
                f"Content-Length: {end - start}",
                f"Content-Range: bytes {start}-{end - 1}/{size}",
                'ETag: "zeros"',
            ]
            client.sendall("\r\n".join([*lines, "", ""]).encode())
            while start < end:
                file.seek(start)
                start += client.sendfile(file, start, min(BLOCK_BYTES, end - start))


@contextmanager
def running_server(path: Path) -> Iterator[str]:
    """The address of a server for the file, in its own process."""
    command = [sys.executable, __file__, "--serve", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def fetch_plainly(endpoint: str, folder: Path) -> float:
    """Seconds that curl or wget takes for the file in one stream."""
    target = str(folder / "plain")
    curl, wget = shutil.which("curl"), shutil.which("wget")
    if curl:
        command = [curl, "--silent", "--fail", "--output", target, f"{endpoint}/{NAME}"]
    elif wget:
        command = [wget, "--quiet", "--output-document", target, f"{endpoint}/{NAME}"]
    else:
        sys.exit("Neither curl nor wget is here.")
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - began


def fetch_ours(endpoint: str, folder: Path, size: int, sha256: str) -> tuple[float, int]:
    """Seconds, and bytes of memory at most, of a download in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--once", str(size), sha256],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    return result["seconds"], result["peak_bytes"]


def download_once(size: int, sha256: str) -> None:
    """Download the file with this process, and print what that took."""
    import psutil

    from localmistral.models.download import download_files
    from localmistral.models.hub import HubFile, Progress

    process, peak = psutil.Process(), 0

    def watch(_: Progress) -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    file = HubFile(path=NAME, bytes=size, sha256=sha256)
    began = time.perf_counter()
    download_files(REPOSITORY, COMMIT, [file], on_progress=watch)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak}))


def hash_zeros(size: int) -> str:
    """The sha256 of that many zero bytes."""
    digest, block = hashlib.sha256(), bytes(BLOCK_BYTES)
    for _ in range(size // BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def compare(size: int, rounds: int, parent: str | None) -> None:
    """Print both ways' medians and the share that ours reaches."""
    sha256 = hash_zeros(size)
    plain_s, ours_s, peaks = [], [], []
    with tempfile.TemporaryDirectory(dir=parent) as name:
        source = Path(name, "zeros")
        source.touch()
        os.truncate(source, size)
        with running_server(source) as endpoint:
            for number in range(rounds):
                for way in ("plain", "ours") if number % 2 else ("ours", "plain"):
                    folder = Path(name, way)
                    folder.mkdir()
                    if way == "plain":
                        plain_s.append(fetch_plainly(endpoint, folder))
                    else:
                        seconds, peak = fetch_ours(endpoint, folder, size, sha256)
                        ours_s.append(seconds)
                        peaks.append(peak)
                    shutil.rmtree(folder)
                print(f"round {number + 1}: {plain_s[-1]:.2f} s plain, {ours_s[-1]:.2f} s ours")
    plain, ours = statistics.median(plain_s), statistics.median(ours_s)
    print(f"plain: {size / plain / 1e6:.0f} MB/s; ours: {size / ours / 1e6:.0f} MB/s", end="")
    print(f" = {plain / ours:.0%}; memory at most {max(peaks) / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--gib", type=int, default=4, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-memory", action="store_true", help="fetch into /dev/shm")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    elif options.once:
        download_once(int(options.once[0]), options.once[1])
    else:
        compare(options.gib << 30, options.rounds, "/dev/shm" if options.in_memory else None)


if __name__ == "__main__":
    main()
