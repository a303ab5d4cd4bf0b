"""How processes meet before JAX joins them: all come, somebody does not, or they contradict."""

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiers import HANG
from tiny_run import ROOT

from oel_jax.base.errors import TryAgain, UserError
from oel_jax.parallel import meeting


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(*given, patience=60.0):
    """What `meet` returns or raises in each of these (count, index), all at one address."""
    address = f"localhost:{free_port()}"

    def one(count, index):
        try:
            return meeting.meet(address, count, index, patience)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(one, *zip(*given, strict=True)))


@pytest.mark.parametrize("count", [2, 5])
def test_all_come_in_any_order_and_the_port_is_free_at_once(count):
    assert together(*((count, index) for index in reversed(range(count)))) == ["localhost"] * count


@pytest.mark.parametrize(
    "given, missing",
    [([(3, 0), (3, 2)], "process 1 of 3 did not come"), ([(3, 0)], "process 1, 2 of 3 did not")],
)
def test_all_who_wait_are_told_who_did_not_come(given, missing):
    for error in together(*given, patience=1.0):
        assert isinstance(error, TryAgain) and error.status == 75
        assert missing in str(error) and "--join_timeout" in str(error)
        assert "did not meet at localhost:" in str(error) and "within 1 s" in str(error)


def test_process_0_that_does_not_come_is_named():
    (error,) = together((2, 1), patience=0.5)
    assert isinstance(error, TryAgain) and "process 0 does not answer there" in str(error)


@pytest.mark.parametrize(
    "given, message",
    [
        ([(2, 0), (3, 1)], "process 1 was started for 3 processes and process 0 for 2"),
        ([(3, 0), (3, 1), (3, 1)], "two processes say that they are process 1 of 3"),
    ],
)
def test_contradictions_are_mistakes(given, message):
    for error in together(*given, patience=60.0):
        assert type(error) is UserError and error.status == 2
        assert message in str(error) and "Give" not in str(error)


def test_a_name_that_does_not_resolve_is_a_mistake():
    with pytest.raises(UserError, match="--coordinator=no.such.invalid:1 .*does not resolve") as e:
        meeting.meet("no.such.invalid:1", 2, 1, 0.3)
    assert e.value.status == 2


def test_somebody_else_at_the_port_is_no_process_and_a_restarted_one_counts_once():
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(meeting.meet, f"127.0.0.1:{port}", 2, 0, 60.0)
        hello = b'{"hello": "oel_jax", "count": 2, "index": 1}\n'
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"x" * 10_000, b'{"hello": 1}\n', b"", hello[:20]):
            stranger = connected(port)
            stranger.sendall(words)
            stranger.close()
        assert not first.done()
        again = pool.submit(meeting.meet, f"127.0.0.1:{port}", 2, 1, 60.0)
        assert [first.result(60), again.result(60)] == ["127.0.0.1"] * 2


def connected(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            pass


def test_another_service_at_the_address_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(TryAgain, match="something else than process 0|does not answer"):
            meeting.meet(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, 1.0)


def test_a_command_whose_peers_do_not_come_ends_with_one_message(tmp_path):
    """Whatever proxies the environment names; nothing is made before."""
    command = [sys.executable, "-m", "oel_jax.main", "--config=configs/nano_frozen_lake.py"]
    command += [f"--workdir={tmp_path / 'run'}", f"--coordinator=127.0.0.1:{free_port()}"]
    command += ["--processes=2", "--process_id=1", "--join_timeout=1"]
    proxy = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | proxy, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 75, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the processes of this run did not meet at 127.0.0.1")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_grpc_reaches_the_coordinator_without_a_proxy(monkeypatch):
    for before, after in (("", "host"), ("a,b", "a,b,host")):
        monkeypatch.setenv("no_proxy", before)
        monkeypatch.setenv("no_grpc_proxy", "")  # so that it is as before afterwards
        monkeypatch.delenv("no_grpc_proxy")
        meeting.without_proxy("host")
        assert os.environ["no_grpc_proxy"] == after and os.environ["no_proxy"] == before
