"""What a program may do in the sandbox, and that each attack ends inside it."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fastrl.rewards import sandbox
from fastrl.rewards.sandbox import Limits, SandboxError, run_sandboxed

LACKING = sandbox._lacking()
isolated = pytest.mark.skipif(LACKING is not None, reason=f"this machine isolates no program: {LACKING}")
SHORT = Limits(seconds=2.0, memory_mb=128)


def run(program, limits=SHORT, **options):
    return run_sandboxed(textwrap.dedent(program), limits=limits, **options)


def processes_named(marker):
    """Processes of this machine whose command line holds the marker."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@isolated
def test_a_program_gets_its_input_and_its_files_and_says_how_it_ended():
    outcome = run(
        """
        import sys
        print(sys.stdin.read().upper(), open("data.txt").read(), end="")
        print("wrong", file=sys.stderr)
        sys.exit(3)
        """,
        stdin="grüße\n",
        files={"data.txt": "x\r\ny"},
    )
    assert outcome == sandbox.Outcome("exit", 3, "GRÜSSE\n x\r\ny".replace("\r\n", "\n"), "wrong\n")
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)") == sandbox.Outcome("signal", 11)


@isolated
@pytest.mark.parametrize("program", ["def f(:", "x = '\0'", "x = '\ud800'", "1 / 0", "raise SystemExit('no')"])
def test_a_broken_program_is_its_own_failure(program):
    outcome = run(program)
    assert (outcome.ended, outcome.code) == ("exit", 1)
    assert outcome.stderr


@isolated
def test_a_fork_bomb_ends_inside():
    before = len([name for name in os.listdir("/proc") if name.isdigit()])
    most, done = [0], threading.Event()

    def count():
        while not done.wait(0.05):
            most[0] = max(most[0], len([name for name in os.listdir("/proc") if name.isdigit()]))

    watcher = threading.Thread(target=count)
    watcher.start()
    outcome = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", Limits(seconds=1.0))
    done.set()
    watcher.join()
    assert outcome.ended == "time"
    assert most[0] < before + 30  # 4 inside; the rest is what else this machine does


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "bytearray(10 << 30)",
        "x = [0]\nwhile True: x += x",
        "import mmap\nmmap.mmap(-1, 10 << 30)",
        "import threading\nthreading.stack_size(1 << 30)\nthreading.Thread(target=print).start()",
        "with open('a', 'wb') as file:\n    for _ in range(10 << 10): file.write(bytes(1 << 20))",
        "for i in range(100):\n    with open(str(i), 'wb') as file: file.write(bytes(1 << 20))",
        "for i in range(100_000): open(str(i), 'w').close()",
        "import os\nos.memfd_create('x')",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.shmget(0, 1 << 20, 0o1666) >= 0, os.strerror(ctypes.get_errno())",
    ],
    ids=["bytes", "list", "mmap", "stack", "one file", "files", "empty files", "memfd", "shmget"],
)
def test_memory_ends_at_its_limit_wherever_it_is_taken(program):
    outcome = run(program)
    assert (outcome.ended, outcome.code) in {("exit", 1), ("signal", 25)}  # 25: a file larger than allowed
    errors = ("MemoryError", "Cannot allocate", "can't start new thread", "No space", "Not permitted", "not permitted")
    assert outcome.ended == "signal" or any(name in outcome.stderr for name in (*errors, "File too large"))


@isolated
def test_endless_output_is_cut_and_ends_the_program():
    limits = Limits(seconds=20.0, output_kb=64)
    began = time.monotonic()
    outcome = run("while True: print('x' * 1000)", limits)
    assert outcome.ended == "output"
    assert len(outcome.stdout) <= 64 << 10
    assert time.monotonic() - began < 10
    assert run("import os\nwhile True: os.write(2, b'x' * 1000)", limits).ended == "output"


@isolated
def test_no_socket_reaches_anything(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        server.settimeout(0.2)
        path = tmp_path / "socket"
        local.bind(str(path))
        local.listen()
        local.settimeout(0.2)
        outcome = run(f"""
            import socket
            tries = [(socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})), (socket.AF_INET6, ("::1", 80)),
                     (socket.AF_INET, ("1.1.1.1", 53)), (40, (2, 1024)), (socket.AF_NETLINK, (0, 0)),
                     (socket.AF_UNIX, {str(path)!r})]
            for family, address in tries:
                try: socket.socket(family).connect(address)
                except OSError as error: print(type(error).__name__)
                else: print("connected")
            a, b = socket.socketpair()
            a.send(b"with itself")
            print(b.recv(20).decode())
        """)
        for listener in (server, local):
            with pytest.raises(TimeoutError):
                listener.accept()
    assert outcome.stdout.split("\n") == ["PermissionError"] * 5 + ["FileNotFoundError", "with itself", ""]


@isolated
def test_no_environment_no_process_and_no_file_of_the_run_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRL_SECRET", "hunter2")
    secret = tmp_path / "tests.json"
    secret.write_text("hunter2")
    outcome = run(f"""
        import glob, os
        print(dict(os.environ), os.listdir("/"), os.listdir("."), glob.glob("/proc/*"))
        home = {str(Path.home())!r}
        for path in ({str(secret)!r}, {__file__!r}, "/proc/1/environ", "/etc/passwd", home + "/.bashrc"):
            print(os.path.exists(path))
    """)
    assert "hunter2" not in outcome.stdout + outcome.stderr
    assert outcome.stdout.splitlines()[1:] == ["False"] * 5
    assert outcome.stdout.splitlines()[0].endswith("['main.py'] []")


@isolated
def test_children_do_not_survive():
    marker = f"survivor-{os.getpid()}-{time.time_ns()}"
    outcome = run(f"""
        import os, signal, subprocess, sys
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        if os.fork() == 0:
            os.setsid()
            child = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)", {marker!r}]
            subprocess.Popen(child, start_new_session=True, stdout=subprocess.PIPE).stdout.readline()
            os.write(1, b"started")
            import time; time.sleep(60)
        import time; time.sleep(1)
        os._exit(0)
    """)
    assert outcome == sandbox.Outcome("exit", 0, "started")
    assert processes_named(marker) == []


@isolated
def test_it_cannot_end_what_runs_it_nor_report_in_its_place():
    outcome = run("""
        import os, signal
        for pid in (1, os.getppid(), -1):
            try: os.kill(pid, signal.SIGKILL)
            except OSError as error: print(error.strerror)
        for number in range(3, 64):
            try: os.write(number, b'{"ended": "exit", "code": 0}\\n')
            except OSError: pass
            else: print("open", number)
        print("alive", flush=True)
        os._exit(5)
    """)
    assert (outcome.ended, outcome.code, outcome.stdout) == ("exit", 5, "No such process\nalive\n")


@isolated
def test_it_gets_no_rights_and_cannot_write_outside_its_folder():
    outcome = run("""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def told(result):
            print(os.strerror(ctypes.get_errno()) if result == -1 else f"did {result}")
        told(libc.unshare(0x10000000))
        told(libc.mount(b"none", b"/box", b"tmpfs", 0, b""))
        told(libc.ptrace(16, 1, 0, 0))
        told(libc.setuid(0))
        told(libc.syscall(435, 0, 0))
        told(libc.syscall(425, 8, ctypes.create_string_buffer(200)))
        told(libc.syscall(56, 0x10000011, 0, 0, 0, 0) if os.uname().machine == "x86_64" else libc.unshare(0x10000000))
        for path in ("/usr/x", "/x", "/bin/x", "/dev/x", os.path.dirname(os.__file__) + "/x"):
            try: open(path, "w")
            except OSError as error: print(error.strerror)
        open("/tmp/x", "w").close()
        print(os.getuid(), os.geteuid(), os.getgroups(), os.listdir("."))
    """)
    denied = "Operation not permitted"
    lines = outcome.stdout.splitlines()
    assert lines[:7] == [denied, denied, denied, lines[3], "Function not implemented", denied, denied]
    assert lines[3] in {denied, "Invalid argument"}  # no rights, or no such user in its namespace
    assert lines[7:12] == ["Read-only file system"] * 5
    assert lines[12].startswith("65534 65534 ")
    assert lines[12].endswith("['x', 'main.py']")


@isolated
@pytest.mark.parametrize(
    "program", ["import time; time.sleep(60)", "while True: pass", "import sys\nsys.stdout.close()\nwhile 1: 0"]
)
def test_a_program_ends_in_time(program):
    began = time.monotonic()
    assert run(program, Limits(seconds=0.5)).ended == "time"
    assert time.monotonic() - began < 5


@isolated
def test_a_stop_of_the_caller_ends_the_program():
    marker = f"orphan-{os.getpid()}-{time.time_ns()}"
    script = f"""
from fastrl.rewards.sandbox import Limits, run_sandboxed
run_sandboxed('''
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", {marker!r}])
''', limits=Limits(seconds=3.0))
"""
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    until = time.monotonic() + 30
    while not processes_named(marker) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_named(marker)
    caller.kill()
    caller.wait()
    until = time.monotonic() + 15
    while processes_named(marker) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_named(marker) == []


@isolated
def test_a_check_takes_less_than_150_ms_of_processor_time():
    import resource

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    run("pass")
    began = spent()
    for _ in range(5):
        assert run("print(sum(range(1000)))").stdout == "499500\n"
    assert (spent() - began) / 5 < 0.15


def test_a_machine_without_isolation_is_refused_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(sandbox, "_lacking", lambda: "Operation not permitted (new namespaces)")
    with pytest.raises(SandboxError, match=r"refuses: Operation not permitted \(new namespaces\).*set unsandboxed"):
        run("print(1)")
    assert run("print(1)", unsandboxed=True) == sandbox.Outcome("exit", 0, "1\n")


def test_without_a_sandbox_time_output_memory_and_environment_are_limited_still(monkeypatch):
    monkeypatch.setenv("FASTRL_SECRET", "hunter2")
    assert "hunter2" not in run("import os; print(os.environ)", unsandboxed=True).stdout
    assert run("while True: pass", Limits(seconds=0.5), unsandboxed=True).ended == "time"
    assert run("while True: print('x' * 1000)", unsandboxed=True).ended == "output"
    assert "MemoryError" in run("bytearray(10 << 30)", unsandboxed=True).stderr


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": -1}, {"output_kb": float("nan")}, {"seconds": 1e9}])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(ValueError, match=f"sandbox: {next(iter(limits))}: expected a positive number"):
        Limits(**limits)
