"""The process inside which `fastrl.rewards.sandbox` runs a program. Run as a script, with the standard library only.

It reads one JSON request from its standard input, gives up all that the program must not have, starts the program, and
writes one JSON report to the file descriptor that its argument names:

    jail       new user, mount, process, network, IPC, host-name and control-group namespaces
      init     process 1 of the namespace: it measures the time, and its end is the end of every process inside
        program    limits, no privileges, a filter of system calls
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from types import FrameType
from typing import Any, NoReturn

NOBODY = 65534
CLONE_NEW = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000}
CLONE_NEW |= {"user": 0x10000000, "process": 0x20000000, "network": 0x40000000}
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# The numbers of system calls on x86_64 and aarch64. The filter lets local sockets and plain clones pass and forbids the
# rest: the ways to another namespace, to another process's memory or files, to memory that no limit counts, and into
# the kernel.
PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, audit architecture
CALLS = {
    "socket": (41, 198), "clone": (56, 220), "clone3": (435, 435), "unshare": (272, 97), "setns": (308, 268),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "io_uring_setup": (425, 425), "memfd_create": (319, 279), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "memfd_secret": (447, 447),
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Runs the request's program and reports how it ended."""
    request = json.load(sys.stdin.buffer)
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    try:
        if request["isolated"]:
            isolate(request)
        os.chdir(request["folder"])
        write_files(request)
        init = os.fork()
    except OSError as error:
        tell(report, {"refused": f"{error.strerror} ({error.filename})"})
        return
    if init == 0:
        supervise(request, report)
    os.waitpid(init, 0)


def isolate(request: dict[str, Any]) -> None:
    """Enters new namespaces as a user without rights, with nothing to see but the system's programs, read-only."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, the kernel ends this one first
    enter_namespaces()
    root = request["root"]
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in (*SYSTEM, *DEVICES, *request["visible"]):
        show(path, root)
    folder = request["folder"]
    for alias in ("/tmp", "/dev/shm"):
        if not os.path.lexists(root + alias):  # something visible may be in /tmp
            os.symlink(folder, root + alias)
    os.mkdir(root + folder)
    attributes(root, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, AT_RECURSIVE)
    size = f"mode=1777,size={request['files_mb']}m,nr_inodes=4096"
    mount("tmpfs", root + folder, "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(root)
    # The old root goes on top of the new one and is then let go.
    call("pivot_root", libc.syscall(syscall_number("pivot_root"), b".", b"."))
    call("umount", libc.umount2(b".", MNT_DETACH))
    if os.getuid() != NOBODY:  # root outside, which may take another identity
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def enter_namespaces() -> None:
    """Enters the new namespaces. Inside, the user is nobody; outside, it is nobody too where root runs this."""
    flags, uid, gid = sum(CLONE_NEW.values()), os.getuid(), os.getgid()
    what = f"new namespaces for {', '.join(CLONE_NEW)}"
    if uid != 0:
        call(what, libc.unshare(flags))
        write_maps("self", f"{NOBODY} {uid} 1", f"{NOBODY} {gid} 1", groups="deny")
        return
    # Only a process outside can map more than one identity: root for what follows here, then nobody for good.
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(go)
            if os.read(ready, 1):
                maps = f"0 0 1\n{NOBODY} {NOBODY} 1"
                write_maps(str(os.getppid()), maps, maps, groups="allow")
            os._exit(0)
        except OSError:
            os._exit(1)
    call(what, libc.unshare(flags))
    os.write(go, b"1")
    _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError(1, "Operation not permitted", "a map of user identities")
    os.close(ready), os.close(go)


def write_maps(process: str, uids: str, gids: str, *, groups: str) -> None:
    """Writes a user namespace's maps of identities."""
    for name, text in (("setgroups", groups), ("gid_map", gids), ("uid_map", uids)):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def show(path: str, root: str) -> None:
    """Makes a path of the old root visible in the new one, at the same place."""
    there = root + path
    if not os.path.lexists(path) or os.path.lexists(there):
        return
    os.makedirs(os.path.dirname(there), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), there)
        return
    if os.path.isdir(path):
        os.mkdir(there)
    else:
        os.close(os.open(there, os.O_CREAT | os.O_WRONLY))
    mount(path, there, "", MS_BIND | MS_REC)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    got = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    call(f"mount of {source} on {target}", got)


def attributes(path: str, given: int, flags: int) -> None:
    """Adds attributes to a mount: mount_setattr(2), of Linux 5.12."""
    packed = struct.pack("QQQQ", given, 0, 0, 0)
    got = libc.syscall(syscall_number("mount_setattr"), AT_FDCWD, path.encode(), flags, packed, len(packed))
    call(f"read-only mount of {path}", got)


def call(what: str, result: int) -> None:
    """Raises the error of a C function that returned -1."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


def syscall_number(name: str) -> int:
    """A system call's number on this processor."""
    if os.uname().machine not in PROCESSORS:
        raise OSError(38, "Function not implemented", f"a filter of system calls for {os.uname().machine}")
    return CALLS[name][PROCESSORS[os.uname().machine][0]]


def write_files(request: dict[str, Any]) -> None:
    """Writes the request's files into the current folder."""
    for name, text in request["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)


def supervise(request: dict[str, Any], report: int) -> NoReturn:
    """Starts the program, waits for it at most as long as allowed, reports, and ends."""
    program = 0

    def late(_: int, __: FrameType | None) -> NoReturn:
        finish({"ended": "time"})

    def finish(what: dict[str, Any]) -> NoReturn:
        tell(report, what)
        if not request["isolated"]:  # elsewhere the kernel ends every process with this one
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(program, signal.SIGKILL)
        os._exit(0)

    try:
        signal.signal(signal.SIGALRM, late)
        # One open file, which the program cannot write to.
        given = os.open("stdin", os.O_RDONLY)
        os.unlink("stdin")
        program = os.fork()
        if program == 0:
            become(request, report, given)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        while True:
            pid, status = os.wait()
            if pid == program:
                signal.setitimer(signal.ITIMER_REAL, 0)
                code = os.waitstatus_to_exitcode(status)
                finish({"ended": "exit" if code >= 0 else "signal", "code": abs(code)})
    except BaseException as error:
        tell(report, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)


def become(request: dict[str, Any], report: int, given: int) -> NoReturn:
    """Turns this process into the program."""
    try:
        os.setsid()
        os.dup2(given, 0)
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        call("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if request["isolated"]:
            forbid()
        os.execve(request["argv"][0], request["argv"], request["environment"])
    except BaseException as error:
        tell(report, {"refused": f"{type(error).__name__}: {error}"})
    os._exit(127)


def forbid() -> None:
    """Installs the filter of system calls: seccomp(2), mode 2."""
    load, equal, any_bit, at_least, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    permission, access, unknown = 1, 13, 38  # EPERM, EACCES, ENOSYS
    call_number, architecture, argument = 0, 4, 16  # offsets in struct seccomp_data
    column, audit = PROCESSORS[os.uname().machine]
    number = {name: numbers[column] for name, numbers in CALLS.items()}
    steps = [(load, 0, 0, architecture), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, call_number)]
    # On x86 the same call has a second number, which the list does not name.
    steps += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, error | unknown)]
    for name in number.keys() - {"socket", "clone"}:
        # Threads ask clone3 first, whose flags a filter cannot see, and take clone where it is unknown.
        steps += [(equal, 0, 1, number[name]), (answer, 0, 0, error | (unknown if name == "clone3" else permission))]
    # Sockets of this machine only: a virtual machine's vsock reaches its host from any network namespace.
    steps += [(equal, 0, 4, number["socket"]), (load, 0, 0, argument), (equal, 0, 1, 1)]
    steps += [(answer, 0, 0, allow), (answer, 0, 0, error | access)]
    steps += [(equal, 0, 3, number["clone"]), (load, 0, 0, argument), (any_bit, 0, 1, sum(CLONE_NEW.values()))]
    steps += [(answer, 0, 0, error | permission), (answer, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    call("filter of system calls", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))


def tell(report: int, what: dict[str, Any]) -> None:
    """Writes the report."""
    os.write(report, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
